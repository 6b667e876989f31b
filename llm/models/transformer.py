"""One transformer: block, and a stack of them with stacked parameters.

Every parameter of the stack carries a leading layer axis, whether the stack is scanned or
unrolled, so that there is one layout of checkpoints.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Params, UserError, round_up
from llm.models import attention as attention_lib
from llm.models import cudnn, precision, splash
from llm.models.layers import MLP, NORMS, Linear, LoRA, normal
from llm.sharding import BATCH, constrain


@dataclasses.dataclass(frozen=True)
class Style:
  """What an architecture publishes and a user does not choose."""

  post_norm: bool  # normalise after the residual sum (BERT) or before the layer (GPT-2)
  causal: bool
  activation: str  # a key of layers.ACTIVATIONS
  norm_epsilon: float
  scaled_residual_init: bool  # output projections start at init_std / sqrt(2 L) (GPT-2)
  norm: str = "layer"  # a key of layers.NORMS
  bias: bool = True  # of the linear layers
  gated: bool = False  # feed-forward
  rotary: bool = False  # positions turn queries and keys, nothing is added to the embedding
  scaled: bool = True  # attention scores over sqrt(K) (not T5, which starts its queries smaller)
  fan_in_init: bool = False  # kernels start at init_std / sqrt(inputs) (T5)
  inner_dropout: bool = False  # inside the feed-forward layer too (T5)


def padded_vocab(vocab_size: int) -> int:
  """Rows of the embedding table: a multiple of 128, so that mesh axes divide it."""
  return round_up(vocab_size, 128)


FLASH = {
  "splash": "tpu",
  "cudnn": "gpu",
}  # attention that keeps no scores for the backward pass, and the platform it runs on


def check_platform(config: ModelConfig, platform: str):
  """Raises UserError where the attention that is asked for does not run on cpu, gpu or tpu."""
  if FLASH.get(config.attention, platform) != platform:
    raise UserError(
      f"config.model.attention={config.attention} runs on a {FLASH[config.attention].upper()} alone, this is a "
      f"{platform.upper()}: reference or auto"
    )


def cannot(backend: str, config: ModelConfig, length: int, context: int, dropout: bool) -> str:
  """Why a backend cannot serve a model on `context` devices a row; empty where it can. dropout: whether it is trained."""
  if backend == "reference":
    return ""
  if config.name == "t5":
    return "T5's position bias"
  if dropout and config.dropout:
    return "dropout of attention weights"
  if backend == "splash":
    return (
      f"a length of {length} on {context} devices, no multiple of {splash.LANES} on each"
      if length % (context * splash.LANES)
      else ""
    )
  width = head_width_of(config)
  return (
    "a context axis"
    if context > 1
    else "float32"
    if precision.of(config).values != jnp.bfloat16
    else f"a head width of {width}, no multiple of 8 up to {cudnn.WIDEST}"
    if width % 8 or width > cudnn.WIDEST
    else f"an odd length, {length},"
    if length % 2
    else ""
  )


def attention_backend(config: ModelConfig, length: int, dropout: bool) -> str:
  """reference, splash or cudnn. "auto" is splash on TPUs, where it can serve. Raises UserError where what is asked for cannot."""
  backend = (
    config.attention
    if config.attention != "auto"
    else "splash"
    if jax.default_backend() == "tpu"
    else "reference"
  )
  why_not = cannot(
    backend, config, length, jax.sharding.get_abstract_mesh().shape.get("context", 1), dropout
  )
  if why_not and config.attention != "auto":
    raise UserError(f"config.model.attention={backend} cannot serve {why_not}: reference or auto")
  return "reference" if why_not else backend


class Memory(NamedTuple):
  """What cross-attention looks at."""

  states_BxSxD: jax.Array
  visibility: attention_lib.Visibility


class Past(NamedTuple):
  """Keys and values of S slots, of one layer; what one head looks at lies together."""

  keys_BxGxSxK: jax.Array
  values_BxGxSxK: jax.Array


class Cache(flax.struct.PyTreeNode):
  """What a decoder has seen. New tokens go to the slots from `index` on; slots of segment 0 are not seen."""

  past: tuple[Past, ...]  # of each layer
  segments_BxS: jax.Array
  positions_BxS: jax.Array
  index: jax.Array


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
  """A cache in which nothing was written."""
  shape = (rows, config.num_kv_heads or config.num_heads, slots, head_width_of(config))
  one = lambda: jnp.zeros(shape, precision.of(config).values)
  past = tuple(Past(one(), one()) for _ in range(config.num_layers))
  return Cache(past, *jnp.zeros((2, rows, slots), jnp.int32), jnp.zeros((), jnp.int32))


def _written(old, new, index, axis=1):
  """`old` with `new` in its slots (dimension `axis`) from `index` on."""
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis)


class Attention(nn.Module):
  """Multi-head attention with separate query, key and value projections; of x to itself, or to `source`.

  Returns (y_BxTxD, the past with what is new in it); past: what was seen before, with x going to `index`.
  """

  config: ModelConfig
  style: Style
  train: bool

  @nn.compact
  def __call__(
    self,
    x_BxTxD,
    visibility,
    bias_HxTxS=None,
    source_BxSxD=None,
    past: Past | None = None,
    index=None,
  ):
    cfg, style, types = self.config, self.style, precision.of(self.config)
    heads, kv_heads, head_width = (
      cfg.num_heads,
      cfg.num_kv_heads or cfg.num_heads,
      head_width_of(cfg),
    )
    source_BxSxD = x_BxTxD if source_BxSxD is None else source_BxSxD
    project = lambda name, count, x, fan_in: Linear(
      (cfg.width, count, head_width),
      out=2,
      precision=types,
      kernel_init=initial(cfg, style, fan_in),
      bias=style.bias,
      lora=lora(cfg),
      name=name,
    )(x)
    q = project("query", heads, x_BxTxD, cfg.width * (1 if style.scaled else head_width))
    k, v = (project(name, kv_heads, source_BxSxD, cfg.width) for name in ("key", "value"))
    if self.style.rotary:
      q = attention_lib.rotary(q, visibility.q_positions_BxT, cfg.rope_theta)
      own = visibility.kv_positions_BxS if past is None else visibility.q_positions_BxT
      k = attention_lib.rotary(k, own, cfg.rope_theta)
    if past is not None:
      past = Past(
        *(_written(old, new.swapaxes(1, 2), index, axis=2) for old, new in zip(past, (k, v)))
      )
      k, v = (a.swapaxes(1, 2) for a in past)
    # Context parallelism: queries stay split over positions, keys and values are gathered.
    q = constrain(q, BATCH, "context", "tensor", None)
    k, v = (constrain(a, BATCH, None, "tensor", None) for a in (k, v))
    # What was seen is read in the type in which it is kept.
    products = types if past is None else types._replace(operands=types.values)
    key = self.make_rng("dropout") if self.train and cfg.dropout else None
    scale = head_width**-0.5 if style.scaled else 1.0
    itself = past is None and source_BxSxD is x_BxTxD
    backend = attention_backend(cfg, x_BxTxD.shape[1], self.train) if itself else "reference"
    if backend == "splash":
      mixed = splash.attend(q, k, v, visibility.q_segments_BxT, causal=style.causal, scale=scale)
    elif backend == "cudnn":
      mixed = cudnn.attend(q, k, v, visibility, scale=scale)
    else:
      mixed = attention_lib.attend(
        q,
        k,
        v,
        visibility,
        products,
        scale=scale,
        bias_HxTxS=bias_HxTxS,
        dropout_rate=cfg.dropout,
        key=key,
      )
    return Linear(
      (heads, head_width, cfg.width),
      precision=types,
      kernel_init=residual_init(cfg, style, heads * head_width),
      bias=style.bias,
      lora=lora(cfg),
      name="out",
    )(mixed), past


def norm(config: ModelConfig, style: Style, name: str) -> nn.Module:
  """A norm of the architecture's kind."""
  return NORMS[style.norm](config.norm_epsilon or style.norm_epsilon, name=name)


