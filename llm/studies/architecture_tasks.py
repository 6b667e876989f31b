"""Three tasks in the form of each kind of architecture: sentiment, questions and replies.

An encoder labels texts and points at answers; it does not write. A decoder labels texts and writes
answers and replies after a prompt. An encoder-decoder writes all three. All read the same records.
"""

import dataclasses
import json
from typing import Any, Mapping, Sequence

import numpy as np
from etils import epath

from llm import models, storage
from llm.checkpoints import manager
from llm.config import Config, DataConfig, ModelConfig, TokenizerConfig, TransferConfig
from llm.core import UserError
from llm.data import answers, sources
from llm.inference.writer import Writer
from llm.objectives import base, chat
from llm.studies.few_labels import SPLITS, split_of
from llm.studies.scored import Scored
from llm.training import experiment

# Words of a question's context around its answer, and characters of a prompt with its reply: so
# that all fit in the rows that were pretrained.
CONTEXT = 60
CHARACTERS = 450
# What a token of English takes on average, to estimate how many examples share a row.
CHARACTERS_A_TOKEN = 4.5
# Tokens that a written answer has at most.
ANSWER_LENGTH = 48
# Prompts that are answered at a time.
ROWS = 32


@dataclasses.dataclass(frozen=True)
class Form:
  """A task for a kind of architecture. metric: of its evaluation, compared as `goal` says.

  objective: its name and hyper-parameters. writes: whether its answers are written, then scored.
  """

  metric: str
  objective: Mapping[str, Any]
  writes: bool = False

  @property
  def lower(self) -> bool:
    """Whether less is better."""
    return self.metric == "loss"


LABELS = {"name": "classification", "pooling": "mean", "baseline": False}
CHOICES = {"name": "text_to_text", "template": "sentiment: {text}"}
WRITES_TARGET = {"name": "text_to_text", "template": "{prompt_text}", "target_length": 160}

FORMS = {
  "sentiment": {
    "encoder": Form("accuracy", LABELS),
    "decoder": Form("accuracy", LABELS),
    "encoder_decoder": Form("choice_accuracy", CHOICES),
  },
  "questions": {
    "encoder": Form("f1", {"name": "span_qa"}),
    "decoder": Form("written_f1", {"name": "chat"}, writes=True),
    "encoder_decoder": Form("written_f1", WRITES_TARGET, writes=True),
  },
  "replies": {
    "decoder": Form("loss", {"name": "chat"}),
    "encoder_decoder": Form("loss", WRITES_TARGET),
  },
}


def form(task: str, model: str) -> Form | None:
  """The form of a task for an architecture; None where it cannot do it."""
  return FORMS[task].get(models.facts_of(model).kind)


