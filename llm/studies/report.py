"""The report of the two phases: a table, what it says in words, a picture and decoded examples."""

import base64
import math
import pathlib
import platform
from typing import Any, Mapping, NamedTuple, Sequence

import jax
import jinja2
import tabulate

from llm.runs.log import duration
from llm.studies import label_curve

CAVEATS = (
  "Both arms have the same architecture, data, batches and fresh head. On sentiment, the learning "
  "rate of each arm and the regularisation of the classical models were chosen on the validation "
  "split; questions and replies keep the epoch that is best there. Test splits were "
  "scored once, and no test text is in what was pretrained on. On sentiment and questions, the "
  "weights of scratch start at the standard deviation that suits labels alone, those of the "
  "pretraining at their own. The embeddings of the small BERT start from counts of which pieces "
  "stand near which in the same unlabelled text (seconds); masked prediction goes on from there."
)
PUBLISHED = (
  "`published` is all-MiniLM-L6-v2, fine-tuned on the same labels by one recipe: a BERT of 6 "
  "layers, distilled from a larger one and then tuned on a billion sentence pairs. So it shows "
  "more than masked language modelling alone."
)


class Compared(NamedTuple):
  """A task, and what both arms reach on its test split; a point of accuracy or F1 is a hundredth.

  difference, low, high: pretrained - scratch with its 95% interval. others: further models.
  lower: whether less is better.
  """

  task: str
  figure: str
  pretrained: float
  scratch: float
  difference: float
  low: float
  high: float
  others: Mapping[str, float]
  lower: bool = False

  @property
  def verdict(self) -> str:
    """Whether the interval tells the arms apart, and which is better."""
    return label_curve.verdict(self.low, self.high, self.lower)


def worth_sentence(equal: Mapping[str, Any], minutes: float) -> str:
  """The first line of the report."""

  def count(labels: float) -> str:
    return label_curve.in_labels(labels, equal["labels"], equal["most"])

  def told(model: str) -> str:
    of_model = equal[model]
    interval = f"[{count(of_model['low'])} to {count(of_model['high'])}]"
    return f"{count(of_model['labels'])} {interval}"

  sentence = (
    f"{equal['labels']} labels with {minutes:.1f} minutes of pretraining are worth "
    f"{told('pretrained')} labels without it"
  )
  if "published_bert" in equal:
    sentence += f"; with a published checkpoint, {told('published_bert')}"
  return f"{sentence} (sentiment of film reviews; 95% intervals)."


def table(compared: Sequence[Compared], form: str = "github") -> str:
  """A line a task, as GitHub's markdown or as HTML."""
  lines = []
  for task in compared:
    lines.append(
      (
        task.task,
        task.figure,
        cell(task, task.pretrained),
        cell(task, task.scratch),
        gain(task),
        cell(task, task.others.get("published_bert")),
        cell(task, task.others.get("tfidf_lr")),
        cell(task, task.others.get("nbsvm")),
        task.verdict,
      )
    )
  headers = ("task", "test figure", "pretrained here", "scratch", "difference [95%]")
  headers += ("published", "TF-IDF + LR", "NBSVM", "")
  return tabulate.tabulate(lines, headers=headers, tablefmt=form, disable_numparse=True)


def cell(task: Compared, value: float | None, sign: str = "") -> str:
  """A value of a task as tables show it: percent, or nats; nothing for None."""
  if value is None:
    return ""
  return f"{value:{sign}.2f}" if task.lower else f"{100 * value:{sign}.1f}"


def gain(task: Compared, unit: str = "") -> str:
  """The difference of a task with its interval, which one draw has not."""
  difference = cell(task, task.difference, "+") + unit
  if math.isnan(task.low):
    return f"{difference} (one draw)"
  return f"{difference} [{cell(task, task.low, '+')}, {cell(task, task.high, '+')}]"


