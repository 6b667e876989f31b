"""What pretraining buys a GPT: prompt and response, and a published decoder beside it.

Pretrains on Wikipedia text, then learns to answer from the Alpaca prompt-response pairs: from the
pretrained parameters and from random ones. Then does the same with the published SmolLM2-135M, for
a few steps and by low-rank adapters alone. Writes report.md, reply_loss.png and result.json.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Callable, Iterator, Mapping

import jax
import numpy as np
import tabulate
import tqdm

from llm import cache as cache_lib
from llm import config as config_lib
from llm import sharding
from llm.checkpoints import locate, manager
from llm.config import Config, DataConfig, MeshConfig, TransferConfig
from llm.data import embedded, sources
from llm.inference.writer import Writer
from llm.objectives import base, chat
from llm.runs import metrics
from llm.runs.log import duration
from llm.studies import plots
from llm.training import evaluation, experiment, loop

# Tokens of a row: nearly all prompts fit with their replies.
LENGTH = 512
HELD_OUT = "embedded:alpaca[test]"
# Held-out prompts that are answered.
NUM_PROMPTS = 3
# Tokens of an answer, at most.
ANSWER_LENGTH = 60


def pretraining_config(quick: bool, cache: str, steps: int = 0) -> Config:
  """A GPT of four layers and width 192. steps: of training; 0 is the default."""
  config = config_lib.defaults(base.defaults("causal_lm"))
  config.model.update(
    name="gpt", num_layers=4, width=192, num_heads=4, mlp_dim=768, max_length=LENGTH, dropout=0.0
  )
  config.data.update(train="embedded:wikipedia", cache=cache)
  config.tokenizer.update(name="sentencepiece", vocab_size=4096, lowercase=False)
  config.optimizer.update(learning_rate=3e-3, beta2=0.98)
  config.training.update(
    steps=steps or (60 if quick else 600),
    batch_size=4,
    sequence_length=LENGTH,
    log_every=20 if quick else 50,
  )
  return config_lib.freeze(config)


def tuning_config(checkpoint: str, cache: str, **training: Any) -> Config:
  """Fine-tuning of a checkpoint on the Alpaca pairs. training: keys of config.training."""
  config = config_lib.defaults(base.defaults("chat"))
  config.data.update(train="embedded:alpaca", eval="embedded:alpaca[validation]", cache=cache)
  config.transfer.checkpoint = checkpoint
  config.optimizer.update(learning_rate=1e-3, schedule="cosine", beta2=0.98, weight_decay=0.0)
  config.training.update(
    {
      "epochs": 3.0,
      "batch_size": 4,
      "sequence_length": LENGTH,
      "log_every": 10,
      "eval_every": -1,
      **training,
    }
  )
  return config_lib.freeze(config)


def adapters_config(cache: str, steps: int) -> Config:
  """A few steps of the published SmolLM2-135M by low-rank adapters, without evaluation."""
  config = tuning_config(
    "embedded:smollm2", cache, epochs=0.0, steps=steps, batch_size=2, log_every=2
  )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, lora_rank=8),
    data=dataclasses.replace(config.data, eval=""),
    optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-4),
  )


def from_scratch(config: Config) -> Config:
  """The same model and tokenizer, with none of the checkpoint's parameters."""
  return dataclasses.replace(
    config, transfer=TransferConfig(checkpoint=config.transfer.checkpoint, skip=("",))
  )


def tuned(
  arms: Mapping[str, Config], seeds: int, workdir: pathlib.Path, name: str
) -> Iterator[tuple[str, pathlib.Path]]:
  """Fine-tunes each arm with each seed in folders of `workdir`. Yields (arm, folder) of each."""
  for seed in range(seeds):
    for arm, config in arms.items():
      folder = workdir / f"{name}_{arm}_{seed}"
      training = dataclasses.replace(config.training, seed=seed)
      loop.train(dataclasses.replace(config, training=training), folder)
      yield arm, folder


@dataclasses.dataclass(frozen=True)
class Replies:
  """The loss of a checkpoint on held-out replies, in nats.

  low, high: 95% bootstrap interval of `per_token` over the rows. `per_character` compares models
  with different tokens.
  """

  per_token: float
  low: float
  high: float
  per_character: float


