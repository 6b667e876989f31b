"""A scaling law of decoders: a grid of sizes and lengths, and larger runs that are predicted first.

  python -m llm.study scaling_law --workdir=DIR [--quick]

On two cores: a GPT over bytes of the embedded Wikipedia and reviews, 32 times in parameters, 2.2
decades in compute, two seeds. On other hardware, take more text and larger sizes:

  --config.run.data.train=shards:DIR --config.run.data.eval=text:held_out.txt
  --config.study.sizes="('6x384','8x512','12x768')" --config.study.tokens="('1e8','1e9','1e10')"

Published: alpha 0.34 and beta 0.28 (Hoffmann et al. 2022), refitted 0.348 and 0.366 (Besiroglu et
al. 2024).
"""

from typing import Any

import ml_collections

from configs import pretrain_gpt
from llm.studies import frame


def get_config() -> Any:
  """The settings of the study, and the config of its runs."""
  run = pretrain_gpt.get_config("tiny")
  run.tokenizer.update(name="bytes", vocab_size=0, path="")
  run.data.update(
    train="embedded:wikipedia@0.7,embedded:reviews@0.3", eval="embedded:wikipedia[validation]"
  )
  run.model.dropout = 0.0
  run.training.update(batch_size=32, sequence_length=128, save_every=0, keep_best="")
  return ml_collections.ConfigDict({"study": frame.defaults("scaling_law"), "run": run})
