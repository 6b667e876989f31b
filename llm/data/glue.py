"""The tasks of GLUE (Wang et al. 2018): their fields, splits and official figures."""

from typing import NamedTuple


class Task(NamedTuple):
  """A task. fields: config.data.fields. validation: its split. metrics: the official figures,
  the first of which compares runs. regression: whether its labels are scores.
  """

  fields: str
  metrics: tuple[str, ...] = ("accuracy",)
  validation: str = "validation"
  regression: bool = False

  @property
  def metric(self) -> str:
    """The figure by which runs are compared."""
    return self.metrics[0]


PAIR = "text=sentence1,text_pair=sentence2"

TASKS = {
  "cola": Task("text=sentence", ("mcc",)),
  "sst2": Task("text=sentence"),
  "mrpc": Task(PAIR, ("f1", "accuracy")),
  "stsb": Task(PAIR, ("pearson", "spearman"), regression=True),
  "qqp": Task("text=question1,text_pair=question2", ("f1", "accuracy")),
  "mnli": Task("text=premise,text_pair=hypothesis", validation="validation_matched"),
  "qnli": Task("text=question,text_pair=sentence"),
  "rte": Task(PAIR),
  "wnli": Task(PAIR),
}
# MNLI has a second validation split, of other genres than its training text.
MISMATCHED = "validation_mismatched"
