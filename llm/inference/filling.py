"""A masked language model fills the masks of a text."""

import functools

import jax
import numpy as np

from llm import models
from llm.core import UserError
from llm.data.tokenizer import Tokenizer
from llm.models import heads
from llm.training import experiment as experiment_lib
from llm.training.experiment import Bundle

SPACE = "▁"  # as SentencePiece writes it
TOKEN_HEAD = ("transform", "transform_norm", "lm")  # the parts of the head that predict tokens


def fill(bundle: Bundle, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
  """The `count` likeliest pieces for each [MASK] of a text, with their probabilities.

  Raises UserError if the checkpoint cannot predict masked tokens, or the text has no [MASK] or is
  too long.
  """
  tokenizer = bundle.tokenizer
  config = bundle.config.model
  tokenizer.require("cls", "sep", "mask")
  if models.facts(config).kind != "encoder" or "transform" not in bundle.params.get("head", {}):
    raise UserError("the checkpoint has no masked-language-model head to fill masks with")
  ids = _encoded(bundle, text)
  places = np.flatnonzero(np.array(ids) == tokenizer.mask)
  row = {
    "tokens": ids,
    "segments": [1] * len(ids),
    "positions": range(len(ids)),
    "types": [0] * len(ids),
    "masked_positions": places,
    "masked_targets": np.zeros(len(places)),
  }
  batch = {name: np.array(values, np.int32)[None] for name, values in row.items()}
  settled = experiment_lib.settled(config, 0)
  head = heads.MaskedLMHead(settled, next_sentence=False, logits=True)
  model = heads.Model(models.build_backbone(settled), head)
  of_head = {name: leaves for name, leaves in bundle.params["head"].items() if name in TOKEN_HEAD}
  params = {"backbone": bundle.params["backbone"], "head": of_head}
  forward = jax.jit(functools.partial(model.apply, train=False))
  logits_1xNxV = forward({"params": params}, batch)["logits"]
  probabilities_NxV = np.asarray(jax.nn.softmax(logits_1xNxV[0]))
  likeliest = []
  for probabilities_V in probabilities_NxV:
    tokens = np.argsort(-probabilities_V)[:count].tolist()
    likeliest.append([(tokenizer.pieces[i], float(probabilities_V[i])) for i in tokens])
  return likeliest


def _encoded(bundle: Bundle, text: str) -> list[int]:
  """The ids of [CLS] text [SEP]. Raises UserError if it has no [MASK] or is too long."""
  tokenizer = bundle.tokenizer
  max_length = bundle.config.model.max_length
  parts = text.split("[MASK]")
  before_mask, *after_masks = tokenizer.encode(parts)
  if not after_masks:
    raise UserError("--prompt has no [MASK] to fill")
  ids = [tokenizer.cls, *before_mask]
  for part, after_mask in zip(parts[1:], after_masks):
    ids += [
      tokenizer.mask,
      *(after_mask if part[:1].isspace() else _at_once(tokenizer, after_mask)),
    ]
  ids.append(tokenizer.sep)
  if len(ids) > max_length:
    raise UserError(
      f"the prompt has {len(ids)} tokens, more than the model's {max_length} positions"
    )
  return ids


def _at_once(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """The ids of a text that follows a mask at once: without the space that begins every text."""
  piece = tokenizer.pieces[ids[0]] if ids else ""
  if piece == SPACE:
    return ids[1:]
  if piece.startswith(SPACE) and piece[1:] in tokenizer.pieces:
    return [tokenizer.pieces.index(piece[1:]), *ids[1:]]
  return ids
