"""Tables between the architectures of `transformers` and those of llm/models.

A `Family` relates the keys of config.json, the names of tensors and their layouts. Tensors have the
names of the class with a language-model head; {} stands for the number of a layer. `ours` is a
name here, `theirs` a name in transformers.
"""

import dataclasses
import functools
import re
import sys
from typing import Any, Callable, Mapping

import numpy as np

from llm.config import ModelConfig
from llm.core import UserError
from llm.models import bert, gpt, llama, modernbert, qwen3, t5
from llm.models.architecture import embedding_width_of, head_width_of, kv_heads_of, padded_vocab


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of transformers and the parameters that it holds.

  theirs: its name.
  ours: the path of one parameter, or of several that transformers fuses along the outputs.
  transposed: it is outputs x inputs, as in torch.nn.Linear.
  inputs: how many leading dimensions of our kernel are contracted.
  reverse: its classes come in the reverse order.
  first: the first layer that has it. Earlier layers hold ones here and do not use them.
  """

  theirs: str
  ours: tuple[str, ...]
  transposed: bool = False
  inputs: int = 1
  reverse: bool = False
  first: int = 0

  def to_ours(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The parameters that a tensor of one layer holds, in the given shapes.

    Raises ValueError where the sizes differ.
    """
    tensor = tensor.T if self.transposed else tensor
    tensor = tensor[..., ::-1] if self.reverse else tensor
    return [
      np.ascontiguousarray(part).reshape(shape)
      for part, shape in zip(np.split(tensor, len(shapes), axis=-1), shapes)
    ]

  def to_theirs(self, leaves: list[np.ndarray]) -> np.ndarray:
    """The tensor of transformers: the inverse of `to_ours`."""
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
  """One architecture of transformers.

  model_type: its name in config.json.
  ours: the name of our architecture.
  classes: our objective -> the class with its head. A checkpoint without another head serves the
    first objective.
  prefix: of names; a checkpoint may leave it out.
  tensors: all that a checkpoint may hold.
  buffers: a regex of tensors that are no parameters.
  tied: name of a copy -> name of the tensor that it copies.
  model: config.json -> our config. config: the inverse.
  special: key of a special token in config.json -> its name here.
  padded: vocab_size counts the rows that pad the vocabulary.
  gated: the `gated` of the models that the family serves; None serves both.
  tied_unscaled: an untied config.json without lm_head.weight is tied, and its output not scaled.
  kept: parameters that are imported even without the head that they belong to.
  dropped: a regex of parameters that are not exported.
  tokenizer_json: the tokenizer must be written as tokenizer.json.
  sentinels: how many ids follow the pieces of a SentencePiece file.
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
  dropped: str = r"^$"
  tokenizer_json: bool = False
  sentinels: int = 0

  def serves(self, model: ModelConfig) -> bool:
    """Whether the family can export this model."""
    return self.ours == model.name and self.gated in (None, model.gated)


def _linear(theirs: str, ours: str, **how: Any) -> tuple[Tensor, Tensor]:
  """A linear layer with bias. how: fields of `Tensor`."""
  return (
    Tensor(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True, **how),
    Tensor(f"{theirs}.bias", (f"{ours}/bias",), reverse=how.get("reverse", False)),
  )


def _norm(theirs: str, ours: str) -> tuple[Tensor, Tensor]:
  """A norm with bias."""
  return Tensor(f"{theirs}.weight", (f"{ours}/scale",)), Tensor(f"{theirs}.bias", (f"{ours}/bias",))


def _fused(theirs: str, ours: tuple[str, ...], inputs: int = 1) -> tuple[Tensor, Tensor]:
  """A Conv1D of GPT-2: its kernel is inputs x outputs, as ours is."""
  return (
    Tensor(f"{theirs}.weight", tuple(f"{o}/kernel" for o in ours), inputs=inputs),
    Tensor(f"{theirs}.bias", tuple(f"{o}/bias" for o in ours)),
  )


def _expect(config: Mapping[str, Any], supported: Mapping[str, Any]):
  """Raises UserError where a key of config.json has another value than the supported one."""
  for key, value in supported.items():
    if config.get(key, value) != value:
      raise UserError(f"config.json: {key}={config[key]!r} is not supported, only {value!r}")


def _number(config: Mapping[str, Any], key: str) -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise UserError(f"config.json: {key} must be a positive integer, not {value!r}")
  return value


def _real(config: Mapping[str, Any], key: str, default: float) -> float:
  value = config.get(key, default)
  if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
    raise UserError(f"config.json: {key} must be a number of at least 0, not {value!r}")
  return float(value)


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
  value = config.get(key, default)
  if type(value) is not bool:
    raise UserError(f"config.json: {key} must be true or false, not {value!r}")
  return value


def _group(config: Mapping[str, Any], key: str) -> dict[str, Any]:
  value = config.get(key) or {}
  if not isinstance(value, dict):
    raise UserError(f"config.json: {key} must be an object, not {value!r}")
  return value


def _bert_model(config: Mapping[str, Any]) -> ModelConfig:
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
  number = functools.partial(_number, config)
  return ModelConfig(
    name="bert",
    num_layers=number("num_hidden_layers"),
    width=number("hidden_size"),
    num_heads=number("num_attention_heads"),
    mlp_dim=number("intermediate_size"),
    vocab_size=number("vocab_size"),
    max_length=number("max_position_embeddings"),
    dropout=_real(config, "hidden_dropout_prob", 0.1),
    norm_epsilon=_real(config, "layer_norm_eps", 1e-12),
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


_LAYERS = "backbone/layers/"


def _bert_encoder(theirs: str) -> tuple[Tensor, ...]:
  """Embeddings and layers with the names of BERT after the prefix `theirs`."""
  embeddings, layer = f"{theirs}.embeddings", f"{theirs}.encoder.layer.{{}}"
  return (
    Tensor(f"{embeddings}.word_embeddings.weight", ("backbone/token/embedding",)),
    Tensor(f"{embeddings}.position_embeddings.weight", ("backbone/position/embedding",)),
    Tensor(f"{embeddings}.token_type_embeddings.weight", ("backbone/type/embedding",)),
    *_norm(f"{embeddings}.LayerNorm", "backbone/embedding_norm"),
    *_linear(f"{layer}.attention.self.query", f"{_LAYERS}attention/query"),
    *_linear(f"{layer}.attention.self.key", f"{_LAYERS}attention/key"),
    *_linear(f"{layer}.attention.self.value", f"{_LAYERS}attention/value"),
    *_linear(f"{layer}.attention.output.dense", f"{_LAYERS}attention/out", inputs=2),
    *_norm(f"{layer}.attention.output.LayerNorm", f"{_LAYERS}attention_norm"),
    *_linear(f"{layer}.intermediate.dense", f"{_LAYERS}mlp/up"),
    *_linear(f"{layer}.output.dense", f"{_LAYERS}mlp/down"),
    *_norm(f"{layer}.output.LayerNorm", f"{_LAYERS}mlp_norm"),
  )


PAIRS = "masked_lm with next_sentence"  # the objective of BertForPreTraining

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
    *_bert_encoder("bert"),
    *_linear("bert.pooler.dense", "head/pooler"),
    *_linear("cls.predictions.transform.dense", "head/transform"),
    *_norm("cls.predictions.transform.LayerNorm", "head/transform_norm"),
    Tensor("cls.predictions.bias", ("head/lm/bias",)),
    # Class 0 of transformers is "B follows A", which is class 1 here.
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


def _modernbert_model(config: Mapping[str, Any]) -> ModelConfig:
  number = functools.partial(_number, config)
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
  every = _global_every(config, number("num_hidden_layers"))
  theta = _modernbert_theta(config, "full")
  local_theta = _modernbert_theta(config, "sliding")
  return ModelConfig(
    name="modernbert",
    num_layers=number("num_hidden_layers"),
    width=number("hidden_size"),
    num_heads=number("num_attention_heads"),
    mlp_dim=number("intermediate_size"),
    vocab_size=number("vocab_size"),
    max_length=number("max_position_embeddings"),
    dropout=_real(config, "embedding_dropout", 0.0),
    norm_epsilon=_real(config, "norm_eps", 1e-5),
    rope_theta=theta,
    local_rope_theta=local_theta,
    global_every=every,
    window=number("local_attention") if every > 1 else 0,
  )


GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _global_every(config: Mapping[str, Any], num_layers: int) -> int:
  """The distance between layers with global attention.

  New releases of transformers list the kind of every layer, old ones give the number. Raises
  UserError on a list that is not periodic.
  """
  kinds = config.get("layer_types")
  if kinds is None:
    key = "global_attn_every_n_layers"
    return min(_number(config, key) if key in config else 3, num_layers)
  every = next((i for i, kind in enumerate(kinds) if i and kind == GLOBAL), num_layers)
  if kinds != _layer_types(every, num_layers):
    raise UserError(
      f"config.json: layer_types={kinds} is not supported, only {num_layers} layers where the "
      f"first and every n-th after it are {GLOBAL} and the others {LOCAL}"
    )
  return every


def _layer_types(every: int, num_layers: int) -> list[str]:
  return [LOCAL if number % every else GLOBAL for number in range(num_layers)]


def _modernbert_theta(config: Mapping[str, Any], kind: str) -> float:
  """The base of the rotary wavelengths in layers of a kind: full or sliding."""
  rope = _group(_group(config, "rope_parameters"), f"{kind}_attention")
  _plain_rope(rope)
  old_keys = {"full": "global_rope_theta", "sliding": "local_rope_theta"}
  defaults = {"full": 160_000.0, "sliding": 10_000.0}
  return _real(rope, "rope_theta", _real(config, old_keys[kind], defaults[kind]))


def _plain_rope(rope: Mapping[str, Any]):
  """Raises UserError where config.json scales the rotary positions."""
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
    # transformers 4 reads the next three keys, transformers 5 reads rope_parameters.
    "global_attn_every_n_layers": model.global_every,
    "global_rope_theta": model.rope_theta,
    "local_rope_theta": model.local_rope_theta,
    "rope_parameters": {
      kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
    },
    "tie_word_embeddings": True,
  }


def _plain(theirs: str, *ours: str, **how: Any) -> Tensor:
  """A linear layer without bias. how: fields of `Tensor`."""
  return Tensor(f"{theirs}.weight", tuple(f"{o}/kernel" for o in ours), transposed=True, **how)


def _scale(theirs: str, ours: str, **how: Any) -> Tensor:
  """A norm without bias. how: fields of `Tensor`."""
  return Tensor(f"{theirs}.weight", (f"{ours}/scale",), **how)


_MODEL_LAYER = "model.layers.{}."  # in ModernBERT, Llama and Qwen3

MODERNBERT = Family(
  "modernbert",
  "modernbert",
  {"masked_lm": "ModernBertForMaskedLM"},
  "model.",
  (
    Tensor("model.embeddings.tok_embeddings.weight", ("backbone/token/embedding",)),
    _scale("model.embeddings.norm", "backbone/embedding_norm"),
    _scale(f"{_MODEL_LAYER}attn_norm", f"{_LAYERS}attention_norm", first=1),
    _plain(
      f"{_MODEL_LAYER}attn.Wqkv",
      *(f"{_LAYERS}attention/{part}" for part in ("query", "key", "value")),
    ),
    _plain(f"{_MODEL_LAYER}attn.Wo", f"{_LAYERS}attention/out", inputs=2),
    _scale(f"{_MODEL_LAYER}mlp_norm", f"{_LAYERS}mlp_norm"),
    _plain(f"{_MODEL_LAYER}mlp.Wi", f"{_LAYERS}mlp/gate", f"{_LAYERS}mlp/up"),
    _plain(f"{_MODEL_LAYER}mlp.Wo", f"{_LAYERS}mlp/down"),
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


def _electra_model(config: Mapping[str, Any]) -> ModelConfig:
  return dataclasses.replace(
    _bert_model(config), name="electra", embedding_width=_number(config, "embedding_size")
  )


def _electra_config(model: ModelConfig) -> dict[str, Any]:
  return _bert_config(model) | {
    "model_type": "electra",
    "embedding_size": embedding_width_of(model),
  }


ELECTRA = Family(
  "electra",
  "electra",
  {
    "replaced_token": "ElectraForPreTraining",
    "span_qa": "ElectraForQuestionAnswering",
  },
  "electra.",
  (
    *_bert_encoder("electra"),
    *_linear("electra.embeddings_project", "backbone/embedding_project"),
    *_linear("discriminator_predictions.dense", "head/detection_transform"),
    *_linear("discriminator_predictions.dense_prediction", "head/detection"),
    *_linear("qa_outputs", "head/span"),
  ),
  buffers=r"embeddings\.position_ids$",
  tied={},
  model=_electra_model,
  config=_electra_config,
  special={"pad": "pad"},
  dropped=r"^generator/",
)


def _gpt_model(config: Mapping[str, Any]) -> ModelConfig:
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
  number = functools.partial(_number, config)
  return ModelConfig(
    name="gpt",
    num_layers=number("n_layer"),
    width=number("n_embd"),
    num_heads=number("n_head"),
    mlp_dim=number("n_inner") if config.get("n_inner") else 4 * number("n_embd"),
    vocab_size=number("vocab_size"),
    max_length=number("n_positions"),
    dropout=_real(config, "resid_pdrop", 0.1),
    norm_epsilon=_real(config, "layer_norm_epsilon", 1e-5),
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


_GPT2_LAYER = "transformer.h.{}."

# The objectives of a decoder with an output layer.
DECODER_OBJECTIVES = ("causal_lm", "chat", "preference")
# bos_token_id and eos_token_id are both the id of our eos.
DECODER_SPECIAL = {"bos": "eos", "eos": "eos"}

GPT2 = Family(
  "gpt2",
  "gpt",
  dict.fromkeys(DECODER_OBJECTIVES, "GPT2LMHeadModel"),
  "transformer.",
  (
    Tensor("transformer.wte.weight", ("backbone/token/embedding",)),
    Tensor("transformer.wpe.weight", ("backbone/position/embedding",)),
    *_norm(f"{_GPT2_LAYER}ln_1", f"{_LAYERS}attention_norm"),
    *_fused(
      f"{_GPT2_LAYER}attn.c_attn",
      tuple(f"{_LAYERS}attention/{part}" for part in ("query", "key", "value")),
    ),
    *_fused(f"{_GPT2_LAYER}attn.c_proj", (f"{_LAYERS}attention/out",), inputs=2),
    *_norm(f"{_GPT2_LAYER}ln_2", f"{_LAYERS}mlp_norm"),
    *_fused(f"{_GPT2_LAYER}mlp.c_fc", (f"{_LAYERS}mlp/up",)),
    *_fused(f"{_GPT2_LAYER}mlp.c_proj", (f"{_LAYERS}mlp/down",)),
    *_norm("transformer.ln_f", "backbone/final_norm"),
  ),
  buffers=r"\.attn\.(bias|masked_bias)$",
  tied={"lm_head.weight": "transformer.wte.weight"},
  model=_gpt_model,
  config=_gpt_config,
  special=DECODER_SPECIAL,
)


def _llama_model(config: Mapping[str, Any]) -> ModelConfig:
  _expect(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
  rope = {**_group(config, "rope_parameters"), **_group(config, "rope_scaling")}
  _plain_rope(rope)
  number = functools.partial(_number, config)
  if config.get("head_dim") not in (None, number("hidden_size") // number("num_attention_heads")):
    raise UserError(
      f"config.json: head_dim={config['head_dim']} is not hidden_size / num_attention_heads"
    )
  kv_heads = "num_key_value_heads" if config.get("num_key_value_heads") else "num_attention_heads"
  return ModelConfig(
    name="llama",
    num_layers=number("num_hidden_layers"),
    width=number("hidden_size"),
    num_heads=number("num_attention_heads"),
    num_kv_heads=number(kv_heads),
    mlp_dim=number("intermediate_size"),
    vocab_size=number("vocab_size"),
    max_length=number("max_position_embeddings"),
    dropout=0.0,
    norm_epsilon=_real(config, "rms_norm_eps", 1e-6),
    rope_theta=_real(rope, "rope_theta", _real(config, "rope_theta", 10_000.0)),
    tied=_flag(config, "tie_word_embeddings", False),
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
    "num_key_value_heads": kv_heads_of(model),
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
  _scale(f"{_MODEL_LAYER}input_layernorm", f"{_LAYERS}attention_norm"),
  _plain(f"{_MODEL_LAYER}self_attn.q_proj", f"{_LAYERS}attention/query"),
  _plain(f"{_MODEL_LAYER}self_attn.k_proj", f"{_LAYERS}attention/key"),
  _plain(f"{_MODEL_LAYER}self_attn.v_proj", f"{_LAYERS}attention/value"),
  _plain(f"{_MODEL_LAYER}self_attn.o_proj", f"{_LAYERS}attention/out", inputs=2),
  _scale(f"{_MODEL_LAYER}post_attention_layernorm", f"{_LAYERS}mlp_norm"),
  _plain(f"{_MODEL_LAYER}mlp.gate_proj", f"{_LAYERS}mlp/gate"),
  _plain(f"{_MODEL_LAYER}mlp.up_proj", f"{_LAYERS}mlp/up"),
  _plain(f"{_MODEL_LAYER}mlp.down_proj", f"{_LAYERS}mlp/down"),
  _scale("model.norm", "backbone/final_norm"),
  Tensor("lm_head.weight", ("backbone/output/embedding",)),
)

LLAMA = Family(
  "llama",
  "llama",
  dict.fromkeys(DECODER_OBJECTIVES, "LlamaForCausalLM"),
  "model.",
  _LLAMA_TENSORS,
  buffers=r"rotary_emb\.inv_freq$",
  tied={"lm_head.weight": "model.embed_tokens.weight"},
  model=_llama_model,
  config=_llama_config,
  special=DECODER_SPECIAL,
)


def _qwen3_model(config: Mapping[str, Any]) -> ModelConfig:
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
  dict.fromkeys(DECODER_OBJECTIVES, "Qwen3ForCausalLM"),
  "model.",
  (
    *_LLAMA_TENSORS,
    _scale(f"{_MODEL_LAYER}self_attn.q_norm", f"{_LAYERS}attention/query_norm"),
    _scale(f"{_MODEL_LAYER}self_attn.k_norm", f"{_LAYERS}attention/key_norm"),
  ),
  buffers=LLAMA.buffers,
  tied=LLAMA.tied,
  model=_qwen3_model,
  config=_qwen3_config,
  special=DECODER_SPECIAL,
  padded=True,
)


def _t5_model(config: Mapping[str, Any]) -> ModelConfig:
  kinds = {"relu": False, "gated-gelu": True}
  kind = config.get("feed_forward_proj", "relu")
  if not isinstance(kind, str) or kind not in kinds:
    raise UserError(
      f"config.json: feed_forward_proj={kind!r} is not supported, only {', '.join(kinds)}"
    )
  number = functools.partial(_number, config)
  _expect(
    config,
    {
      "relative_attention_num_buckets": t5.BUCKETS,
      "relative_attention_max_distance": t5.FARTHEST,
      "num_decoder_layers": number("num_layers"),
    },
  )
  return ModelConfig(
    name="t5",
    num_layers=number("num_layers"),
    width=number("d_model"),
    num_heads=number("num_heads"),
    head_width=number("d_kv"),
    mlp_dim=number("d_ff"),
    vocab_size=number("vocab_size"),
    max_length=number("n_positions") if config.get("n_positions") else 512,
    dropout=_real(config, "dropout_rate", 0.1),
    init_std=1.0,
    gated=kinds[kind],
    norm_epsilon=_real(config, "layer_norm_epsilon", 1e-6),
    # transformers 5 always writes tie_word_embeddings=true. The actual value is in
    # scale_decoder_outputs.
    tied=_flag(config, "scale_decoder_outputs", _flag(config, "tie_word_embeddings", True)),
  )


def _t5_config(model: ModelConfig) -> dict[str, Any]:
  return {
    "model_type": "t5",
    "num_layers": model.num_layers,
    "num_decoder_layers": model.num_layers,
    "d_model": model.width,
    "num_heads": model.num_heads,
    "d_kv": head_width_of(model),
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
    # transformers 5 always ties the weights. It takes a missing scale_decoder_outputs from
    # tie_word_embeddings.
    "tie_word_embeddings": model.tied,
    **({} if model.scaled_output or not model.tied else {"scale_decoder_outputs": False}),
  }


def _t5_stack(stack: str, cross: bool, gated: bool) -> list[Tensor]:
  """The tensors of the encoder or the decoder.

  stack: "encoder" or "decoder". cross: with attention to the encoder. gated: of the MLP.
  """
  layer = stack + ".block.{}.layer."
  ours = f"backbone/{stack}/layers/"
  attentions = {"attention": "SelfAttention"}
  if cross:
    attentions["cross"] = "EncDecAttention"
  mlp = f"{layer}{len(attentions)}"
  inputs = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
  tensors = [
    Tensor(
      f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      (f"backbone/{stack}/relative/embedding",),
    ),
    Tensor(f"{stack}.final_layer_norm.weight", (f"backbone/{stack}/final_norm/scale",)),
    Tensor(f"{mlp}.layer_norm.weight", (f"{ours}mlp_norm/scale",)),
    _plain(f"{mlp}.DenseReluDense.wo", f"{ours}mlp/down"),
  ]
  for part, name in inputs.items():
    tensors.append(_plain(f"{mlp}.DenseReluDense.{name}", f"{ours}mlp/{part}"))
  for number, (part, name) in enumerate(attentions.items()):
    attention = f"{layer}{number}.{name}"
    tensors += [
      Tensor(f"{layer}{number}.layer_norm.weight", (f"{ours}{part}_norm/scale",)),
      _plain(f"{attention}.q", f"{ours}{part}/query"),
      _plain(f"{attention}.k", f"{ours}{part}/key"),
      _plain(f"{attention}.v", f"{ours}{part}/value"),
      _plain(f"{attention}.o", f"{ours}{part}/out", inputs=2),
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
    # Old releases of transformers wrote this bias and did not use it.
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
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


FAMILIES = (BERT, ELECTRA, MODERNBERT, GPT2, LLAMA, QWEN3, _t5(gated=False), _t5(gated=True))
MODEL_TYPES = tuple(dict.fromkeys(family.model_type for family in FAMILIES))


def find(config: Mapping[str, Any]) -> Family | None:
  """The family of a config.json; None where its model_type is not supported.

  Raises UserError where a key has a value that is not supported.
  """
  for family in FAMILIES:
    if family.model_type == config.get("model_type") and family.serves(family.model(config)):
      return family
  return None


def of_model(model: ModelConfig) -> Family:
  """The family that exports a model. Raises UserError where transformers has none."""
  for family in FAMILIES:
    if family.serves(model):
      return family
  raise UserError(f"transformers has no architecture like {model.name}")


def full_name(family: Family, name: str) -> str:
  """The name of a tensor in the family's table.

  A checkpoint may leave out the prefix, and old ones call a norm's parameters gamma and beta.
  """
  name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  table = {tensor.theirs.replace("{}", "0") for tensor in family.tensors} | set(family.tied)
  first_layer = re.sub(r"\.\d+\.", ".0.", name, count=1)
  if first_layer not in table and family.prefix + first_layer in table:
    return family.prefix + name
  return name
