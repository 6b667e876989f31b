"""Rewards: the loss is TRL's and the derived one; what is drawn is what is trained; runs resume."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm import sharding
from llm.checkpoints import manager
from llm.config import DataConfig, MeshConfig, ModelConfig
from llm.core import UserError, flatten, unflatten
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base, grpo, rollouts
from llm.rewards import functions, grading, process
from llm.training import loop, sampler
from tests.conftest import tiny
from tests.test_models import model_of, params_of
from tests.test_preference import source_of

BYTES = tokenizer_lib.ByteTokenizer()
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "grpo.json").read_text())
NORMALIZE = {"bnpo": "tokens", "grpo": "answers", "dr_grpo": "constant"}
PROMPTS = [{"prompt": f"say {n}", "answer": "ab"} for n in range(12)]


def silent(*_):
  pass


def objective_of(case):
  return grpo.Objective(
    normalize=NORMALIZE[case["loss_type"]],
    clip_low=case["low"],
    clip_high=case["high"],
    kl=case["beta"],
    max_tokens=GOLDEN["longest"],
  )


def golden_batch(case):
  """The golden arrays as a batch: an answer a row, as the objective weighs its tokens."""
  mask = np.array(GOLDEN["mask"], np.float32)
  is_learned = (mask.sum(1, keepdims=True) < mask.shape[1]) if case["cut_off"] else True
  lengths = mask.sum(1, keepdims=True) if case["loss_type"] == "grpo" else 1.0
  return {
    "segments": mask.astype(np.int32),
    "weights": (mask * is_learned / lengths).astype(np.float32),
    "advantages": mask * np.array(GOLDEN["advantages"], np.float32)[:, None],
    "sampled_losses": -np.array(GOLDEN["sampled"], np.float32) * mask,
    "reference_losses": -np.array(GOLDEN["reference"], np.float32) * mask,
  }


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["loss_type"])
def test_the_loss_and_its_gradient_are_those_of_trl_and_by_hand(case):
  objective, batch = objective_of(case), golden_batch(case)

  @jax.jit
  def loss(policy):
    return objective.loss({"losses": -policy}, batch, objective.totals(batch))[0]

  policy = jnp.array(GOLDEN["policy"], jnp.float32)
  value, gradient = jax.value_and_grad(loss)(policy)
  assert float(value) == pytest.approx(case["loss"], rel=1e-5)
  np.testing.assert_allclose(gradient, case["gradient"], atol=1e-6)
  # By hand: - ratio A where the ratio is not clipped, and beta (1 - reference / policy).
  ratio = np.exp(GOLDEN["policy"] - np.array(GOLDEN["sampled"]))
  advantages = batch["advantages"]
  cut = np.where(advantages > 0, ratio > 1 + case["high"], ratio < 1 - case["low"])
  kept = -ratio * advantages * ~cut
  of_kl = case["beta"] * (1 - np.exp(np.array(GOLDEN["reference"]) - GOLDEN["policy"]))
  by_hand = (kept + of_kl) * batch["weights"] / float(objective.totals(batch)["answers"])
  np.testing.assert_allclose(gradient, by_hand, atol=1e-6)


def group_of(rewards, lengths=(2, 2, 2, 2)):
  prompt = rollouts.Prompt(np.array([5, 6], np.int32), PROMPTS[0])
  answers = [
    base.Answer(np.arange(7, 7 + n, dtype=np.int32), np.full(n, 0.5, np.float32), True)
    for n in lengths
  ]
  return rollouts.Group(prompt, answers, [""] * 4, np.array(rewards, float), [""] * 4)


def test_advantages_compare_with_the_group():
  nan = float("nan")
  spread = group_of([1.0, 0.0, nan, 0.0])
  graded = np.array([1.0, 0.0, 0.0])
  expected = (graded - graded.mean()) / (graded.std(ddof=1) + rollouts.EPSILON)
  np.testing.assert_allclose(spread.advantages("std")[[0, 1, 3]], expected)
  np.testing.assert_allclose(spread.advantages("mean"), [2 / 3, -1 / 3, 0, -1 / 3])
  for silent_rewards in ([0.1] * 4, [nan, nan, nan, 1.0], [0.1, 0.1, nan, 0.1]):
    group = group_of(silent_rewards)
    assert not group.has_signal and (group.advantages("std") == 0).all()


class Scripted:
  """An actor whose answers are known: the prompt's last letters, so many times."""

  def __init__(self):
    self.draws = []

  def write(self, prompts, answers, max_tokens, temperature, draw=0):
    self.draws.append(draw)
    counts = [
      1 + (n + draw * int(prompt[-1])) % answers for prompt in prompts for n in range(answers)
    ]
    ids = [np.array(BYTES.encode(["x" * count])[0] + [BYTES.eos], np.int32) for count in counts]
    return [
      base.Answer(
        i[:max_tokens], np.ones(min(len(i), max_tokens), np.float32), len(i) <= max_tokens
      )
      for i in ids
    ]

  def rng(self, draw):
    return np.random.default_rng(draw)

  def place(self, rows):
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def prompts_of(tmp_path, objective, length=32):
  source = source_of(tmp_path / "a.jsonl", *PROMPTS)
  return objective.rows(source, BYTES, DataConfig(), ModelConfig(name="gpt"), length)


