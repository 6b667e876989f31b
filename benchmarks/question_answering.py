"""Fine-tunes on questions about real abstracts: windows packed into rows, beside padded torch.

  pip install -e '.[bench]'
  python benchmarks/question_answering.py [--layers=4 --width=256 --length=384 --rounds=3]

Both sides train a BERT of one shape on the same windows (float32, dropout off), in turns. The
script prints the windows a second of each. Torch's BertForQuestionAnswering takes one window a row,
padded to the maximum, as its examples do.
"""

import argparse
import multiprocessing
import statistics
import time

import numpy as np


def windows(options):
  """(rows of the abstracts, their windows), tokenized by the vocabulary of embedded:minilm."""
  from llm import cache
  from llm.checkpoints import huggingface
  from llm.config import DataConfig, ModelConfig
  from llm.data import embedded, sources
  from llm.objectives import span_qa

  tokenizer = huggingface.read_tokenizer(embedded.model("minilm", cache.cache_dir()))
  objective = span_qa.Objective()
  rows = objective.rows(
    sources.parse("embedded:abstracts", DataConfig())[0],
    tokenizer,
    DataConfig(),
    ModelConfig(name="bert"),
    options.length,
  )
  return objective, rows, tokenizer.vocab_size


def ours(options):
  """run(steps) -> windows trained on."""
  import jax

  from llm import command, sharding
  from llm.config import MeshConfig, ModelConfig, OptimizerConfig
  from llm.data import batches
  from llm.training import experiment, optimizer, partition
  from llm.training import step as step_lib

  command.start_cpu()
  command.use_compilation_cache()
  objective, rows, vocab = windows(options)
  model = experiment.build(
    objective,
    ModelConfig(
      name="bert",
      num_layers=options.layers,
      width=options.width,
      num_heads=options.width // 64,
      mlp_dim=4 * options.width,
      vocab_size=vocab,
      max_length=512,
      dropout=0.0,
      dtype="float32",
    ),
  )
  made = batches.Batches([rows], [1.0], options.rows, 0)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    params = step_lib.init_params(model, made[0], jax.random.key(0))
    marks = partition.frozen_layers(params, "")
    trained, frozen = partition.split(
      jax.device_put(params, sharding.shardings(params, mesh)), marks
    )
    tx = optimizer.make(OptimizerConfig(learning_rate=1e-4), trained, options.layers, 1000)
    state = [step_lib.init_state(trained, frozen, tx)]
    train = step_lib.make_train_step(model, objective, tx, marks, 1, None)
  numbers = iter(range(10**9))

  def run(steps):
    seen = 0
    with jax.set_mesh(mesh):
      for _ in range(steps):
        batch = made[next(numbers)]
        seen += int(batch["window_weights"].sum())
        state[0], _ = train(state[0], jax.device_put(batch, sharding.batch_sharding(mesh)), 0)
    return seen

  return run


def theirs(options):
  """run(steps) -> windows trained on, each padded to the length of a row."""
  import torch
  import transformers

  _, rows, vocab = windows(options)
  model = transformers.BertForQuestionAnswering(
    transformers.BertConfig(
      vocab_size=vocab,
      hidden_size=options.width,
      num_hidden_layers=options.layers,
      num_attention_heads=options.width // 64,
      intermediate_size=4 * options.width,
      hidden_dropout_prob=0,
      attention_probs_dropout_prob=0,
    )
  ).train()
  tx = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  rng = np.random.default_rng(0)

  def run(steps):
    for _ in range(steps):
      chosen = [rows.windows[n] for n in rng.integers(len(rows.windows), size=options.rows)]
      ids, mask = (np.zeros((options.rows, options.length), np.int64) for _ in range(2))
      for row, window in enumerate(chosen):
        ids[row, : len(window.tokens)], mask[row, : len(window.tokens)] = window.tokens, 1

      def ends(side, chosen=chosen):
        return torch.tensor([getattr(w, side) for w in chosen])

      model(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        start_positions=ends("start"),
        end_positions=ends("end"),
      ).loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      tx.step()
      tx.zero_grad()
    return steps * options.rows

  return run


def worker(side, options, pipe):
  """Answers a number of steps with windows a second."""
  run = side(options)
  run(2)
  pipe.send("ready")
  while True:
    steps, start = pipe.recv(), time.perf_counter()
    pipe.send(run(steps) / (time.perf_counter() - start))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in (
    ("layers", 4),
    ("width", 256),
    ("length", 384),
    ("rows", 8),
    ("rounds", 3),
    ("steps", 6),
  ):
    parser.add_argument(f"--{name}", type=int, default=default)
  options = parser.parse_args()
  context, pipes, paces = multiprocessing.get_context("spawn"), {}, {}
  for side in (ours, theirs):
    pipes[side], there = context.Pipe()
    context.Process(target=worker, args=(side, options, there), daemon=True).start()
    pipes[side].recv()
  for _ in range(options.rounds):
    for side, pipe in pipes.items():
      pipe.send(options.steps)
      paces.setdefault(side.__name__, []).append(pipe.recv())
  ratio = statistics.median(a / b for a, b in zip(*paces.values()))
  print(
    {name: f"{statistics.median(found):.1f} windows/s" for name, found in paces.items()},
    f"ratio {ratio:.2f}",
  )


if __name__ == "__main__":
  main()
