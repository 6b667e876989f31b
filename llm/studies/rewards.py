"""What a reward teaches beside demonstrations: sums of three digits, by a small decoder.

For each seed, supervised fine-tuning (SFT) on demonstrations gives a start: its first checkpoint
that answers a share of validation problems. From it go on

- GRPO, with the reward of exact match on other problems;
- SFT on the same demonstrations, for as long as GRPO took;
- DPO, on pairs of a right and a wrong answer of the start to GRPO's problems;
- SFT on GRPO's problems with their answers, for as long: what GRPO is not shown.

All are scored by exact match of the likeliest answer on the same held-out problems.
"""

import bisect
import dataclasses
import json
from typing import Any, Iterable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

import llm
from llm import sharding, storage
from llm.config import Config, MeshConfig, key
from llm.core import UserError
from llm.data import sources
from llm.inference.writer import Writer
from llm.models.decoding import Sampling
from llm.objectives import base as base_lib
from llm.objectives import grpo
from llm.studies import frame, rewards_report
from llm.studies.runs import Result, Run
from llm.training import evaluation

DIGITS = 3
MAX_TOKENS = DIGITS + 3  # the sum, the end token, and room for what is wrong
HELD_OUT = 1000  # problems that the arms are scored on
VALIDATION = 300  # problems by which the start is chosen
SAVE_EVERY = 20  # steps of the start
WRITTEN = 500  # prompts at a time