def in_process(monkeypatch, reward):
  """Grades by a function, without a process."""
  monkeypatch.setattr(
    grading,
    "of_all_processes",
    lambda grader, answers, records: (
      np.array([float(reward(a, r)) for a, r in zip(answers, records)]),
      [""] * len(answers),
    ),
  )


def test_answers_are_packed_and_those_cut_off_are_not_learned(tmp_path, monkeypatch):
  in_process(monkeypatch, lambda answer, record: len(answer))
  template = "{{ messages[0].content }}"
  objective = grpo.Objective(
    template=template, answers=4, max_tokens=4, learn_cut_off=False, normalize="answers"
  )
  rows = prompts_of(tmp_path, objective)
  asked = Scripted().place([rows.example(i, None) for i in (3, 1, 0)])
  made = objective.on_policy(asked, [rows], Scripted(), train=True)
  batch = {name: np.asarray(array) for name, array in made.batch.items()}
  assert made.tokens == (batch["segments"] > 0).sum() and len(batch["tokens"]) < 12
  learned = []
  for row in range(len(batch["tokens"])):
    for segment in range(1, batch["segments"][row].max() + 1):
      of_answer = (batch["segments"][row] == segment) & (batch["weights"][row] > 0)
      if of_answer.any():
        text = BYTES.decode(batch["targets"][row][of_answer][:-1])
        assert batch["weights"][row][of_answer].sum() == pytest.approx(1)
        assert len(set(batch["advantages"][row][of_answer].tolist())) == 1
        learned.append(len(text))
  # Of 1 to 4 letters and the end token, the longest does not fit.
  assert sorted(learned) == [1] * 3 + [2] * 3 + [3] * 3
  assert made.metrics["cut_off"] == (3, 12) and made.metrics["silent_groups"] == (0, 3)
  assert [sample["prompt"] for sample in made.samples] == ["say 3", "say 1"]


def test_prompts_without_signal_are_redrawn(tmp_path, monkeypatch):
  """In the first draw all answers earn the same; in the second, those of odd prompts differ."""
  actor = Scripted()
  in_process(monkeypatch, lambda answer, record: len(answer) * actor.draws[-1])
  objective = grpo.Objective(template="{{ messages[0].content }}", answers=4, redraws=3)
  rows = prompts_of(tmp_path, objective, 100)
  asked = actor.place([rows.example(i, None) for i in range(4)])
  made = objective.on_policy(asked, [rows], actor, train=True)
  assert actor.draws[:2] == [0, 1]
  weights, advantages = np.asarray(made.batch["weights"]), np.asarray(made.batch["advantages"])
  assert (advantages[weights > 0] != 0).any() and made.metrics["silent_groups"][0] >= 4
  answers = made.batch["segments"].max(-1).sum()
  assert answers <= 4 * 4 and answers % 4 == 0
  untried = dataclasses.replace(objective, redraws=0).on_policy(asked, [rows], actor, train=True)
  assert untried.metrics["silent_groups"][1] == 4


