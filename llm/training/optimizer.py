"""AdamW, Adafactor and Muon with a schedule, decay and learning rates by path."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from llm.config import OptimizerConfig
from llm.core import STACKED, UserError
from llm.sharding import constrain, layer_by_layer
from llm.training import partition


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
  """Steps of the warm-up; -1 in the config is a tenth of the run."""
  return config.warmup_steps if config.warmup_steps >= 0 else max(1, steps // 10)


def schedule(config: OptimizerConfig, learning_rate, steps: int, warmup: int):
  """step -> learning rate: linear from 0 during the warm-up, then as config.schedule says.

  `learning_rate`, `steps` and `warmup` may be traced. The rate of step 0 is one warm-up step above 0.

  rsqrt is learning_rate sqrt(warmup / max(step, warmup)): with 0.01 and 10,000 that of T5 (Raffel et
  al. 2020, section 3.1.2).

  wsd (warm-up, stable, decay; Hu et al. 2024, section 4) is constant, and falls linearly to 0 over
  the last `decay_share` of the steps (Hägele et al. 2024, section 3), at most over all steps after
  the warm-up. Until the decay begins, the rate does not depend on the length of the run: a
  checkpoint from before it can be trained for longer as if that had been planned. A checkpoint from
  the decay goes back to the full rate where it is trained for longer.
  """

  def rate(step):
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
  """The learning rate of a step in a run of so many steps."""
  return float(schedule(config, config.learning_rate, steps, warmup_steps(config, steps))(step))


def multipliers(config: OptimizerConfig, trained: dict, num_layers: int) -> dict:
  """path -> factor of the learning rate (an array over layers for stacked leaves).

  Layer-wise decay (Howard and Ruder 2018, section 3.2; as in ELECTRA): the head has factor 1, layer
  i of L has decay^(L - i), the embeddings decay^(L + 1).
  Raises UserError on a rule that matches nothing.
  """
  rules = []
  for text in config.multipliers:
    pattern, _, factor = text.rpartition("=")
    try:
      rules.append((re.compile(pattern), float(factor)))
    except (re.error, ValueError):
      raise UserError(f"config.optimizer.multipliers: {text!r} is not of the form 'regex=0.1'")
  used = set()

  def factor(path: str) -> float:
    value = 1.0
    if config.layer_decay != 1.0 and path.startswith("backbone/"):
      layer = re.search(r"/layers/(\d+)/", path)
      above = num_layers - int(layer[1]) if layer else 1 if "final_norm" in path else num_layers + 1
      value *= config.layer_decay**above
    for rule, times in rules:
      if rule.search(path):
        used.add(rule)
        return value * times
    return value

  factors = partition.by_layer(trained, factor)
  for rule, _ in rules:
    if rule not in used:
      raise UserError(
        f"config.optimizer.multipliers: {rule.pattern!r} matches no trained parameter"
      )
  return factors


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Inputs x outputs of a kernel of one layer; the shape itself of anything else."""
  if len(shape) < 3:
    return shape
  return (-1, shape[-1]) if path.endswith("out/kernel") else (shape[0], -1)


