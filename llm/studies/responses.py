"""What pretraining buys a GPT: prompt and response, and a published decoder beside it.

Pretrains on Wikipedia text, then learns to answer from the Alpaca prompt-responses: from the pretrained parameters and
from random ones. Then the same with the published SmolLM2-135M, for a few steps and by low-rank adapters alone. Writes
report.md, reply_loss.png and result.json.
"""

import dataclasses
import json
import math
import pathlib
import time
from typing import Callable

import jax
import tabulate
import tqdm

from llm import config as config_lib
from llm import sharding
from llm.checkpoints import locate, manager
from llm.config import MeshConfig, TransferConfig
from llm.data import cache as cache_lib
from llm.data import embedded, sources
from llm.inference.writer import Writer
from llm.objectives import base, chat
from llm.runs import metrics
from llm.runs.log import duration
from llm.studies import plots
from llm.training import evaluation, experiment, loop

LENGTH = 512  # holds nearly all prompts with their replies
HELD_OUT = "embedded:alpaca[test]"
SHOWN = 3  # held-out prompts that are answered
ANSWER = 60  # tokens at most


def pretraining_config(quick: bool, cache: str) -> config_lib.Config:
  """A GPT of four layers and width 192."""
  config = config_lib.defaults(base.defaults("causal_lm"))
  config.model.update(
    name="gpt", num_layers=4, width=192, num_heads=4, mlp_dim=768, max_length=LENGTH, dropout=0.0
  )
  config.data.update(train="embedded:wikipedia", cache=cache)
  config.tokenizer.update(name="sentencepiece", vocab_size=4096, lowercase=False)
  config.optimizer.update(learning_rate=3e-3, beta2=0.98)
  config.training.update(
    steps=60 if quick else 600, batch_size=4, sequence_length=LENGTH, log_every=20 if quick else 50
  )
  return config_lib.freeze(config)


def tuning_config(start: str, cache: str, **training) -> config_lib.Config:
  """Fine-tuning on the Alpaca pairs."""
  config = config_lib.defaults(base.defaults("chat"))
  config.data.update(train="embedded:alpaca", eval="embedded:alpaca[validation]", cache=cache)
  config.transfer.checkpoint = start
  config.optimizer.update(learning_rate=1e-3, schedule="cosine", beta2=0.98, weight_decay=0.0)
  config.training.update(
    {"epochs": 3.0, "batch_size": 4, "sequence_length": LENGTH, "log_every": 10, **training}
  )
  return config_lib.freeze(config)


def evaluated_by_epoch(config: config_lib.Config) -> config_lib.Config:
  """The same, evaluated at the end of every epoch."""
  an_epoch = math.ceil(experiment.prepare(config, say=lambda *_: None).batches.steps_an_epoch())
  return dataclasses.replace(
    config, training=dataclasses.replace(config.training, eval_every=an_epoch)
  )


def from_scratch(config: config_lib.Config) -> config_lib.Config:
  """The same model and tokenizer, with none of the checkpoint's parameters."""
  return dataclasses.replace(
    config, transfer=TransferConfig(checkpoint=config.transfer.checkpoint, skip=("",))
  )


@dataclasses.dataclass(frozen=True)
class Replies:
  """The loss of a checkpoint on held-out replies."""

  per_token: float  # nats
  low: float  # 95% bootstrap interval over the rows
  high: float
  per_character: float  # nats, for models with other tokens


def reply_loss(
  bundle: experiment.Bundle,
  template: str,
  data: config_lib.DataConfig,
  batch_size: int,
  held_out: str = HELD_OUT,
  length: int = LENGTH,
) -> Replies:
  """Over a split, conversations rendered by `template` in rows of `length`."""
  (source,) = sources.parse(held_out, data)
  objective = chat.Objective(template=template)
  rows = objective.rows(source, bundle.tokenizer, data, bundle.config.model, length)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    predictions = evaluation.of_checkpoint(
      bundle, objective, rows, length, batch_size, mesh
    ).predictions
  outcomes = objective.outcomes(predictions, rows)
  low, high = metrics.bootstrap(objective.summary, outcomes)["loss"]
  learned = [bundle.tokenizer.decode(ids[weights > 0].tolist()) for ids, weights in rows.encoded]
  return Replies(
    objective.summary(outcomes)["loss"],
    low,
    high,
    float(outcomes["loss"][:, 0].sum()) / sum(map(len, learned)),
  )


def answers(bundle: experiment.Bundle, template: str, prompts: list[str]) -> list[str]:
  """What a checkpoint answers, greedily."""
  made = chat.Template(template, bundle.tokenizer.special.get("bos", ""))
  ids = [
    made.opening([{"role": "user", "content": prompt}], bundle.tokenizer) for prompt in prompts
  ]
  return [written.text.strip() for written in Writer(bundle).write(ids, ANSWER)]


