"""Rewards that can be checked: a decoder answers prompts, and learns from what its answers earn.

Group relative policy optimisation, GRPO (Shao et al. 2024, section 4.1), with corrections of DAPO
(Yu et al. 2025) and Dr. GRPO (Liu et al. 2025) as settings.
"""

import dataclasses
import functools
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llm import sharding
from llm.config import key
from llm.core import Batch, UserError
from llm.data import packing
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.objectives import base, chat, rollouts
from llm.objectives.rollouts import Group, Prompt, PromptRows, Written
from llm.rewards import functions, grading

SHOWN = 2  # groups of a step that are kept to look at


@functools.cache
def _grader(spec: str, seconds: float) -> grading.Grader:
  """One process for each reward, however many objectives ask it."""
  return grading.Grader(spec, seconds)


@dataclasses.dataclass(frozen=True)
class Objective(chat.Objective):
  """The clipped surrogate of Shao et al. 2024, equation 3, over the tokens of the answers.

  reward: module:function, or one of rewards/functions.py. reward_seconds: it may take for an
  answer. answers: to each prompt. max_tokens: of an answer. temperature: of the draws; the policy
  that learns has the same.

  advantage: `std` divides a reward less the mean of its group by their deviation, `mean` does not.
  normalize: what the sum over all tokens is divided by. `tokens` is their number (DAPO, section
  3.3), `answers` first takes the mean of each answer (Shao et al. 2024), `constant` is the number
  of answers times max_tokens (Dr. GRPO, section 3.2).
  clip_low, clip_high: how far below and above 1 the ratio of probabilities may move (DAPO, section
  3.1, has 0.2 and 0.28). iterations: updates with the same answers (mu of algorithm 1).
  learn_cut_off: whether answers that reached max_tokens are learned (DAPO, section 3.4).
  redraws: so often, a batch of other prompts is drawn for those whose answers all earn the same
  (DAPO, section 3.2).
  kl: the weight of the divergence from the checkpoint that the run starts from, by the estimate k3
  (Schulman 2020; Shao et al. 2024, equation 4). Its gradient, beside answers of the policy, is that
  of KL(reference || policy), not of KL(policy || reference) (Tang and Munos 2025).
  """

  reward: str = "exact_match"
  reward_seconds: float = key(10.0, above=0)
  answers: int = key(8, at_least=2)
  max_tokens: int = key(64, above=0)
  temperature: float = key(1.0, above=0)
  advantage: str = key("std", choices=("std", "mean"))
  normalize: str = key("tokens", choices=("tokens", "answers", "constant"))
  clip_low: float = key(0.2, above=0, below=1)
  clip_high: float = key(0.2, above=0)
  iterations: int = key(1, at_least=1)
  learn_cut_off: bool = True
  redraws: int = key(0, at_least=0)
  kl: float = key(0.0, at_least=0)

  @property
  def goal(self):
    return "max:reward"

  @property
  def updates(self):
    return self.iterations

  def derived(self, means):
    return {}  # its loss is not that of next tokens

  def fit(self, sources, tokenizer):
    if sources:
      functions.resolve(self.reward)
    return super().fit(sources, tokenizer)

  def rows(self, source, tokenizer, data, model, length):
    tokenizer.require("eos")
    template = chat.Template(self.template, tokenizer.special.get("bos", ""))
    room = length - self.max_tokens + 1  # the last id of an answer is a target only
    if room < 1:
      raise UserError(
        f"config.objective.max_tokens={self.max_tokens} leaves no room for a prompt in "
        f"config.training.sequence_length={length}"
      )
    prompts = [
      Prompt(np.array(template.opening(rollouts.opening(record), tokenizer), np.int32), record)
      for record in source.records()
    ]
    fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]
    if not fitting:
      raise UserError(
        f"{source.spec}: no prompt of 1 to {room} tokens, which with config.objective.max_tokens="
        f"{self.max_tokens} fit config.training.sequence_length={length}"
      )
    dropped = len(prompts) - len(fitting)
    return PromptRows(source.spec, fitting, tokenizer, length, dropped, self.kl > 0)

  def batch_spec(self, model, length):
    names = ["advantages", "sampled_losses"] + ["reference_losses"] * (self.kl > 0)
    arrays = {name: base.float_spec(length) for name in names}
    return {**super().batch_spec(model, length), **arrays, "record": base.int_spec(2)}

  def head(self, config):
    return heads.CausalLMHead(config, self.temperature)

  def on_policy(self, batch, rows, actor, *, train):
    asked = _asked(batch, rows)
    if not train:
      return base.OnPolicy(self._greedy(asked, rows[0], actor))
    groups = self._groups([prompt for prompt in asked if prompt], rows, actor)
    learned = [group for group in groups if group.has_signal][: len(asked)] if self.redraws else []
    written = [one for group in learned or groups for one in self._written(group)]
    packed = packing.best_fit_decreasing(np.array([one.size for one in written]), rows[0].length)
    made = actor.place([rows[0].row([written[n] for n in numbers]) for numbers in packed])
    if self.kl:
      made = {**made, "reference_losses": actor.reference_losses(made)}
    return base.OnPolicy(
      made,
      sum(one.size for one in written),
      _metrics(groups),
      [group.sample(rows[0].tokenizer) for group in groups[:SHOWN]],
    )

  def _groups(
    self, prompts: list[Prompt], rows: Sequence[PromptRows], actor: base.Actor
  ) -> list[Group]:
    """A group of answers to each prompt, and to those that are drawn in place of silent ones."""
    groups = []
    for draw in range(1 + self.redraws):
      if draw:
        prompts = _drawn(rows, len(prompts), actor.rng(draw))
      ids = [prompt.ids for prompt in prompts]
      answers = actor.write(ids, self.answers, self.max_tokens, self.temperature, draw)
      groups += self._graded(prompts, answers, rows[0].tokenizer)
      if sum(group.has_signal for group in groups) >= len(prompts):
        break
    return groups

  def _graded(
    self, prompts: list[Prompt], answers: list[base.Answer], tokenizer: Tokenizer
  ) -> list[Group]:
    """The answers, `len(answers) / len(prompts)` to each prompt, with their rewards."""
    each = len(answers) // len(prompts)
    records = [prompt.record for prompt in prompts for _ in range(each)]
    texts = [tokenizer.decode(answer.ids[: len(answer.ids) - answer.ended]) for answer in answers]
    grader = _grader(self.reward, self.reward_seconds)
    values, faults = grading.of_all_processes(grader, texts, records)
    spans = [slice(n * each, (n + 1) * each) for n in range(len(prompts))]
    return [
      Group(prompt, answers[span], texts[span], values[span], faults[span])
      for prompt, span in zip(prompts, spans)
    ]

  def _written(self, group: Group) -> list[Written]:
    """The answers of a group with their advantages and weights."""
    written = []
    advantages = group.advantages(self.advantage)
    for answer, advantage, reward in zip(group.answers, advantages, group.rewards):
      is_learned = not np.isnan(reward) and (answer.ended or self.learn_cut_off)
      weight = 1.0 / len(answer.ids) if self.normalize == "answers" else 1.0
      written.append(Written(group.prompt.ids, answer, advantage, weight * is_learned))
    return written

  def _greedy(self, asked: list[Prompt | None], rows: PromptRows, actor: base.Actor) -> Batch:
    """The likeliest answer to each prompt, a row each. Nothing is learned from it."""
    filler = np.zeros(1, np.int32)
    ids = [prompt.ids if prompt else filler for prompt in asked]
    answers = actor.write(ids, 1, self.max_tokens, 0.0)
    written = [Written(prompt, answer, 0.0, 0.0) for prompt, answer in zip(ids, answers)]
    return actor.place([rows.row([one]) for one in written])

  def totals(self, batch):
    return {"answers": self._normaliser(batch)}

  def _normaliser(self, batch: Batch) -> jax.Array:
    """What the sum over the tokens of a batch is divided by."""
    if self.normalize == "tokens":
      return batch["weights"].sum()
    answers = batch["segments"].max(-1).sum().astype(jnp.float32)
    return answers * (self.max_tokens if self.normalize == "constant" else 1.0)

  def loss(self, outputs, batch, totals):
    weights_BxT = batch["weights"]
    learned_BxT = (weights_BxT > 0).astype(jnp.float32)
    log_ratio_BxT = (batch["sampled_losses"] - outputs["losses"]) * learned_BxT
    losses_BxT, is_clipped_BxT = self.surrogate(log_ratio_BxT, batch["advantages"])
    tokens = learned_BxT.sum()
    metrics = {
      "clipped": ((is_clipped_BxT * learned_BxT).sum(), tokens),
      "log_ratio": (jnp.abs(log_ratio_BxT).sum(), tokens),
    }
    if self.kl:
      k3_BxT = k3((outputs["losses"] - batch["reference_losses"]) * learned_BxT)
      losses_BxT += self.kl * k3_BxT
      metrics["kl"] = ((k3_BxT * learned_BxT).sum(), tokens)
    is_learned = jnp.any(weights_BxT)  # an evaluation learns nothing
    metrics["loss"] = ((losses_BxT * weights_BxT).sum(), is_learned * self._normaliser(batch))
    return base.weighted_mean(losses_BxT, weights_BxT, totals["answers"]), metrics

  def surrogate(self, log_ratio: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss of each token, whether its ratio is clipped, so that it has no gradient).

    log_ratio: of the policy's probability of a token to that when it was drawn.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
    is_clipped = ratio * advantages > clipped * advantages
    return -jnp.minimum(ratio * advantages, clipped * advantages), is_clipped

  def predict(self, outputs, batch):
    return {name: batch[name] for name in ("targets", "segments")}

  def outcomes(self, predictions, rows: PromptRows):
    """The reward of the likeliest answer to each prompt, NaN where it has none, and its length."""
    answers = []
    targets_RxT, segments_RxT = predictions["targets"], predictions["segments"]
    for prompt, targets_T, segments_T in zip(rows.prompts, targets_RxT, segments_RxT):
      ids = targets_T[len(prompt.ids) - 1 : segments_T.sum()]
      answers.append(base.Answer(ids, np.zeros(len(ids)), ids[-1] == rows.tokenizer.eos))
    groups = self._graded(rows.prompts[: len(answers)], answers, rows.tokenizer)
    return {
      "reward": np.array([group.rewards[0] for group in groups]),
      "length": np.array([float(len(answer.ids)) for answer in answers]),
    }

  def summary(self, outcomes):
    return {name: float(np.nanmean(values)) for name, values in outcomes.items()}


