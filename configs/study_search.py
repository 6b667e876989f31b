"""A search over any keys of any config.

  python -m llm.study search --workdir=DIR [--quick]
  python -m llm.study search --workdir=DIR \\
      --config=configs/study_search.py:configs/finetune_classification.py:reviews \\
      --config.run.transfer.checkpoint=CHECKPOINT --config.study.rungs=1 \\
      --config.study.keys="('optimizer.learning_rate=log(1e-5,1e-3)','training.batch_size=16|32')"

After the colon stands the config of the runs. Without one it is a small GPT over bytes, on the
embedded Wikipedia.
"""

import importlib.util
from typing import Any

import ml_collections

from configs import pretrain_gpt
from llm.core import UserError
from llm.studies import frame


def get_config(run: str = "") -> Any:
  """The settings of the study, and the config of its runs. run: FILE or FILE:SETTING."""
  config = _of_file(run) if run else _small()
  return ml_collections.ConfigDict({"study": frame.defaults("search"), "run": config})


def _small() -> Any:
  config = pretrain_gpt.get_config("tiny")
  config.tokenizer.update(name="bytes", vocab_size=0, path="")
  config.data.update(train="embedded:wikipedia", eval="embedded:wikipedia[validation]")
  config.model.update(num_layers=2, width=64, num_heads=2, mlp_dim=256, dropout=0.0)
  config.training.update(steps=540, batch_size=16, sequence_length=128, keep_best="")
  return config


def _of_file(run: str) -> Any:
  """The config of a file, with the setting after its colon."""
  path, colon, setting = run.partition(":")
  spec = importlib.util.spec_from_file_location("searched", path)
  try:
    module: Any = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
  except (OSError, AttributeError):
    raise UserError(f"--config=configs/study_search.py:{run}: {path} is no config file")
  return module.get_config(setting) if colon else module.get_config()