def by_epoch(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """(step, reply loss on the validation split) of every evaluation of a run."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["loss"]) for line in lines if line.get("split") == "eval"]


def tune(
  pretrained: pathlib.Path, workdir: pathlib.Path, cache: str, small_steps: int
) -> dict[str, pathlib.Path]:
  """Name -> checkpoint of every model: the foundations, and what was fine-tuned from them."""
  config = evaluated_by_epoch(tuning_config(str(pretrained), cache))
  arms = {"fine-tuned": config, "from scratch": from_scratch(config)}
  made = {"foundation": pretrained}
  for name, arm in arms.items():
    made[name] = workdir / name.replace(" ", "_")
    loop.train(arm, made[name])
  print(
    "the same for a few steps with a published decoder of 135 M parameters, by low-rank adapters",
    flush=True,
  )
  small = tuning_config(
    "embedded:smollm2", cache, epochs=0.0, steps=small_steps, batch_size=2, log_every=2
  )
  small = dataclasses.replace(
    small,
    model=dataclasses.replace(small.model, lora_rank=8),
    data=dataclasses.replace(small.data, eval=""),
    optimizer=dataclasses.replace(small.optimizer, learning_rate=5e-4),
  )
  made |= {
    "SmolLM2": locate.find("embedded:smollm2", print, cache),
    "SmolLM2 tuned": workdir / "smollm2_tuned",
  }
  loop.train(small, made["SmolLM2 tuned"])
  return made


def report(
  losses: dict[str, Replies],
  prompts: list[str],
  said: dict[str, list[str]],
  pretraining: dict,
  small_steps: int,
  seconds: float,
) -> str:
  """report.md."""
  rows = [
    (name, f"{r.per_token:.2f} [{r.low:.2f}, {r.high:.2f}]", f"{r.per_character:.3f}")
    for name, r in losses.items()
  ]
  tokens = sum(d["tokens"] for d in pretraining["data"].values())
  shown = [
    part
    for n, prompt in enumerate(prompts)
    for part in (
      f"## {prompt.strip()}",
      "",
      tabulate.tabulate(
        [(name, " ".join(texts[n].split()) or "(nothing)") for name, texts in said.items()],
        headers=("model", "answer"),
        tablefmt="github",
      ),
      "",
    )
  ]
  return "\n".join(
    [
      "# Prompt and response",
      "",
      f"The loss of held-out replies (Alpaca, test split). A GPT of {pretraining['parameters']:,} parameters, pretrained for "
      f"{duration(pretraining['seconds'])} on {tokens / 1e6:.1f} M tokens of Wikipedia (foundation), then fine-tuned for three "
      "epochs on the prompt-responses that fit; the same fine-tuning from random parameters; and SmolLM2-135M-Instruct, which has seen "
      f"such replies, with {small_steps} steps of low-rank adapters. {duration(seconds)} in all.",
      "",
      tabulate.tabulate(
        rows, headers=("model", "nats a token [95%]", "nats a character"), tablefmt="github"
      ),
      "",
      "![reply loss](reply_loss.png)",
      "",
      *shown,
    ]
  )


def run(workdir: pathlib.Path, quick: bool, cache: str, use_devices: Callable):
  """The whole study. use_devices: as of loop.train."""
  began = time.time()
  print("phase 1: pretraining", flush=True)
  config = pretraining_config(quick, cache)
  pretraining = loop.train(config, workdir / "pretrained", use_devices=use_devices)
  print("phase 2: learning to answer, from the pretrained parameters and from scratch", flush=True)
  small_steps = 2 if quick else 12
  models = tune(workdir / "pretrained", workdir, cache, small_steps)
  prompts = [
    chat.conversation(record)[0]["content"]
    for record in embedded.records("alpaca", "test", cache_lib.cache_dir(cache))
  ][:SHOWN]
  losses, said = {}, {}
  for name, path in tqdm.tqdm(
    models.items(), desc="held-out replies", unit=" models", disable=None
  ):
    bundle = experiment.load(manager.find(path))
    template = (
      chat.template_of(base.build(bundle.config.objective), bundle.tokenizer) or chat.TEMPLATE
    )
    losses[name] = reply_loss(bundle, template, config.data, 4)
    said[name] = answers(bundle, template, prompts)
  text = report(losses, prompts, said, pretraining, small_steps, time.time() - began)
  plots.reply_loss(
    {name: by_epoch(models[name]) for name in ("fine-tuned", "from scratch")},
    workdir / "reply_loss.png",
  )
  (workdir / "report.md").write_text(text)
  (workdir / "result.json").write_text(
    json.dumps(
      {
        "reply_loss": {name: dataclasses.asdict(loss) for name, loss in losses.items()},
        "prompts": prompts,
        "answers": said,
        "pretraining": pretraining,
        "seconds": time.time() - began,
      },
      indent=1,
    )
  )
  print(
    f"\n{text}\n{workdir / 'report.md'}, reply_loss.png and result.json written in {duration(time.time() - began)}"
  )
