"""A masked language model that fills the [MASK]s of a text."""

import functools

import jax
import numpy as np

from llm import models
from llm.core import UserError
from llm.objectives import masked_lm
from llm.training import experiment as experiment_lib
from llm.training.experiment import Bundle

HEAD = ("transform", "transform_norm", "lm")  # parts of a head that predict tokens


def fill(bundle: Bundle, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
  """The likeliest pieces for each [MASK] of a text, with their probabilities. Raises UserError."""
  tokenizer, config = bundle.tokenizer, bundle.config.model
  tokenizer.require("cls", "sep", "mask")
  if models.facts(config).kind != "encoder" or "transform" not in bundle.params.get("head", {}):
    raise UserError("the checkpoint has no masked-language-model head to fill masks with")
  ids = _encoded(bundle, text)
  places = np.flatnonzero(np.array(ids) == tokenizer.mask)
  batch = {
    "tokens": ids,
    "segments": [1] * len(ids),
    "positions": range(len(ids)),
    "types": [0] * len(ids),
    # Each piece of the vocabulary is scored at each mask.
    "masked_positions": np.repeat(places, config.vocab_size),
    "masked_targets": np.tile(np.arange(config.vocab_size), len(places)),
  }
  batch = {name: np.array(values, np.int32)[None] for name, values in batch.items()}
  model = experiment_lib.build(masked_lm.Objective(next_sentence=False), config)
  head = {name: leaves for name, leaves in bundle.params["head"].items() if name in HEAD}
  params = {"backbone": bundle.params["backbone"], "head": head}
  losses = jax.jit(functools.partial(model.apply, train=False))({"params": params}, batch)["losses"]
  odds = np.exp(-np.asarray(losses)).reshape(len(places), config.vocab_size)
  return [
    [(tokenizer.pieces[i], float(of_mask[i])) for i in np.argsort(-of_mask)[:count]]
    for of_mask in odds
  ]


def _encoded(bundle: Bundle, text: str) -> list[int]:
  """[CLS] text [SEP]. Raises UserError where there is nothing to fill, or the text is too long."""
  tokenizer, most = bundle.tokenizer, bundle.config.model.max_length
  first, *others = tokenizer.encode(text.split("[MASK]"))
  if not others:
    raise UserError("--prompt has no [MASK] to fill")
  after_masks = (token for part in others for token in (tokenizer.mask, *part))
  ids = [tokenizer.cls, *first, *after_masks, tokenizer.sep]
  if len(ids) > most:
    raise UserError(f"the prompt has {len(ids)} tokens, more than the model's {most} positions")
  return ids
