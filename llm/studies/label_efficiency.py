"""How many labels without pretraining equal n with it?

The arms are checkpoints: one that is pretrained here, published ones, and each with a middle phase
on the unlabelled text of the target (ULMFiT, Howard and Ruder 2018, section 3.2). Beside them the
architecture of the first one from scratch, and the classical models. All see the same draws of
labels. Learning rate and epochs of each arm and label count are chosen on the validation split.
"""

import dataclasses
from typing import Any, Mapping, Sequence

import tabulate
from etils import epath

from llm.checkpoints import locate, manager
from llm.config import Config, ModelConfig, TokenizerConfig, TransferConfig, key
from llm.core import UserError
from llm.studies import few_labels, frame, label_curve, plots
from llm.studies.few_labels import Arm, Cell, Classical
from llm.studies.label_curve import Setting
from llm.studies.runs import Result, Run

SCRATCH = "scratch"
CLASSICAL = "classical"


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """target: a source with {split} for train, validation and test. fields: as config.data.fields.

  checkpoints: NAME=CHECKPOINT; `here` is config.run, pretrained as a part of the study. middle:
  names of those that also go through a middle phase. labels: LABELSxDRAWS:EPOCHS, where 0 labels
  are all, and of EPOCHS with commas the best is chosen. rates: factors of the recipe's learning
  rate, of which the best is chosen on the first `searched` draws. length: tokens of a row.
  """

  title = "Label efficiency"

  target: str = "embedded:reviews[{split}]"
  fields: str = ""
  checkpoints: tuple = ("pretrained=here", "published=embedded:minilm")
  middle: tuple = ("pretrained",)
  middle_steps: int = key(300, at_least=1)
  labels: tuple = ("64x20:20", "256x8:6", "1024x4:3", "0x3:2")
  rates: tuple = ("1", "3")
  searched: int = key(2, at_least=1)
  length: int = key(40, at_least=4)
  batch_size: int = key(32, at_least=1)

  def quick(self) -> "Study":
    # Published checkpoints are larger, and take most of the time.
    left = tuple(text for text in self.checkpoints if "embedded:" not in text) or self.checkpoints
    names = {text.partition("=")[0] for text in left}
    fewer = ("64x6:20", "256x3:6", "1024x2:3")
    return dataclasses.replace(
      self,
      checkpoints=left,
      middle=tuple(name for name in self.middle if name in names),
      middle_steps=min(100, self.middle_steps),
      labels=fewer if self.labels == type(self)().labels else self.labels,
      searched=1,
    )

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    starts = self._starts(folder)
    settings = [few_labels.setting(text, self.searched, self.rates) for text in self.labels]
    if len({setting.labels for setting in settings}) < 2:
      raise UserError(
        "how many labels are worth the same needs 2 label counts at least (config.study.labels), "
        f"and there is {len(settings)}"
      )
    if not done:
      few_labels.check_target(self.target, self.fields, base.data.cache)
    pretraining = [few_labels.pretraining(base)] if few_labels.HERE in self._values() else []
    if few_labels.missing(pretraining, done):
      return pretraining
    middle = [self._middle(base, name, starts[name]) for name in self.middle]
    if few_labels.missing(middle, done):
      return [*pretraining, *middle]
    for run in middle:
      starts[run.name] = str(folder / "runs" / run.name)
    cells = [
      self._cell(arm, starts, setting, base)
      for arm in (*starts, SCRATCH, CLASSICAL)
      for setting in settings
    ]
    return [*pretraining, *middle, *cells]

  def _values(self) -> list[str]:
    return [few_labels.named(text, "config.study.checkpoints")[1] for text in self.checkpoints]

  def _starts(self, folder: epath.Path) -> dict[str, str]:
    """Arm -> its checkpoint. Raises UserError on names that are taken or unknown."""
    starts = {}
    for text in self.checkpoints:
      name, value = few_labels.named(text, "config.study.checkpoints")
      if name in (SCRATCH, CLASSICAL, *starts):
        raise UserError(f"config.study.checkpoints: the name {name!r} is taken; give another")
      starts[name] = few_labels.checkpoint(value, folder)
    if not starts:
      raise UserError("config.study.checkpoints is empty: give NAME=CHECKPOINT, e.g. 'bert=DIR'")
    for name in self.middle:
      if name not in starts:
        raise UserError(f"config.study.middle: {name!r} is none of the arms {', '.join(starts)}")
    return starts

  def _middle(self, base: Config, name: str, checkpoint: str) -> Run:
    """Goes on with the pretraining of a checkpoint, on the text of the target."""
    start = locate.find(checkpoint, lambda *_: None, base.data.cache)
    before = manager.describe(start).config.objective["name"]
    data = dataclasses.replace(
      base.data,
      train=few_labels.split_of(self.target, "train"),
      eval=few_labels.split_of(self.target, "validation"),
      fields=self.fields,
    )
    skip = () if before == base.objective["name"] else (r"^(head|generator)/",)
    config = dataclasses.replace(
      base,
      data=data,
      model=ModelConfig(dropout=base.model.dropout),
      tokenizer=TokenizerConfig(),
      transfer=TransferConfig(checkpoint=checkpoint, skip=skip),
      training=dataclasses.replace(
        base.training, steps=self.middle_steps, epochs=0.0, eval_every=0, save_every=0
      ),
    )
    return Run(f"{name}_and_middle", config, {"role": "middle", "arm": name})

  def _cell(self, name: str, starts: Mapping[str, str], setting: Setting, base: Config) -> Cell:
    first = next(iter(starts.values()))
    arm = Arm(
      checkpoint=starts.get(name, first),
      scratch=name not in starts,
      target=self.target,
      fields=self.fields,
      cache=base.data.cache,
      length=self.length,
      batch_size=self.batch_size,
    )
    kind = Classical if name == CLASSICAL else Cell
    facts = {"role": "fine-tuning", "arm": name, "labels": setting.labels}
    return kind(few_labels.name_of(name, setting), arm.config(), facts, arm=arm, setting=setting)

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    rows = few_labels.result_rows(done)
    worth = _worth(rows)
    differences = _differences(rows)
    plots.label_curve(rows, folder / "label_curve", f"{self.target}: accuracy by labels")
    plots.worth(worth, folder / "worth")
    figures = {"worth": worth, "curve": rows, "differences": differences}
    return figures, _in_words(rows, worth, differences)


