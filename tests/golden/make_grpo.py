"""Makes grpo.json: what TRL's GRPOTrainer computes of given log-probabilities.

  pip install trl && python tests/golden/make_grpo.py

Each case has its settings, the loss and its gradient for the log-probability of every token. The
arrays of all cases are the same: rows of answers, padded at their ends.
"""

import collections
import json
import pathlib
import types

import torch
from trl import GRPOTrainer

ROWS, TOKENS, LONGEST = 6, 9, 12
LENGTHS = (9, 4, 1, 6, 9, 3)
CASES = [
  {"loss_type": "bnpo", "low": 0.2, "high": 0.2, "beta": 0.0, "cut_off": False},
  {"loss_type": "bnpo", "low": 0.2, "high": 0.28, "beta": 0.05, "cut_off": True},
  {"loss_type": "grpo", "low": 0.1, "high": 0.3, "beta": 0.04, "cut_off": True},
  {"loss_type": "dr_grpo", "low": 0.2, "high": 0.2, "beta": 0.1, "cut_off": False},
]


def arrays():
  """Log-probabilities of the policy, of the draw and of the reference; advantages; the mask."""
  generator = torch.Generator().manual_seed(0)
  policy = -2 * torch.rand(ROWS, TOKENS, generator=generator)
  sampled = policy + 0.4 * torch.randn(ROWS, TOKENS, generator=generator)
  reference = policy + 0.3 * torch.randn(ROWS, TOKENS, generator=generator)
  advantages = torch.randn(ROWS, generator=generator)
  mask = (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).float()
  return policy, sampled, reference, advantages, mask


def trainer_of(case, policy):
  """As much of a trainer as its loss asks for."""
  accelerator = types.SimpleNamespace(
    num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
  )
  return types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *a, **k: (policy, torch.zeros_like(policy), None),
    args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    accelerator=accelerator,
    model=types.SimpleNamespace(training=True),
    _metrics={"train": collections.defaultdict(list)},
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level="token",
    beta=case["beta"],
    loss_type=case["loss_type"],
    epsilon_low=case["low"],
    epsilon_high=case["high"],
    current_gradient_accumulation_steps=1,
    max_completion_length=LONGEST,
    use_vllm=False,
    _entropy_bonus_enabled=False,
  )


def computed(case):
  """The case with its loss and gradient."""
  policy, sampled, reference, advantages, mask = arrays()
  policy.requires_grad_()
  if case["cut_off"]:  # the answers that fill the row are not learned
    mask = mask * (mask.sum(1, keepdim=True) < TOKENS)
  inputs = {
    "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
    "prompt_mask": torch.ones(ROWS, 1),
    "completion_ids": torch.zeros(ROWS, TOKENS, dtype=torch.long),
    "completion_mask": mask,
    "advantages": advantages,
    "old_per_token_logps": sampled,
    "ref_per_token_logps": reference,
  }
  loss = GRPOTrainer._compute_loss(trainer_of(case, policy), None, inputs)
  loss.backward()
  return {**case, "loss": loss.item(), "gradient": policy.grad.tolist()}


def main():
  names = ("policy", "sampled", "reference", "advantages", "mask")
  values = {name: array.tolist() for name, array in zip(names, arrays())}
  result = {"longest": LONGEST, **values, "cases": [computed(case) for case in CASES]}
  path = pathlib.Path(__file__).parent / "grpo.json"
  path.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
  main()
