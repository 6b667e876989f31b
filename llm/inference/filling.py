"""A masked language model fills the masks of a text."""

import functools

import jax
import numpy as np

from llm import models
from llm.core import UserError
from llm.objectives import masked_lm
from llm.training import experiment as experiment_lib
from llm.training.experiment import Bundle

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
    # The loss of each piece of the vocabulary at each mask.
    "masked_positions": np.repeat(places, config.vocab_size),
    "masked_targets": np.tile(np.arange(config.vocab_size), len(places)),
  }
  batch = {name: np.array(values, np.int32)[None] for name, values in row.items()}
  model = experiment_lib.build(masked_lm.Objective(next_sentence=False), config)
  head = {name: leaves for name, leaves in bundle.params["head"].items() if name in TOKEN_HEAD}
  params = {"backbone": bundle.params["backbone"], "head": head}
  forward = jax.jit(functools.partial(model.apply, train=False))
  losses = forward({"params": params}, batch)["losses"]
  probabilities_NxV = np.exp(-np.asarray(losses)).reshape(len(places), config.vocab_size)
  likeliest = []
  for probabilities_V in probabilities_NxV:
    tokens = np.argsort(-probabilities_V)[:count].tolist()
    likeliest.append([(tokenizer.pieces[i], float(probabilities_V[i])) for i in tokens])
  return likeliest


def _encoded(bundle: Bundle, text: str) -> list[int]:
  """The ids of [CLS] text [SEP]. Raises UserError if it has no [MASK] or is too long."""
  tokenizer = bundle.tokenizer
  max_length = bundle.config.model.max_length
  before_mask, *after_masks = tokenizer.encode(text.split("[MASK]"))
  if not after_masks:
    raise UserError("--prompt has no [MASK] to fill")
  ids = [tokenizer.cls, *before_mask]
  for part in after_masks:
    ids += [tokenizer.mask, *part]
  ids.append(tokenizer.sep)
  if len(ids) > max_length:
    raise UserError(
      f"the prompt has {len(ids)} tokens, more than the model's {max_length} positions"
    )
  return ids