def reply_loss(
  bundle: experiment.Bundle,
  template: str,
  data: DataConfig,
  batch_size: int,
  held_out: str = HELD_OUT,
  length: int = LENGTH,
) -> Replies:
  """The loss on the replies of a split.

  The conversations are rendered by `template`, in rows of `length` tokens.
  """
  outcomes, rows = reply_outcomes(bundle, template, data, batch_size, held_out, length)
  objective = chat.Objective(template=template)
  low, high = metrics.bootstrap(objective.summary, outcomes)["loss"]
  replies = [bundle.tokenizer.decode(ids[weights > 0].tolist()) for ids, weights in rows.encoded]
  total_loss = float(outcomes["loss"][:, 0].sum())
  return Replies(
    per_token=objective.summary(outcomes)["loss"],
    low=low,
    high=high,
    per_character=total_loss / sum(map(len, replies)),
  )


def reply_outcomes(
  bundle: experiment.Bundle,
  template: str,
  data: DataConfig,
  batch_size: int,
  held_out: str = HELD_OUT,
  length: int = LENGTH,
) -> tuple[dict[str, np.ndarray], Any]:
  """(the loss and the tokens of each reply, Rx2; the rows), as `reply_loss`."""
  (source,) = sources.parse(held_out, data)
  objective = chat.Objective(template=template)
  rows = objective.rows(source, bundle.tokenizer, data, bundle.config.model, length)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    evaluated = evaluation.of_checkpoint(bundle, objective, rows, length, batch_size, mesh)
  return objective.outcomes(evaluated.predictions, rows), rows


def held_out_prompts(cache: str) -> list[str]:
  """The first prompts of the test split. cache: as config.data.cache."""
  records = embedded.records("alpaca", "test", cache_lib.cache_dir(cache))
  return [chat.conversation(record)[0]["content"] for record in records][:NUM_PROMPTS]


def answers(bundle: experiment.Bundle, template: str, prompts: list[str]) -> list[str]:
  """The greedy answer of a checkpoint to every prompt."""
  rendering = chat.Template(template, bundle.tokenizer.special.get("bos", ""))
  ids = []
  for prompt in prompts:
    conversation = [{"role": "user", "content": prompt}]
    ids.append(rendering.opening(conversation, bundle.tokenizer))
  return [written.text.strip() for written in Writer(bundle).write(ids, ANSWER_LENGTH)]


