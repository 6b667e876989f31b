"""Makes the folders beside it: tiny random models of transformers, and what torch computes.

  pip install -e '.[parity]' && python tests/golden/make.py

Each folder is a checkpoint in their layout and expected.npz: inputs, log-probabilities (or class
logits, next-sentence logits), the loss, and its gradient for every tensor under `grad:NAME`.
"""

import io
import json
import pathlib

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
TEXT = [
  "the cat sat on the mat",
  "a café in Zürich, naïve façade",
  "it is raining cats and dogs today",
] * 4


def bert_tokenizer(folder):
  letters = sorted({c for t in TEXT for c in t.lower() if c.isascii() and c != " "})
  pieces = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *letters,
    *(f"##{c}" for c in letters),
    "the",
    "cat",
    "##s",
  ]
  pieces = list(dict.fromkeys(pieces))
  (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
  return len(pieces)


def gpt_tokenizer(folder):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    TEXT,
    trainers.BpeTrainer(
      vocab_size=270,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  return tokenizer.get_vocab_size()


def t5_tokenizer(folder):
  """A SentencePiece model with T5's special ids; ten sentinels follow its pieces."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(TEXT),
    model_writer=model,
    vocab_size=60,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    pad_piece="<pad>",
    normalization_rule_name="identity",
    minloglevel=2,
  )
  (folder / "spiece.model").write_bytes(model.getvalue())
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 10})
  )
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).GetPieceSize() + 10


def randomized(model):
  """Every parameter random, biases and norms too, so that none can be mistaken for another."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(
        torch.randn(p.shape, generator=generator) * 0.2
        + (1.0 if "norm" in name.lower() and "weight" in name else 0.0)
      )
  return model.eval()


def save(folder, model, inputs, outputs, loss):
  loss.backward()
  model.save_pretrained(folder)
  grads = {f"grad:{n}": p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
  np.savez_compressed(
    folder / "expected.npz",
    **inputs,
    **{k: v.detach().numpy() for k, v in outputs.items()},
    loss=loss.item(),
    **grads,
  )


def ids(vocab, rows=3, length=12):
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, vocab, (rows, length))  # torch gives the row of [PAD] no gradient
  lengths = np.array([length, length - 3, length - 5])
  return (
    tokens,
    (np.arange(length) < lengths[:, None]).astype(np.int64),
    np.tile(np.arange(length) >= 5, (rows, 1)).astype(np.int64),
  )


def bert(name, cls, **more):
  folder = HERE / name
  folder.mkdir(exist_ok=True)
  vocab = bert_tokenizer(folder)
  config = transformers.BertConfig(
    vocab_size=vocab,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    **more,
  )
  model = randomized(cls(config))
  tokens, mask, types = ids(vocab)
  out = model(
    input_ids=torch.tensor(tokens),
    attention_mask=torch.tensor(mask),
    token_type_ids=torch.tensor(types),
  )
  inputs = {"tokens": tokens, "segments": mask, "types": types}
  if cls is transformers.BertForPreTraining:
    logp = torch.log_softmax(out.prediction_logits, -1)
    follows = torch.tensor([0, 1, 0])  # 0: B follows A
    loss = -logp[:, 1, 3].mean() + torch.nn.functional.cross_entropy(
      out.seq_relationship_logits, follows
    )
    save(
      folder, model, inputs, {"log_probs": logp, "pair_logits": out.seq_relationship_logits}, loss
    )
  else:
    save(
      folder,
      model,
      inputs,
      {"logits": out.logits},
      torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 2])),
    )


def modernbert(name):
  """Three does not divide the seven layers: the last is global. A text exceeds the window."""
  folder = HERE / name
  folder.mkdir(exist_ok=True)
  vocab = bert_tokenizer(folder)
  config = transformers.ModernBertConfig(
    vocab_size=vocab,
    hidden_size=16,
    num_hidden_layers=7,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    local_attention=4,
    pad_token_id=0,
    cls_token_id=2,
    bos_token_id=2,
    sep_token_id=3,
    eos_token_id=3,
  )
  model = randomized(transformers.ModernBertForMaskedLM(config))
  tokens, mask, _ = ids(vocab)
  logp = torch.log_softmax(
    model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits, -1
  )
  save(
    folder, model, {"tokens": tokens, "segments": mask}, {"log_probs": logp}, -logp[:, 1, 3].mean()
  )