def write_files(sources_of: Mapping[str, str], data: DataConfig, folder: epath.Path) -> None:
  """Writes TASK_SPLIT.jsonl of all tasks and splits, where they do not lie there.

  sources_of: task -> a source with {split}. Raises UserError on bad records.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for task, target in sources_of.items():
    for split in SPLITS:
      path = folder / f"{task}_{split}.jsonl"
      if path.exists():
        continue
      source = sources.parse_one(split_of(target, split), data)
      records = [RECORDS[task](record) for record in source.records()]
      lines = [json.dumps(record) for record in records if record]
      if not lines:
        raise UserError(f"{source.spec}: no record is short enough for config.study")
      storage.write_whole(path, "\n".join(lines) + "\n")


def _sentiment(record: dict) -> dict[str, Any]:
  return {"text": record["text"], "label": record["label"]}


def _question(record: dict) -> dict[str, Any] | None:
  """The question on the words around its first answer; None where it has none."""
  given = answers.given(record)
  if not given:
    return None
  answer, start = given[0]
  before = record["text"][:start].split()
  after = record["text"][start + len(answer) :].split()
  # The place of the answer in its context differs from record to record.
  room = max(0, CONTEXT - len(answer.split()))
  first = min(len(before), len(record["text"]) % (room + 1))
  lead = " ".join(before[len(before) - first :])
  text = " ".join(filter(None, (lead, answer, *after[: room - first])))
  answer_start = len(lead) + 1 if lead else 0
  prompt = f"{record['question']}\n{text}"
  return {
    "text": text,
    "question": record["question"],
    "id": record["id"],
    "answers": [{"text": answer, "answer_start": answer_start}],
    **_written(prompt, answer),
  }


def _reply(record: dict) -> dict[str, Any] | None:
  """The first turn and its answer; None where they are long."""
  turns = chat.conversation(record)
  prompt, reply = turns[0]["content"], turns[-1]["content"]
  if len(turns) != 2 or len(prompt) + len(reply) > CHARACTERS:
    return None
  return {"text": prompt, **_written(prompt, reply)}


def _written(prompt: str, target: str) -> dict[str, Any]:
  """What models that write read: a decoder the messages, an encoder-decoder prompt and target."""
  user = {"role": "user", "content": prompt}
  messages = [user, {"role": "assistant", "content": target}]
  return {"messages": messages, "prompt_text": prompt, "target": target}


RECORDS = {"sentiment": _sentiment, "questions": _question, "replies": _reply}


def tuning_config(
  pretraining: Config, checkpoint: str, task: str, files: epath.Path, split: str
) -> Config:
  """Fine-tuning on a task from a checkpoint of `pretraining`, scored on a split."""
  of_task = form(task, pretraining.model.name)
  assert of_task is not None
  objective = {**base.defaults(of_task.objective["name"]), **of_task.objective}
  if of_task.objective is CHOICES:
    objective["targets"] = _targets(files / f"{task}_train.jsonl")
  data = dataclasses.replace(
    pretraining.data,
    train=f"jsonl:{files}/{task}_train.jsonl",
    eval=f"jsonl:{files}/{task}_{split}.jsonl",
    fields="",
  )
  labels = isinstance(base.build(objective), base.Labels)
  skip = (r"^(head|generator)/",) if labels else ()
  training = pretraining.training
  if not labels:  # its batches count rows, which hold several examples
    rows = _rows(files / f"{task}_train.jsonl", training.batch_size, training.sequence_length)
    training = dataclasses.replace(training, batch_size=rows)
  return dataclasses.replace(
    pretraining,
    objective=objective,
    training=training,
    data=data,
    model=ModelConfig(),
    tokenizer=TokenizerConfig(),
    transfer=TransferConfig(checkpoint=checkpoint, skip=skip),
  )


def _records(path: epath.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _rows(path: epath.Path, examples: int, length: int) -> int:
  """About how many rows of `length` tokens hold so many examples of a file, packed."""
  records = _records(path)
  texts = [
    (record.get("prompt_text", record["text"]), record.get("target", "")) for record in records
  ]
  characters = sum(len(prompt) + len(target) for prompt, target in texts)
  tokens = characters / len(records) / CHARACTERS_A_TOKEN
  return max(1, round(examples * tokens / length))


def _targets(path: epath.Path) -> tuple[str, ...]:
  """The labels of a file as the targets of text_to_text."""
  labels = sorted({str(record["label"]) for record in _records(path)})
  return tuple(f"{label}={label}" for label in labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writes(Scored):
  """A run whose checkpoint answers questions in writing. path: the file of the questions."""

  path: epath.Path

  def score(self, workdir: epath.Path) -> dict[str, float]:
    bundle = experiment.load(manager.find(workdir))
    records = _records(self.path)
    template = chat.template_of(base.build(bundle.config.objective), bundle.tokenizer)
    prompts: Sequence[str | list[int]] = [record["prompt_text"] for record in records]
    if template:
      rendering = chat.Template(template, bundle.tokenizer.special.get("bos", ""))
      turns = [record["messages"][:1] for record in records]
      prompts = [rendering.opening(turn, bundle.tokenizer) for turn in turns]
    writer = Writer(bundle)
    written = []
    for first in range(0, len(prompts), ROWS):
      written += writer.write(prompts[first : first + ROWS], ANSWER_LENGTH)
    gold = [[answer["text"] for answer in record["answers"]] for record in records]
    scores = [answers.f1(one.text.strip(), right) for one, right in zip(written, gold)]
    return {"written_f1": float(np.mean(scores))}
