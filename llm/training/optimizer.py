"""AdamW, Adafactor and Muon, with a schedule and with decay and learning rates by path."""

import math
import re
from typing import Any, Callable, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from llm.config import OptimizerConfig
from llm.core import STACKED, Leaves, UserError
from llm.sharding import constrain, layer_by_layer
from llm.training import partition

Number = float | jax.Array  # an array where a search traces it


class Pace(NamedTuple):
  """What the learning rate of a run follows: arguments of the compiled step.

  So runs that differ in nothing else share one program. warmup: steps of it.
  """

  learning_rate: Number
  steps: Number
  warmup: Number


def pace(config: OptimizerConfig, steps: int) -> Pace:
  """The pace of a run of `steps` steps."""
  if config.learning_rate < 0:
    raise ValueError("the learning rate is that of a recipe, and was not carried over")
  return Pace(config.learning_rate, steps, warmup_steps(config, steps))


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
  """Steps of the warm-up of a run of `steps` steps. -1 in the config means a tenth of the run."""
  return config.warmup_steps if config.warmup_steps >= 0 else max(1, steps // 10)


def schedule(
  config: OptimizerConfig, learning_rate: Number, steps: Number, warmup: Number
) -> Callable[[Any], Any]:
  """step -> learning rate: linear from 0 during the warm-up, then as config.schedule says.

  learning_rate: the highest rate. steps: of the run. warmup: steps of the warm-up. The rate of step
  0 is one warm-up step above 0.

  rsqrt is learning_rate sqrt(warmup / max(step, warmup)). With a rate of 0.01 and a warm-up of
  10,000 steps, it is the schedule of T5 (Raffel et al. 2020, section 3.1.2).

  wsd (warm-up, stable, decay; Hu et al. 2024, section 4) is constant. It falls linearly to 0 over
  the last `decay_share` of the steps (Hägele et al. 2024, section 3), but never during the warm-up.
  Before the decay, the rate does not depend on the length of the run: training can go on from such
  a checkpoint as if the longer run had been planned. From a checkpoint of the decay, a longer run
  goes back to the full rate.
  """

  def rate(step: Any) -> Any:
    if config.schedule == "rsqrt":
      return learning_rate * jnp.sqrt(
        jnp.maximum(warmup, 1) / jnp.maximum(step, jnp.maximum(warmup, 1))
      )
    rising = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
    after_warmup = jnp.maximum(steps - warmup, 1)
    progress = jnp.clip((step - warmup) / after_warmup, 0.0, 1.0)
    decay = jnp.clip(config.decay_share * steps, 1.0, after_warmup)
    falling = {
      "linear": 1.0 - progress,
      "cosine": 0.1 + 0.45 * (1.0 + jnp.cos(jnp.pi * progress)),
      "constant": 1.0,
      "wsd": jnp.clip((steps - step) / decay, 0.0, 1.0),
    }[config.schedule]
    return learning_rate * jnp.where(step < warmup, rising, falling)

  return rate


def rate_at(config: OptimizerConfig, steps: int, step: int) -> float:
  """The learning rate of step `step` in a run of `steps` steps."""
  return float(schedule(config, config.learning_rate, steps, warmup_steps(config, steps))(step))


def multipliers(
  config: OptimizerConfig,
  trained: Leaves,
  num_layers: int,
  masks: partition.FrozenMasks | None = None,
) -> Leaves:
  """path -> factor of the learning rate; for stacked leaves an array that broadcasts over layers.

  Layer-wise decay (Howard and Ruder 2018, section 3.2; as in ELECTRA): the head has factor 1, also
  a table of its own, layer i of L has decay^(L - i), the embeddings have decay^(L + 1). The layers
  of an encoder lie below the L of its decoder. masks: of the frozen layers, which trained lacks.
  The first rule of config.multipliers that matches a path multiplies its factor.
  Raises UserError on a rule that is malformed or matches nothing.
  """
  rules = _multiplier_rules(config)
  used = set()

  def factor(path: str) -> float:
    decay = _layer_decay(config, path, num_layers)
    for rule, multiplier in rules:
      if rule.search(path):
        used.add(rule)
        return decay * multiplier
    return decay

  factors = partition.by_layer(trained, factor, masks)
  for rule, _ in rules:
    if rule not in used:
      raise UserError(
        f"config.optimizer.multipliers: {rule.pattern!r} matches no trained parameter"
      )
  return factors


def _multiplier_rules(config: OptimizerConfig) -> list[tuple[re.Pattern[str], float]]:
  rules = []
  for text in config.multipliers:
    pattern, _, multiplier = text.rpartition("=")
    try:
      rules.append((re.compile(pattern), float(multiplier)))
    except (re.error, ValueError):
      raise UserError(f"config.optimizer.multipliers: {text!r} is not of the form 'regex=0.1'")
  return rules


def _layer_decay(config: OptimizerConfig, path: str, num_layers: int) -> float:
  """The factor of a path by layer-wise decay alone."""
  is_of_head = not path.startswith("backbone/") or path.startswith("backbone/output/")
  if config.layer_decay == 1.0 or is_of_head:
    return 1.0
  below_decoder = num_layers if path.startswith("backbone/encoder/") else 0
  if layer := re.search(r"/layers/(\d+)/", path):
    layers_above = num_layers - int(layer[1]) + below_decoder
  elif "final_norm" in path:
    layers_above = 1 + below_decoder
  else:
    layers_above = num_layers + 1
  return config.layer_decay**layers_above


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Inputs x outputs for a kernel of one layer; for other parameters their own shape."""
  if len(shape) < 3:
    return shape
  return (-1, shape[-1]) if path.endswith("out/kernel") else (shape[0], -1)


def per_matrix(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner`, applied to every layer's matrix on its own, over a path -> array dict.

  A stack of layers is mapped over, and the head dimension of a kernel is merged into its inputs or
  outputs. The state holds one part for every number of layers, and "single" for unstacked leaves.
  """

  def init(params: Any) -> Any:
    stacked, single = _as_matrices(params)
    state = {}
    for count in {len(x) for x in stacked.values()}:
      state[str(count)] = jax.vmap(inner.init)(_with_layers(stacked, count))
    state["single"] = inner.init(single)
    return state

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    stacked, single = _as_matrices(updates)
    stacked_params, single_params = _as_matrices(params)
    single_updates, single_state = inner.update(single, state["single"], single_params)
    new_updates = cast(Leaves, single_updates)
    new_state = {"single": single_state}
    for key in state.keys() - {"single"}:
      part = _with_layers(stacked, int(key))
      part_params = _with_layers(stacked_params, int(key))
      part_updates, new_state[key] = jax.vmap(inner.update)(part, state[key], part_params)
      new_updates |= cast(Leaves, part_updates)
    return {path: new_updates[path].reshape(x.shape) for path, x in updates.items()}, new_state

  return optax.GradientTransformation(init, update)


def _as_matrices(leaves: Leaves) -> tuple[Leaves, Leaves]:
  """Stacked leaves as layers x inputs x outputs, and the others as inputs x outputs."""
  stacked = {}
  single = {}
  for path, x in leaves.items():
    if STACKED in path:
      stacked[path] = x.reshape(x.shape[0], *_matrix_shape(path, x.shape[1:]))
    else:
      single[path] = x.reshape(_matrix_shape(path, x.shape))
  return stacked, single


def _with_layers(stacked: Leaves, count: int) -> Leaves:
  """The leaves that have so many layers."""
  return {path: x for path, x in stacked.items() if len(x) == count}


MUON_MOMENTUM = 0.95  # with Nesterov's look-ahead (Jordan et al. 2024)
# The root mean square of an update of Muon. AdamW's is about the same, so one rate and one decay
# fit both (Liu et al. 2025, section 2.2).
MUON_RMS = 0.2


def matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers | None:
  """The axes of inputs and of outputs of a stack of matrices; None for other parameters.

  Matrices are kernels and low-rank adapters. Axis 0 is the layers. The axis of heads belongs to the
  outputs of a kernel, but to the inputs of `out`.
  """
  if STACKED not in path or not re.search("/(kernel|lora_a|lora_b)$", path):
    return None
  axes = tuple(range(1, ndim))
  inputs = ndim - 2 if path.endswith("out/kernel") else 1
  return contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])


