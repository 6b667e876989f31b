"""One transformer: attention, block, and a stack of blocks with stacked parameters.

Every parameter of the stack carries a leading layer axis, whether the stack is scanned or unrolled:
there is one layout of checkpoints.
"""

import operator
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import Batch, Params
from llm.models import attention as attention_lib
from llm.models import cudnn, precision, splash
from llm.models.architecture import Facts, head_width_of, init_std_of, kv_heads_of
from llm.models.attention import Visibility
from llm.models.cache import Cache, Past
from llm.models.layers import MLP, LayerNorm, Linear, LoRA, RMSNorm, normal
from llm.sharding import BATCH, constrain


class Memory(NamedTuple):
  """What cross-attention looks at."""

  states_BxSxD: jax.Array
  visibility: Visibility


class Pattern(NamedTuple):
  """How the layers of a stack differ, an entry a layer; None where they do not."""

  reach: jax.Array | None = None  # tokens between a query and the farthest key that it sees
  theta: jax.Array | None = None  # base of the rotary wavelengths
  normed: jax.Array | None = None  # whether a norm precedes attention


EVERYWHERE = 2**30  # the reach of a layer that sees the whole text


def pattern_of(config: ModelConfig, facts: Facts) -> Pattern | None:
  """Every `global_every`-th layer sees everything, from the first on; None where all are alike."""
  if config.global_every == 1 and facts.first_norm:
    return None
  pattern = Pattern()
  layers_L = jnp.arange(config.num_layers)
  if config.global_every > 1:
    sees_all_L = layers_L % config.global_every == 0
    pattern = pattern._replace(
      reach=jnp.where(sees_all_L, EVERYWHERE, config.window // 2),
      theta=jnp.where(sees_all_L, config.rope_theta, config.local_rope_theta),
    )
  if not facts.first_norm:
    pattern = pattern._replace(normed=layers_L > 0)
  return pattern


class Attention(nn.Module):
  """Multi-head attention of x to itself, or to `source`.

  past: keys and values of what was seen before; those of x go to the slots from `index` on. layer:
  the entries of a `Pattern`. Returns (y_BxTxD, the past with what is new in it).
  """

  config: ModelConfig
  facts: Facts
  train: bool

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    visibility: Visibility,
    bias_HxTxS: jax.Array | None = None,
    source_BxSxD: jax.Array | None = None,
    past: Past | None = None,
    index: jax.Array | None = None,
    layer: Pattern | None = None,
  ) -> tuple[jax.Array, Past | None]:
    cfg, facts, types = self.config, self.facts, precision.of(self.config)
    itself = past is None and source_BxSxD is None
    source_BxSxD = x_BxTxD if source_BxSxD is None else source_BxSxD
    fan_in = cfg.width * (1 if facts.scaled_scores else head_width_of(cfg))
    q_BxTxHxK = self.project("query", cfg.num_heads, x_BxTxD, fan_in)
    k_BxSxGxK = self.project("key", kv_heads_of(cfg), source_BxSxD, cfg.width)
    v_BxSxGxK = self.project("value", kv_heads_of(cfg), source_BxSxD, cfg.width)
    if facts.qk_norm:
      q_BxTxHxK = norm(cfg, facts, "query_norm")(q_BxTxHxK)
      k_BxSxGxK = norm(cfg, facts, "key_norm")(k_BxSxGxK)
    if facts.rotary:
      theta = cfg.rope_theta if layer is None or layer.theta is None else layer.theta
      new_keys = visibility.kv_positions_BxS if past is None else visibility.q_positions_BxT
      q_BxTxHxK = attention_lib.rotary(q_BxTxHxK, visibility.q_positions_BxT, theta)
      k_BxSxGxK = attention_lib.rotary(k_BxSxGxK, new_keys, theta)
    if past is not None:
      past = past.with_new(k_BxSxGxK, v_BxSxGxK, index)
      k_BxSxGxK, v_BxSxGxK = (a.swapaxes(1, 2) for a in past)
      # What was seen is read in the type in which it is kept.
      types = types._replace(operands=types.values)
    # Context parallelism: queries stay split over positions, keys and values are gathered.
    q_BxTxHxK = constrain(q_BxTxHxK, BATCH, "context", "tensor", None)
    k_BxSxGxK = constrain(k_BxSxGxK, BATCH, None, "tensor", None)
    v_BxSxGxK = constrain(v_BxSxGxK, BATCH, None, "tensor", None)
    backend = cfg.attention if itself else "reference"
    mixed_BxTxHxK = self.attend(
      backend, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, visibility, bias_HxTxS, layer, types
    )
    return self.out(mixed_BxTxHxK), past

  def project(self, name: str, heads: int, x_BxTxD: jax.Array, fan_in: int) -> jax.Array:
    """Queries, keys or values: BxTxHxK."""
    cfg, facts = self.config, self.facts
    return Linear(
      (cfg.width, heads, head_width_of(cfg)),
      out=2,
      precision=precision.of(cfg),
      kernel_init=initial(cfg, facts, fan_in),
      bias=facts.bias,
      lora=lora(cfg),
      name=name,
    )(x_BxTxD)

  def attend(self, backend, q, k, v, visibility, bias_HxTxS, layer, types) -> jax.Array:
    """BxTxHxK, by the backend that the config asks for."""
    cfg = self.config
    scale = head_width_of(cfg) ** -0.5 if self.facts.scaled_scores else 1.0
    reach = None if layer is None else layer.reach
    if backend == "splash":
      return splash.attend(
        q,
        k,
        v,
        visibility.q_segments_BxT,
        causal=self.facts.causal,
        scale=scale,
        window=cfg.window,
        reach=reach,
      )
    if reach is not None:
      visibility = visibility.replace(reach=reach)
    if backend == "cudnn":
      return cudnn.attend(q, k, v, visibility, scale=scale)
    key = self.make_rng("dropout") if self.train and cfg.dropout else None
    return attention_lib.attend(
      q,
      k,
      v,
      visibility,
      types,
      scale=scale,
      bias_HxTxS=bias_HxTxS,
      dropout_rate=cfg.dropout,
      key=key,
    )

  def out(self, mixed_BxTxHxK: jax.Array) -> jax.Array:
    """The heads, joined and projected to the width of the model: BxTxD."""
    cfg, facts = self.config, self.facts
    heads, head_width = cfg.num_heads, head_width_of(cfg)
    return Linear(
      (heads, head_width, cfg.width),
      precision=precision.of(cfg),
      kernel_init=residual_init(cfg, facts, heads * head_width),
      bias=facts.bias,
      lora=lora(cfg),
      name="out",
    )(mixed_BxTxHxK)


