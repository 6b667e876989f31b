"""Whole loops on real text, input included: what is real is counted, padding is not.

  python benchmarks/real_text.py pretrain --base=DIR     # another checkout of this repository
  python benchmarks/real_text.py finetune                # beside the Trainer of transformers
  python benchmarks/real_text.py questions               # the same, on questions

pretrain: BERT, MLM and NSP, on half Wikipedia and half reviews; tokens a second that are not
padding, here and there. finetune: the embedded reviews from `embedded:minilm`; examples a second,
theirs padded to the longest of a batch that was drawn by length. questions: the embedded abstracts
likewise, the same windows on both sides. Each side is a process of its own,
and they take turns; medians of the rounds.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps
LENGTH = 64  # of a row in fine-tuning
EXAMPLES = 32  # of a batch in fine-tuning
WINDOW = 256  # tokens of a window at most, and of a row, for questions
WINDOWS = 8  # of a batch


def config_of(name: str, argument: str):
  """The config of a file of this process's checkout."""
  root = pathlib.Path(os.environ["PYTHONPATH"])
  spec = importlib.util.spec_from_file_location(name, root / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def loop_of(config, count):
  """A function: steps -> what `count` says of the batches that so many steps trained on."""
  import jax

  from llm import command, sharding
  from llm import config as config_lib
  from llm.data import batches as batches_lib
  from llm.training import experiment as experiment_lib
  from llm.training import optimizer
  from llm.training import plan as plan_lib
  from llm.training import state as state_lib

  made = experiment_lib.prepare(config_lib.freeze(config), say=lambda *_: None)
  command.start_cpu()
  command.use_compilation_cache()
  mesh = sharding.make_mesh(made.config.mesh)
  made = made.on(mesh)
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    planned = plan_lib.of(made, mesh)
    state, _ = state_lib.first_state(made, planned, None, pathlib.Path(folder), lambda *_: None)
  pace = optimizer.pace(made.config.optimizer, made.config.training.steps)
  states = [state]
  stream = batches_lib.stream(made.batches, 0, made.config.training.steps, mesh, 4)

  def run(steps: int) -> int:
    seen = 0
    with jax.set_mesh(mesh):
      for _ in range(steps):
        batch = next(stream)
        seen += count(batch)
        states[0], _ = planned.train_step(states[0], batch, 0, pace)
      jax.block_until_ready(states[0])
    return seen

  return run


def pretraining(size: str):
  """Our loop, in whatever checkout is on the path."""
  config = config_of("pretrain_bert", size)
  config.data.train, config.data.eval = "embedded:wikipedia@0.5,embedded:reviews@0.5", ""
  return loop_of(config, lambda batch: int((batch["segments"] > 0).sum()))


def ours(_):
  """Our loop over labelled sentences."""
  config = config_of("finetune_classification", "reviews")
  config.data.eval = config.training.keep_best = ""
  config.transfer.checkpoint = "embedded:minilm"
  config.training.update(epochs=0.0, steps=100_000, batch_size=EXAMPLES, sequence_length=LENGTH)
  return loop_of(config, lambda batch: int(batch["label_weights"].sum()))


def trainer(model, tokenizer, encoded: list[dict], batch_size: int):
  """run(steps) -> examples, by the Trainer: batches of one length, padded to their longest."""
  import transformers

  def run(steps: int) -> int:
    with tempfile.TemporaryDirectory() as output:
      arguments = transformers.TrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=3e-5,
        train_sampling_strategy="group_by_length",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
      )
      transformers.Trainer(
        model,
        arguments,
        train_dataset=encoded,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
      ).train()
    return steps * batch_size

  return run


def theirs(_):
  """Labelled sentences in the Trainer."""
  import transformers

  from llm import cache
  from llm.config import DataConfig
  from llm.data import embedded, sources

  folder = embedded.model("minilm", cache.cache_dir())
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
  (source,) = sources.parse("embedded:reviews", DataConfig())
  records = list(source.records())
  names = sorted({r["label"] for r in records})
  encoded = [
    {**tokenizer(r["text"], truncation=True, max_length=LENGTH), "labels": names.index(r["label"])}
    for r in records
  ]
  return trainer(model, tokenizer, encoded, EXAMPLES)


