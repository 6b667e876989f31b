"""Decoders in GGUF files, dequantized by the `gguf` package; names, rows and tokenizer as transformers has them."""

import pathlib
import re
from typing import Iterator

import gguf
import numpy as np
import tokenizers
from gguf import quants
from tokenizers import decoders, models, pre_tokenizers

from llm.checkpoints import huggingface
from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib

NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the token type of special pieces

# How text is cut before the merges, by the name that the file gives it.
PRE_TOKENIZERS = {
  "smollm": [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ],
  "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


class Weights:
  """The tensors of a file under the names of transformers, dequantized one at a time to float32."""

  def __init__(self, path: pathlib.Path, reader, heads: int, kv_heads: int):
    self.folder, self._heads = path, {"attn_q": heads, "attn_k": kv_heads}
    self._tensors = {}
    for tensor in reader.tensors:
      found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
      if not found or found[2] not in NAMES:
        raise UserError(f"{path}: the tensor {tensor.name} has no place in a Llama-type decoder")
      layer = f"model.layers.{found[1]}." if found[1] else ""
      self._tensors[f"{layer}{NAMES[found[2]]}.weight"] = (tensor, found[2])

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __getitem__(self, name: str) -> np.ndarray:
    tensor, kind = self._tensors[name]
    rows = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if kind in self._heads:  # stored for interleaved rotary positions: pairs back into halves
      rows = (
        rows.reshape(self._heads[kind], -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
      )
    return rows


def _tokenizer(path: pathlib.Path, field) -> tokenizer_lib.Tokenizer:
  kind, cut = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
  if kind != "gpt2" or cut not in PRE_TOKENIZERS:
    raise UserError(
      f"{path}: a tokenizer of kind {kind!r} cut by {cut!r} is not supported, only gpt2 cut by "
      f"{', '.join(PRE_TOKENIZERS)}"
    )
  pieces = field("tokenizer.ggml.tokens")
  merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
  made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
  made.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[cut])
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(
    [p for p, kind in zip(pieces, field("tokenizer.ggml.token_type")) if kind == CONTROL]
  )
  ids = {
    ours: field(f"tokenizer.ggml.{theirs}_token_id", -1)
    for ours, theirs in (("pad", "padding"), ("unk", "unknown"), ("eos", "eos"), ("bos", "bos"))
  }
  found = tokenizer_lib.HuggingFaceTokenizer(
    made.to_str().encode(), special={name: pieces[i] for name, i in ids.items() if i >= 0}
  )
  found.template = field("tokenizer.chat_template", "")
  return found


def read(path: pathlib.Path) -> huggingface.Converted:
  """A Llama-type GGUF file, ours. Raises UserError on another architecture or tokenizer, or a damaged file."""
  try:
    reader = gguf.GGUFReader(path)
  except (OSError, ValueError, IndexError, KeyError) as error:
    raise UserError(f"{path} cannot be read as GGUF: {str(error) or type(error).__name__}")

  def field(name, default=None):
    if name not in reader.fields:
      if default is None:
        raise UserError(f"{path} lacks the key {name}")
      return default
    return reader.fields[name].contents()

  if field("general.architecture") != "llama":
    raise UserError(
      f"{path}: the architecture {field('general.architecture')!r} is not supported, only 'llama'"
    )
  heads = field("llama.attention.head_count")
  kv_heads = field("llama.attention.head_count_kv", heads)
  weights = Weights(path, reader, heads, kv_heads)
  theirs = {
    "model_type": "llama",
    "num_hidden_layers": field("llama.block_count"),
    "hidden_size": field("llama.embedding_length"),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": field("llama.feed_forward_length"),
    "vocab_size": len(field("tokenizer.ggml.tokens")),
    "max_position_embeddings": field("llama.context_length"),
    "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
    "rope_theta": field("llama.rope.freq_base", 10_000.0),
    "tie_word_embeddings": "lm_head.weight" not in set(weights),
  }
  return huggingface.assemble(theirs, _tokenizer(path, field), weights)
