"""Beside the live library: what we export loads there, and its tokenizers give the same ids.

Needs torch and transformers: pip install -e '.[parity]'; run by .ci/run with -m parity.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm.cache import cache_dir
from llm.checkpoints import export, export_tokenizer, huggingface, layout, manager
from llm.data import embedded
from llm.models import build_backbone, resolve
from tests.test_huggingface import GOLDEN, NAMES, _batch

pytestmark = pytest.mark.parity

CACHE = cache_dir()  # the user's own: taken before conftest gives the tests another
PASSAGES = 50

DIFFICULT = [
  "",
  " ",
  "Hello, world!",
  "naïve café, Zürich, Ångström, İstanbul",
  "東京タワー と 漢字",
  "emoji 👩‍👩‍👧‍👦 🇩🇪 ok",
  "tab\tnewline\nnull\x00bell\x07",
  "a" * 300,
  "spaces     and   more  ",
  "don't can't won't 3.14 1,000,000 $5 50%",
  "[CLS] [SEP] [MASK]",
  "ﬁ ligature ½ ² ™",
  "mixed中文English한국어",
  "\u200bzero\u200dwidth\ufeff",
  "ÀÉÎÕÜ àéîõü ß ẞ",
]


@pytest.fixture(scope="module")
def library():
  import transformers

  transformers.logging.set_verbosity_error()
  return transformers


@pytest.mark.parametrize("name", NAMES)
def test_what_we_export_loads_with_nothing_missing(name, library, tmp_path):
  import torch

  huggingface.write(*huggingface.read(GOLDEN / name), tmp_path / "ours", "")
  (tmp_path / "theirs").mkdir()
  export.to_transformers(manager.find(tmp_path / "ours"), tmp_path / "theirs")
  architecture = json.loads((tmp_path / "theirs" / "config.json").read_text())["architectures"][0]
  model, info = getattr(library, architecture).from_pretrained(
    tmp_path / "theirs", output_loading_info=True
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  expected = np.load(GOLDEN / name / "expected.npz")
  arguments = {
    "input_ids": torch.tensor(expected["tokens"]),
    "attention_mask": torch.tensor(expected["segments"]),
  }
  if "types" in expected:
    arguments["token_type_ids"] = torch.tensor(expected["types"])
  if "decoder_tokens" in expected:
    arguments |= {
      "decoder_input_ids": torch.tensor(expected["decoder_tokens"]),
      "decoder_attention_mask": torch.tensor(expected["decoder_segments"]),
    }
  with torch.no_grad():
    out = model.eval()(**arguments)
  logits = (out.prediction_logits if name == "bert_pretraining" else out.logits).numpy()
  if name == "bert_classifier":
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
  else:
    # T5's logits come without the rows that pad the vocabulary.
    logits = logits[..., : expected["log_probs"].shape[-1]]
    logits = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    real = expected.get("decoder_segments", expected["segments"]) > 0
    np.testing.assert_allclose(logits[real], expected["log_probs"][real], atol=1e-4)
  theirs, ours = (
    library.AutoTokenizer.from_pretrained(tmp_path / "theirs"),
    layout.read_tokenizer(GOLDEN / name),
  )
  # The tiny t5's model normalises nothing.
  for text in DIFFICULT[:4] if name.startswith("t5") else DIFFICULT:
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode([text])[0], text


@pytest.mark.parametrize(
  "name", ["gpt2", "llama", "llama_tied", "qwen3", "t5", "t5_gated", "t5_gated_tied"]
)
def test_greedy_continuations_are_theirs(name, library):
  """Two prompts of different lengths in one batch go on for eight tokens, through either cache."""
  import torch

  import llm
  from llm.inference import writer

  model_class = (
    library.T5ForConditionalGeneration if name.startswith("t5") else library.AutoModelForCausalLM
  )
  theirs, bundle = model_class.from_pretrained(GOLDEN / name).eval(), llm.load(GOLDEN / name)
  # A piece that both end with.
  bundle.tokenizer.eos = next(i for i in range(3, 60) if i not in bundle.tokenizer.special_ids)
  made = writer.Writer(bundle)
  prompts = ["cat", "it is a"]
  # T5's rows without a piece.
  padding = list(range(bundle.tokenizer.vocab_size, theirs.config.vocab_size)) or None
  ours = made.write(prompts, 8)
  for prompt, found in zip(prompts, ours):
    ids = bundle.tokenizer.encode([prompt])[0] + (
      [bundle.tokenizer.eos] if name.startswith("t5") else []
    )
    out = theirs.generate(
      torch.tensor([ids]),
      attention_mask=torch.ones(1, len(ids), dtype=torch.long),
      max_new_tokens=8,
      do_sample=False,
      suppress_tokens=padding,
      eos_token_id=bundle.tokenizer.eos,
      pad_token_id=0,
    )[0].tolist()
    new = out[1:] if name.startswith("t5") else out[len(ids) :]
    assert found.tokens == [t for t in new if t != bundle.tokenizer.eos] and new


def test_adapters_are_pefts(library, tmp_path):
  """peft loads what `convert adapters` writes onto the run's checkpoint, and gives our logits."""
  import peft
  import torch

  from llm.training import experiment, loop
  from tests.conftest import tiny

  (tmp_path / "train.jsonl").write_text(
    "".join(json.dumps({"text": t, "label": t[:3]}) + "\n" for t in ("the cat", "sat on") * 8)
  )
  config = tiny(
    "classifier",
    f"jsonl:{tmp_path}/train.jsonl",
    transfer__checkpoint=str(GOLDEN / "bert_classifier"),
    model__lora_rank=2,
    transfer__skip=("^head/classifier",),
    model__lora_targets=r"(query|out|up)$",
    training__sequence_length=16,
    training__batch_size=16,
  )
  loop.train(config, tmp_path / "tuned")
  step = manager.find(tmp_path / "tuned")
  (tmp_path / "alone").mkdir()
  export.to_peft(step, tmp_path / "alone")
  base = library.AutoModelForSequenceClassification.from_pretrained(
    GOLDEN / "bert_classifier", num_labels=2, ignore_mismatched_sizes=True
  )
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "alone").eval()
  expected = np.load(GOLDEN / "bert_classifier" / "expected.npz")
  with torch.no_grad():
    logits = theirs(
      input_ids=torch.tensor(expected["tokens"]),
      attention_mask=torch.tensor(expected["segments"]),
      token_type_ids=torch.tensor(expected["types"]),
    ).logits.numpy()
  ours = (
    experiment.from_checkpoint(step)
    .on_platform("cpu")
    .model.apply({"params": manager.restore(step, "params")}, _batch(expected), train=False)
  )
  np.testing.assert_allclose(ours["logits"][:, 0], logits, atol=1e-5)