def orthogonalised(momenta: Leaves) -> Leaves:
  """Every layer's matrix with its singular values brought near 1, times 0.2 sqrt(longer side).

  Five steps of Newton-Schulz by optax (Jordan et al. 2024). An orthogonal matrix has a root mean
  square of 1 / sqrt(longer side), so that of the result is near MUON_RMS.
  """
  axes: dict[str, Any] = {path: matrix_axes(path, x.ndim) for path, x in momenta.items()}
  # `momenta` already hold the momentum.
  newton_schulz = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
  whole = _move_layers(momenta, 1)
  matrices, _ = newton_schulz.update(whole, newton_schulz.init(whole))
  scaled = {path: _scale_to_rms(x, axes[path]) for path, x in cast(Leaves, matrices).items()}
  return _move_layers(scaled, -1)


def _scale_to_rms(x: jax.Array, axes: Any) -> jax.Array:
  """A stack of orthogonal matrices with the root mean square MUON_RMS.

  axes: the axes of inputs and those of outputs.
  """
  sides = [math.prod(x.shape[axis] for axis in side) for side in axes]
  return MUON_RMS * max(sides) ** 0.5 * x


def _move_layers(leaves: Leaves, order: int) -> Leaves:
  """Moves stacks to whole layers on each device (order 1) or back to their own places (-1)."""
  moved = {}
  for path, x in leaves.items():
    for spec in layer_by_layer(path, x.shape)[::order]:
      x = constrain(x, *spec)
    moved[path] = x
  return moved