@dataclasses.dataclass(frozen=True)
class Study(frame.Study):
  """demonstrations, start_steps: of the SFT that gives the start. start_share: of the validation
  problems, which the start answers. problems: of GRPO. steps: of GRPO, each with `prompts` prompts.
  rate, dpo_rate: of GRPO and of DPO. dpo_prompts: that the pairs of DPO are made of."""

  title = "Rewards"
  writes_files = True

  demonstrations: int = key(5000, above=0)
  start_steps: int = key(500, at_least=SAVE_EVERY)
  start_share: float = key(0.25, above=0, below=1)
  problems: int = key(20_000, above=0, at_most=100_000)
  steps: int = key(600, above=0)
  prompts: int = key(64, above=0)
  rate: float = key(2e-4, above=0)
  dpo_rate: float = key(1e-4, above=0)
  dpo_prompts: int = key(2000, above=0)
  seeds: int = key(3, at_least=1)

  def quick(self) -> "Study":
    return dataclasses.replace(self, steps=100, dpo_prompts=1000, seeds=1)

  def next_runs(self, base: Config, done: Sequence[Result], folder: epath.Path) -> list[Run]:
    self._write_problems(self._problems(folder))
    starts = [self._start(base, seed, folder) for seed in range(self.seeds)]
    if len(done) < len(starts):
      return starts
    second = []
    for start in _of(done, "start"):
      second += [self._grpo(base, start, folder), self._dpo(base, start, folder)]
    if len(done) < len(starts) + len(second):
      return [*starts, *second]
    start_of = {start.run.facts["seed"]: start for start in _of(done, "start")}
    third = []
    for of_grpo in _of(done, "grpo"):
      start = start_of[of_grpo.run.facts["seed"]]
      steps = _steps_in(_training_seconds(of_grpo), start)
      third += [
        self._sft(base, start, folder, "sft", "demonstrations", steps),
        self._sft(base, start, folder, "sft_answers", "answered", steps),
      ]
    return [*starts, *second, *third]

  def _problems(self, folder: epath.Path) -> epath.Path:
    """The folder of the problems; that of other settings is another one."""
    return folder / f"problems-{self.demonstrations}-{self.problems}"

  def _write_problems(self, folder: epath.Path) -> None:
    """held_out, validation, demonstrations, prompts and answered: the last two of the same sums."""
    if (folder / "answered.jsonl").exists():
      return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    learned = HELD_OUT + VALIDATION
    later = learned + self.demonstrations
    numbers = rng.permutation((high - low) ** 2)[: later + self.problems]
    terms = [divmod(int(number), high - low) for number in numbers]
    sums = [(f"{a + low}+{b + low}=", str(a + b + 2 * low)) for a, b in terms]
    sets = {
      "held_out": [_checked(*pair) for pair in sums[:HELD_OUT]],
      "validation": [_checked(*pair) for pair in sums[HELD_OUT:learned]],
      "demonstrations": [_shown(*pair) for pair in sums[learned:later]],
      "prompts": [_checked(*pair) for pair in sums[later:]],
      "answered": [_shown(*pair) for pair in sums[later:]],
    }
    for name, records in sets.items():
      storage.write_whole(folder / f"{name}.jsonl", _lines(records))

  def _start(self, base: Config, seed: int, folder: epath.Path) -> Run:
    training = dataclasses.replace(
      base.training,
      steps=self.start_steps,
      seed=seed,
      save_every=SAVE_EVERY,
      keep=self.start_steps,  # all of them
    )
    data = _data(base, self._problems(folder) / "demonstrations.jsonl")
    config = dataclasses.replace(base, training=training, data=data)
    return Run(f"start-{seed}", config, {"arm": "start", "seed": seed})

  def _after(
    self, base: Config, start: Result, folder: epath.Path, arm: str, path: str, **groups: Any
  ) -> Run:
    """A run that goes on from a start. groups: what differs from the config of the start."""
    seed = start.run.facts["seed"]
    checkpoint = str(self._chosen(start.run, folder))
    transfer = dataclasses.replace(base.transfer, checkpoint=checkpoint)
    data = _data(base, self._problems(folder) / path)
    training = dataclasses.replace(base.training, seed=seed, **groups.pop("training"))
    config = dataclasses.replace(base, transfer=transfer, data=data, training=training, **groups)
    return Run(f"{arm}-{seed}", config, {"arm": arm, "seed": seed})

  def _grpo(self, base: Config, start: Result, folder: epath.Path) -> Run:
    objective = {**base_lib.defaults("grpo"), "max_tokens": MAX_TOKENS}
    return self._after(
      base,
      start,
      folder,
      "grpo",
      "prompts.jsonl",
      objective=objective,
      optimizer=dataclasses.replace(base.optimizer, learning_rate=self.rate, beta2=0.99),
      training={
        "steps": self.steps,
        "batch_size": self.prompts,
        "log_every": 10,
        "save_every": 50,
      },
    )

  def _dpo(self, base: Config, start: Result, folder: epath.Path) -> Run:
    name = f"pairs-{start.run.facts['seed']}-{self.dpo_prompts}.jsonl"
    self._write_pairs(self._chosen(start.run, folder), folder, self._problems(folder) / name)
    return self._after(
      base,
      start,
      folder,
      "dpo",
      name,
      objective=base_lib.defaults("preference"),
      optimizer=dataclasses.replace(base.optimizer, learning_rate=self.dpo_rate),
      training={"epochs": 1.0, "steps": 0, "batch_size": 16},
    )

  def _sft(
    self, base: Config, start: Result, folder: epath.Path, arm: str, data: str, steps: int
  ) -> Run:
    return self._after(base, start, folder, arm, f"{data}.jsonl", training={"steps": steps})

  def _chosen(self, start: Run, folder: epath.Path) -> epath.Path:
    """The first checkpoint of a start that answers start_share of the validation problems.

    The share is taken to rise with the steps. The choice is kept. Raises UserError where the last
    one answers fewer.
    """
    workdir = _workdir(folder, start)
    path = workdir / f"chosen-{self.start_share:g}.json"
    if path.exists():
      return workdir / "checkpoints" / json.loads(path.read_text())
    steps = range(SAVE_EVERY, self.start_steps + 1, SAVE_EVERY)
    validation = self._problems(folder) / "validation.jsonl"

    def share(step: int) -> float:
      return float(_exact_match(workdir / "checkpoints" / str(step), validation).mean())

    place = bisect.bisect_left(steps, self.start_share, key=share)
    if place == len(steps):
      raise UserError(
        f"{start.name} answers no more than {share(steps[-1]):.0%} of the validation problems: set "
        "more config.study.demonstrations or config.study.start_steps"
      )
    storage.write_whole(path, json.dumps(str(steps[place])))
    return workdir / "checkpoints" / str(steps[place])

  def _write_pairs(self, start: epath.Path, folder: epath.Path, path: epath.Path) -> None:
    """For each problem to which the start gives right and wrong answers, one of each."""
    if path.exists():
      return
    problems = _read(self._problems(folder) / "prompts.jsonl")[: self.dpo_prompts]
    writer = Writer(llm.load(start))
    each = grpo.Objective().answers
    pairs = []
    for first in range(0, len(problems), WRITTEN):
      asked = [problem for problem in problems[first : first + WRITTEN] for _ in range(each)]
      texts = writer.write(
        [problem["prompt"] for problem in asked], MAX_TOKENS, Sampling(temperature=1.0), seed=first
      )
      for number in range(0, len(asked), each):
        pairs += _pair(asked[number], [w.text for w in texts[number : number + each]])
    if not pairs:
      raise UserError(f"{start} answers no problem both right and wrong: nothing to prefer")
    storage.write_whole(path, _lines(pairs))

  def report(self, done: Sequence[Result], folder: epath.Path) -> tuple[dict[str, Any], str]:
    right = {
      (result.run.facts["arm"], result.run.facts["seed"]): self._right(result.run, folder)
      for result in done
      if not result.diverged
    }
    arms = []
    for arm in rewards_report.ARMS:
      if seconds := [_training_seconds(result) for result in _of(done, arm)]:
        figures = rewards_report.compared(right, arm, self.seeds)
        arms.append({"name": arm, **figures, "seconds": float(np.mean(seconds))})
    rewards_report.draw([_workdir(folder, result.run) for result in _of(done, "grpo")], folder)
    return {"arms": arms}, _in_words(arms, self)

  def _right(self, one_run: Run, folder: epath.Path) -> np.ndarray:
    """Of each held-out problem, whether a run answers it right; kept beside the run."""
    workdir = _workdir(folder, one_run)
    is_start = one_run.facts["arm"] == "start"
    checkpoint = self._chosen(one_run, folder) if is_start else workdir
    path = workdir / f"held_out-{checkpoint.name}.json"
    if not path.exists():
      right = _exact_match(checkpoint, self._problems(folder) / "held_out.jsonl")
      storage.write_whole(path, json.dumps(right.tolist()))
    return np.array(json.loads(path.read_text()))