def by_epoch(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """(step, reply loss on the validation split) of every evaluation of a run."""
  points = []
  for text in (workdir / "metrics.jsonl").read_text().splitlines():
    line = json.loads(text)
    if line.get("split") == "eval":
      points.append((line["step"], line["loss"]))
  return points


def tune(
  pretrained: pathlib.Path, workdir: pathlib.Path, cache: str, small_steps: int
) -> dict[str, pathlib.PurePath]:
  """Fine-tunes all arms. Name -> checkpoint of every model, the foundations included.

  small_steps: steps of the published decoder.
  """
  config = tuning_config(str(pretrained), cache)
  tuned = workdir / "fine-tuned"
  loop.train(config, tuned)
  scratch = workdir / "from_scratch"
  loop.train(from_scratch(config), scratch)
  print(
    "the same for a few steps with a published decoder of 135 M parameters, by low-rank adapters",
    flush=True,
  )
  published = locate.find("embedded:smollm2", print, cache)
  published_tuned = workdir / "smollm2_tuned"
  loop.train(adapters_config(cache, small_steps), published_tuned)
  return {
    "foundation": pretrained,
    "fine-tuned": tuned,
    "from scratch": scratch,
    "SmolLM2": published,
    "SmolLM2 tuned": published_tuned,
  }


def report(
  losses: Mapping[str, Replies],
  prompts: list[str],
  answers_by_model: Mapping[str, list[str]],
  pretraining: dict[str, Any],
  small_steps: int,
  seconds: float,
) -> str:
  """report.md. pretraining: the result.json of the pretraining run. seconds: of the whole study."""
  tokens = sum(source["tokens"] for source in pretraining["data"].values())
  introduction = (
    "The loss of held-out replies (Alpaca, test split). A GPT of "
    f"{pretraining['parameters']:,} parameters, pretrained for "
    f"{duration(pretraining['seconds'])} on {tokens / 1e6:.1f} M tokens of Wikipedia (foundation), "
    "then fine-tuned for three epochs on the prompt-response pairs that fit; the same fine-tuning "
    "from random parameters; and SmolLM2-135M-Instruct, which was trained on such replies, with "
    f"{small_steps} steps of low-rank adapters. {duration(seconds)} in all."
  )
  lines = ["# Prompt and response", "", introduction, "", _loss_table(losses), ""]
  lines += ["![reply loss](reply_loss.png)", ""]
  for number, prompt in enumerate(prompts):
    lines += [f"## {prompt.strip()}", "", _answer_table(number, answers_by_model), ""]
  return "\n".join(lines)


def _loss_table(losses: Mapping[str, Replies]) -> str:
  rows = [
    (
      name,
      f"{loss.per_token:.2f} [{loss.low:.2f}, {loss.high:.2f}]",
      f"{loss.per_character:.3f}",
    )
    for name, loss in losses.items()
  ]
  headers = ("model", "nats a token [95%]", "nats a character")
  return tabulate.tabulate(rows, headers=headers, tablefmt="github")


def _answer_table(number: int, answers_by_model: Mapping[str, list[str]]) -> str:
  """The answers of all models to one prompt."""
  rows = [
    (name, " ".join(texts[number].split()) or "(nothing)")
    for name, texts in answers_by_model.items()
  ]
  return tabulate.tabulate(rows, headers=("model", "answer"), tablefmt="github")


def _compare(
  models: Mapping[str, pathlib.PurePath], prompts: list[str], data: DataConfig
) -> tuple[dict[str, Replies], dict[str, list[str]]]:
  """(reply loss, answers to the prompts) of every model, by its name."""
  losses = {}
  answers_by_model = {}
  for name, path in tqdm.tqdm(
    models.items(), desc="held-out replies", unit=" models", disable=None
  ):
    bundle = experiment.load(manager.find(path))
    objective = base.build(bundle.config.objective)
    template = chat.template_of(objective, bundle.tokenizer) or chat.TEMPLATE
    losses[name] = reply_loss(bundle, template, data, batch_size=4)
    answers_by_model[name] = answers(bundle, template, prompts)
  return losses, answers_by_model


def run(workdir: pathlib.Path, quick: bool, cache: str, steps: int, use_devices: Callable):
  """The whole study, written to `workdir`.

  quick: few steps. cache: as config.data.cache. steps: of the pretraining; 0 is the default.
  use_devices: as of `loop.train`.
  """
  started_at = time.time()
  print("phase 1: pretraining", flush=True)
  config = pretraining_config(quick, cache, steps)
  pretrained = workdir / "pretrained"
  pretraining = loop.train(config, pretrained, use_devices=use_devices)
  print("phase 2: learning to answer, from the pretrained parameters and from scratch", flush=True)
  small_steps = 2 if quick else 12
  models = tune(pretrained, workdir, cache, small_steps)
  prompts = held_out_prompts(cache)
  losses, answers_by_model = _compare(models, prompts, config.data)
  seconds = time.time() - started_at
  text = report(losses, prompts, answers_by_model, pretraining, small_steps, seconds)
  arms = ("fine-tuned", "from scratch")
  curves = {name: by_epoch(pathlib.Path(models[name])) for name in arms}
  plots.reply_loss(curves, workdir / "reply_loss")
  (workdir / "report.md").write_text(text)
  result = {
    "reply_loss": {name: dataclasses.asdict(loss) for name, loss in losses.items()},
    "prompts": prompts,
    "answers": answers_by_model,
    "pretraining": pretraining,
    "seconds": seconds,
  }
  (workdir / "result.json").write_text(json.dumps(result, indent=1))
  print(f"\n{text}")
  print(f"{workdir / 'report.md'}, reply_loss.png and result.json written in {duration(seconds)}")
