"""Classification of texts or pairs, and regression (Devlin et al. 2019, section 4.1).

  python -m llm.train --config=configs/finetune_classification.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR \\
      --config.data.train=jsonl:train.jsonl --config.data.eval=jsonl:eval.jsonl

Records have `text`, pairs also `text_pair`, and `label`; config.data.fields renames them. The model
and the tokenizer are those of the checkpoint. Settings for one task follow a colon: reviews
(embedded), imdb (tfds) and the tasks of GLUE (tfds): cola, sst2, mrpc, qqp, stsb, mnli,
mnli_mismatched, qnli, rte and wnli. A run of GLUE keeps the best checkpoint by the official metric.

Published: accuracy of BERT on GLUE's test set of SST-2: tiny 83.2, mini 85.9, small 89.7, medium
89.6 (README of google-research/bert), base 93.5 (Devlin et al. 2019, table 1). Without pretraining,
NBSVM has an accuracy of 91.2 on IMDb (Wang and Manning 2012).
"""

from typing import Any

from llm import config as config_lib
from llm.data import glue
from llm.objectives import base


def get_config(task: str = "") -> Any:
  """The config for your own data, or for one task."""
  config = config_lib.defaults(base.defaults("classification"))
  # The mean over a text's tokens works better than its first token with the pooler that BERT has
  # for it (docs/recipes.md). Nothing is copied of the checkpoint's head.
  config.objective.pooling = "mean"
  config.transfer.skip = (r"^(head|generator)/",)
  config.recipe.update(learning_rate=3e-5, width_power=2.0, epochs=3.0, least_steps=400)
  config.training.update(
    epochs=-1.0,
    batch_size=32,
    sequence_length=128,
    log_every=50,
    eval_every=-1,
    keep_best="auto",
  )
  if task == "reviews":
    config.data.update(train="embedded:reviews", eval="embedded:reviews[validation]")
    config.training.sequence_length = 64
  elif task == "imdb":
    config.data.update(train="tfds:imdb_reviews[train]", eval="tfds:imdb_reviews[test]")
    config.training.sequence_length = 512
  elif task.removesuffix("_mismatched") in glue.TASKS:
    _of_glue(config, task)
  elif task:
    names = ", ".join(glue.TASKS)
    raise ValueError(f"unknown task {task!r}; known: reviews, imdb, mnli_mismatched, {names}")
  return config


def _of_glue(config: Any, task: str):
  """Sets what a task of GLUE needs."""
  name = task.removesuffix("_mismatched")
  facts = glue.TASKS[name]
  split = facts.validation if name == task else glue.MISMATCHED
  source = f"tfds:glue/{name}"
  config.data.update(train=f"{source}[train]", eval=f"{source}[{split}]", fields=facts.fields)
  config.training.keep_best = f"max:{facts.metric}"
  if facts.regression:
    config.objective.num_classes = 1