def actor_of(objective, model, params, mesh):
  leaves = flatten(params)
  placed = jax.device_put(leaves, sharding.shardings(leaves, mesh))
  config = model.backbone.config
  return sampler.Sampler(config, BYTES, {p: [False] for p in leaves}, mesh, 3, 1).at(placed, {}, 5)


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_sampler_and_the_trainer_agree(name, tmp_path):
  """On a mesh of every axis and on one device: the same answers, log-probabilities to 1e-5.

  With adapters: the sampler applies each layer alone, where its path is shorter than the rule says.
  """
  objective = grpo.Objective(template="{{ messages[0].content }}", max_tokens=9, temperature=0.7)
  rows = prompts_of(tmp_path, objective)
  prompts = [rows.prompts[n].ids[n:] for n in range(4)]
  targets = dict(lora_rank=2, lora_targets="^backbone/layers/attention")
  model = model_of(name, vocab_size=BYTES.vocab_size, max_length=64, dtype="float32", **targets)
  network = objective.model(model.backbone.config)
  leaves = flatten(params_of(model, seed=1))
  params = unflatten({k: v + 0.1 if k.endswith("lora_b") else v for k, v in leaves.items()})
  assert sum(k.endswith("lora_b") for k in leaves) >= 3
  written = []
  for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1}):
    count = math.prod(axes.values())
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:count])
    with jax.set_mesh(mesh):
      actor = actor_of(objective, model, params, mesh)
      answers = actor.write(prompts, 2, objective.max_tokens, objective.temperature)
      made = [
        rows.row([rollouts.Written(prompts[n // 2], answer, 1.0, 1.0)])
        for n, answer in enumerate(answers)
      ]
      batch = actor.place(made)
      losses = jax.jit(lambda b: network.apply({"params": params}, b, train=False)["losses"])(batch)
    learned = np.array(batch["weights"]) > 0
    assert learned.sum() == sum(len(answer.ids) for answer in answers)
    sampled = np.array(batch["sampled_losses"])
    np.testing.assert_allclose(np.array(losses)[learned], sampled[learned], rtol=0, atol=1e-5)
    written.append([answer.ids.tolist() for answer in answers])
  assert written[0] == written[1] and len(set(map(tuple, written[0]))) > 4


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("grpo") / "start"
  loop.train(tiny("gpt", f"text:{corpus}", training__steps=1), workdir, say=silent)
  return workdir


def run_config(start, tmp_path, reward, **objective):
  source = source_of(tmp_path / "prompts.jsonl", *PROMPTS)
  config = tiny(
    "gpt",
    source.spec,
    transfer__checkpoint=str(start),
    model__dropout=0.0,
    mesh__data=2,
    mesh__fsdp=2,
    mesh__tensor=2,
    training__steps=4,
    training__save_every=2,
    training__log_every=1,
    training__batch_size=4,
    optimizer__learning_rate=1e-3,
    optimizer__weight_decay=0.0,
  )
  settings = {"max_tokens": 6, "answers": 4, "template": "{{ messages[0].content }}", **objective}
  return dataclasses.replace(
    config, objective={**base.defaults("grpo"), "reward": reward, **settings}
  )


def params_after(workdir, step):
  return flatten(manager.restore(workdir / "checkpoints" / str(step), "params"))


def test_a_run_that_was_killed_ends_bit_equal(start, tmp_path, monkeypatch):
  """With several updates of a batch, redrawn prompts and a reference; killed between two saves."""
  config = run_config(
    start, tmp_path, "tests.reward_functions:length", iterations=2, redraws=1, kl=0.01
  )
  whole = loop.train(config, tmp_path / "whole", say=silent)
  steps = []
  metrics = grpo._metrics

  def killed(groups):
    steps.append(len(groups))
    if len(steps) == 4:
      raise RuntimeError("killed")
    return metrics(groups)

  monkeypatch.setattr(grpo, "_metrics", killed)
  with pytest.raises(RuntimeError, match="killed"):
    loop.train(config, tmp_path / "cut", say=silent)
  monkeypatch.setattr(grpo, "_metrics", metrics)
  cut = loop.train(config, tmp_path / "cut", say=silent)
  (of_prompts,) = (of_source["tokens"] for of_source in whole["data"].values())
  assert cut["tokens"] == whole["tokens"] > of_prompts  # the answers are learned too
  first, second = params_after(tmp_path / "whole", 4), params_after(tmp_path / "cut", 4)
  assert all((first[path] == second[path]).all() for path in first)
  logs = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in ("whole", "cut")
  ]
  for name in ("reward", "length", "entropy", "loss", "kl"):
    assert [line[name] for line in logs[0]] == [line[name] for line in logs[1]], name
  rollouts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("whole", "cut")]
  assert rollouts[0] == rollouts[1] and len(rollouts[0].splitlines()) == 4 * grpo.SHOWN
  assert whole["flops"] > 0 and sum(line["clipped"] for line in logs[0]) > 0


def test_equal_rewards_change_nothing(start, tmp_path):
  config = run_config(start, tmp_path, "tests.reward_functions:same")
  config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))
  loop.train(config, tmp_path / "run", say=silent)
  before, after = params_after(start, 1), params_after(tmp_path / "run", 1)
  assert all((before[path] == after[path]).all() for path in before)
  line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
  assert line["silent_groups"] == 1 and line["grad_norm"] == 0 and line["reward"] == 0.1