def verdicts(compared: Sequence[Compared]) -> list[str]:
  """What the table says, a sentence a task, which follows from its numbers."""
  sentences = []
  for task in compared:
    unit = "" if task.lower else " points"  # nats a token are the figure itself
    sentence = f"{task.task.capitalize()}: pretraining changes {task.figure} by {gain(task, unit)}"
    if task.verdict:
      sentence += f": {task.verdict}"
    classical = {name: task.others[name] for name in ("tfidf_lr", "nbsvm") if name in task.others}
    if classical:
      best = max(classical, key=lambda name: classical[name])
      gap = 100 * (max(task.pretrained, task.scratch) - classical[best])
      side = "above" if gap >= 0 else "below"
      sentence += f"; the better network is {abs(gap):.1f} points {side} {best}"
    sentences.append(f"{sentence}.")
  return sentences


PAGE = jinja2.Template(
  """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What two phases buy</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ccc }
th { text-align: left } img { max-width: 100% } .text { color: #555 }
</style>
<h1>What two phases buy</h1>
<p><strong>{{ worth }}</strong></p>
<p>{{ introduction }}</p>
{{ table }}
<img alt="Accuracy against the number of labels" src="data:image/png;base64,{{ picture }}">
<ul>{% for verdict in verdicts %}<li>{{ verdict | e }}</li>{% endfor %}</ul>
<p>{{ caveats }}</p>
{% for name, examples in shown.items() %}<h2>{{ name }}</h2>
{% for example in examples %}<p class="text">{{ example.text | e }}</p><ul>
{% for arm, text in example.items() if arm != "text" %}<li>{{ arm }}: {{ text | e }}</li>
{% endfor %}
</ul>{% endfor %}{% endfor %}
</html>
""",
  autoescape=False,
)


def _introduction(pretrainings: Mapping[str, dict], seconds: float) -> str:
  parts = []
  for name, result in pretrainings.items():
    tokens = sum(source["tokens"] for source in result["data"].values())
    parts.append(
      f"a {name} of {result['parameters']:,} parameters for {duration(result['seconds'])} on "
      f"{tokens / 1e6:.1f} M tokens"
    )
  machine = f"{platform.machine()}, {len(jax.devices())} x {jax.devices()[0].device_kind}"
  return f"Pretrained here: {' and '.join(parts)}; {machine}; {duration(seconds)} in all."


def write(
  workdir: pathlib.Path,
  compared: Sequence[Compared],
  equal: Mapping[str, Any],
  pretrainings: Mapping[str, dict],
  shown: Mapping[str, list[dict[str, str]]],
  seconds: float,
) -> str:
  """Writes report.md and report.html beside label_curve.png, and returns the former."""
  first = worth_sentence(equal, pretrainings["BERT"]["seconds"] / 60)
  introduction = _introduction(pretrainings, seconds)
  caveats = CAVEATS
  if any("published_bert" in task.others for task in compared):
    caveats += f" {PUBLISHED}"
  lines = ["# What two phases buy", "", f"**{first}**", "", introduction, "", table(compared), ""]
  lines += ["![Accuracy against the number of labels](label_curve.png)", ""]
  lines += [f"- {verdict}" for verdict in verdicts(compared)]
  lines += ["", caveats, ""]
  for name, examples in shown.items():
    lines += [f"## {name}", ""]
    for example in examples:
      lines += [f"> {' '.join(example['text'].split())}", ""]
      lines += [f"- {arm}: {' '.join(t.split())}" for arm, t in example.items() if arm != "text"]
      lines.append("")
  text = "\n".join(lines)
  (workdir / "report.md").write_text(text)
  page = PAGE.render(
    worth=first,
    introduction=introduction,
    table=table(compared, "html"),
    picture=base64.b64encode((workdir / "label_curve.png").read_bytes()).decode(),
    verdicts=verdicts(compared),
    caveats=caveats,
    shown=shown,
  )
  (workdir / "report.html").write_text(page)
  return text
