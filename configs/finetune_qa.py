"""Extractive question answering by an encoder (Devlin et al. 2019, sections 4.2 and 4.3).

  python -m llm.train --config=configs/finetune_qa.py --workdir=DIR2 \\
      --config.transfer.checkpoint=DIR \\
      --config.data.train=squad:train.json --config.data.eval=squad:dev.json

Questions come from files in SQuAD's layout, or from records with text (the context), question and
answers. Long contexts are cut into windows that overlap, and short ones share a row. Settings for
one data set follow a colon: squad and squad2 (tfds), and abstracts (embedded: 497 abstracts, with
who took part in each study).

Published: BERT-base has F1 88.41 and exact match 81.25 on the development set of SQuAD v1.1 (README
of google-research/bert).
"""

from typing import Any

from llm import config as config_lib
from llm.objectives import base

SQUAD = {"squad": "tfds:squad", "squad2": "tfds:squad/v2.0"}


def get_config(task: str = "") -> Any:
  """The config for your own data, or for one data set."""
  config = config_lib.defaults(base.defaults("span_qa"))
  config.transfer.skip = (r"^(head|generator)/",)
  config.recipe.update(learning_rate=3e-5, width_power=2.0, epochs=2.0)
  config.training.update(
    epochs=-1.0,
    batch_size=32,
    sequence_length=384,
    log_every=50,
    eval_every=-1,
    keep_best="auto",
  )
  if task in SQUAD:
    name = SQUAD[task]
    config.data.update(train=f"{name}[train]", eval=f"{name}[validation]", fields="text=context")
    config.objective.no_answer = task == "squad2"
  elif task == "abstracts":
    config.data.update(train="embedded:abstracts", eval="embedded:abstracts[validation]")
    config.training.update(batch_size=8, sequence_length=256)
  elif task:
    raise ValueError(f"unknown task {task!r}; known: squad, squad2, abstracts")
  return config
