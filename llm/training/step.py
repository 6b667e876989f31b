"""The training step, the evaluation step and the first state. No task is named here."""

from typing import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from llm.core import Batch, TrainState
from llm.sharding import BATCH, constrain
from llm.training import partition


def init_params(model: nn.Module, batch: Batch, rng: jax.Array):
  """Fresh parameters {"backbone": ..., "head": ...}, no head where it has no parameters of its own.

  Pure: under jax.eval_shape it allocates nothing.
  """
  return model.init(rng, batch, train=False)["params"]


def init_state(trained: dict, frozen: dict, optimizer: optax.GradientTransformation) -> TrainState:
  """Step 0."""
  return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def _slices(batch: Batch, count: int) -> Batch:
  """B rows -> count x B/count, each slice taking rows from every device."""
  return {
    k: constrain(v.reshape(-1, count, *v.shape[1:]).swapaxes(0, 1), None, BATCH)
    for k, v in batch.items()
  }


def train_step(
  model: nn.Module,
  objective,
  optimizer,
  marks,
  accum_steps: int,
  state: TrainState,
  batch: Batch,
  seed,
) -> tuple[TrainState, dict]:
  """One update. Gradients are taken of the trained parameters alone.

  Losses are divided by the weights of the whole global batch, so the result does not depend on the
  mesh or on accum_steps. Metrics are (sum, weight) pairs.
  """
  totals = objective.totals(batch)
  rng = jax.random.fold_in(jax.random.key(seed), state.step)

  def loss_of(trained, part, rng):
    params = partition.merge(trained, state.frozen, marks)
    outputs = model.apply({"params": params}, part, train=True, rngs={"dropout": rng})
    return objective.loss(outputs, part, totals)

  gradient = jax.grad(loss_of, has_aux=True)
  if accum_steps == 1:
    grads, metrics = gradient(state.trained, batch, rng)
  else:

    def accumulate(carry, part_and_number):
      part, number = part_and_number
      new = gradient(state.trained, part, jax.random.fold_in(rng, number))
      return jax.tree.map(jnp.add, carry, new), None

    parts = _slices(batch, accum_steps)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(gradient, state.trained, jax.tree.map(lambda x: x[0], parts), rng),
    )
    (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(accum_steps)))
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  metrics["grad_norm"] = (optax.global_norm(grads), jnp.ones(()))
  return TrainState(
    state.step + 1, optax.apply_updates(state.trained, updates), state.frozen, opt_state
  ), metrics


def one_at_a_time(compiled: Callable) -> Callable:
  """`compiled`, on CPU waiting for what it gives: programs queued on several CPU devices can wait for each
  other for ever."""
  if jax.default_backend() != "cpu":
    return compiled
  return lambda *args: jax.block_until_ready(compiled(*args))


def jitted_train_step(model: nn.Module, objective, optimizer, marks, accum_steps: int, placed):
  """jitted (state, batch, seed) -> (state, metrics). The old state's memory is given to the new, which lies as `placed` says."""
  return jax.jit(
    lambda state, batch, seed: train_step(
      model, objective, optimizer, marks, accum_steps, state, batch, seed
    ),
    donate_argnums=0,
    out_shardings=(placed, None),
  )


def make_train_step(
  model: nn.Module, objective, optimizer, marks, accum_steps: int, placed
) -> Callable:
  """The same, on CPU one at a time."""
  return one_at_a_time(jitted_train_step(model, objective, optimizer, marks, accum_steps, placed))


def make_eval_step(model: nn.Module, objective, marks) -> Callable:
  """jitted (trained, frozen, batch) -> (metrics, predictions), without dropout."""

  def evaluate(trained, frozen, batch):
    params = partition.merge(trained, frozen, marks)
    outputs = model.apply({"params": params}, batch, train=False)
    return (
      objective.loss(outputs, batch, objective.totals(batch))[1],
      objective.predict(outputs, batch),
    )

  return one_at_a_time(jax.jit(evaluate))