def norm(config: ModelConfig, facts: Facts, name: str) -> nn.Module:
  """A norm of the architecture's kind."""
  epsilon = config.norm_epsilon or facts.norm_epsilon
  if facts.norm == "rms":
    return RMSNorm(epsilon, name=name)
  return LayerNorm(epsilon, facts.norm_bias, name=name)


def lora(config: ModelConfig) -> LoRA | None:
  """The adapters that the config asks for."""
  if not config.lora_rank:
    return None
  return LoRA(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout)


def initial(config: ModelConfig, facts: Facts, fan_in: int) -> Callable:
  """Initialiser of a kernel."""
  return normal(init_std_of(config, facts) * (fan_in**-0.5 if facts.fan_in_init else 1.0))


def residual_init(config: ModelConfig, facts: Facts, fan_in: int) -> Callable:
  """Initialiser of the projections that write to the residual stream."""
  if facts.scaled_residual_init:
    return normal(init_std_of(config, facts) * (2 * config.num_layers) ** -0.5)
  return initial(config, facts, fan_in)


class Block(nn.Module):
  """Attention, to the memory too if there is one, and feed-forward: a residual sum and a norm each.

  Returns (x, the past with what is new in it), as scan wants it.
  """

  config: ModelConfig
  facts: Facts
  train: bool

  @nn.compact
  def __call__(
    self,
    x_BxTxD: jax.Array,
    visibility: Visibility,
    bias_HxTxS: jax.Array | None = None,
    memory: Memory | None = None,
    layer: Pattern | None = None,
    index: jax.Array | None = None,
    past: Past | None = None,
  ) -> tuple[jax.Array, Past | None]:
    cfg, facts = self.config, self.facts
    attention = Attention(cfg, facts, self.train, name="attention")
    entered, leave = self.residual("attention", x_BxTxD)
    if layer is not None and layer.normed is not None:
      entered = jnp.where(layer.normed, entered, x_BxTxD)
    y_BxTxD, past = attention(entered, visibility, bias_HxTxS, past=past, index=index, layer=layer)
    x_BxTxD = leave(y_BxTxD)
    if memory is not None:
      cross = Attention(cfg, facts, self.train, name="cross")
      entered, leave = self.residual("cross", x_BxTxD)
      y_BxTxD, _ = cross(entered, memory.visibility, source_BxSxD=memory.states_BxSxD)
      x_BxTxD = leave(y_BxTxD)
    entered, leave = self.residual("mlp", x_BxTxD)
    return leave(self.feed_forward(entered)), past

  def feed_forward(self, x_BxTxD: jax.Array) -> jax.Array:
    cfg, facts = self.config, self.facts
    mlp = MLP(
      cfg.mlp_dim,
      facts.activation,
      precision.of(cfg),
      initial(cfg, facts, cfg.width),
      residual_init(cfg, facts, cfg.mlp_dim),
      facts.gated,
      facts.bias,
      lora(cfg),
      name="mlp",
    )
    return mlp(x_BxTxD, self.drop) if facts.inner_dropout else mlp(x_BxTxD)

  def residual(self, name: str, x_BxTxD: jax.Array) -> tuple[jax.Array, Callable]:
    """(what enters the layer called `name`, a function from its output to what leaves the sum)."""
    normalise = norm(self.config, self.facts, f"{name}_norm")

    def leave(y_BxTxD: jax.Array) -> jax.Array:
      total_BxTxD = x_BxTxD + self.drop(y_BxTxD)
      if self.facts.post_norm:
        total_BxTxD = normalise(total_BxTxD)
      return constrain(total_BxTxD, BATCH, "context", None)

    return x_BxTxD if self.facts.post_norm else normalise(x_BxTxD), leave

  def drop(self, x: jax.Array) -> jax.Array:
    key = self.make_rng("dropout") if self.train and self.config.dropout else None
    return attention_lib.dropout(x, self.config.dropout, key)