def test_a_reward_that_fails_is_bounded_named_and_counted(capsys):
  grader = grading.Grader("tests.reward_functions:troubled", 1.0)
  answers = ["a", "raise", "nan", "hang", "text", "exit", "none", "b"]
  grades = grader.grade(answers, [{"worth": n, "_where": f"f:{n}"} for n in range(8)])
  values = [grade.value for grade in grades]
  assert (values[0], values[-1]) == (0.0, 7.0) and all(map(math.isnan, values[1:-1]))
  assert [grade.fault for grade in grades[1:-1]] == [
    "raised ValueError: no such answer",
    "returned nan",
    "took more than 1 s",
    "returned str 'high', which is no number",
    "ended its process",
    "returned NoneType None, which is no number",
  ]
  told = capsys.readouterr().err
  assert "troubled raised ValueError: no such answer (f:1)" in told
  grader.close()


def test_what_a_reward_loads_is_not_counted_as_time_of_an_answer():
  grader = grading.Grader("tests.reward_functions:slow", 1.0)
  assert [grade.value for grade in grader.grade(["a", "bb"], [{}, {}])] == [1.0, 2.0]
  grader.close()
  with pytest.raises(UserError, match="unready cannot be prepared: RuntimeError: no such model"):
    grading.Grader("tests.reward_functions:unready", 1.0).grade(["a"], [{}])


def test_a_reward_that_never_works_ends_the_run(monkeypatch):
  grader = grading.Grader("tests.reward_functions:broken", 1.0)
  monkeypatch.setattr(
    grader,
    "grade",
    lambda answers, records: [
      grading.Grade(*process.grade(functions.resolve(grader.spec), answer, record))
      for answer, record in zip(answers, records)
    ],
  )
  with pytest.raises(UserError, match="gave none of 2 answers.*raised RuntimeError: out of order"):
    grading.of_all_processes(grader, ["a", "b"], [{}, {}])