def _muon(config: OptimizerConfig, trained: Leaves) -> optax.GradientTransformation:
  """Muon for the matrices of layers; AdamW for embeddings, heads, norms and biases."""
  matrix_paths = {path for path, leaf in trained.items() if matrix_axes(path, leaf.ndim)}
  if not matrix_paths:
    raise UserError(
      "config.optimizer.name=muon: no trained parameter is a matrix of a layer, and Muon trains "
      "no others; take adamw, or let config.optimizer.freeze leave kernels of layers"
    )
  muon = optax.chain(
    optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=config.moment_dtype),
    optax.stateless(lambda momenta, _: orthogonalised(cast(Leaves, momenta))),
  )
  adam = _adam(config)

  def split(leaves: Leaves) -> tuple[Leaves, Leaves]:
    matrices = {path: x for path, x in leaves.items() if path in matrix_paths}
    others = {path: x for path, x in leaves.items() if path not in matrix_paths}
    return matrices, others

  def init(params: Any) -> Any:
    matrices, others = split(params)
    return {"muon": muon.init(matrices), "adamw": adam.init(others)}

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    matrices, others = split(updates)
    muon_updates, muon_state = muon.update(matrices, state["muon"])
    adam_updates, adam_state = adam.update(others, state["adamw"])
    new_updates = cast(Leaves, muon_updates) | cast(Leaves, adam_updates)
    return new_updates, {"muon": muon_state, "adamw": adam_state}

  return optax.GradientTransformation(init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(
    config.beta1, config.beta2, config.epsilon, mu_dtype=config.moment_dtype
  )


def _scaling(config: OptimizerConfig, trained: Leaves) -> optax.GradientTransformation:
  """Turns gradients into updates for a learning rate of 1."""
  if config.name == "adamw":
    return _adam(config)
  if config.name == "muon":
    return _muon(config, trained)
  # Adafactor as T5 used it: no momentum, factored second moments, clipped updates, and steps
  # relative to the size of the parameters (Shazeer and Stern 2018, algorithm 4, sections 6 and 8).
  return per_matrix(
    optax.chain(
      optax.scale_by_factored_rms(decay_rate=0.8),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
    )
  )


def make(
  config: OptimizerConfig,
  trained: Leaves,
  num_layers: int,
  steps: Number,
  learning_rate: Number | None = None,
  warmup: Number | None = None,
  masks: partition.FrozenMasks | None = None,
) -> optax.GradientTransformation:
  """The optimizer of the trained parameters, a path -> array dict.

  AdamW (Loshchilov and Hutter 2019), Adafactor or Muon. Gradients are clipped by their global norm.
  AdamW's moments are bias-corrected. The decay is decoupled and scaled by the learning rate.

  steps: of the run. learning_rate and warmup (in steps): replace those of the config in a search.
  masks: of the frozen layers, where there are some.
  Raises UserError on a regex of the config that is malformed, or a multiplier that matches nothing.
  """
  if learning_rate is None and config.learning_rate < 0:
    raise ValueError("the learning rate is that of a recipe, and was not carried over")
  decays = _decays(config, trained)
  factors = multipliers(config, trained, num_layers, masks)
  rate = schedule(
    config,
    config.learning_rate if learning_rate is None else learning_rate,
    steps,
    warmup_steps(config, int(steps)) if warmup is None else warmup,
  )

  def apply_factors(updates: Any, _) -> Any:
    return jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors)

  parts = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
  parts += [_scaling(config, trained), optax.add_decayed_weights(config.weight_decay, mask=decays)]
  if any(np.any(factor != 1.0) for factor in factors.values()):
    parts.append(optax.stateless(apply_factors))
  return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def _decays(config: OptimizerConfig, trained: Leaves) -> dict[str, bool]:
  """path -> whether weight decay applies to it."""
  try:
    no_decay = re.compile(config.no_decay) if config.no_decay else None
  except re.error as error:
    raise UserError(
      f"config.optimizer.no_decay={config.no_decay!r} is no regular expression: {error}"
    )
  decays = {path: not (no_decay and no_decay.search(path)) for path in trained}
  if no_decay and config.no_decay != OptimizerConfig().no_decay and all(decays.values()):
    raise UserError(
      f"config.optimizer.no_decay={config.no_decay!r} matches no trained parameter (all layers "
      "have one path, such as backbone/layers/mlp/up/kernel)"
    )
  return decays
