"""Any task as text to text by T5 (Raffel et al. 2020, section 2.4).

  python -m llm.train --config=configs/finetune_text_to_text.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR \\
      --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl

Records have `text` and `target`. Settings for one task follow a colon: cola, sst2, mrpc, qqp, mnli,
qnli, rte and squad (tfds), with the prefixes of the paper (appendix D), and reviews (embedded).

Published: T5 v1.1 small has exact match 78.33 and F1 86.63 on SQuAD, and 83.06 on MNLI (the notes
of t5x on GPUs).
"""

from typing import Any, NamedTuple

from llm import config as config_lib
from llm.objectives import base


class Task(NamedTuple):
  """A task of GLUE. targets: "label=text". fields: config.data.fields."""

  template: str
  targets: tuple[str, ...]
  fields: str
  split: str = "validation"


TASKS = {
  "cola": Task(
    "cola sentence: {text}",
    ("unacceptable=unacceptable", "acceptable=acceptable"),
    "text=sentence",
  ),
  "sst2": Task(
    "sst2 sentence: {text}",
    ("negative=negative", "positive=positive"),
    "text=sentence",
  ),
  "mrpc": Task(
    "mrpc sentence1: {text} sentence2: {text_pair}",
    ("not_equivalent=not_equivalent", "equivalent=equivalent"),
    "text=sentence1,text_pair=sentence2",
  ),
  "qqp": Task(
    "qqp question1: {text} question2: {text_pair}",
    ("not_duplicate=not_duplicate", "duplicate=duplicate"),
    "text=question1,text_pair=question2",
  ),
  "mnli": Task(
    "mnli hypothesis: {text_pair} premise: {text}",
    ("entailment=entailment", "neutral=neutral", "contradiction=contradiction"),
    "text=premise,text_pair=hypothesis",
    "validation_matched",
  ),
  "qnli": Task(
    "qnli question: {text} sentence: {text_pair}",
    ("entailment=entailment", "not_entailment=not_entailment"),
    "text=question,text_pair=sentence",
  ),
  "rte": Task(
    "rte sentence1: {text} sentence2: {text_pair}",
    ("entailment=entailment", "not_entailment=not_entailment"),
    "text=sentence1,text_pair=sentence2",
  ),
}


def get_config(task: str = "") -> Any:
  """The config for your own data, or for one task."""
  config = config_lib.defaults(base.defaults("text_to_text"))
  # The paper's settings for fine-tuning (section 3.1.3).
  config.optimizer.update(
    name="adafactor",
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    grad_clip_norm=0.0,
  )
  config.training.update(epochs=3.0, batch_size=32, sequence_length=512, log_every=50)
  if task in TASKS:
    template, targets, fields, split = TASKS[task]
    config.objective.update(template=template, targets=targets)
    config.data.update(
      train=f"tfds:glue/{task}[train]", eval=f"tfds:glue/{task}[{split}]", fields=fields
    )
  elif task == "squad":
    config.objective.template = "question: {question} context: {text}"
    config.data.update(
      train="tfds:squad[train]", eval="tfds:squad[validation]", fields="text=context"
    )
  elif task == "reviews":
    config.objective.update(
      template="sentiment: {text}",
      targets=("negative=negative", "positive=positive"),
      target_length=32,
    )
    config.data.update(train="embedded:reviews", eval="embedded:reviews[validation]")
    config.training.sequence_length = 128
  elif task:
    raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}, squad, reviews")
  return config
