"""The torch side of the benchmarks: plain modules with fused attention, and those of transformers.

Each peer is built for a shape and gives `step()`: forward, backward, clip, fused AdamW, zero.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
  """Attention (fused) and feed-forward, pre-norm (GPT-2) or post-norm (BERT)."""

  def __init__(self, width: int, heads: int, *, causal: bool):
    super().__init__()
    self.heads, self.causal = heads, causal
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

  def attend(self, x):
    rows, length, width = x.shape
    q, k, v = (
      a.view(rows, length, self.heads, -1).transpose(1, 2) for a in self.qkv(x).split(width, dim=2)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
    return self.out(mixed.transpose(1, 2).reshape(rows, length, width))

  def feed(self, x):
    return self.down(F.gelu(self.up(x), approximate="tanh" if self.causal else "none"))

  def forward(self, x):
    if self.causal:
      x = x + self.attend(self.norm1(x))
      return x + self.feed(self.norm2(x))
    x = self.norm1(x + self.attend(x))
    return self.norm2(x + self.feed(x))


class PlainGPT(nn.Module):
  """GPT-2 with tied embeddings; returns the loss."""

  def __init__(self, layers, width, heads, vocab, length):
    super().__init__()
    self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
    self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
    self.norm = nn.LayerNorm(width)

  def forward(self, tokens, targets):
    x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
    for block in self.blocks:
      x = block(x)
    logits = F.linear(self.norm(x), self.token.weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBERT(nn.Module):
  """BERT with MLM on the gathered masked positions, and NSP; returns the loss."""

  def __init__(self, layers, width, heads, vocab, length):
    super().__init__()
    self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
    self.segment, self.norm = nn.Embedding(2, width), nn.LayerNorm(width)
    self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
    self.transform, self.transform_norm = nn.Linear(width, width), nn.LayerNorm(width)
    self.bias = nn.Parameter(torch.zeros(vocab))
    self.pooler, self.pair = nn.Linear(width, width), nn.Linear(width, 2)

  def forward(self, tokens, types, positions, targets, pairs):
    x = self.token(tokens) + self.position.weight[: tokens.shape[1]] + self.segment(types)
    x = self.norm(x)
    for block in self.blocks:
      x = block(x)
    masked = torch.gather(x, 1, positions[..., None].expand(-1, -1, x.shape[-1]))
    masked = self.transform_norm(F.gelu(self.transform(masked)))
    logits = F.linear(masked, self.token.weight, self.bias)
    pair = self.pair(torch.tanh(self.pooler(x[:, 0])))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + F.cross_entropy(pair, pairs)


def initialized(model):
  for parameter in model.parameters():
    if parameter.ndim > 1:
      nn.init.normal_(parameter, std=0.02)
  return model


def _stepper(model, loss):
  """step() -> loss tensor. `loss` maps the model to the loss of a fixed batch."""
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
  model.train()

  def step():
    value = loss(model)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value

  return step


def peers(
  kind: str, layers: int, width: int, heads: int, vocab: int, batch: dict, *, autocast: bool = False
) -> dict:
  """name -> step() for one shape; `batch` is the batch of ours, as numpy arrays.

  autocast: products in bfloat16."""
  import transformers

  t = {k: torch.from_numpy(np.asarray(v)).long() for k, v in batch.items()}
  length = batch["tokens"].shape[1]
  if kind == "gpt":
    config = transformers.GPT2Config(
      vocab_size=vocab,
      n_positions=length,
      n_embd=width,
      n_layer=layers,
      n_head=heads,
      resid_pdrop=0,
      embd_pdrop=0,
      attn_pdrop=0,
    )

    def make_hf():
      return transformers.GPT2LMHeadModel(config)

    def hf_loss(model):
      logits = model(t["tokens"], use_cache=False).logits
      return F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())

    def make_plain():
      return initialized(PlainGPT(layers, width, heads, vocab, length))

    def plain_loss(model):
      return model(t["tokens"], t["targets"])
  elif kind == "t5":
    config = transformers.T5Config(
      vocab_size=vocab,
      d_model=width,
      d_kv=width // heads,
      d_ff=4 * width,
      num_layers=layers,
      num_heads=heads,
      dropout_rate=0.0,
      decoder_start_token_id=0,
    )
    make_hf, make_plain = lambda: transformers.T5ForConditionalGeneration(config), None

    def hf_loss(model):
      logits = model(
        input_ids=t["tokens"], decoder_input_ids=t["decoder_tokens"], use_cache=False
      ).logits
      return F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())
  else:
    config = transformers.BertConfig(
      vocab_size=vocab,
      hidden_size=width,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      intermediate_size=4 * width,
      hidden_dropout_prob=0,
      attention_probs_dropout_prob=0,
    )

    def make_hf():
      return transformers.BertForPreTraining(config)

    labels = torch.full_like(t["tokens"], -100).scatter(
      1, t["masked_positions"], t["masked_targets"]
    )

    def hf_loss(model):
      return model(
        t["tokens"],
        token_type_ids=t["types"],
        labels=labels,
        next_sentence_label=t["next_sentence"],
      ).loss

    def make_plain():
      return initialized(PlainBERT(layers, width, heads, vocab, 512))

    def plain_loss(model):
      return model(
        t["tokens"],
        t["types"],
        t["masked_positions"],
        t["masked_targets"],
        t["next_sentence"][:, 0],
      )

  if autocast:
    hf_loss = torch.autocast("cpu", torch.bfloat16)(hf_loss)
    plain_loss = torch.autocast("cpu", torch.bfloat16)(plain_loss) if make_plain else None
  name = {
    "gpt": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
    "t5": "T5ForConditionalGeneration",
  }[kind]
  found = {
    f"{name} eager": _stepper(make_hf(), hf_loss),
    f"{name} compiled": _compiled(make_hf(), hf_loss),
  }
  if make_plain:
    found |= {
      "plain module": _stepper(make_plain(), plain_loss),
      "plain module compiled": _compiled(make_plain(), plain_loss),
    }
  return found


def _compiled(model, loss):
  """As _stepper, through torch.compile; needs a C++ compiler on CPU."""
  return _stepper(model, torch.compile(loss))
