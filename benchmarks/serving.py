"""Serving: 16 clients at once beside one by one, and beside transformers with the same checkpoint.

  pip install -e '.[serve,test,bench]'
  python -m benchmarks.serving [--checkpoint=embedded:smollm2 --clients=16 --requests=32]
      [--sides=server,writer,torch]

All answer the same requests, of several lengths, greedily. `server` is llm.serve, asked by OpenAI's
client. `writer` is llm.generate's own writing, one prompt at a time. `torch` is generate of
transformers, one prompt at a time and in batches of as many as there are clients.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = "the old house stood near a river where many boats came by in summer with fruit".split()


def asked(count: int) -> list[tuple[str, int]]:
  """(prompt, tokens to write) of each request."""
  rng = np.random.default_rng(0)
  return [
    (" ".join(rng.choice(WORDS, rng.integers(4, 60))), int(rng.integers(16, 80)))
    for _ in range(count)
  ]


def report(name: str, tokens: int, seconds: float):
  print(f"{name:<44} {tokens / seconds:8.1f} tokens/s  ({tokens} in {seconds:.1f} s)", flush=True)


def of_server(checkpoint: str, requests: list[tuple[str, int]], clients: int):
  """Throughput and time to the first token of llm.serve."""
  from tests.serving import Serving

  with tempfile.TemporaryDirectory() as folder:
    serving = Serving(pathlib.Path(folder) / "state", f"base={checkpoint}").start()
    try:
      client = serving.client(serving.key())

      def answer(request: tuple[str, int]) -> tuple[int, float, float]:
        """(tokens, seconds to the first text, seconds to the end)."""
        prompt, tokens = request
        began, first, written = time.perf_counter(), 0.0, 0
        for chunk in client.completions.create(
          model="base",
          prompt=prompt,
          max_tokens=tokens,
          temperature=0,
          stream=True,
          stream_options={"include_usage": True},
        ):
          first = first or time.perf_counter() - began
          written = chunk.usage.completion_tokens if chunk.usage else written
        return written, first, time.perf_counter() - began

      def at_once(count: int, name: str):
        """Asks with so many clients."""
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
          answers = list(pool.map(answer, requests))
        seconds = time.perf_counter() - began
        report(name, sum(tokens for tokens, _, _ in answers), seconds)
        firsts = sorted(first for _, first, _ in answers)
        middle, late = statistics.median(firsts), firsts[int(0.95 * (len(firsts) - 1))]
        print(f"  to the first token: median {middle * 1e3:.0f} ms, 95% {late * 1e3:.0f} ms")

      for count, name in ((clients, f"{clients} clients at once"), (1, "one by one")):
        at_once(count, "(compiling)")
        at_once(count, f"server, {name}")
    finally:
      serving.stop()


def of_writer(checkpoint: str, requests: list[tuple[str, int]]):
  """Throughput of llm.generate's writing, one prompt at a time."""
  import llm
  from llm import command
  from llm.inference.writer import Writer

  command.use_compilation_cache()
  command.start_cpu()
  writer = Writer(llm.load(checkpoint))
  for name in ("(compiling)", "writer, one by one"):
    began = time.perf_counter()
    written = sum(len(writer.write([prompt], tokens)[0].tokens) for prompt, tokens in requests)
    report(name, written, time.perf_counter() - began)


def of_torch(checkpoint: str, requests: list[tuple[str, int]], clients: int):
  """Throughput of transformers' generate."""
  import torch
  import transformers

  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "llm.convert", "to_hf", f"--checkpoint={checkpoint}"]
    subprocess.run([*command, f"--output={folder}/hf"], check=True, cwd=ROOT, capture_output=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/hf", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for dtype in (torch.float32, torch.bfloat16):
      model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=dtype).eval()
      for size in (1, clients):
        generate(model, tokenizer, requests[:size])
        began = time.perf_counter()
        parts = [requests[i : i + size] for i in range(0, len(requests), size)]
        name = "one by one" if size == 1 else f"in batches of {size}"
        written = sum(generate(model, tokenizer, part) for part in parts)
        report(f"transformers {dtype}, {name}", written, time.perf_counter() - began)


def generate(model, tokenizer, part: list[tuple[str, int]]) -> int:
  """Writes a batch until its longest answer has ended. The tokens that were asked for count."""
  import torch

  batch = tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True)
  longest = max(tokens for _, tokens in part)
  with torch.inference_mode():
    ids = model.generate(**batch, max_new_tokens=longest, do_sample=False)
  new = ids[:, batch["input_ids"].shape[1] :]
  ends = new == tokenizer.eos_token_id
  lengths = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1])
  return sum(min(int(length), tokens) for length, (_, tokens) in zip(lengths, part))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", default="embedded:smollm2")
  parser.add_argument("--clients", type=int, default=16)
  parser.add_argument("--requests", type=int, default=32)
  parser.add_argument("--sides", default="server,writer,torch")
  flags = parser.parse_args()
  requests = asked(flags.requests)
  sides = flags.sides.split(",")
  if "server" in sides:
    of_server(flags.checkpoint, requests, flags.clients)
  if "writer" in sides:
    of_writer(flags.checkpoint, requests)
  if "torch" in sides:
    of_torch(flags.checkpoint, requests, flags.clients)


if __name__ == "__main__":
  main()
