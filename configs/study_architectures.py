"""Encoder, decoder and encoder-decoder at equal FLOPs, text and vocabulary, on three tasks.

  python -m llm.study architectures --workdir=DIR [--quick]

config.run holds what all share: width, text, vocabulary, length and batch. On other hardware:

  --config.study.budget=1e18 --config.run.model.width=512 --config.run.data.train=text:corpus.txt
  --config.study.models="('bert:8:masked_lm','gpt:8:causal_lm','t5:4:span_corruption')"

Published: on the same data at 17 M to 1 B parameters, encoders are better at classification and
decoders at generation (Ettin, Weller et al. 2025).
"""

from typing import Any

import ml_collections

from configs import pretrain_bert
from llm.studies import frame


def get_config() -> Any:
  """The settings of the study, and what all its runs share."""
  run = pretrain_bert.get_config("tiny")
  run.data.train = "embedded:wikipedia@0.35,embedded:reviews@0.5,embedded:abstracts@0.15"
  # Counts of neighbours would start the encoders alone.
  run.model.update(max_length=256, embedding_start="random")
  run.training.update(batch_size=16, sequence_length=256, eval_every=0, save_every=0)
  return ml_collections.ConfigDict({"study": frame.defaults("architectures"), "run": run})
