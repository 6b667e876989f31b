"""What an architecture publishes and a user does not choose; shapes that follow from a config."""

import dataclasses

from llm.config import ModelConfig
from llm.core import round_up


@dataclasses.dataclass(frozen=True)
class Facts:
  """What an architecture is. The rest of the code asks these, never for its name."""

  kind: str  # encoder, decoder, encoder_decoder
  activation: str  # a key of layers.ACTIVATIONS
  norm_epsilon: float  # where config.model.norm_epsilon is 0
  causal: bool  # a token sees none that comes later
  # A text that is labelled stands between these special pieces of the tokenizer; "" is none.
  begin: str = ""
  end: str = "eos"
  untied: bool = False  # the output layer may be a table of its own
  norm: str = "layer"  # layer or rms
  norm_bias: bool = True  # of layer norms
  post_norm: bool = False  # normalises after the residual sum, not before the layer
  # The first layer's attention takes what is embedded as it is, where a norm went before.
  first_norm: bool = True
  bias: bool = True  # of the linear layers
  gated: bool = False  # the feed-forward layer
  rotary: bool = False  # positions turn queries and keys; none is added to the embedding
  qk_norm: bool = False  # queries and keys are normalised, head by head
  position_bias: bool = False  # positions add to the scores of attention (T5)
  scaled_scores: bool = True  # scores over sqrt(K); T5 starts its queries smaller instead
  scaled_residual_init: bool = False  # output projections start at init_std / sqrt(2 L) (GPT-2)
  fan_in_init: bool = False  # kernels start at init_std / sqrt(inputs) (T5)
  inner_dropout: bool = False  # inside the feed-forward layer too (T5)
  pooler: bool = True  # a layer over the first token goes before the classifier (BERT)
  # The dropout of fine-tuning, where the checkpoint was pretrained without.
  tuning_dropout: float = 0.0
  embedding_project: bool = False  # the embedding may be narrower than the layers (ELECTRA)


def padded_vocab(vocab_size: int) -> int:
  """Rows of the embedding table: a multiple of 128, so that mesh axes divide it."""
  return round_up(vocab_size, 128)


def init_std_of(config: ModelConfig, facts: Facts) -> float:
  """The standard deviation at which weights start, where the config sets none.

  It is 1 where kernels are divided by the root of their inputs. Elsewhere, from the width of 768
  on, it is the 0.02 of BERT and GPT-2. Below, it grows as 1 / sqrt(width), so that a product with a
  fresh kernel shrinks a vector as much as in BERT-base. At a fixed 0.02, the two products of a
  fresh attention layer leave 31% of a vector of 768 numbers, and 5% of one of 128: narrow models
  would learn for long from what is embedded alone.
  """
  if config.init_std:
    return config.init_std
  if facts.fan_in_init:
    return 1.0
  return 0.02 * max(1.0, 768 / config.width) ** 0.5


def head_width_of(config: ModelConfig) -> int:
  """K: the width of an attention head."""
  return config.head_width or config.width // config.num_heads


def embedding_width_of(config: ModelConfig) -> int:
  """E: the width of the embedding table."""
  return config.embedding_width or config.width


def kv_heads_of(config: ModelConfig) -> int:
  """Heads of keys and values."""
  return config.num_kv_heads or config.num_heads
