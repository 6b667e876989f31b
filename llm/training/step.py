"""The training step, the evaluation step and the first state. No task is named here."""

from typing import Any, Callable, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from llm.core import Batch, Leaves, Params, TrainState
from llm.objectives import base
from llm.sharding import BATCH, constrain
from llm.training import partition
from llm.training.optimizer import Pace
from llm.training.partition import FrozenMasks


def init_params(model: nn.Module, batch: Batch, rng: jax.Array) -> Params:
  """Fresh parameters {"backbone": .., "head": ..}; no head where it has no parameters of its own.

  Pure: under jax.eval_shape it allocates nothing.
  """
  return cast(Params, model.init(rng, batch, train=False)["params"])


def init_state(
  trained: Leaves, frozen: Leaves, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state at step 0."""
  return TrainState(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def train_step(
  model: nn.Module,
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  frozen_masks: FrozenMasks,
  accum_steps: int,
  state: TrainState,
  batch: Batch,
  seed: jax.typing.ArrayLike,
) -> tuple[TrainState, base.Metrics]:
  """The updates of one batch (`objective.updates`). Only the trained parameters have gradients.

  Losses are divided by the weights of the whole global batch. So the result does not depend on the
  mesh, nor without dropout on `accum_steps`, the number of parts that the batch is computed in.
  """
  rng = jax.random.fold_in(jax.random.key(seed), state.step)

  def update(state: TrainState, rng: jax.Array) -> tuple[TrainState, base.Metrics]:
    return _update(model, objective, optimizer, frozen_masks, accum_steps, state, batch, rng)

  if objective.updates == 1:
    new_state, metrics = update(state, rng)
  else:
    new_state, metrics = jax.lax.scan(update, state, jax.random.split(rng, objective.updates))
    metrics = jax.tree.map(lambda of_updates: of_updates.sum(0), metrics)
  return new_state.replace(step=state.step + 1), metrics


def _update(
  model: nn.Module,
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  frozen_masks: FrozenMasks,
  accum_steps: int,
  state: TrainState,
  batch: Batch,
  rng: jax.Array,
) -> tuple[TrainState, base.Metrics]:
  """One update; the step of the state stays. rng: of the dropout."""
  totals = objective.totals(batch)

  def loss_of(trained: Leaves, part: Batch, rng: jax.Array) -> tuple[jax.Array, base.Metrics]:
    params = partition.merge(trained, state.frozen, frozen_masks)
    outputs = model.apply({"params": params}, part, train=True, rngs={"dropout": rng})
    return objective.loss(cast(base.Outputs, outputs), part, totals)

  gradient = jax.grad(loss_of, has_aux=True)
  if accum_steps == 1:
    grads, metrics = gradient(state.trained, batch, rng)
  else:
    grads, metrics = _accumulated(gradient, state.trained, batch, rng, accum_steps)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  metrics["grad_norm"] = (optax.global_norm(grads), jnp.ones(()))
  new_state = TrainState(
    step=state.step,
    trained=cast(Leaves, optax.apply_updates(state.trained, updates)),
    frozen=state.frozen,
    opt_state=opt_state,
  )
  return new_state, metrics


def _accumulated(
  gradient: Callable, trained: Leaves, batch: Batch, rng: jax.Array, accum_steps: int
) -> tuple[Leaves, base.Metrics]:
  """Gradients and metrics of a batch, summed over its parts, which are computed in turn."""

  def add_part(sums, part_and_number):
    part, number = part_and_number
    of_part = gradient(trained, part, jax.random.fold_in(rng, number))
    return jax.tree.map(jnp.add, sums, of_part), None

  parts = _parts(batch, accum_steps)
  first_part = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradient, trained, first_part, rng)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add_part, zeros, (parts, jnp.arange(accum_steps)))
  return sums


def _parts(batch: Batch, count: int) -> Batch:
  """B rows -> count x B/count. Each part takes rows from every device."""
  return {
    name: constrain(array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1), None, BATCH)
    for name, array in batch.items()
  }


def one_at_a_time(compiled: Callable) -> Callable:
  """`compiled`, which on CPU waits for its results.

  Programs that are queued on several CPU devices can wait for each other forever.
  """
  if jax.default_backend() != "cpu":
    return compiled
  return lambda *args: jax.block_until_ready(compiled(*args))


def make_train_step(
  model: nn.Module,
  objective: base.Objective,
  optimizer: Callable[[Pace], optax.GradientTransformation],
  frozen_masks: FrozenMasks,
  accum_steps: int,
  shardings: Any,
) -> Any:
  """The compiled step (state, batch, seed, pace) -> (state, metrics).

  Runs that differ only in seed and pace share it. shardings: of the new state, a TrainState of
  them; None leaves it to the compiler. The memory of the old state is reused for the new one.
  """
  return jax.jit(
    lambda state, batch, seed, pace: train_step(
      model, objective, optimizer(pace), frozen_masks, accum_steps, state, batch, seed
    ),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )


def make_eval_step(
  model: nn.Module, objective: base.Objective, frozen_masks: FrozenMasks
) -> Callable:
  """The compiled step (trained, frozen, batch) -> (metrics, predictions), without dropout."""

  def evaluate(
    trained: Leaves, frozen: Leaves, batch: Batch
  ) -> tuple[base.Metrics, dict[str, jax.Array]]:
    params = partition.merge(trained, frozen, frozen_masks)
    outputs = cast(base.Outputs, model.apply({"params": params}, batch, train=False))
    _, metrics = objective.loss(outputs, batch, objective.totals(batch))
    return metrics, objective.predict(outputs, batch)

  return one_at_a_time(jax.jit(evaluate))