def lora(config: ModelConfig) -> LoRA | None:
  """The adapters that the config asks for."""
  return (
    LoRA(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout)
    if config.lora_rank
    else None
  )


def head_width_of(config: ModelConfig) -> int:
  """K."""
  return config.head_width or config.width // config.num_heads


def initial(config: ModelConfig, style: Style, fan_in: int):
  """Initialiser of a kernel."""
  return normal(config.init_std * (fan_in**-0.5 if style.fan_in_init else 1.0))


def residual_init(config: ModelConfig, style: Style, fan_in: int):
  """Initialiser of the projections that write to the residual stream."""
  if style.scaled_residual_init:
    return normal(config.init_std * (2 * config.num_layers) ** -0.5)
  return initial(config, style, fan_in)


class Block(nn.Module):
  """Attention (to the memory too, if there is one) and feed-forward, each with a residual sum and a norm.

  Returns (x, past with what is new in it), as scan wants it.
  """

  config: ModelConfig
  style: Style
  train: bool

  @nn.compact
  def __call__(
    self,
    x_BxTxD,
    visibility,
    bias_HxTxS=None,
    memory: Memory | None = None,
    index=None,
    past: Past | None = None,
  ):
    cfg, style = self.config, self.style
    attention = Attention(cfg, style, self.train, name="attention")
    mlp = MLP(
      cfg.mlp_dim,
      style.activation,
      precision.of(cfg),
      initial(cfg, style, cfg.width),
      residual_init(cfg, style, cfg.mlp_dim),
      style.gated,
      style.bias,
      lora(cfg),
      name="mlp",
    )

    def look_back(x):
      nonlocal past
      y, past = attention(x, visibility, bias_HxTxS, past=past, index=index)
      return y

    x_BxTxD = self.residual("attention", look_back, x_BxTxD)
    if memory is not None:
      cross = Attention(cfg, style, self.train, name="cross")
      look = lambda x: cross(x, memory.visibility, source_BxSxD=memory.states_BxSxD)[0]
      x_BxTxD = self.residual("cross", look, x_BxTxD)
    feed = (lambda x: mlp(x, self.drop)) if style.inner_dropout else mlp
    return self.residual("mlp", feed, x_BxTxD), past

  def residual(self, name: str, layer, x_BxTxD):
    """x plus what the layer says of it, normalised before or after."""
    normed = norm(self.config, self.style, f"{name}_norm")
    if self.style.post_norm:
      x_BxTxD = normed(x_BxTxD + self.drop(layer(x_BxTxD)))
    else:
      x_BxTxD = x_BxTxD + self.drop(layer(normed(x_BxTxD)))
    return constrain(x_BxTxD, BATCH, "context", None)

  def drop(self, x):
    key = self.make_rng("dropout") if self.train and self.config.dropout else None
    return attention_lib.dropout(x, self.config.dropout, key)