def unstacked(params: Params) -> Params:
  """The parameters with the layers of every stack as a tuple of trees."""
  if not isinstance(params, dict):
    return params

  def layers(stacked: Params) -> tuple:
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(count))

  return {
    name: layers(tree) if name == "layers" else unstacked(tree) for name, tree in params.items()
  }


def stack(
  module: nn.Module,
  facts: Facts,
  x_BxTxD: jax.Array,
  visibility: Visibility,
  bias_HxTxS: jax.Array | None,
  memory: Memory | None,
  *,
  train: bool,
) -> jax.Array:
  """L blocks over x -> BxTxD. Called inside a module with a `config`, as its parameter `layers`."""
  config = module.config
  unroll = config.scan == "unroll"
  policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
  block = Block
  if config.remat in policies:
    block = nn.remat(Block, prevent_cse=unroll, policy=policies[config.remat])
  pattern = pattern_of(config, facts)
  by_layer: Any = nn.broadcast if pattern is None else 0
  in_axes: Any = (nn.broadcast, nn.broadcast, nn.broadcast, by_layer)
  layers = nn.scan(
    block,
    variable_axes={"params": 0},
    in_axes=in_axes,
    split_rngs={"params": True, "dropout": True},
    length=config.num_layers,
    unroll=config.num_layers if unroll else 1,
  )
  stacked = layers(config, facts, train, name="layers")
  return stacked(x_BxTxD, visibility, bias_HxTxS, memory, pattern)[0]


def one_by_one(
  module: nn.Module,
  facts: Facts,
  x_BxTxD: jax.Array,
  visibility: Visibility,
  bias_HxTxS: jax.Array | None,
  memory: Memory | None,
  cache: Cache | None,
) -> tuple[jax.Array, tuple[Past, ...]]:
  """As `stack`, with `unstacked` parameters, for writing -> (BxTxD, the past of each layer).

  A token reads each parameter once. Cutting the layers, and their pasts, out of one array would
  take most of its time.
  """
  layers = module.variables["params"]["layers"]
  index, pasts = (None, (None,) * len(layers)) if cache is None else (cache.index, cache.past)
  written = []
  for params, past in zip(layers, pasts, strict=True):
    block = Block(module.config, facts, train=False, parent=None)
    x_BxTxD, past = block.apply(
      {"params": params}, x_BxTxD, visibility, bias_HxTxS, memory, index=index, past=past
    )
    written.append(past)
  return x_BxTxD, tuple(written)


def trunk(
  backbone: nn.Module,
  facts: Facts,
  x_BxTxD: jax.Array,
  batch: Batch,
  *,
  train: bool,
  bias_HxTxS: jax.Array | None = None,
  memory: Memory | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
  """Dropout of what is embedded, then the stack. Called inside a backbone with a `config`.

  Reads segments and positions of the batch. bias: of the self-attention. memory: what each block
  looks at. cache: what was seen before; x is written into it.
  """
  config = backbone.config
  key = backbone.make_rng("dropout") if train and config.dropout else None
  x_BxTxD = attention_lib.dropout(x_BxTxD, config.dropout, key)
  x_BxTxD = constrain(x_BxTxD, BATCH, "context", None)
  if cache is None:
    visibility = attention_lib.self_visibility(batch, causal=facts.causal)
  else:
    cache = cache.with_new(batch["segments"], batch["positions"])
    visibility = attention_lib.cache_visibility(batch, cache, causal=facts.causal)
  layers = backbone.variables.get("params", {}).get("layers")
  if not isinstance(layers, tuple):
    return stack(backbone, facts, x_BxTxD, visibility, bias_HxTxS, memory, train=train), None
  x_BxTxD, past = one_by_one(backbone, facts, x_BxTxD, visibility, bias_HxTxS, memory, cache)
  if cache is None:
    return x_BxTxD, None
  return x_BxTxD, cache.replace(past=past, index=cache.index + x_BxTxD.shape[1])
