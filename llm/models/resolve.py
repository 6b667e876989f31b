"""What "auto" becomes: settled once, in the config, before anything is built."""

import dataclasses

import jax

from llm import models
from llm.config import ModelConfig
from llm.core import UserError
from llm.models import cudnn, precision, splash
from llm.models.architecture import head_width_of

# Layers that "auto" unrolls: compilation takes time in proportion to them.
MOST_UNROLLED = 64

# Attention that keeps no scores for the backward pass, and the platform that it runs on.
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def resolved(
  config: ModelConfig, length: int, platform: str, context: int = 1, *, trains: bool = True
) -> ModelConfig:
  """The config without "auto".

  length: tokens of a row. platform: cpu, gpu or tpu. context: devices that share a row. Raises
  UserError where attention of the kind that is asked for cannot serve.
  """
  dtype = precision.auto(platform) if config.dtype == "auto" else config.dtype
  # JAX adds its options to the class at run time, where its types do not show them.
  has_float64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
  if dtype == "float64" and not has_float64:
    raise UserError(
      "config.model.dtype=float64 would be computed in float32: set JAX_ENABLE_X64=1 in the "
      "environment"
    )
  config = dataclasses.replace(config, dtype=dtype)
  scan = config.scan
  if scan == "auto":
    scan = "unroll" if platform == "cpu" and config.num_layers <= MOST_UNROLLED else "scan"
  attention = config.attention
  if attention == "auto":
    attention = "reference"
    if platform == "tpu" and not cannot("splash", config, length, context, trains):
      attention = "splash"
  elif PLATFORMS.get(attention, platform) != platform:
    raise UserError(
      f"config.model.attention={attention} runs on a {PLATFORMS[attention].upper()} alone, this is "
      f"a {platform.upper()}: take reference or auto"
    )
  elif reason := cannot(attention, config, length, context, trains):
    raise UserError(
      f"config.model.attention={attention} cannot serve {reason}: take reference or auto"
    )
  return dataclasses.replace(config, scan=scan, attention=attention)


def cannot(backend: str, config: ModelConfig, length: int, context: int, trains: bool) -> str:
  """What keeps attention of some kind from serving a model; empty where nothing does."""
  if backend == "reference":
    return ""
  if models.facts(config).position_bias:
    return "a bias of positions"
  if trains and config.dropout:
    return "dropout of attention weights"
  if backend == "splash":
    if length % (context * splash.LANES):
      return f"a length of {length} on {context} devices, no multiple of {splash.LANES} on each"
    return ""
  return _cudnn_cannot(config, length, context)


def _cudnn_cannot(config: ModelConfig, length: int, context: int) -> str:
  width = head_width_of(config)
  if context > 1:
    return "a context axis"
  if config.dtype != "bfloat16":
    return config.dtype
  if width % 8 or width > cudnn.WIDEST:
    return f"a head width of {width}, no multiple of 8 up to {cudnn.WIDEST}"
  if length % 2:
    return f"an odd length, {length}"
  return ""
