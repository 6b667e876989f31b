"""One transformer: block, and a stack of them with stacked parameters.

Every parameter of the stack carries a leading layer axis, whether the stack is scanned or
unrolled, so that there is one layout of checkpoints.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm.config import ModelConfig
from llm.core import round_up
from llm.models import attention as attention_lib
from llm.models.layers import NORMS, Linear, LoRA, MLP, normal
from llm.sharding import BATCH, constrain


@dataclasses.dataclass(frozen=True)
class Style:
  """What an architecture publishes and a user does not choose."""
  post_norm: bool            # normalise after the residual sum (BERT) or before the layer (GPT-2)
  causal: bool
  activation: str            # a key of layers.ACTIVATIONS
  norm_epsilon: float
  scaled_residual_init: bool  # output projections start at init_std / sqrt(2 L) (GPT-2)
  norm: str = "layer"        # a key of layers.NORMS
  bias: bool = True          # of the linear layers
  gated: bool = False        # feed-forward
  rotary: bool = False       # positions turn queries and keys, nothing is added to the embedding


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """The type of the computation: "auto" is bfloat16 on accelerators, float32 on CPU."""
  if config.dtype != "auto":
    return jnp.dtype(config.dtype)
  return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def padded_vocab(vocab_size: int) -> int:
  """Rows of the embedding table: a multiple of 128, so that mesh axes divide it."""
  return round_up(vocab_size, 128)


class Attention(nn.Module):
  """Multi-head self-attention with separate query, key and value projections."""
  config: ModelConfig
  style: Style
  train: bool

  @nn.compact
  def __call__(self, x_BxTxD, visibility):
    cfg, dtype = self.config, compute_dtype(self.config)
    heads, kv_heads = cfg.num_heads, cfg.num_kv_heads or cfg.num_heads
    head_width = cfg.width // cfg.num_heads
    q, k, v = (Linear((cfg.width, count, head_width), out=2, dtype=dtype, kernel_init=normal(cfg.init_std),
                      bias=self.style.bias, lora=lora(cfg), name=name)(x_BxTxD)
               for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads)))
    if self.style.rotary:
      q = attention_lib.rotary(q, visibility.q_positions_BxT, cfg.rope_theta)
      k = attention_lib.rotary(k, visibility.kv_positions_BxS, cfg.rope_theta)
    # Context parallelism: queries stay split over positions, keys and values are gathered.
    q = constrain(q, BATCH, "context", "tensor", None)
    k, v = (constrain(a, BATCH, None, "tensor", None) for a in (k, v))
    key = self.make_rng("dropout") if self.train and cfg.dropout else None
    mixed = attention_lib.attend(q, k, v, visibility, scale=head_width ** -0.5,
                                 dropout_rate=cfg.dropout, key=key)
    return Linear((heads, head_width, cfg.width), dtype=dtype, kernel_init=residual_init(cfg, self.style),
                  bias=self.style.bias, lora=lora(cfg), name="out")(mixed)


def norm(config: ModelConfig, style: Style, name: str) -> nn.Module:
  """A norm of the architecture's kind."""
  return NORMS[style.norm](config.norm_epsilon or style.norm_epsilon, name=name)


def lora(config: ModelConfig) -> LoRA | None:
  """The adapters that the config asks for."""
  return LoRA(config.lora_rank, config.lora_alpha, config.lora_targets, config.lora_dropout) if config.lora_rank else None


def residual_init(config: ModelConfig, style: Style):
  """Initialiser of the projections that write to the residual stream."""
  shrink = (2 * config.num_layers) ** -0.5 if style.scaled_residual_init else 1.0
  return normal(config.init_std * shrink)


class Block(nn.Module):
  """Attention and feed-forward, each with a residual sum and a norm. Returns (x, None) for scan."""
  config: ModelConfig
  style: Style
  train: bool

  @nn.compact
  def __call__(self, x_BxTxD, visibility):
    cfg, style = self.config, self.style
    attention = Attention(cfg, style, self.train, name="attention")
    mlp = MLP(cfg.mlp_dim, style.activation, compute_dtype(cfg), normal(cfg.init_std), residual_init(cfg, style),
              style.gated, style.bias, lora(cfg), name="mlp")
    norms = [norm(cfg, style, n) for n in ("attention_norm", "mlp_norm")]
    for layer, normed in zip((lambda x: attention(x, visibility), mlp), norms):
      if style.post_norm:
        x_BxTxD = normed(x_BxTxD + self.drop(layer(x_BxTxD)))
      else:
        x_BxTxD = x_BxTxD + self.drop(layer(normed(x_BxTxD)))
      x_BxTxD = constrain(x_BxTxD, BATCH, "context", None)
    return x_BxTxD, None

  def drop(self, x):
    key = self.make_rng("dropout") if self.train and self.config.dropout else None
    return attention_lib.dropout(x, self.config.dropout, key)


def stack(config: ModelConfig, style: Style, x_BxTxD, visibility, *, train: bool, name="layers"):
  """L blocks over x -> BxTxD. Called inside a module, whose parameter `name` they become."""
  unroll = config.scan == "unroll" or config.scan == "auto" and jax.default_backend() == "cpu"
  block = nn.remat(Block, prevent_cse=unroll) if config.remat == "full" else Block
  layers = nn.scan(block, variable_axes={"params": 0}, in_axes=nn.broadcast,
                   split_rngs={"params": True, "dropout": True}, length=config.num_layers,
                   unroll=config.num_layers if unroll else 1)
  return layers(config, style, train, name=name)(x_BxTxD, visibility)[0]


def trunk(backbone: nn.Module, style: Style, x_BxTxD, batch, *, train: bool):
  """Dropout of what is embedded, then the stack -> BxTxD. Called inside a backbone with a `config`."""
  config = backbone.config
  key = backbone.make_rng("dropout") if train and config.dropout else None
  x_BxTxD = constrain(attention_lib.dropout(x_BxTxD, config.dropout, key), BATCH, "context", None)
  visibility = attention_lib.self_visibility(batch, causal=style.causal)
  return stack(config, style, x_BxTxD, visibility, train=train)
