"""Fine-tunes the real 6-layer BERT on 256 review sentences: four draws here, five with torch.

  python tests/golden/fine_tune.py ours      one line of JSON: accuracies of each draw, and NBSVM's
  python tests/golden/fine_tune.py torch     the same recipe in transformers, in fine_tuning.json

The recipe: AdamW, a tenth of warm-up, linear to 0, gradients clipped at 1. The score is taken on
500 rows of the test split.
"""

import json
import pathlib
import sys

import jax
import numpy as np

DRAWS = 5
HERE = 4  # draws on our side: two devices work on two at a time
LABELS, EPOCHS, RATE, BATCH, LENGTH = 256, 3, 2e-4, 16, 32


def splits():
  """(training split, 500 rows of the test split, converted model, its folder)."""
  from llm.checkpoints import huggingface
  from llm.config import DataConfig
  from llm import cache
  from llm.data import embedded, sources
  from llm.objectives import classification
  from llm.studies import fine_tuner

  folder = embedded.model("minilm", cache.cache_dir())
  converted = huggingface.read(folder)
  found = [sources.parse(f"embedded:reviews[{s}]", DataConfig())[0] for s in ("train", "test")]
  objective = classification.Objective().fit(found[:1], None)
  train, test = (
    fine_tuner.encode(objective, s, converted[2], converted[1].model, LENGTH) for s in found
  )
  rows = np.random.default_rng(0).choice(len(test.labels), 500, replace=False)
  test = fine_tuner.Split(
    [test.texts[i] for i in rows], test.labels[rows], {k: v[rows] for k, v in test.arrays.items()}
  )
  return train, test, objective, converted, folder


def ours():
  """Our accuracies, and NBSVM's."""
  jax.config.update("jax_num_cpu_devices", 2)
  from llm import sharding
  from llm.checkpoints import transfer
  from llm.config import MeshConfig, TransferConfig
  from llm.models import classical
  from llm.studies import fine_tuner, label_curve
  from llm.training import experiment, step

  train, test, objective, (params, config, _), _ = splits()
  one = {k: v[:1] for k, v in train.arrays.items()}
  fresh = step.init_params(experiment.build(objective, config.model), one, jax.random.key(0))
  start, _ = transfer.transfer(fresh, params, TransferConfig(skip=(r"^head/(?!pooler)",)))
  tuner = fine_tuner.FineTuner(
    objective, config.model, {"bert": start}, BATCH, sharding.make_mesh(MeshConfig())
  )

  class Bar:
    update = staticmethod(lambda: None)

  draws = [label_curve.draw(train, LABELS, n) for n in range(HERE)]
  found = tuner.accuracies(
    [fine_tuner.Run("bert", d, RATE, EPOCHS, n) for n, d in enumerate(draws)],
    train,
    test,
    Bar,
  )
  nbsvm = [
    classical.accuracy(
      "nbsvm", 1.0, ([train.texts[i] for i in d], train.labels[list(d)]), (test.texts, test.labels)
    )
    for d in draws
  ]
  print(json.dumps({"ours": found, "nbsvm": nbsvm}))


def torchs():
  """Torch's accuracies."""
  import torch
  import transformers

  from llm.studies import label_curve

  train, test, _, _, folder = splits()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def encode(texts):
    return tokenizer(
      list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )

  steps = EPOCHS * LABELS // BATCH
  warmup = steps // 10
  out = []
  for seed in range(DRAWS):
    torch.manual_seed(seed)
    chosen = np.array(label_curve.draw(train, LABELS, seed))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, num_labels=2
    ).train()
    groups = [
      {
        "params": [
          p for n, p in model.named_parameters() if ("bias" in n or "LayerNorm" in n) == plain
        ],
        "weight_decay": 0.0 if plain else 0.01,
      }
      for plain in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
      optimizer,
      lambda s: min((s + 1) / warmup, 1.0) if s < warmup else (steps - s) / (steps - warmup),
    )
    for epoch in range(EPOCHS):
      order = np.random.default_rng((seed, epoch)).permutation(chosen)
      for rows in order.reshape(-1, BATCH):
        model(
          **encode(train.texts[i] for i in rows), labels=torch.tensor(train.labels[rows])
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
      guesses = [
        model(**encode(test.texts[i : i + 100])).logits.argmax(-1)
        for i in range(0, len(test.texts), 100)
      ]
    out.append(float((torch.cat(guesses).numpy() == test.labels).mean()))
    print(out, flush=True)
  pathlib.Path(__file__).with_name("fine_tuning.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
  {"ours": ours, "torch": torchs}[sys.argv[1]]()
