"""What two phases buy, in minutes: three tasks, each from scratch and pretrained here.

Pretrains a small BERT on Wikipedia, film reviews and abstracts without their labels, and a small
GPT on Wikipedia. Fine-tunes both on three tasks, from the pretrained parameters and from random
ones: sentiment at several label counts (studies/sentiment.py), questions (studies/questions.py) and
replies to prompts (studies/responses.py). Writes report.md, report.html, label_curve.png and
result.json.
"""

import dataclasses
import json
import math
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

# Fine-tunings of each arm on replies.
REPLY_SEEDS = 3


def pretraining_config(quick: bool, cache: str, steps: int = 0) -> Config:
  """A BERT of two layers and width 128, as configs/pretrain_bert.py:tiny trains it.

  steps: of training; 0 is the default.
  """
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
    steps=steps or (600 if quick else 1200),
    batch_size=32,
    sequence_length=questions.LENGTH,
    log_every=100 if quick else 200,
    save_every=2000,
  )
  return config_lib.freeze(config)


def replies_pretraining_config(quick: bool, cache: str, steps: int = 0) -> Config:
  """A GPT of two layers and width 128. steps: of the BERT's training; this takes a third."""
  config = responses.pretraining_config(quick, cache)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, num_layers=2, width=128, num_heads=2, mlp_dim=512),
    training=dataclasses.replace(
      config.training, steps=math.ceil(steps / 3) or (60 if quick else 400)
    ),
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
  pretrained: pathlib.Path, workdir: pathlib.Path, quick: bool, cache: str
) -> tuple[Compared, list[dict[str, str]]]:
  """Fine-tunes both arms with each seed. (the comparison, prompts with both answers)."""
  tuning = responses.tuning_config(str(pretrained), cache, epochs=1.0 if quick else 2.0)
  tuning = dataclasses.replace(
    tuning, training=dataclasses.replace(tuning.training, keep_best="min:loss")
  )
  arms = {"pretrained": tuning, "scratch": responses.from_scratch(tuning)}
  prompts = responses.held_out_prompts(cache)
  losses: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
  answers: dict[str, list[str]] = {}
  for arm, folder in responses.tuned(arms, 1 if quick else REPLY_SEEDS, workdir, "replies"):
    bundle = experiment.load(manager.find(folder))
    objective = base.build(bundle.config.objective)
    template = chat.template_of(objective, bundle.tokenizer) or chat.TEMPLATE
    outcomes, _ = responses.reply_outcomes(bundle, template, tuning.data, 4)
    losses[arm].append(outcomes["loss"])
    if arm not in answers:
      answers[arm] = responses.answers(bundle, template, prompts)
  shown = [
    {"text": prompt, **{arm: answers[arm][number] for arm in arms}}
    for number, prompt in enumerate(prompts)
  ]
  return replies_difference(np.array(losses["pretrained"]), np.array(losses["scratch"])), shown


def replies_difference(pretrained_SxNx2: np.ndarray, scratch_SxNx2: np.ndarray) -> Compared:
  """The mean loss of a token. _SxNx2: the loss and the tokens of each reply, for each seed."""
  tokens_N = pretrained_SxNx2[0, :, 1]
  loss_SxN, scratch_loss_SxN = pretrained_SxNx2[..., 0], scratch_SxNx2[..., 0]
  low, high = metrics.seeds_interval(loss_SxN - scratch_loss_SxN, tokens_N)
  loss, scratch_loss = (
    float(losses.sum(axis=1).mean() / tokens_N.sum()) for losses in (loss_SxN, scratch_loss_SxN)
  )
  return Compared(
    "replies to prompts",
    "nats a token",
    loss,
    scratch_loss,
    loss - scratch_loss,
    low,
    high,
    {},
    lower=True,
  )


def run(workdir: pathlib.Path, quick: bool, cache: str, steps: int, use_devices: Callable):
  """The whole study, written to `workdir`.

  quick: less of everything. cache: as config.data.cache. steps: of the BERT's pretraining, and the
  GPT's takes a third; 0 is the default. use_devices: as of `loop.train`.
  """
  started_at = time.time()
  config = pretraining_config(quick, cache, steps)
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
  gpt = workdir / "pretrained_gpt"
  gpt_pretraining = loop.train(replies_pretraining_config(quick, cache, steps), gpt)
  replies, prompts = replies_compared(gpt, workdir, quick, cache)
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
