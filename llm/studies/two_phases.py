"""What two phases buy, in minutes: three tasks, each from scratch and pretrained here.

Pretrains a small BERT on Wikipedia, film reviews and abstracts without their labels, and a small
GPT on Wikipedia. Fine-tunes both on three tasks, from the pretrained parameters and from random
ones: sentiment at several label counts (studies/sentiment.py), questions (studies/questions.py) and
replies to prompts (studies/responses.py). Writes report.md, report.html, label_curve.png and
result.json.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Callable

import numpy as np

from llm import config as config_lib
from llm.checkpoints import manager
from llm.config import Config
from llm.objectives import base, chat
from llm.runs import metrics
from llm.runs.log import duration
from llm.studies import label_curve, plots, questions, report, responses, sentiment
from llm.studies.report import Compared
from llm.training import experiment, loop


def pretraining_config(quick: bool, cache: str) -> Config:
  """A BERT of two layers and width 128, as configs/pretrain_bert.py:tiny trains it."""
  config = config_lib.defaults(base.defaults("masked_lm"))
  config.model.update(
    name="bert",
    num_layers=2,
    width=128,
    num_heads=2,
    mlp_dim=512,
    max_length=questions.LENGTH,
    dropout=0.0,
    embedding_start="cooccurrence",
  )
  config.objective.update(mask_rate=0.4, next_sentence=False)
  config.data.update(
    train="embedded:wikipedia@0.35,embedded:reviews@0.5,embedded:abstracts@0.15", cache=cache
  )
  config.tokenizer.update(name="sentencepiece", vocab_size=8192)
  config.optimizer.learning_rate = 3e-3
  config.training.update(
    steps=600 if quick else 1200,
    batch_size=32,
    sequence_length=questions.LENGTH,
    log_every=100 if quick else 200,
  )
  return config_lib.freeze(config)


def replies_pretraining_config(quick: bool, cache: str) -> Config:
  """A GPT of two layers and width 128."""
  config = responses.pretraining_config(quick, cache)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=2, width=128, num_heads=2, mlp_dim=512),
    training=dataclasses.replace(config.training, steps=60 if quick else 400),
  )


def sentiment_compared(rows: list[dict], differences: list[dict]) -> list[Compared]:
  """A comparison a label count."""
  compared = []
  for difference in differences:
    labels = difference["labels"]
    accuracy = {
      model: row["accuracy_mean"] for model, row in sentiment.by_model(rows, labels).items()
    }
    compared.append(
      Compared(
        f"sentiment, {labels:,} labels",
        "accuracy",
        accuracy.pop("pretrained"),
        accuracy.pop("scratch"),
        difference["pretrained_minus_scratch"],
        difference["low"],
        difference["high"],
        accuracy,
      )
    )
  return compared


def worth(rows: list[dict]) -> dict[str, Any]:
  """How many labels without pretraining equal the fewest labels with it, for each model."""
  fewest = min(row["labels"] for row in rows)
  curve = {row["labels"]: row["accuracies"] for row in rows if row["model"] == "scratch"}
  result: dict[str, Any] = {"labels": fewest, "most": max(curve)}
  for model in ("pretrained", "published_bert"):
    if row := sentiment.by_model(rows, fewest).get(model):
      equal, low, high = label_curve.equivalent_labels(row["accuracies"], curve)
      result[model] = {"labels": equal, "low": low, "high": high}
  return result


def replies_compared(
  workdir: pathlib.Path, quick: bool, cache: str
) -> tuple[Compared, dict[str, Any], list[dict[str, str]]]:
  """(the comparison, the result of the pretraining, prompts with both answers)."""
  pretrained = workdir / "pretrained_gpt"
  pretraining = loop.train(replies_pretraining_config(quick, cache), pretrained)
  tuning = responses.tuning_config(str(pretrained), cache, epochs=1.0 if quick else 2.0)
  tuning = dataclasses.replace(
    tuning, training=dataclasses.replace(tuning.training, keep_best="min:loss")
  )
  loop.train(tuning, workdir / "replies")
  loop.train(responses.from_scratch(tuning), workdir / "replies_from_scratch")
  prompts = responses.held_out_prompts(cache)
  losses = {}
  answers = {}
  for arm, folder in (("pretrained", "replies"), ("scratch", "replies_from_scratch")):
    bundle = experiment.load(manager.find(workdir / folder))
    template = chat.template_of(base.build(bundle.config.objective), bundle.tokenizer)
    outcomes, _ = responses.reply_outcomes(bundle, template or chat.TEMPLATE, tuning.data, 4)
    losses[arm] = outcomes["loss"]
    answers[arm] = responses.answers(bundle, template or chat.TEMPLATE, prompts)
  shown = [
    {"text": prompt, "pretrained": ours, "scratch": theirs}
    for prompt, ours, theirs in zip(prompts, answers["pretrained"], answers["scratch"])
  ]
  means = base.mean_of_sums(losses)
  low, high = metrics.bootstrap(_loss_difference, losses)["difference"]
  compared = Compared(
    "replies to prompts",
    "nats a token",
    means["pretrained"],
    means["scratch"],
    _loss_difference(losses)["difference"],
    low,
    high,
    {},
    lower=True,
  )
  return compared, pretraining, shown


def _loss_difference(losses: dict[str, np.ndarray]) -> dict[str, float]:
  means = base.mean_of_sums(losses)
  return {"difference": means["pretrained"] - means["scratch"]}


def run(workdir: pathlib.Path, quick: bool, cache: str, use_devices: Callable):
  """The whole study, written to `workdir`.

  quick: less of everything. cache: as config.data.cache. use_devices: as of `loop.train`.
  """
  started_at = time.time()
  config = pretraining_config(quick, cache)
  print("phase 1: pretraining a BERT", flush=True)
  bert = workdir / "pretrained"
  pretraining = loop.train(config, bert, use_devices=use_devices)
  print("phase 2, sentiment: from the pretrained parameters and from scratch", flush=True)
  rows, differences = sentiment.measured(manager.find(bert), config.data, quick)
  compared = sentiment_compared(rows, differences)
  print("phase 2, questions", flush=True)
  answered = questions.measured(bert, workdir, cache, quick)
  compared.append(questions.compared(answered))
  print("both phases, replies to prompts", flush=True)
  replies, gpt_pretraining, prompts = replies_compared(workdir, quick, cache)
  compared.append(replies)
  equal = worth(rows)
  title = "Sentiment of review sentences: what pretraining buys"
  plots.label_curve(rows, workdir / "label_curve", title)
  pretrainings = {"BERT": pretraining, "GPT": gpt_pretraining}
  shown = {"Questions: who took part in the study?": answered.shown, "Replies": prompts}
  seconds = time.time() - started_at
  report.write(workdir, compared, equal, pretrainings, shown, seconds)
  result = {
    "worth": equal,
    "compared": [task._asdict() for task in compared],
    "rows": rows,
    "differences": differences,
    "pretraining": pretrainings,
    "seconds": seconds,
  }
  (workdir / "result.json").write_text(json.dumps(result, indent=1))
  print(f"\n{report.worth_sentence(equal, pretraining['seconds'] / 60)}\n")
  print(f"{report.table(compared)}\n")
  print("\n".join(report.verdicts(compared)))
  print(f"\n{workdir / 'report.html'}, report.md and result.json written in {duration(seconds)}")
