"""Pretrain or fine-tune: one config in, one checkpoint out.

python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=DIR [--config.KEY=VALUE ...]
"""

from absl import flags
from ml_collections import config_flags

from llm import command, processes
from llm import config as config_lib
from llm.core import UserError
from llm.training import loop

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with its argument after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The folder of the run. A run that is already there is resumed."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes: of a TPU pod, a Slurm job or launch/local.sh."
)
_GO_ON = flags.DEFINE_bool("go_on", False, "Resume a run that began with another config.")


def read_config() -> config_lib.Config:
  """The config of the command line. Raises UserError if it is missing or not valid."""
  if _CONFIG.value is None:
    raise UserError("--config is missing, e.g. --config=configs/pretrain_bert.py:tiny")
  return config_lib.freeze(_CONFIG.value)


def main():
  """Trains as the flags say, and resumes a run that is already in the workdir."""
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder where the run is kept")
  config = read_config()
  if _DISTRIBUTED.value:
    processes.join()
  loop.train(config, _WORKDIR.value, go_on=_GO_ON.value, use_devices=command.start_cpu)


if __name__ == "__main__":
  command.run(main)