def test_the_real_t5_vocabulary_gives_their_ids(library, tmp_path):
  """Its SentencePiece model of 32,000 pieces with 100 sentinels, here and there."""
  import zipfile

  from llm.data import tokenizer

  with zipfile.ZipFile(embedded.archive("t5", CACHE)) as content:
    ours = tokenizer.SentencePieceTokenizer(content.read(embedded.ARCHIVES["t5"][2]), extra=100)
  export_tokenizer.write(ours, tmp_path, 512)
  theirs = library.AutoTokenizer.from_pretrained(tmp_path)
  assert (
    ours.vocab_size == 32_100
    and ours.sentinels[0] == theirs.convert_tokens_to_ids("<extra_id_0>") == 32_099
  )
  for text in DIFFICULT:
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode([text])[0], text


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
  """The folder of the real 6-layer BERT."""
  return embedded.model("minilm", CACHE)


def test_the_real_bert_is_torchs(minilm, library):
  """Hidden states to 1e-4 of their scale, tokenizer ids equal on a page of difficult text."""
  import torch

  theirs, tokenizer = (
    library.AutoModel.from_pretrained(minilm).eval(),
    library.AutoTokenizer.from_pretrained(minilm),
  )
  params, config, ours = huggingface.read(minilm)
  for text in DIFFICULT:
    assert (
      tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
      == ours.encode([text])[0]
    ), text
  encoded = tokenizer(DIFFICULT, padding=True, truncation=True, max_length=64, return_tensors="pt")
  with torch.no_grad():
    expected = theirs(**encoded).last_hidden_state.numpy()
  ids, mask = (
    encoded["input_ids"].numpy().astype(np.int32),
    encoded["attention_mask"].numpy().astype(np.int32),
  )
  batch = {
    "tokens": ids,
    "segments": mask,
    "types": np.zeros_like(ids),
    "positions": np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)),
  }
  found, *_ = jax.jit(
    lambda b: build_backbone(resolve.resolved(config.model, 0, "cpu")).apply(
      {"params": params["backbone"]}, b, train=False
    )
  )(batch)
  real = mask > 0
  assert (
    np.abs(np.asarray(found)[real] - expected[real]).max() <= 1e-4 * np.abs(expected[real]).max()
  )


@pytest.fixture(scope="module")
def smollm():
  """The real 135M decoder, a GGUF file."""
  return embedded.model("smollm2", CACHE)