def k3(log_ratio: jax.Array) -> jax.Array:
  """exp(x) - x - 1 with x the log-probability under the reference less that under the policy."""
  return jnp.exp(log_ratio) - log_ratio - 1


def _asked(batch: Batch, rows: Sequence[PromptRows]) -> list[Prompt | None]:
  """The prompts of a batch; None for a row that fills it up."""
  by_number = {of_source.number: of_source.prompts for of_source in rows}
  return [
    by_number[source][prompt - 1] if prompt else None
    for source, prompt in sharding.host_rows(batch["record"]).tolist()
  ]


def _drawn(rows: Sequence[PromptRows], count: int, rng: np.random.Generator) -> list[Prompt]:
  """Prompts at random, from all sources alike."""
  prompts = [prompt for of_source in rows for prompt in of_source.prompts]
  return [prompts[n] for n in rng.integers(len(prompts), size=count)]


def _metrics(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
  """Means over the answers of a step. entropy: of the next token, by the tokens that were drawn."""
  answers = [answer for group in groups for answer in group.answers]
  rewards = np.concatenate([group.rewards for group in groups])
  tokens = float(sum(len(answer.ids) for answer in answers))
  count = float(len(answers))
  return {
    "reward": (float(np.nansum(rewards)), float((~np.isnan(rewards)).sum())),
    "length": (tokens, count),
    "entropy": (float(sum(answer.losses.sum() for answer in answers)), tokens),
    "cut_off": (float(sum(not answer.ended for answer in answers)), count),
    "silent_groups": (float(sum(not group.has_signal for group in groups)), float(len(groups))),
    "reward_faults": (float(np.isnan(rewards).sum()), count),
  }
