"""Writing beside transformers' generate on torch, in turns: same weights, greedy, 128 new tokens.

  pip install -e '.[bench]'
  python benchmarks/decode.py [--shapes=6x384 --batches=1,32 --rounds=3]

Each side runs in a process of its own: ours as `model.dtype=auto` takes it, torch in float32 and in
bfloat16. Prints medians of tokens a second, and the ratio of each to ours.
"""

import argparse
import multiprocessing
import pathlib
import statistics
import tempfile
import time

import numpy as np

# name -> layers, width, heads, vocabulary
SHAPES = {
  "6x384": (6, 384, 6, 4096),
  "124m": (12, 768, 12, 50_257),
}
PROMPT, NEW = 16, 128


def model_config(shape: str, dtype: str):
  """A GPT-2 of one shape."""
  from llm.config import ModelConfig

  layers, width, heads, vocab = SHAPES[shape]
  return ModelConfig(
    name="gpt",
    num_layers=layers,
    width=width,
    num_heads=heads,
    mlp_dim=4 * width,
    vocab_size=vocab,
    max_length=256,
    dropout=0.0,
    dtype=dtype,
  )


def make(shape: str, folder: pathlib.Path):
  """Random weights in the layout of transformers, for both sides."""
  import json

  from llm.checkpoints import export, tensors
  from llm.checkpoints.families import gpt2
  from llm.objectives import base

  config, rng = model_config(shape, "float32"), np.random.default_rng(0)
  shapes = base.shapes(base.build({"name": "causal_lm"}), config)
  leaves = {
    path: rng.normal(scale=0.02, size=size).astype(np.float32) for path, size in shapes.items()
  }
  export.save(
    folder / "model.safetensors", lambda: tensors.from_params(gpt2.FAMILY, leaves, config)
  )
  (folder / "config.json").write_text(
    json.dumps(gpt2.FAMILY.config(config) | {"architectures": ["GPT2LMHeadModel"]})
  )


def prompts(shape: str, rows: int) -> np.ndarray:
  """Random ids, rows x PROMPT."""
  return np.random.default_rng(1).integers(1, SHAPES[shape][3], (rows, PROMPT))


def ours(shape, folder, rows, dtype):
  """run() -> tokens written."""
  import types

  from llm import command
  from llm.checkpoints import huggingface, tensors
  from llm.checkpoints.families import gpt2
  from llm.data.tokenizer import ByteTokenizer
  from llm.inference import writer
  from llm.objectives import base
  from llm.training import experiment

  command.start_cpu()
  command.use_compilation_cache()
  config = model_config(shape, dtype)
  wanted = base.shapes(base.build({"name": "causal_lm"}), config)
  params = tensors.to_params(gpt2.FAMILY, huggingface.Weights(folder), wanted, config)
  made = writer.Writer(
    experiment.Bundle(None, params, ByteTokenizer(), types.SimpleNamespace(model=config))
  )
  made.tokenizer.eos = -1  # nothing ends a text
  ids = prompts(shape, rows).tolist()
  return lambda: np.array([written.tokens for written in made.write(ids, NEW)])


def theirs(shape, folder, rows, dtype):
  """run() -> tokens written."""
  import torch
  import transformers

  model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
  ids = torch.tensor(prompts(shape, rows))
  return lambda: model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=NEW,
    min_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )[:, PROMPT:].numpy()


SIDES = (ours, "auto"), (theirs, "float32"), (theirs, "bfloat16")


def worker(side, pipe, *arguments):
  """Answers "run" with (seconds, tokens)."""
  run = side(*arguments)
  run()
  pipe.send("ready")
  while pipe.recv() == "run":
    start = time.perf_counter()
    tokens = run()
    pipe.send((time.perf_counter() - start, tokens))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", default="6x384")
  parser.add_argument("--batches", default="1,32")
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  context = multiprocessing.get_context("spawn")
  for shape in options.shapes.split(","):
    with tempfile.TemporaryDirectory() as folder:
      make(shape, pathlib.Path(folder))
      for rows in map(int, options.batches.split(",")):
        pipes, seconds, wrote = {}, {}, {}
        for side, dtype in SIDES:
          pipes[side, dtype], there = context.Pipe()
          arguments = (side, there, shape, pathlib.Path(folder), rows, dtype)
          context.Process(target=worker, args=arguments, daemon=True).start()
          pipes[side, dtype].recv()
        for _ in range(options.rounds):
          for side, pipe in pipes.items():
            pipe.send("run")
            took, wrote[side] = pipe.recv()
            seconds.setdefault(side, []).append(took)
        for pipe in pipes.values():
          pipe.send("end")
        for side, times in seconds.items():
          pace = rows * NEW / statistics.median(times)
          ratio = statistics.median(b / a for a, b in zip(seconds[SIDES[0]], times))
          same = (wrote[SIDES[0]] == wrote[side]).mean()
          print(
            f"{shape}, batch {rows}: {side[0].__name__} {side[1]} {pace:,.0f} tokens/s, "
            f"ours / this {ratio:.2f}; {same:.1%} of the tokens equal",
            flush=True,
          )


if __name__ == "__main__":
  main()