def unstacked(params: Params) -> Params:
  """The parameters with the layers of every stack as a tuple of trees, for `stack` to go through one by one."""
  if not isinstance(params, dict):
    return params

  def layers(stacked):
    return tuple(
      jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(len(jax.tree.leaves(stacked)[0]))
    )

  return {
    name: layers(tree) if name == "layers" else unstacked(tree) for name, tree in params.items()
  }


def stack(
  module: nn.Module,
  style: Style,
  x_BxTxD,
  visibility,
  bias_HxTxS,
  memory,
  index,
  past,
  *,
  train: bool,
):
  """L blocks over x -> (BxTxD, past of each). Called inside a module with a `config`, whose parameter `layers` they become.

  With a past, parameters must be `unstacked`: a step of decoding reads each parameter once, and would spend most of its
  time on cutting the layers, and their pasts, out of one array.
  """
  config = module.config
  if isinstance(own := module.variables.get("params", {}).get("layers"), tuple):
    pasts = []
    for params, one in zip(own, past or (None,) * len(own), strict=True):
      block = Block(config, style, train, parent=None)
      x_BxTxD, one = block.apply(
        {"params": params}, x_BxTxD, visibility, bias_HxTxS, memory, index, one
      )
      pasts.append(one)
    return x_BxTxD, tuple(pasts)
  unroll = config.scan == "unroll" or config.scan == "auto" and jax.default_backend() == "cpu"
  keep = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
  block = (
    nn.remat(Block, prevent_cse=unroll, policy=keep[config.remat])
    if config.remat in keep
    else Block
  )
  layers = nn.scan(
    block,
    variable_axes={"params": 0},
    in_axes=(nn.broadcast,) * 3,
    split_rngs={"params": True, "dropout": True},
    length=config.num_layers,
    unroll=config.num_layers if unroll else 1,
  )
  return layers(config, style, train, name="layers")(x_BxTxD, visibility, bias_HxTxS, memory)


def trunk(
  backbone: nn.Module,
  style: Style,
  x_BxTxD,
  batch,
  *,
  train: bool,
  bias_HxTxS=None,
  memory: Memory | None = None,
  cache: Cache | None = None,
):
  """Dropout of what is embedded, then the stack -> (BxTxD, cache). Called inside a backbone with a `config`.

  Of the batch, segments and positions are read. bias: of the self-attention. memory: what each block looks at.
  cache: what was seen before; x is written into it.
  """
  config = backbone.config
  key = backbone.make_rng("dropout") if train and config.dropout else None
  x_BxTxD = constrain(attention_lib.dropout(x_BxTxD, config.dropout, key), BATCH, "context", None)
  if cache is None:
    visibility = attention_lib.self_visibility(batch, causal=style.causal)
    return stack(backbone, style, x_BxTxD, visibility, bias_HxTxS, memory, None, None, train=train)[
      0
    ], None
  seen = cache.replace(
    segments_BxS=_written(cache.segments_BxS, batch["segments"], cache.index),
    positions_BxS=_written(cache.positions_BxS, batch["positions"], cache.index),
  )
  visibility = attention_lib.Visibility(
    batch["segments"], seen.segments_BxS, batch["positions"], seen.positions_BxS, style.causal
  )
  x_BxTxD, past = stack(
    backbone, style, x_BxTxD, visibility, bias_HxTxS, memory, cache.index, cache.past, train=train
  )
  return x_BxTxD, seen.replace(past=past, index=cache.index + x_BxTxD.shape[1])