def _of(rows: Sequence[Mapping], model: str) -> dict[int, list[float]]:
  """Labels -> the accuracies of the draws of one arm."""
  return {row["labels"]: row["accuracies"] for row in rows if row["model"] == model}


def _networks(rows: Sequence[Mapping]) -> list[str]:
  """The arms that start from a checkpoint."""
  names = dict.fromkeys(row["model"] for row in rows if row["network"])
  return [name for name in names if name != SCRATCH]


def _shared(
  rows: Sequence[Mapping], arm: str, curve: Mapping[int, list[float]]
) -> list[tuple[int, list[float]]]:
  """(labels, accuracies) of an arm where `curve` has a point: it lacks those that diverged."""
  return sorted(item for item in _of(rows, arm).items() if item[0] in curve)


def _worth(rows: Sequence[Mapping]) -> list[dict[str, Any]]:
  """For each arm and label count, the labels from scratch that are worth the same."""
  curve = _of(rows, SCRATCH)
  worth = []
  for arm in _networks(rows):
    for labels, accuracies in _shared(rows, arm, curve):
      equal, low, high = label_curve.equivalent_labels(accuracies, curve)
      worth.append({"arm": arm, "labels": labels, "equal": equal, "low": low, "high": high})
  return worth


def _differences(rows: Sequence[Mapping]) -> list[dict[str, Any]]:
  """Each arm minus scratch at each label count, over the draws, which are the same."""
  curve = _of(rows, SCRATCH)
  differences = []
  for arm in _networks(rows):
    for labels, accuracies in _shared(rows, arm, curve):
      mean, low, high = label_curve.paired_difference(accuracies, curve[labels])
      entry = {"arm": arm, "labels": labels, "mean": mean, "low": low, "high": high}
      differences.append({**entry, "draws": len(accuracies)})
  return differences


def _in_words(rows: list[dict], worth: list[dict], differences: list[dict]) -> str:
  counts = sorted(_of(rows, SCRATCH))
  fewest, most = counts[0], counts[-1]

  def equal(point: Mapping[str, Any]) -> str:
    names = ("equal", "low", "high")
    mean, low, high = (label_curve.in_labels(point[name], fewest, most) for name in names)
    return mean if low == high else f"{mean} [{low} to {high}]"

  first = [
    f"- **{fewest:,} labels with `{point['arm']}` are worth {equal(point)} labels without "
    "pretraining**"
    for point in worth
    if point["labels"] == fewest
  ]
  table = [
    (
      point["arm"],
      f"{point['labels']:,}",
      equal(point),
      label_curve.in_points(gain["mean"], gain["low"], gain["high"]),
      label_curve.verdict(gain["low"], gain["high"]),
    )
    for point, gain in zip(worth, differences)
  ]
  headers = ("arm", "labels", "worth, labels from scratch [95%]", "minus scratch, points [95%]", "")
  return "\n".join(
    [
      *first,
      "",
      "![labels that are worth the same](worth.png)\n",
      tabulate.tabulate(table, headers, "github", disable_numparse=True) + "\n",
      "Test accuracy in %, the mean over draws with its standard deviation:\n",
      _curve_table(rows, counts) + "\n",
      "![accuracy by labels](label_curve.png)\n",
      *few_labels.remarks(rows),
      "Learning rate and epochs of each arm and label count, and the regularisation of the "
      "classical models, were chosen on the validation split; the test split was scored once. The "
      "intervals of labels are a bootstrap over the draws of both arms, those of differences "
      "Student's over the draws, which both arms share. There is one pretraining of each arm and "
      "one random start of scratch, so they say nothing of the chance of either.\n",
    ]
  )


def _curve_table(rows: Sequence[Mapping], counts: Sequence[int]) -> str:
  cells = {
    (row["model"], row["labels"]): f"{100 * row['accuracy_mean']:.1f} ± "
    f"{100 * row['accuracy_std']:.1f} ({row['seeds']})"
    for row in rows
  }
  models = dict.fromkeys(row["model"] for row in rows)
  table = [[model, *(cells.get((model, count), "") for count in counts)] for model in models]
  headers = ["mean ± deviation (draws)", *(f"{count:,} labels" for count in counts)]
  return tabulate.tabulate(table, headers, "github", disable_numparse=True)
