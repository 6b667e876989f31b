"""AdamW with a schedule, decay and learning rates by path."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm.config import OptimizerConfig
from llm.core import UserError
from llm.training import partition


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
  """Steps of the warm-up; -1 in the config is a tenth of the run."""
  return config.warmup_steps if config.warmup_steps >= 0 else max(1, steps // 10)


def schedule(config: OptimizerConfig, learning_rate, steps: int, warmup: int):
  """step -> learning rate: linear from 0 during the warm-up, then as config.schedule says.

  `learning_rate`, `steps` and `warmup` may be traced. The rate of step 0 is one warm-up step above 0.
  """
  def rate(step):
    rising = jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1.0)
    progress = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0.0, 1.0)
    falling = {"linear": 1.0 - progress,
               "cosine": 0.1 + 0.45 * (1.0 + jnp.cos(jnp.pi * progress)),
               "constant": 1.0}[config.schedule]
    return learning_rate * jnp.where(step < warmup, rising, falling)
  return rate


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
      value *= config.layer_decay ** above
    for rule, times in rules:
      if rule.search(path):
        used.add(rule)
        return value * times
    return value

  factors = partition.by_layer(trained, factor)
  for rule, _ in rules:
    if rule not in used:
      raise UserError(f"config.optimizer.multipliers: {rule.pattern!r} matches no trained parameter")
  return factors


def make(config: OptimizerConfig, trained: dict, num_layers: int, steps: int,
         learning_rate=None, warmup: int | None = None) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) over the trained parameters, a path -> array dict.

  Gradients are clipped by their global norm, moments bias-corrected, decay decoupled and scaled by
  the rate. `learning_rate` and `warmup` stand for the config's where a search sets them.
  """
  try:
    no_decay = re.compile(config.no_decay) if config.no_decay else None
  except re.error as error:
    raise UserError(f"config.optimizer.no_decay={config.no_decay!r} is no regular expression: {error}")
  decays = {path: not (no_decay and no_decay.search(path)) for path in trained}
  factors = multipliers(config, trained, num_layers)
  rate = schedule(config, config.learning_rate if learning_rate is None else learning_rate, steps,
                  warmup_steps(config, steps) if warmup is None else warmup)
  parts = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
  parts += [optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
            optax.add_decayed_weights(config.weight_decay, mask=decays)]
  if any(np.any(f != 1.0) for f in factors.values()):
    parts.append(optax.stateless(lambda updates, _: jax.tree.map(
        lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors)))
  return optax.chain(*parts, optax.scale_by_learning_rate(rate))
