"""How the architectures of `transformers` are ours: their config keys, their tensors' names and layouts.

A family is a table. Their tensors are named as in the library's classes with a language-model head; a
layer's number stands as {}.
"""

import dataclasses
import re
from typing import Any, Callable, Mapping

import numpy as np

from llm.config import ModelConfig
from llm.core import UserError
from llm.models import bert, gpt, llama, modernbert, qwen3, t5
from llm.models.architecture import head_width_of, padded_vocab


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs and the leaves of ours that it holds.

  ours: one path, or several where theirs is fused along its outputs. transposed: theirs is outputs x
  inputs, as torch.nn.Linear keeps it. inputs: how many leading dimensions of our kernel are contracted.
  reverse: their classes come in the other order. first: the first layer that has it in theirs; ours
  have it in the layers before too, unused, as ones.
  """

  theirs: str
  ours: tuple[str, ...]
  transposed: bool = False
  inputs: int = 1
  reverse: bool = False
  first: int = 0

  def to_ours(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Their tensor of one layer -> our leaves of one layer. Raises ValueError if the sizes differ."""
    tensor = tensor.T if self.transposed else tensor
    tensor = tensor[..., ::-1] if self.reverse else tensor
    return [
      np.ascontiguousarray(part).reshape(shape)
      for part, shape in zip(np.split(tensor, len(shapes), axis=-1), shapes)
    ]

  def to_theirs(self, leaves: list[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`."""
    flat = leaves
    if self.ours[0].endswith("kernel"):
      flat = [leaf.reshape(int(np.prod(leaf.shape[: self.inputs])), -1) for leaf in leaves]
    elif self.ours[0].endswith("bias"):
      flat = [leaf.reshape(-1) for leaf in leaves]
    tensor = np.concatenate(flat, axis=-1)
    tensor = tensor[..., ::-1] if self.reverse else tensor
    return np.ascontiguousarray(tensor.T if self.transposed else tensor)


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture of theirs.

  ours: the name of ours. classes: our objective -> their class with its head; the first is the one
  that a checkpoint without another head is for. prefix: what its names may begin with or not.
  buffers: a regex of tensors that carry nothing. tied: their name of a copy -> of what it copies.
  special: their key of a special token -> our name of it. padded: their vocab_size counts rows that
  pad the vocabulary, as ours are padded. gated: serves models of this `gated` alone. tied_unscaled:
  an untied config.json without lm_head.weight is tied after all, and its output is not scaled.
  kept: leaves that come along without their head. sentinels: ids after the pieces of a SentencePiece
  file. tokenizer_json: its tokenizer must be a tokenizer.json.
  """

  model_type: str
  ours: str
  classes: Mapping[str, str]
  prefix: str
  tensors: tuple[Tensor, ...]
  buffers: str
  tied: Mapping[str, str]
  model: Callable[[Mapping[str, Any]], ModelConfig]
  config: Callable[[ModelConfig], dict[str, Any]]
  special: Mapping[str, str]
  padded: bool = False
  gated: bool | None = None
  tied_unscaled: bool = False
  kept: tuple[str, ...] = ()
  tokenizer_json: bool = False
  sentinels: int = 0

  def serves(self, model: ModelConfig) -> bool:
    """Whether a model of ours is of this family."""
    return self.ours == model.name and self.gated in (None, model.gated)


def _linear(theirs: str, ours: str, **how) -> tuple[Tensor, Tensor]:
  return (
    Tensor(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True, **how),
    Tensor(f"{theirs}.bias", (f"{ours}/bias",), reverse=how.get("reverse", False)),
  )


def _norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
  return Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/bias",))


def _fused(theirs: str, ours: tuple[str, ...], inputs: int = 1) -> tuple[Tensor, Tensor]:
  """GPT-2's Conv1D: inputs x outputs, as ours."""
  return (
    Tensor(f"{theirs}.weight", tuple(f"{o}/kernel" for o in ours), inputs=inputs),
    Tensor(f"{theirs}.bias", tuple(f"{o}/bias" for o in ours)),
  )


def _expect(config: Mapping[str, Any], wanted: Mapping[str, Any]):
  """Raises UserError where their config asks for what our architecture does not do."""
  for key, value in wanted.items():
    if config.get(key, value) != value:
      raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def _number(config: Mapping[str, Any], key: str) -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {key} must be a positive integer, not {value!r}")
  return value


def _bert_model(config) -> ModelConfig:
  _expect(
    config,
    {
      "hidden_act": "gelu",
      "type_vocab_size": 2,
      "position_embedding_type": "absolute",
      "is_decoder": False,
      "tie_word_embeddings": True,
    },
  )
  n = lambda key: _number(config, key)
  return ModelConfig(
    name="bert",
    num_layers=n("num_hidden_layers"),
    width=n("hidden_size"),
    num_heads=n("num_attention_heads"),
    mlp_dim=n("intermediate_size"),
    vocab_size=n("vocab_size"),
    max_length=n("max_position_embeddings"),
    dropout=float(config.get("hidden_dropout_prob", 0.1)),
    norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
  )


def _bert_config(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "bert",
    "hidden_act": "gelu",
    "type_vocab_size": 2,
    "layer_norm_eps": model.norm_epsilon or bert.FACTS.norm_epsilon,
    "num_hidden_layers": model.num_layers,
    "hidden_size": model.width,
    "num_attention_heads": model.num_heads,
    "intermediate_size": model.mlp_dim,
    "vocab_size": model.vocab_size,
    "max_position_embeddings": model.max_length,
    "hidden_dropout_prob": model.dropout,
    "attention_probs_dropout_prob": model.dropout,
    "tie_word_embeddings": True,
  }


_LAYER, _OURS = "bert.encoder.layer.{}.", "backbone/layers/"

PAIRS = "masked_lm with next_sentence"  # what BertForPreTraining is for

BERT = Family(
  "bert",
  "bert",
  {
    PAIRS: "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
    "span_qa": "BertForQuestionAnswering",
  },
  "bert.",
  (
    Tensor("bert.embeddings.word_embeddings.weight", ("backbone/token/embedding",)),
    Tensor("bert.embeddings.position_embeddings.weight", ("backbone/position/embedding",)),
    Tensor("bert.embeddings.token_type_embeddings.weight", ("backbone/type/embedding",)),
    *_norm("bert.embeddings.LayerNorm", "backbone/embedding_norm"),
    *_linear(f"{_LAYER}attention.self.query", f"{_OURS}attention/query"),
    *_linear(f"{_LAYER}attention.self.key", f"{_OURS}attention/key"),
    *_linear(f"{_LAYER}attention.self.value", f"{_OURS}attention/value"),
    *_linear(f"{_LAYER}attention.output.dense", f"{_OURS}attention/out", inputs=2),
    *_norm(f"{_LAYER}attention.output.LayerNorm", f"{_OURS}attention_norm"),
    *_linear(f"{_LAYER}intermediate.dense", f"{_OURS}mlp/up"),
    *_linear(f"{_LAYER}output.dense", f"{_OURS}mlp/down"),
    *_norm(f"{_LAYER}output.LayerNorm", f"{_OURS}mlp_norm"),
    *_linear("bert.pooler.dense", "head/pooler"),
    *_linear("cls.predictions.transform.dense", "head/transform"),
    *_norm("cls.predictions.transform.LayerNorm", "head/transform_norm"),
    Tensor("cls.predictions.bias", ("head/lm/bias",)),
    # Their class 0 is "B follows A", which is our class 1.
    *_linear("cls.seq_relationship", "head/next_sentence", reverse=True),
    *_linear("classifier", "head/classifier"),
    *_linear("qa_outputs", "head/span"),
  ),
  buffers=r"embeddings\.position_ids$",
  tied={
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
  model=_bert_model,
  config=_bert_config,
  special={"pad": "pad"},
  kept=("head/pooler/kernel", "head/pooler/bias"),
)


def _modernbert_model(config) -> ModelConfig:
  n = lambda key: _number(config, key)
  _expect(
    config,
    {
      "hidden_activation": "gelu",
      "classifier_activation": "gelu",
      "norm_bias": False,
      "attention_bias": False,
      "mlp_bias": False,
      "classifier_bias": False,
      "decoder_bias": True,
      "tie_word_embeddings": True,
    },
  )
  every = _global_every(config, n("num_hidden_layers"))
  theta, local_theta = (_modernbert_theta(config, kind) for kind in ("full", "sliding"))
  return ModelConfig(
    name="modernbert",
    num_layers=n("num_hidden_layers"),
    width=n("hidden_size"),
    num_heads=n("num_attention_heads"),
    mlp_dim=n("intermediate_size"),
    vocab_size=n("vocab_size"),
    max_length=n("max_position_embeddings"),
    dropout=float(config.get("embedding_dropout", 0.0)),
    norm_epsilon=float(config.get("norm_eps", 1e-5)),
    rope_theta=theta,
    local_rope_theta=local_theta,
    global_every=every,
    window=n("local_attention") if every > 1 else 0,
  )


GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _global_every(config: Mapping[str, Any], num_layers: int) -> int:
  """Every so many layers is global: by their list of layers, in old releases by a number."""
  kinds = config.get("layer_types")
  if kinds is None:
    return min(config.get("global_attn_every_n_layers", 3), num_layers)
  every = next((i for i, kind in enumerate(kinds) if i and kind == GLOBAL), num_layers)
  if kinds != _layer_types(every, num_layers):
    raise UserError(
      f"config.json: layer_types={kinds} is not supported, only {num_layers} layers of which the "
      f"first and every n-th after it are {GLOBAL}, the others {LOCAL}"
    )
  return every


def _layer_types(every: int, num_layers: int) -> list[str]:
  return [LOCAL if number % every else GLOBAL for number in range(num_layers)]


def _modernbert_theta(config: Mapping[str, Any], kind: str) -> float:
  """Base of the rotary wavelengths of layers with full or sliding attention."""
  rope = (config.get("rope_parameters") or {}).get(f"{kind}_attention") or {}
  _plain_rope(rope)
  old = {"full": ("global_rope_theta", 160_000.0), "sliding": ("local_rope_theta", 10_000.0)}
  return float(rope.get("rope_theta", config.get(*old[kind])))


def _plain_rope(rope: Mapping[str, Any]):
  """Raises UserError where rotary positions are stretched."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise UserError(
      f"config.json: rotary positions of type {kind!r} are not supported, only 'default'"
    )


def _modernbert_config(model: ModelConfig) -> dict[str, Any]:
  thetas = {GLOBAL: model.rope_theta, LOCAL: model.local_rope_theta}
  return {
    "model_type": "modernbert",
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "norm_eps": model.norm_epsilon or modernbert.FACTS.norm_epsilon,
    "num_hidden_layers": model.num_layers,
    "hidden_size": model.width,
    "num_attention_heads": model.num_heads,
    "intermediate_size": model.mlp_dim,
    "vocab_size": model.vocab_size,
    "max_position_embeddings": model.max_length,
    "embedding_dropout": model.dropout,
    "attention_dropout": model.dropout,
    "local_attention": model.window or model.max_length,
    "layer_types": _layer_types(model.global_every, model.num_layers),
    # As transformers 4 and 5 want them.
    "global_attn_every_n_layers": model.global_every,
    "global_rope_theta": model.rope_theta,
    "local_rope_theta": model.local_rope_theta,
    "rope_parameters": {
      kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
    },
    "tie_word_embeddings": True,
  }


def _plain(theirs: str, *ours: str, **how) -> Tensor:
  """A linear layer without bias."""
  return Tensor(f"{theirs}.weight", tuple(f"{o}/kernel" for o in ours), transposed=True, **how)


def _scale(theirs: str, ours: str, **how) -> Tensor:
  """A norm without bias."""
  return Tensor(f"{theirs}.weight", (f"{ours}/scale",), **how)


_MODEL = "model.layers.{}."  # of ModernBERT and the decoders

MODERNBERT = Family(
  "modernbert",
  "modernbert",
  {"masked_lm": "ModernBertForMaskedLM"},
  "model.",
  (
    Tensor("model.embeddings.tok_embeddings.weight", ("backbone/token/embedding",)),
    _scale("model.embeddings.norm", "backbone/embedding_norm"),
    _scale(f"{_MODEL}attn_norm", f"{_OURS}attention_norm", first=1),
    _plain(
      f"{_MODEL}attn.Wqkv", *(f"{_OURS}attention/{part}" for part in ("query", "key", "value"))
    ),
    _plain(f"{_MODEL}attn.Wo", f"{_OURS}attention/out", inputs=2),
    _scale(f"{_MODEL}mlp_norm", f"{_OURS}mlp_norm"),
    _plain(f"{_MODEL}mlp.Wi", f"{_OURS}mlp/gate", f"{_OURS}mlp/up"),
    _plain(f"{_MODEL}mlp.Wo", f"{_OURS}mlp/down"),
    _scale("model.final_norm", "backbone/final_norm"),
    _plain("head.dense", "head/transform"),
    _scale("head.norm", "head/transform_norm"),
    Tensor("decoder.bias", ("head/lm/bias",)),
  ),
  buffers=r"rotary_emb\.",
  tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
  model=_modernbert_model,
  config=_modernbert_config,
  special={"pad": "pad", "cls": "cls", "sep": "sep", "bos": "cls", "eos": "sep"},
  tokenizer_json=True,
)


def _gpt_model(config) -> ModelConfig:
  _expect(
    config,
    {
      "activation_function": "gelu_new",
      "scale_attn_weights": True,
      "tie_word_embeddings": True,
      "scale_attn_by_inverse_layer_idx": False,
      "add_cross_attention": False,
    },
  )
  n = lambda key: _number(config, key)
  return ModelConfig(
    name="gpt",
    num_layers=n("n_layer"),
    width=n("n_embd"),
    num_heads=n("n_head"),
    mlp_dim=config.get("n_inner") or 4 * n("n_embd"),
    vocab_size=n("vocab_size"),
    max_length=n("n_positions"),
    dropout=float(config.get("resid_pdrop", 0.1)),
    norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
  )


def _gpt_config(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": model.norm_epsilon or gpt.FACTS.norm_epsilon,
    "n_layer": model.num_layers,
    "n_embd": model.width,
    "n_head": model.num_heads,
    "n_inner": model.mlp_dim,
    "vocab_size": model.vocab_size,
    "n_positions": model.max_length,
    "resid_pdrop": model.dropout,
    "embd_pdrop": model.dropout,
    "attn_pdrop": model.dropout,
    "tie_word_embeddings": True,
  }


_BLOCK = "transformer.h.{}."

WRITERS = (
  "causal_lm",
  "chat",
  "preference",
)  # objectives that a decoder with an output layer serves
ENDS = {"bos": "eos", "eos": "eos"}

GPT2 = Family(
  "gpt2",
  "gpt",
  dict.fromkeys(WRITERS, "GPT2LMHeadModel"),
  "transformer.",
  (
    Tensor("transformer.wte.weight", ("backbone/token/embedding",)),
    Tensor("transformer.wpe.weight", ("backbone/position/embedding",)),
    *_norm(f"{_BLOCK}ln_1", f"{_OURS}attention_norm"),
    *_fused(
      f"{_BLOCK}attn.c_attn",
      tuple(f"{_OURS}attention/{part}" for part in ("query", "key", "value")),
    ),
    *_fused(f"{_BLOCK}attn.c_proj", (f"{_OURS}attention/out",), inputs=2),
    *_norm(f"{_BLOCK}ln_2", f"{_OURS}mlp_norm"),
    *_fused(f"{_BLOCK}mlp.c_fc", (f"{_OURS}mlp/up",)),
    *_fused(f"{_BLOCK}mlp.c_proj", (f"{_OURS}mlp/down",)),
    *_norm("transformer.ln_f", "backbone/final_norm"),
  ),
  buffers=r"\.attn\.(bias|masked_bias)$",
  tied={"lm_head.weight": "transformer.wte.weight"},
  model=_gpt_model,
  config=_gpt_config,
  special=ENDS,
)


def _llama_model(config) -> ModelConfig:
  _expect(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
  rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
  _plain_rope(rope)
  n = lambda key: _number(config, key)
  if config.get("head_dim") not in (None, n("hidden_size") // n("num_attention_heads")):
    raise UserError(
      f"config.json: head_dim={config['head_dim']} is not hidden_size / num_attention_heads"
    )
  return ModelConfig(
    name="llama",
    num_layers=n("num_hidden_layers"),
    width=n("hidden_size"),
    num_heads=n("num_attention_heads"),
    num_kv_heads=config.get("num_key_value_heads") or n("num_attention_heads"),
    mlp_dim=n("intermediate_size"),
    vocab_size=n("vocab_size"),
    max_length=n("max_position_embeddings"),
    dropout=0.0,
    norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
    rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
    tied=bool(config.get("tie_word_embeddings", False)),
  )


def _llama_config(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_hidden_layers": model.num_layers,
    "hidden_size": model.width,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads or model.num_heads,
    "intermediate_size": model.mlp_dim,
    "vocab_size": model.vocab_size,
    "max_position_embeddings": model.max_length,
    "rms_norm_eps": model.norm_epsilon or llama.FACTS.norm_epsilon,
    "rope_theta": model.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "tie_word_embeddings": model.tied,
  }


_LLAMA_TENSORS = (
  Tensor("model.embed_tokens.weight", ("backbone/token/embedding",)),
  _scale(f"{_MODEL}input_layernorm", f"{_OURS}attention_norm"),
  _plain(f"{_MODEL}self_attn.q_proj", f"{_OURS}attention/query"),
  _plain(f"{_MODEL}self_attn.k_proj", f"{_OURS}attention/key"),
  _plain(f"{_MODEL}self_attn.v_proj", f"{_OURS}attention/value"),
  _plain(f"{_MODEL}self_attn.o_proj", f"{_OURS}attention/out", inputs=2),
  _scale(f"{_MODEL}post_attention_layernorm", f"{_OURS}mlp_norm"),
  _plain(f"{_MODEL}mlp.gate_proj", f"{_OURS}mlp/gate"),
  _plain(f"{_MODEL}mlp.up_proj", f"{_OURS}mlp/up"),
  _plain(f"{_MODEL}mlp.down_proj", f"{_OURS}mlp/down"),
  _scale("model.norm", "backbone/final_norm"),
  Tensor("lm_head.weight", ("backbone/output/embedding",)),
)

LLAMA = Family(
  "llama",
  "llama",
  dict.fromkeys(WRITERS, "LlamaForCausalLM"),
  "model.",
  _LLAMA_TENSORS,
  buffers=r"rotary_emb\.inv_freq$",
  tied={"lm_head.weight": "model.embed_tokens.weight"},
  model=_llama_model,
  config=_llama_config,
  special=ENDS,
)


def _qwen3_model(config) -> ModelConfig:
  _expect(config, {"use_sliding_window": False})
  model = _llama_model({**config, "head_dim": None})
  return dataclasses.replace(model, name="qwen3", head_width=_number(config, "head_dim"))


def _qwen3_config(model: ModelConfig) -> dict[str, Any]:
  return _llama_config(model) | {
    "model_type": "qwen3",
    "head_dim": head_width_of(model),
    "vocab_size": padded_vocab(model.vocab_size),
    "rms_norm_eps": model.norm_epsilon or qwen3.FACTS.norm_epsilon,
    "use_sliding_window": False,
  }


QWEN3 = Family(
  "qwen3",
  "qwen3",
  dict.fromkeys(WRITERS, "Qwen3ForCausalLM"),
  "model.",
  (
    *_LLAMA_TENSORS,
    _scale(f"{_MODEL}self_attn.q_norm", f"{_OURS}attention/query_norm"),
    _scale(f"{_MODEL}self_attn.k_norm", f"{_OURS}attention/key_norm"),
  ),
  buffers=LLAMA.buffers,
  tied=LLAMA.tied,
  model=_qwen3_model,
  config=_qwen3_config,
  special=ENDS,
  padded=True,
)


def _t5_model(config) -> ModelConfig:
  kinds = {"relu": False, "gated-gelu": True}
  kind = config.get("feed_forward_proj", "relu")
  if kind not in kinds:
    raise UserError(
      f"config.json: feed_forward_proj={kind!r} is not supported, only {', '.join(kinds)}"
    )
  n = lambda key: _number(config, key)
  _expect(
    config,
    {
      "relative_attention_num_buckets": t5.BUCKETS,
      "relative_attention_max_distance": t5.FARTHEST,
      "num_decoder_layers": n("num_layers"),
    },
  )
  return ModelConfig(
    name="t5",
    num_layers=n("num_layers"),
    width=n("d_model"),
    num_heads=n("num_heads"),
    head_width=n("d_kv"),
    mlp_dim=n("d_ff"),
    vocab_size=n("vocab_size"),
    max_length=config.get("n_positions") or 512,
    dropout=float(config.get("dropout_rate", 0.1)),
    init_std=1.0,
    gated=kinds[kind],
    norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
    # transformers 5 writes tie_word_embeddings=true always, and by this key whether that was meant.
    tied=bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))),
  )


def _t5_config(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "t5",
    "num_layers": model.num_layers,
    "num_decoder_layers": model.num_layers,
    "d_model": model.width,
    "num_heads": model.num_heads,
    "d_kv": model.head_width or model.width // model.num_heads,
    "d_ff": model.mlp_dim,
    "vocab_size": padded_vocab(model.vocab_size),
    "n_positions": model.max_length,
    "dropout_rate": model.dropout,
    "layer_norm_epsilon": model.norm_epsilon or t5.FACTS.norm_epsilon,
    "relative_attention_num_buckets": t5.BUCKETS,
    "relative_attention_max_distance": t5.FARTHEST,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu" if model.gated else "relu",
    # transformers 5 ties always. Without the second key, the first says whether outputs are scaled.
    "tie_word_embeddings": model.tied,
    **({} if model.scaled_output or not model.tied else {"scale_decoder_outputs": False}),
  }


def _t5_stack(stack: str, cross: bool, gated: bool) -> list[Tensor]:
  theirs, ours = stack + ".block.{}.layer.", f"backbone/{stack}/layers/"
  attentions = {"attention": "SelfAttention"} | ({"cross": "EncDecAttention"} if cross else {})
  last = len(attentions)
  wide = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
  tensors = [
    Tensor(
      f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      (f"backbone/{stack}/relative/embedding",),
    ),
    Tensor(f"{stack}.final_layer_norm.weight", (f"backbone/{stack}/final_norm/scale",)),
    Tensor(f"{theirs}{last}.layer_norm.weight", (f"{ours}mlp_norm/scale",)),
    _plain(f"{theirs}{last}.DenseReluDense.wo", f"{ours}mlp/down"),
    *(
      _plain(f"{theirs}{last}.DenseReluDense.{name}", f"{ours}mlp/{part}")
      for part, name in wide.items()
    ),
  ]
  for number, (part, name) in enumerate(attentions.items()):
    tensors += [
      Tensor(f"{theirs}{number}.layer_norm.weight", (f"{ours}{part}_norm/scale",)),
      *(
        _plain(f"{theirs}{number}.{name}.{x}", f"{ours}{part}/{y}")
        for x, y in (("q", "query"), ("k", "key"), ("v", "value"))
      ),
      _plain(f"{theirs}{number}.{name}.o", f"{ours}{part}/out", inputs=2),
    ]
  return tensors


def _t5(gated: bool) -> Family:
  return Family(
    "t5",
    "t5",
    dict.fromkeys(("span_corruption", "text_to_text"), "T5ForConditionalGeneration"),
    "",
    (
      Tensor("shared.weight", ("backbone/token/embedding",)),
      Tensor("lm_head.weight", ("backbone/output/embedding",)),
      *_t5_stack("encoder", False, gated),
      *_t5_stack("decoder", True, gated),
    ),
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # of old releases, unused
    tied={
      name: "shared.weight"
      for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    },
    model=_t5_model,
    config=_t5_config,
    special={"pad": "pad", "eos": "eos"},
    padded=True,
    gated=gated,
    tied_unscaled=True,
    sentinels=100,
  )


FAMILIES = (BERT, MODERNBERT, GPT2, LLAMA, QWEN3, _t5(gated=False), _t5(gated=True))
MODEL_TYPES = tuple(dict.fromkeys(family.model_type for family in FAMILIES))


def find(config: Mapping[str, Any]) -> Family | None:
  """The family of a config.json of theirs."""
  for family in FAMILIES:
    if family.model_type == config.get("model_type") and family.serves(family.model(config)):
      return family
  return None


def of_model(model: ModelConfig) -> Family:
  """The family of a model of ours. Raises UserError where transformers has none."""
  for family in FAMILIES:
    if family.serves(model):
      return family
  raise UserError(f"transformers has no architecture like {model.name}")


def full_name(family: Family, name: str) -> str:
  """A tensor's name as the tables have it: with the prefix, and the norms' newer names."""
  name = re.sub(
    r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  )
  known = {t.theirs.replace("{}", "0") for t in family.tensors} | set(family.tied)
  numbered = re.sub(r"\.\d+\.", ".0.", name, count=1)
  return (
    family.prefix + name if numbered not in known and family.prefix + numbered in known else name
  )
