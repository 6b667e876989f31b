"""Pretrain or fine-tune: one config in, one checkpoint out.

python -m llm.train --config=configs/pretrain_bert.py:tiny --workdir=DIR [--config.KEY=VALUE ...]

With --dry_run it shows what the run would be, and how long it would take.
"""

import json
import shlex

import jax
from absl import flags
from ml_collections import config_flags

from llm import command, config_file, idle_keys, models, processes, storage
from llm import config as config_lib
from llm.core import UserError
from llm.objectives import base
from llm.training import dry_run, loop

_CONFIG = config_file.define("A file of configs/, with its argument after a colon.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The folder of the run. A run that is already there is resumed."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes: of a TPU pod, a Slurm job or launch/local.sh."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Show what the run would be: keys, header, time, a batch. No workdir is written.",
)
_GO_ON = flags.DEFINE_bool("go_on", False, "Resume a run that began with another config.")


def read_config() -> config_lib.Config:
  """The config of the command line. Raises UserError if it is missing or not valid."""
  if _CONFIG.value is None:
    raise UserError("--config is missing, e.g. --config=configs/pretrain_bert.py:tiny")
  given = config_flags.get_override_values(flags.FLAGS["config"])
  plain = _CONFIG.value.to_dict()
  # A run has one length: what the command line says counts, not what the file says.
  for name, other in (("steps", "epochs"), ("epochs", "steps")):
    if f"training.{name}" in given and f"training.{other}" not in given:
      plain["training"][other] = type(plain["training"][other])()
  config = config_lib.freeze(plain)
  idle_keys.warn(config, given)
  return config


# The kind of architecture -> the config that a pretrained checkpoint is fine-tuned by.
TUNED_BY = {
  "encoder": "configs/finetune_classification.py",
  "decoder": "configs/finetune_chat.py",
  "encoder_decoder": "configs/finetune_text_to_text.py",
}


def next_commands(config: config_lib.Config, architecture: str, workdir: str) -> str:
  """The commands that go on from the checkpoint of a run, filled in.

  architecture: the name of its model.
  """
  workdir = workdir.rstrip("/")
  objective = base.build(config.objective)
  kind = models.facts_of(architecture).kind
  checkpoint = f"--checkpoint={shlex.quote(workdir)}"
  commands = []
  if config.data.eval:
    commands.append(f"python -m llm.evaluate {checkpoint}")
  if isinstance(objective, base.Answers):
    commands.append(f'python -m llm.predict {checkpoint} --question="..." --context="..."')
  elif isinstance(objective, base.Labels):
    commands.append(f'python -m llm.predict {checkpoint} --text="..."')
  elif kind != "encoder":
    commands.append(f'python -m llm.generate {checkpoint} --prompt="..."')
  if not objective.labelled:
    commands.append(
      f"python -m llm.train --config={TUNED_BY[kind]} --workdir={shlex.quote(workdir)}_tuned "
      f"--config.transfer.checkpoint={shlex.quote(workdir)} "
      "--config.data.train=jsonl:YOURS.jsonl --config.data.eval=jsonl:YOURS_HELD_OUT.jsonl"
    )
  return "\n".join(f"  {command}" for command in commands)


def written(workdir: str) -> str:
  """What a run left in its workdir, and how to look at its curves."""
  names = sorted(path.name + "/" * path.is_dir() for path in storage.folder(workdir).iterdir())
  shown = [name for name in names if name != "lock"]
  return (
    f"written: {', '.join(shown)} in {workdir.rstrip('/')} (docs/runs.md)\n"
    f"curves: tensorboard --logdir={shlex.quote(workdir.rstrip('/'))}/events"
  )


def main():
  """Trains as the flags say, and resumes a run that is already in the workdir."""
  config = read_config()
  if _DISTRIBUTED.value:
    processes.join()
  if _DRY_RUN.value:
    flag = flags.FLAGS["config"]
    file = config_flags.get_config_filename(flag)
    overridden = config_flags.get_override_values(flag)
    dry_run.run(config, file, overridden, use_devices=command.start_cpu)
    return
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: the folder where the run is kept")
  loop.train(config, _WORKDIR.value, go_on=_GO_ON.value, use_devices=command.start_cpu)
  if not jax.process_index():
    resolved = json.loads((storage.folder(_WORKDIR.value) / "resolved.json").read_text())
    commands = next_commands(config, resolved["model"]["name"], _WORKDIR.value)
    print(f"{written(_WORKDIR.value)}\nnext:\n{commands}")


if __name__ == "__main__":
  command.run(main)