def decoder(name, cls, config, rows=None, **shape):
  """rows: of the embedding, where they are more than the tokenizer has pieces."""
  folder = HERE / name
  folder.mkdir(exist_ok=True)
  vocab = gpt_tokenizer(folder)
  model = randomized(cls(config(vocab_size=rows or vocab, bos_token_id=0, eos_token_id=0, **shape)))
  tokens, mask, _ = ids(vocab)
  logp = torch.log_softmax(
    model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits[..., :vocab], -1
  )
  targets, weights = torch.tensor(np.roll(tokens, -1, 1)), torch.tensor(mask, dtype=torch.float32)
  losses = -logp.gather(-1, targets[..., None])[..., 0]
  save(
    folder,
    model,
    {"tokens": tokens, "segments": mask},
    {"log_probs": logp},
    (losses * weights).sum() / weights.sum(),
  )


def t5(name, own_output=False, **shape):
  """As in the published checkpoints, the embedding has more rows than the tokenizer has pieces."""
  folder = HERE / name
  folder.mkdir(exist_ok=True)
  vocab = t5_tokenizer(folder)
  config = transformers.T5Config(
    vocab_size=128,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
    decoder_start_token_id=0,
    **shape,
  )
  model = transformers.T5ForConditionalGeneration(config)
  if own_output:  # v1.1: transformers 5 ties nevertheless, unless a checkpoint has both
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(128, 16))
  model = randomized(model)
  tokens, mask, _ = ids(vocab, length=40)  # far enough for relative positions to share buckets
  targets, target_mask, _ = ids(vocab, length=9)
  given = np.roll(targets, 1, 1)
  given[:, 0] = 0
  out = model(
    input_ids=torch.tensor(tokens),
    attention_mask=torch.tensor(mask),
    decoder_input_ids=torch.tensor(given),
    decoder_attention_mask=torch.tensor(target_mask),
  )
  logp = torch.log_softmax(out.logits[..., :vocab], -1)
  weights = torch.tensor(target_mask, dtype=torch.float32)
  losses = -logp.gather(-1, torch.tensor(targets)[..., None])[..., 0]
  inputs = {
    "tokens": tokens,
    "segments": mask,
    "decoder_tokens": given,
    "decoder_segments": target_mask,
    "targets": targets,
  }
  save(folder, model, inputs, {"log_probs": logp}, (losses * weights).sum() / weights.sum())


if __name__ == "__main__":
  bert("bert_pretraining", transformers.BertForPreTraining)
  bert(
    "bert_classifier",
    transformers.BertForSequenceClassification,
    num_labels=3,
    id2label={0: "no", 1: "maybe", 2: "yes"},
    label2id={"no": 0, "maybe": 1, "yes": 2},
  )
  decoder(
    "gpt2",
    transformers.GPT2LMHeadModel,
    transformers.GPT2Config,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=20,
  )
  llama = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    rms_norm_eps=1e-6,
    rope_theta=500.0,
  )
  for name, tied in (("llama", False), ("llama_tied", True)):
    decoder(
      name,
      transformers.LlamaForCausalLM,
      transformers.LlamaConfig,
      tie_word_embeddings=tied,
      **llama,
    )
  t5("t5", feed_forward_proj="relu", tie_word_embeddings=True)
  t5("t5_gated", own_output=True, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
  t5("t5_gated_tied", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
  modernbert("modernbert")
  decoder(
    "qwen3",
    transformers.Qwen3ForCausalLM,
    transformers.Qwen3Config,
    rows=384,
    head_dim=6,
    tie_word_embeddings=True,
    **llama,
  )
  print(
    json.dumps(
      {p.name: sum(f.stat().st_size for f in p.iterdir()) for p in HERE.iterdir() if p.is_dir()}
    )
  )