def our_questions(_):
  """Our loop over windows of the abstracts."""
  config = config_of("finetune_qa", "abstracts")
  config.data.eval = ""
  config.transfer.checkpoint = "embedded:minilm"
  config.training.update(epochs=0.0, steps=100_000, batch_size=WINDOWS, sequence_length=WINDOW)
  return loop_of(config, lambda batch: int(batch["window_weights"].sum()))


def their_questions(_):
  """The same windows in the Trainer."""
  import transformers

  from llm import cache
  from llm.checkpoints import layout
  from llm.config import DataConfig, ModelConfig
  from llm.data import embedded, sources
  from llm.objectives import span_qa

  folder = embedded.model("minilm", cache.cache_dir())
  model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
  (source,) = sources.parse("embedded:abstracts", DataConfig())
  rows = span_qa.Objective().rows(
    source, layout.read_tokenizer(folder), DataConfig(), ModelConfig(name="bert"), WINDOW
  )
  encoded = [
    {
      "input_ids": w.tokens.tolist(),
      "token_type_ids": w.arrays()["types"].astype(int).tolist(),
      "attention_mask": [1] * len(w.tokens),
      "start_positions": w.start,
      "end_positions": w.end,
    }
    for w in rows.windows
  ]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  return trainer(model, tokenizer, encoded, WINDOWS)


SIDES = {
  "pretraining": pretraining,
  "ours": ours,
  "theirs": theirs,
  "our_questions": our_questions,
  "their_questions": their_questions,
}
# what is asked for -> our side, their side, what is counted
FINE_TUNING = {
  "finetune": ("ours", "theirs", "examples"),
  "questions": ("our_questions", "their_questions", "windows"),
}


def work(side: str, argument: str):
  """Answers each number of steps read with a line: how much a second was trained on."""
  run = SIDES[side](argument)
  run(WARM_UP)
  print(json.dumps("ready"), file=sys.__stdout__, flush=True)
  for line in sys.stdin:
    began = time.perf_counter()
    seen = run(int(line))
    print(json.dumps(seen / (time.perf_counter() - began)), file=sys.__stdout__, flush=True)


def measured(
  sides: dict[str, tuple[pathlib.Path, str, str]], rounds: int, steps: int
) -> dict[str, float]:
  """name -> what a second was trained on, the median of the rounds.

  sides: name -> (checkout, a key of SIDES, its argument).
  """
  workers = {}
  for name, (root, side, argument) in sides.items():
    workers[name] = subprocess.Popen(
      [sys.executable, __file__, "work", f"--side={side}", f"--argument={argument}"],
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=root,
      env={**os.environ, "PYTHONPATH": str(root)},
    )
    _answer(workers[name])
  paces = {name: [] for name in sides}
  for _ in range(rounds):
    for name, worker in workers.items():
      print(steps, file=worker.stdin, flush=True)
      paces[name].append(_answer(worker))
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  return {name: statistics.median(of_side) for name, of_side in paces.items()}


def _answer(worker):
  """The next line of a worker that is JSON; what libraries print is passed over."""
  for line in worker.stdout:
    try:
      return json.loads(line)
    except json.JSONDecodeError:
      pass
  raise SystemExit("a side ended early: what it said stands above")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=["pretrain", *FINE_TUNING, "work"])
  parser.add_argument("--base", type=pathlib.Path, help="pretrain: the other checkout")
  parser.add_argument("--sizes", default="tiny,mini", help="pretrain: of configs/pretrain_bert.py")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--side", help="work: which")
  parser.add_argument("--argument", help="work: of that side")
  options = parser.parse_args()
  if options.what == "work":
    return work(options.side, options.argument)
  if options.what in FINE_TUNING:
    here, there, counted = FINE_TUNING[options.what]
    paces = measured(
      {side: (HERE, side, "") for side in (here, there)}, options.rounds, options.steps
    )
    print(
      f"{options.what}: {paces[here]:.1f} {counted}/s here, {paces[there]:.1f} in "
      f"transformers, {paces[here] / paces[there]:.2f} times"
    )
    return
  if not options.base:
    parser.error("pretrain needs --base")
  for size in options.sizes.split(","):
    sides = {
      "here": (HERE, "pretraining", size),
      "there": (options.base.resolve(), "pretraining", size),
    }
    paces = measured(sides, options.rounds, options.steps)
    print(
      f"BERT {size}, MLM and NSP: {paces['here']:,.0f} real tokens/s here, "
      f"{paces['there']:,.0f} there, {paces['here'] / paces['there']:.2f} times"
    )


if __name__ == "__main__":
  main()