def _checked(prompt: str, answer: str) -> dict:
  """A problem, with the answer for the reward alone."""
  return {"prompt": prompt, "answer": answer}


def _shown(prompt: str, answer: str) -> dict:
  """A demonstration."""
  roles = (("user", prompt), ("assistant", answer))
  return {"messages": [{"role": role, "content": text} for role, text in roles]}


def _pair(problem: dict, texts: Sequence[str]) -> list[dict]:
  """The first right and the first wrong text as a preference; [] where one is missing."""
  right = [text for text in texts if text == problem["answer"]]
  wrong = [text for text in texts if text != problem["answer"] and text.strip()]
  if not right or not wrong:
    return []
  return [{"prompt": problem["prompt"], "chosen": right[0], "rejected": wrong[0]}]


def _lines(records: Iterable[dict]) -> str:
  return "".join(json.dumps(record) + "\n" for record in records)


def _read(path: epath.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _data(base: Config, path: epath.Path) -> Any:
  return dataclasses.replace(base.data, train=f"jsonl:{path}")


def _workdir(folder: epath.Path, one_run: Run) -> epath.Path:
  return folder / "runs" / one_run.name


def _of(done: Sequence[Result], arm: str) -> list[Result]:
  return [r for r in done if r.run.facts["arm"] == arm and not r.diverged]


def _training_seconds(result: Result) -> float:
  """Without compilation, evaluation and checkpoints; with what the model wrote."""
  shares = result.figures["shares"]
  return result.figures["seconds"] * sum(shares[n] for n in ("training", "input", "writing"))


def _steps_in(seconds: float, start: Result) -> int:
  """How many steps of SFT take so long, at the pace of a start."""
  return max(1, round(seconds * start.figures["step"] / _training_seconds(start)))


def _exact_match(checkpoint: epath.Path, problems: epath.Path) -> np.ndarray:
  """1 for each problem to which the likeliest answer of a checkpoint is right, else 0."""
  bundle = llm.load(checkpoint)
  config = bundle.config
  length = config.training.sequence_length
  objective = grpo.Objective(max_tokens=MAX_TOKENS, template=config.objective["template"])
  source = sources.parse_one(f"jsonl:{problems}", config.data)
  rows = objective.rows(source, bundle.tokenizer, config.data, config.model, length)
  mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    evaluated = evaluation.of_checkpoint(bundle, objective, rows, length, WRITTEN, mesh)
  return objective.outcomes(evaluated.predictions, rows)["reward"]


def _in_words(arms: Sequence[Mapping[str, Any]], study: Study) -> str:
  return "\n".join(
    [
      f"Sums of two numbers of {DIGITS} digits. The start: SFT on {study.demonstrations:,} "
      f"demonstrations, up to {study.start_share:.0%} of {VALIDATION} validation problems. GRPO: "
      f"{study.steps} steps of {study.prompts} of {study.problems:,} other problems. Exact match "
      f"of the likeliest answer on {HELD_OUT:,} held-out problems, means of {study.seeds} seeds; "
      "Student's intervals with seeds and problems taken as drawn.\n",
      rewards_report.table(arms) + "\n",
      "The seconds are those of training, with what the model wrote in it. The answers for the "
      "pairs of DPO were written before, and are not in its seconds.\n",
      "![reward, length, entropy and silent groups of GRPO](rewards.png)\n",
    ]
  )
