"""A run whose checkpoint is scored once more when it is trained."""

import abc
import dataclasses
import json
from typing import Any, Callable, Mapping

from etils import epath

from llm import storage
from llm.runs import workdir as workdir_lib
from llm.studies import runs

SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class Scored(runs.Run, abc.ABC):
  """The scores stand among the figures of the evaluation, in result.json too."""

  @abc.abstractmethod
  def score(self, workdir: epath.Path) -> dict[str, float]:
    """Further figures of the checkpoint that lies in `workdir`."""

  def take(self, workdir: epath.Path, use_devices: Callable | None) -> Mapping[str, Any]:
    result = super().take(workdir, use_devices)
    folder = storage.folder(workdir)
    if not (folder / SCORES).exists():
      workdir_lib.write_json(folder / SCORES, self.score(workdir))
    scores = json.loads((folder / SCORES).read_text())
    result = {**result, "eval": {**result["eval"], **scores}}
    workdir_lib.write_json(folder / "result.json", result)
    return result