def a_matrix_at_a_time(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` as if layers were not stacked and kernels had no head dimension: it looks at whole matrices.

  Over a path -> array dict.
  """

  def apart(leaves):
    stacked = {
      p: x.reshape(x.shape[0], *_matrix_shape(p, x.shape[1:]))
      for p, x in leaves.items()
      if STACKED in p
    }
    return stacked, {
      p: x.reshape(_matrix_shape(p, x.shape)) for p, x in leaves.items() if STACKED not in p
    }

  def init(params):
    stacked, single = apart(params)
    by_count = {
      n: {p: x for p, x in stacked.items() if len(x) == n}
      for n in {len(x) for x in stacked.values()}
    }
    return {
      **{str(n): jax.vmap(inner.init)(part) for n, part in by_count.items()},
      "single": inner.init(single),
    }

  def update(updates, state, params):
    (stacked, single), (stacked_params, single_params) = apart(updates), apart(params)
    new = {}
    out, new["single"] = inner.update(single, state["single"], single_params)
    for n in state.keys() - {"single"}:
      take = lambda leaves: {p: x for p, x in leaves.items() if len(x) == int(n)}
      found, new[n] = jax.vmap(inner.update)(take(stacked), state[n], take(stacked_params))
      out |= found
    return {p: out[p].reshape(x.shape) for p, x in updates.items()}, new

  return optax.GradientTransformation(init, update)


MUON_MOMENTUM = 0.95  # Jordan et al. 2024, Nesterov's
# The root mean square of an update of Muon. It is about that of AdamW, so that one rate and one
# decay fit both (Liu et al. 2025, section 2.2).
MUON_RMS = 0.2


def matrix_axes(path: str, ndim: int) -> contrib.MuonDimensionNumbers | None:
  """The axes of inputs and of outputs where the parameter is a matrix of every layer, else None.

  Matrices are kernels and low-rank adapters. The first axis is that of the layers, and heads are
  part of what a kernel gives, or of what `out` takes.
  """
  if STACKED not in path or not re.search("/(kernel|lora_a|lora_b)$", path):
    return None
  axes = tuple(range(1, ndim))
  inputs = ndim - 2 if path.endswith("out/kernel") else 1
  return contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])


def orthogonalised(momenta: dict) -> dict:
  """Every layer's matrix with its singular values brought near 1, times 0.2 sqrt(longer side).

  Five steps of Newton-Schulz by optax (Jordan et al. 2024). The root mean square of an orthogonal
  matrix is 1 / sqrt(longer side), so that of what is returned is near MUON_RMS.
  """
  axes = {path: matrix_axes(path, x.ndim) for path, x in momenta.items()}
  newton_schulz = contrib.scale_by_muon(
    beta=0.0, nesterov=False, weight_dimension_numbers=axes
  )  # the momentum is in the momenta

  def sized(x: jax.Array, numbers: contrib.MuonDimensionNumbers) -> jax.Array:
    sides = [math.prod(x.shape[axis] for axis in side) for side in numbers]
    return MUON_RMS * max(sides) ** 0.5 * x

  def moved(leaves: dict, order: int) -> dict:
    out = {}
    for path, x in leaves.items():
      for spec in layer_by_layer(path, x.shape)[::order]:
        x = constrain(x, *spec)
      out[path] = x
    return out

  whole = moved(momenta, 1)
  matrices, _ = newton_schulz.update(whole, newton_schulz.init(whole))
  return moved({path: sized(x, axes[path]) for path, x in matrices.items()}, -1)


def _muon(config: OptimizerConfig, trained: dict) -> optax.GradientTransformation:
  """Muon for the matrices of layers, AdamW for the rest: embeddings, heads, norms and biases."""
  matrices = {path for path, leaf in trained.items() if matrix_axes(path, leaf.ndim)}
  if not matrices:
    raise UserError(
      "config.optimizer.name=muon: no trained parameter is a matrix of a layer, and Muon trains "
      "no others; take adamw, or let config.optimizer.freeze leave kernels of layers"
    )
  muon = optax.chain(
    optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=config.moment_dtype),
    optax.stateless(lambda momenta, _: orthogonalised(momenta)),
  )
  adam = _adam(config)

  def apart(leaves: dict) -> tuple[dict, dict]:
    return (
      {path: x for path, x in leaves.items() if path in matrices},
      {path: x for path, x in leaves.items() if path not in matrices},
    )

  def init(params: dict) -> dict:
    of_layers, rest = apart(params)
    return {"muon": muon.init(of_layers), "adamw": adam.init(rest)}

  def update(grads: dict, state: dict, params: dict | None = None) -> tuple[dict, dict]:
    of_layers, rest = apart(grads)
    of_layers, muon_state = muon.update(of_layers, state["muon"])
    rest, adam_state = adam.update(rest, state["adamw"])
    return of_layers | rest, {"muon": muon_state, "adamw": adam_state}

  return optax.GradientTransformation(init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(
    config.beta1, config.beta2, config.epsilon, mu_dtype=config.moment_dtype
  )


def _scaling(config: OptimizerConfig, trained: dict) -> optax.GradientTransformation:
  """Gradients -> updates of the right size for a rate of 1."""
  if config.name == "adamw":
    return _adam(config)
  if config.name == "muon":
    return _muon(config, trained)
  # Adafactor as T5 used it: no momentum, second moments in factors, updates clipped, steps relative to
  # the parameters (Shazeer and Stern 2018, algorithm 4, sections 6 and 8).
  return a_matrix_at_a_time(
    optax.chain(
      optax.scale_by_factored_rms(decay_rate=0.8),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
    )
  )


def make(
  config: OptimizerConfig,
  trained: dict,
  num_layers: int,
  steps: int,
  learning_rate=None,
  warmup: int | None = None,
) -> optax.GradientTransformation:
  """The optimizer of the trained parameters, a path -> array dict.

  AdamW (Loshchilov and Hutter 2019), Adafactor or Muon. Gradients are clipped by their global norm,
  AdamW's moments bias-corrected, decay decoupled and scaled by the rate. `learning_rate` and
  `warmup` stand for the config's where a search sets them.
  """
  try:
    no_decay = re.compile(config.no_decay) if config.no_decay else None
  except re.error as error:
    raise UserError(
      f"config.optimizer.no_decay={config.no_decay!r} is no regular expression: {error}"
    )
  decays = {path: not (no_decay and no_decay.search(path)) for path in trained}
  factors = multipliers(config, trained, num_layers)
  rate = schedule(
    config,
    config.learning_rate if learning_rate is None else learning_rate,
    steps,
    warmup_steps(config, steps) if warmup is None else warmup,
  )
  parts = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
  parts += [_scaling(config, trained), optax.add_decayed_weights(config.weight_decay, mask=decays)]
  if any(np.any(f != 1.0) for f in factors.values()):
    parts.append(
      optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors)
      )
    )
  return optax.chain(*parts, optax.scale_by_learning_rate(rate))