def test_ready_rewards():
  record = {"answer": "42", "other": ["x", " y "]}
  exact = functions.resolve("exact_match")
  assert exact(" 42\n", record) == 1 and exact("420", record) == 0
  assert functions.resolve("exact_match:other")("y", record) == 1
  last = functions.resolve(r"regex:#### (-?\d+)$")
  assert last("so: #### 42", record) == 1 and last("so: #### 41", record) == 0
  assert functions.resolve("regex:^so")("so", {}) == 1


@pytest.mark.parametrize(
  "reward, message",
  [
    ("nothing", "must be module:function, or one of exact_match"),
    ("no.such.module:f", "cannot be imported: ModuleNotFoundError"),
    ("tests.reward_functions:missing", "cannot be imported: AttributeError"),
    ("tests.reward_functions:number", "is no function but of type int"),
    ("regex:(", "unterminated|missing"),
  ],
)
def test_a_reward_that_is_none_is_said(reward, message, tmp_path):
  source = source_of(tmp_path / "a.jsonl", *PROMPTS)
  with pytest.raises(UserError, match=message):
    grpo.Objective(reward=reward).fit([source], BYTES)


@pytest.mark.parametrize(
  "record, changes, message",
  [
    ({"prompt": "a" * 90}, {}, "no prompt of 1 to 33 tokens, which with .*max_tokens=32"),
    ({"prompt": "a"}, {"max_tokens": 65}, "max_tokens=65 leaves no room for a prompt"),
    ({"prompt": ""}, {}, "all of its texts are empty"),
    ({"prompt": []}, {}, "expected `prompt`, a text, or `messages`"),
    (
      {"messages": [{"role": "assistant", "content": "a"}]},
      {},
      "the last message must be the user's",
    ),
    ({"messages": [{"role": "judge", "content": "a"}]}, {}, "unknown role 'judge'"),
  ],
)
def test_prompts_that_cannot_be_answered_are_said(record, changes, message, tmp_path):
  objective = grpo.Objective(template="{{ messages[0].content }}", max_tokens=32)
  source = source_of(tmp_path / "a.jsonl", record)
  with pytest.raises(UserError, match=message):
    objective = dataclasses.replace(objective, **changes)
    objective.rows(source, BYTES, DataConfig(), ModelConfig(name="gpt"), 64)


def test_an_encoder_writes_no_answers(start, tmp_path):
  config = run_config(start, tmp_path, "exact_match")
  model = dataclasses.replace(config.model, name="bert")
  transfer = dataclasses.replace(config.transfer, checkpoint="")
  config = dataclasses.replace(config, model=model, transfer=transfer)
  with pytest.raises(UserError, match="objective.name=grpo trains decoder models, not .*bert"):
    loop.train(config, tmp_path / "run", say=silent)


@pytest.mark.slow
def test_a_task_of_reasoning_gym_gives_the_reward():
  import reasoning_gym

  entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
  reward = functions.resolve("reasoning_gym:chain_sum")
  assert reward(entry["answer"], entry) == 1 and reward("no", entry) < 1
  with pytest.raises(UserError, match="reasoning_gym:no_such_task"):
    functions.resolve("reasoning_gym:no_such_task")


@pytest.mark.slow
def test_a_checkpoint_of_sentiment_is_a_reward(reviews, bert_start, tmp_path):
  config = tiny(
    "classifier",
    f"jsonl:{reviews}/train.jsonl",
    transfer__checkpoint=str(bert_start),
    transfer__skip=("^head/",),
    training__steps=12,
    training__batch_size=32,
  )
  loop.train(config, tmp_path / "judge", say=silent)
  reward = functions.resolve(f"classifier:{tmp_path}/judge:good")
  functions.prepare(reward, "classifier")
  assert "program" in vars(reward)  # what it loads is there before the first answer
  probabilities = [reward(text, {}) for text in ("praise the film.", "slowly the film.", " ")]
  assert 0 < probabilities[1] < probabilities[0] < 1 and probabilities[2] == 0
  with pytest.raises(UserError, match="'great' is no label of .* labels are bad, good"):
    functions.resolve(f"classifier:{tmp_path}/judge:great")
