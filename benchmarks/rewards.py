"""Tokens trained a second by GRPO, beside TRL on torch: the same network, prompts and reward.

  pip install -e '.[bench]' && python benchmarks/rewards.py [--rounds=3] [--steps=12]

A GPT of 4 layers and width 128 over single characters, with random weights, so that both sides
write answers of the full length. A step has 32 prompts of 8 characters with 8 answers of 16 tokens
each, exact match as the reward, no divergence from a reference. Tokens are those of prompts and
answers. Both sides in float32, ours with bfloat16 products too. Sides take turns, each in a process
of its own; prints medians of the rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS, HEADS, WIDTH = 4, 4, 128
PROMPTS, ANSWERS, WRITTEN = 32, 8, 16
PROMPT = "123+456="
TOKENS = PROMPTS * ANSWERS * (len(PROMPT) + WRITTEN)  # of a step, at most
SIDES = ("ours float32", "ours auto", "trl float32")


def problems() -> list[dict]:
  """Sums of three digits, of one length."""
  return [
    {"prompt": f"{a}+{b}=", "answer": str(a + b)}
    for a in range(100, 1000, 7)
    for b in range(100, 1000, 97)
  ]


def ours(dtype: str, steps: int, folder: pathlib.Path) -> float:
  """Tokens a second of llm.train, the median of its steps after the first."""
  from configs import finetune_grpo
  from llm import command
  from llm import config as config_lib
  from llm.training import loop

  data = folder / "problems.jsonl"
  data.write_text("".join(json.dumps(problem) + "\n" for problem in problems()))
  config = finetune_grpo.get_config()
  config.model.update(
    name="gpt", num_layers=LAYERS, num_heads=HEADS, width=WIDTH, mlp_dim=4 * WIDTH, max_length=128
  )
  config.model.dtype = dtype
  config.tokenizer.name = "bytes"
  config.data.train = f"jsonl:{data}"
  config.objective.update(template="{{ messages[0].content }}", answers=ANSWERS, max_tokens=WRITTEN)
  config.training.update(
    steps=steps, batch_size=PROMPTS, sequence_length=128, log_every=1, save_every=0
  )
  command.start_cpu()
  loop.train(config_lib.freeze(config), folder / "run", say=lambda *_: None)
  lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  return statistics.median(json.loads(line)["tokens_per_second"] for line in lines[2:])


def tokenizer_of_characters():
  """A tokenizer of transformers with a piece for each character."""
  import tokenizers
  import transformers
  from tokenizers import Regex, models, pre_tokenizers

  pieces = ["<end>", "<unknown>", *"0123456789+="]
  pieces += [f"<{n}>" for n in range(260 - len(pieces))]
  vocabulary = {piece: number for number, piece in enumerate(pieces)}
  fast = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
  fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=fast, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
  )


def trl(steps: int, folder: pathlib.Path) -> float:
  """Tokens a second of TRL's GRPOTrainer, the median of its steps after the second."""
  import datasets
  import torch
  import transformers
  from trl import GRPOConfig, GRPOTrainer

  torch.manual_seed(0)
  model = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      vocab_size=260, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )
  )  # fmt: skip
  lengths: list[float] = []
  ends: list[float] = []

  def reward(completions, answer, completion_ids, **_):
    lengths.append(sum(len(PROMPT) + len(ids) for ids in completion_ids))
    return [float(text.strip() == gold) for text, gold in zip(completions, answer)]

  class Clock(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
      ends.append(time.perf_counter())

  settings = GRPOConfig(
    output_dir=str(folder),
    max_steps=steps,
    per_device_train_batch_size=PROMPTS * ANSWERS,
    num_generations=ANSWERS,
    max_completion_length=WRITTEN,
    temperature=1.0,
    learning_rate=1e-6,
    beta=0.0,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to=[],
    logging_steps=steps,
    save_strategy="no",
    disable_tqdm=True,
  )
  trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=settings,
    train_dataset=datasets.Dataset.from_list(problems()),
    processing_class=tokenizer_of_characters(),
    callbacks=[Clock()],
  )
  trainer.train()
  seconds = [after - before for before, after in zip(ends, ends[1:])]
  return statistics.median(n / s for n, s in zip(lengths[2:], seconds[1:]))


def measured(side: str, steps: int) -> float:
  """The figure of a side, in a process of its own."""
  command = [sys.executable, __file__, f"--side={side}", f"--steps={steps}"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  if done.returncode:
    raise SystemExit(f"{side}: {done.stderr[-2000:]}")
  return float(done.stdout.strip().splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--side", choices=SIDES)
  options = parser.parse_args()
  if options.side:
    with tempfile.TemporaryDirectory() as folder:
      name, dtype = options.side.split()
      path = pathlib.Path(folder)
      print(trl(options.steps, path) if name == "trl" else ours(dtype, options.steps, path))
    return
  figures = {side: [] for side in SIDES}
  for _ in range(options.rounds):
    for side in SIDES:
      figures[side].append(measured(side, options.steps))
  print(f"{TOKENS:,} tokens a step at most; tokens a second, median of {options.rounds} rounds")
  for side, values in figures.items():
    print(
      f"{side:12}  {statistics.median(values):9,.0f}  ({', '.join(f'{v:,.0f}' for v in values)})"
    )


if __name__ == "__main__":
  main()
