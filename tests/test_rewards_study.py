"""The study of rewards: problems in no two sets, pairs of right and wrong, an interval by hand."""

import json

import numpy as np
import pytest

from configs import study_rewards
from llm import config as config_lib
from llm.studies import frame, rewards, rewards_report
from llm.studies.frame import Result


def study_of(**settings):
  config = study_rewards.get_config()
  config.study.update(settings)
  return frame.build("rewards", config.study.to_dict()), config_lib.freeze(config.run)


def texts_of(path):
  for line in path.read_text().splitlines():
    record = json.loads(line)
    if "prompt" in record:
      yield record["prompt"], record["answer"]
    else:
      yield tuple(message["content"] for message in record["messages"])


def test_no_problem_is_in_two_sets_and_all_answers_are_right(tmp_path):
  study, base = study_of(demonstrations=300, problems=500, seeds=2)
  runs = study.next_runs(base, [], tmp_path)
  assert [run.name for run in runs] == ["start-0", "start-1"]
  folder = tmp_path / "problems-300-500"
  names = ("held_out", "validation", "demonstrations")
  sets = [dict(texts_of(folder / f"{name}.jsonl")) for name in names]
  prompts, answered = (dict(texts_of(folder / f"{name}.jsonl")) for name in ("prompts", "answered"))
  assert prompts == answered and len(prompts) == 500
  every = {**sets[0], **sets[1], **sets[2], **prompts}
  assert len(every) == rewards.HELD_OUT + rewards.VALIDATION + 300 + 500
  for prompt, answer in every.items():
    first, second = prompt.rstrip("=").split("+")
    assert int(first) + int(second) == int(answer) and len(first) == len(second) == 3


def test_a_pair_has_a_right_and_a_wrong_answer():
  problem = {"prompt": "100+100=", "answer": "200"}
  assert rewards._pair(problem, ["210", "200", "200"]) == [
    {"prompt": "100+100=", "chosen": "200", "rejected": "210"}
  ]
  assert rewards._pair(problem, ["200", "200", " "]) == []


def test_the_interval_is_that_of_paired_differences():
  rng = np.random.default_rng(0)
  before = (rng.random((3, 400)) < 0.3).astype(float)
  after = np.maximum(before, rng.random((3, 400)) < 0.4)
  right = {("start", s): before[s] for s in range(3)} | {("grpo", s): after[s] for s in range(3)}
  row = rewards_report.compared(right, "grpo", 3)
  gain = row["exact_match_after"] - row["exact_match_before"]
  assert gain == pytest.approx(100 * (after - before).mean())
  # By the normal approximation, from the problems alone; seeds add little here.
  deviation = 100 * (after - before).mean(0).std() / 20
  assert row["low"] == pytest.approx(gain - 1.96 * deviation, abs=2)
  assert row["high"] == pytest.approx(gain + 1.96 * deviation, abs=2)


def test_sft_goes_on_for_as_long_as_grpo_took():
  shares = {"training": 0.5, "input": 0.1, "writing": 0.0}
  start = Result(None, {"seconds": 100.0, "step": 300, "shares": shares})
  of_grpo = Result(None, {"seconds": 50.0, "shares": {**shares, "writing": 0.2}})
  assert rewards._training_seconds(of_grpo) == pytest.approx(40)
  assert rewards._steps_in(40.0, start) == 200
