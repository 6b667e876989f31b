"""Classification or regression from a checkpoint (Devlin et al. 2019, section 4.1).

  python -m llm.train --config=configs/finetune_classification.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR --config.data.train=jsonl:train.jsonl \\
      --config.data.eval=jsonl:eval.jsonl

Records have `text`, for pairs `text_pair`, and `label`; config.data.fields renames them. Model and
tokenizer follow the checkpoint. Ready-made settings follow a colon: reviews, imdb and the tasks of
GLUE (cola, sst2, mrpc, qqp, stsb, mnli, mnli_mismatched, qnli, rte, wnli), each with its official
metric as the one that the best checkpoint is kept by.
"""

from llm import config as config_lib
from llm.objectives import base

# task -> (fields, evaluation split, official metric)
GLUE = {
  "cola": ("text=sentence", "validation", "mcc"),
  "sst2": ("text=sentence", "validation", "accuracy"),
  "mrpc": ("text=sentence1,text_pair=sentence2", "validation", "f1"),
  "qqp": ("text=question1,text_pair=question2", "validation", "f1"),
  "stsb": ("text=sentence1,text_pair=sentence2", "validation", "pearson"),
  "mnli": ("text=premise,text_pair=hypothesis", "validation_matched", "accuracy"),
  "mnli_mismatched": ("text=premise,text_pair=hypothesis", "validation_mismatched", "accuracy"),
  "qnli": ("text=question,text_pair=sentence", "validation", "accuracy"),
  "rte": ("text=sentence1,text_pair=sentence2", "validation", "accuracy"),
  "wnli": ("text=sentence1,text_pair=sentence2", "validation", "accuracy"),
}


def get_config(task: str = ""):
  """The config of one task; "" for the user's own data."""
  config = config_lib.defaults(base.defaults("classification"))
  # The rule of this transfer: the encoder and its pooler are taken over, other heads are not.
  config.transfer.skip = (r"^(head/(?!pooler)|generator/)",)
  config.optimizer.update(learning_rate=3e-5, warmup_steps=-1)
  config.training.update(epochs=3.0, batch_size=32, sequence_length=128, log_every=50)
  if task == "reviews":
    config.data.train, config.data.eval = "embedded:reviews", "embedded:reviews[validation]"
    config.training.update(sequence_length=64, keep_best="max:accuracy")
  elif task == "imdb":
    config.data.train, config.data.eval = "tfds:imdb_reviews[train]", "tfds:imdb_reviews[test]"
    config.training.sequence_length = 512
  elif task in GLUE:
    fields, split, metric = GLUE[task]
    name = f"tfds:glue/{task.removesuffix('_mismatched')}"
    config.data.update(train=f"{name}[train]", eval=f"{name}[{split}]", fields=fields)
    config.training.keep_best = f"max:{metric}"
    if task == "stsb":
      config.objective.num_classes = 1
  elif task:
    raise ValueError(f"unknown task {task!r}; known: reviews, imdb, {', '.join(GLUE)}")
  return config
