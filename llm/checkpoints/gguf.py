"""Decoders in GGUF files: names, rows and tokenizer become those of transformers.

The `gguf` package dequantizes the weights.
"""

import pathlib
import re
from typing import Iterator

import gguf
import numpy as np
import tokenizers
from gguf import quants
from tokenizers import decoders, models, pre_tokenizers

from llm import reading
from llm.checkpoints import huggingface
from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib
from llm.reading import Shape

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

# The pre-tokenizers that split text before BPE merges it, by their name in the file.
PRE_TOKENIZERS = {
  "smollm": [
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ],
  "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


class _Header:
  """The key-value pairs at the start of a file."""

  def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
    self._path = path
    self._fields = reader.fields

  def read(self, key: str, shape: type[Shape]) -> Shape:
    """The value of a key. Raises UserError where the file lacks the key, or has another shape."""
    if key not in self._fields:
      raise UserError(f"{self._path} lacks the key {key}")
    return reading.shaped(self._fields[key].contents(), shape, f"{self._path}: {key}")

  def get(self, key: str, default: Shape) -> Shape:
    """The value of a key, of the type of `default`, which it is where the file lacks the key."""
    return self.read(key, type(default)) if key in self._fields else default


class Weights:
  """The tensors of a file under the names of transformers.

  They are dequantized to float32 one at a time. heads, kv_heads: of the queries and of the keys.
  """

  def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader, heads: int, kv_heads: int):
    self.folder = path
    self._heads = {"attn_q": heads, "attn_k": kv_heads}
    self._tensors = {}
    for tensor in reader.tensors:
      match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
      if not match or match[2] not in NAMES:
        raise UserError(f"{path}: the tensor {tensor.name} has no place in a Llama-type decoder")
      number, kind = match.groups()
      layer = f"model.layers.{number}." if number else ""
      self._tensors[f"{layer}{NAMES[kind]}.weight"] = (tensor, kind)

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __getitem__(self, name: str) -> np.ndarray:
    tensor, kind = self._tensors[name]
    rows = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if kind not in self._heads:
      return rows
    # GGUF pairs the rows for rotary positions as (0, 1), (2, 3), ..; transformers pairs each row of
    # a head's first half with one of its second half.
    by_pair = rows.reshape(self._heads[kind], -1, 2, rows.shape[-1])
    return by_pair.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(path: pathlib.Path, header: _Header) -> tokenizer_lib.Tokenizer:
  """The BPE tokenizer of a file. Raises UserError on any other kind."""
  kind = header.read("tokenizer.ggml.model", str)
  splitting = header.read("tokenizer.ggml.pre", str)
  if kind != "gpt2" or splitting not in PRE_TOKENIZERS:
    raise UserError(
      f"{path}: a tokenizer of kind {kind!r} with the pre-tokenizer {splitting!r} is not "
      f"supported, only gpt2 with one of {', '.join(PRE_TOKENIZERS)}"
    )
  pieces = header.read("tokenizer.ggml.tokens", list[str])
  lines = header.read("tokenizer.ggml.merges", list[str])
  merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
  try:
    fast = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
  except Exception as error:  # the package raises nothing narrower
    raise UserError(f"{path}: its tokens and merges do not fit one another: {error}")
  fast.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[splitting])
  fast.decoder = decoders.ByteLevel()
  token_types = header.read("tokenizer.ggml.token_type", list[int])
  fast.add_special_tokens([piece for piece, kind in zip(pieces, token_types) if kind == CONTROL])
  tokenizer = tokenizer_lib.HuggingFaceTokenizer(
    fast.to_str().encode(), special=_special_pieces(header, pieces)
  )
  tokenizer.template = header.get("tokenizer.chat_template", "")
  return tokenizer


def _special_pieces(header: _Header, pieces: list[str]) -> dict[str, str]:
  """pad, unk, eos, bos -> piece, for those that the file names."""
  special = {}
  for name, key in (("pad", "padding"), ("unk", "unknown"), ("eos", "eos"), ("bos", "bos")):
    i = header.get(f"tokenizer.ggml.{key}_token_id", -1)
    if i >= len(pieces):
      raise UserError(f"there is no token {i}, which tokenizer.ggml.{key}_token_id names")
    if i >= 0:
      special[name] = pieces[i]
  return special


def read(path: pathlib.Path) -> huggingface.Converted:
  """The (params, config, tokenizer) of a Llama-type GGUF file.

  Raises UserError on another architecture or tokenizer, and on a damaged file.
  """
  reading.check_file(path)
  try:
    reader = gguf.GGUFReader(path)
  # What the package raises on counts and offsets that lead out of the file.
  except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
    raise UserError(f"{path} cannot be read as GGUF: {str(error) or type(error).__name__}")
  header = _Header(path, reader)
  architecture = header.read("general.architecture", str)
  if architecture != "llama":
    raise UserError(f"{path}: the architecture {architecture!r} is not supported, only 'llama'")
  heads = header.read("llama.attention.head_count", int)
  kv_heads = header.get("llama.attention.head_count_kv", heads)
  scaling = header.get("llama.rope.scaling.type", "none")
  if scaling != "none":
    raise UserError(f"{path}: rotary positions scaled by {scaling!r} are not supported")
  weights = Weights(path, reader, heads, kv_heads)
  transformers_config = {
    "model_type": "llama",
    "num_hidden_layers": header.read("llama.block_count", int),
    "hidden_size": header.read("llama.embedding_length", int),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "intermediate_size": header.read("llama.feed_forward_length", int),
    "vocab_size": len(header.read("tokenizer.ggml.tokens", list[str])),
    "max_position_embeddings": header.read("llama.context_length", int),
    "rms_norm_eps": header.read("llama.attention.layer_norm_rms_epsilon", float),
    "rope_theta": header.get("llama.rope.freq_base", 10_000.0),
    "tie_word_embeddings": "lm_head.weight" not in set(weights),
  }
  return huggingface.assemble(transformers_config, _tokenizer(path, header), weights)
