"""Pretrain or fine-tune: one config in, one checkpoint out.

python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=DIR [--config.KEY=VALUE ...]

With --dry_run it shows what the run would be, and how long it would take.
"""

import shlex

from absl import flags
from ml_collections import config_flags

from llm import command, models, processes
from llm import config as config_lib
from llm.checkpoints import manager
from llm.core import UserError
from llm.objectives import base
from llm.training import dry_run, experiment, loop

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with its argument after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The folder of the run. A run that is already there is resumed."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes: of a TPU pod, a Slurm job or launch/local.sh."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Show what the run would be: keys, header, time, a batch. Nothing is written."
)
_GO_ON = flags.DEFINE_bool("go_on", False, "Resume a run that began with another config.")


def read_config() -> config_lib.Config:
  """The config of the command line. Raises UserError if it is missing or not valid."""
  if _CONFIG.value is None:
    raise UserError("--config is missing, e.g. --config=configs/pretrain_bert.py:tiny")
  return config_lib.freeze(_CONFIG.value)


# The kind of architecture -> the config that a pretrained checkpoint is fine-tuned by.
TUNED_BY = {
  "encoder": "configs/finetune_classification.py",
  "decoder": "configs/finetune_chat.py",
  "encoder_decoder": "configs/finetune_text_to_text.py",
}


def next_commands(workdir: str) -> str:
  """The commands that go on from the checkpoint of a run, filled in."""
  saved = experiment.from_checkpoint(manager.find(workdir, lambda _: None))
  objective = saved.objective
  checkpoint = f"--checkpoint={shlex.quote(workdir)}"
  kind = models.facts(saved.config.model).kind
  commands = []
  if saved.config.data.eval:
    commands.append(f"python -m llm.evaluate {checkpoint}")
  if isinstance(objective, base.Labels):
    given = " ".join(f'--{field}="your {field}"' for field in objective.fields)
    commands.append(f"python -m llm.predict {checkpoint} {given}")
  elif kind != "encoder":
    commands.append(f'python -m llm.generate {checkpoint} --prompt="your text"')
  if not objective.labelled:
    commands.append(
      f"python -m llm.train --config={TUNED_BY[kind]} --workdir={shlex.quote(workdir)}_tuned "
      f"--config.transfer.checkpoint={shlex.quote(workdir)} "
      "--config.data.train=jsonl:YOURS.jsonl --config.data.eval=jsonl:YOURS_HELD_OUT.jsonl"
    )
  return "\n".join(f"  {command}" for command in commands)


def main():
  """Trains as the flags say, and resumes a run that is already in the workdir."""
  config = read_config()
  if _DRY_RUN.value:
    flag = flags.FLAGS["config"]
    file = config_flags.get_config_filename(flag)
    overridden = config_flags.get_override_values(flag)
    dry_run.run(config, file, overridden, use_devices=command.start_cpu)
    return
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder where the run is kept")
  if _DISTRIBUTED.value:
    processes.join()
  loop.train(config, _WORKDIR.value, go_on=_GO_ON.value, use_devices=command.start_cpu)
  print(f"next:\n{next_commands(_WORKDIR.value)}")


if __name__ == "__main__":
  command.run(main)