def test_the_real_decoder_has_torchs_perplexity(smollm, library, tmp_path):
  """On Wikipedia passages, within 0.5%, and every logit within 1e-4 of their scale.

  Torch runs our export.
  """
  import torch

  from llm.checkpoints import gguf

  params, config, tokenizer = gguf.read(smollm)
  huggingface.write(params, config, tokenizer, tmp_path / "ours", "gguf")
  (tmp_path / "theirs").mkdir()
  export.to_transformers(manager.find(tmp_path / "ours"), tmp_path / "theirs")
  theirs = library.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
  texts = [r["text"] for r in embedded.records("wikipedia", "validation", CACHE)]
  passages = [p for text in texts for p in text.split("\n") if len(p) > 500][:PASSAGES]
  ids = np.array([t[:64] for t in tokenizer.encode(passages)], np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(ids)).logits.numpy()
  batch = {
    "tokens": ids,
    "segments": np.ones_like(ids),
    "positions": np.tile(np.arange(64, dtype=np.int32), (len(ids), 1)),
  }

  def logits(params, batch):
    hidden, table, _ = build_backbone(resolve.resolved(config.model, 0, "cpu")).apply(
      {"params": params["backbone"]}, batch, train=False
    )
    return hidden @ table.T

  found = np.asarray(jax.jit(logits)(params, batch))[..., : tokenizer.vocab_size]
  assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
  ours, torchs = (_perplexity(a, ids) for a in (found, expected))
  assert ours == pytest.approx(torchs, rel=5e-3) and 5 < ours < 40
  print(f"perplexity on {len(ids)} passages: ours {ours:.4f}, torch {torchs:.4f}")


def test_the_real_decoders_chat_template_gives_transformers_ids(smollm, library, tmp_path):
  """Two turns, with and without a system message; the assistant's tokens are learned.

  <|im_end|> is learned too.
  """
  from llm.checkpoints import gguf
  from llm.objectives import base, chat

  _, config, tokenizer = gguf.read(smollm)
  export_tokenizer.write(
    tokenizer,
    tmp_path,
    2048,
    chat_template=chat.template_of(base.build(config.objective), tokenizer),
  )
  theirs = library.AutoTokenizer.from_pretrained(tmp_path)
  source = chat.template_of(base.build(config.objective), tokenizer)
  template = chat.Template(source, tokenizer.special.get("bos", ""))
  talk = [
    {"role": "user", "content": "Hi there, né?"},
    {"role": "assistant", "content": "Yes.\n\nIndeed", "weight": 1},
    {"role": "user", "content": "Why 東?"},
    {"role": "assistant", "content": "So.", "weight": 1},
  ]
  for turns in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
    ids, learned = template.tokens([{"weight": 0, **turn} for turn in turns], tokenizer)
    assert ids.tolist() == theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert tokenizer.decode([i for i, w in zip(ids, learned) if w]) == "Yes.\n\nIndeedSo."
    assert [tokenizer.pieces[i] for i, w in zip(ids, learned) if w].count("<|im_end|>") == 2
  asked = template.encode(template.render(talk[:1], True), tokenizer)
  assert asked == theirs.apply_chat_template(
    talk[:1], tokenize=True, add_generation_prompt=True, return_dict=False
  )


def _perplexity(logits, ids) -> float:
  logits = logits[:, :-1].astype(np.float64)
  log_probs = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0] - np.log(
    np.exp(logits).sum(-1)
  )
  return float(np.exp(-log_probs.mean()))


def test_fine_tuning_the_real_bert_reaches_what_torch_reaches(minilm):
  """Our mean of four draws is in the interval of torch's over five, and above NBSVM's.

  Each draw has 256 review sentences. Torch's side was run once by the same script:
  golden/fine_tuning.json. Ours runs in a separate process, without the compiler flags of the tests.
  """
  script = GOLDEN / "fine_tune.py"
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
    "PRETUNE_CACHE": str(CACHE),
    "PYTHONPATH": str(script.parents[2]),
  }
  done = subprocess.run(
    [sys.executable, script, "ours"], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  torchs = json.loads((GOLDEN / "fine_tuning.json").read_text())
  print(found, torchs)
  spread = (
    np.var(found["ours"], ddof=1) / len(found["ours"]) + np.var(torchs, ddof=1) / len(torchs)
  ) ** 0.5
  # The 95% interval of a difference of such means (t of 7).
  assert np.mean(found["ours"]) > np.mean(torchs) - 2.36 * spread
  assert np.mean(found["ours"]) > np.mean(found["nbsvm"]) + 0.05
