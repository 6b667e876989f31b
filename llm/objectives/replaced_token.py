"""Replaced token detection: a small generator replaces tokens, the model tells which (ELECTRA)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm import models
from llm.config import ModelConfig, key
from llm.core import Batch, UserError
from llm.models import heads
from llm.models.architecture import embedding_width_of
from llm.objectives import base, masked_lm


class Generator(nn.Module):
  """A masked language model with layers of its own, over what the discriminator has embedded."""

  backbone: nn.Module
  head: nn.Module

  def __call__(
    self, batch: Batch, embedded: tuple[jax.Array, jax.Array], *, train: bool
  ) -> base.Outputs:
    hidden_BxTxD, table_VxE, _ = self.backbone(batch, train=train, embedded=embedded)
    return self.head(hidden_BxTxD, batch, table_VxE, train=train)


class Network(nn.Module):
  """Generator and discriminator; parameters are {"backbone": ..., "head": ..., "generator": ...}.

  The first two are the discriminator, embedding included: what a fine-tuning run takes over.
  """

  backbone: nn.Module
  head: nn.Module
  generator: nn.Module

  def __call__(self, batch: Batch, *, train: bool) -> base.Outputs:
    outputs = self.generator(batch, self.backbone.embed(batch), train=train)
    original_BxT = with_masked(batch, batch["masked_targets"])
    tokens_BxT = with_masked(batch, outputs["drawn"])
    hidden_BxTxD, table_VxE, _ = self.backbone({**batch, "tokens": tokens_BxT}, train=train)
    detected = self.head(hidden_BxTxD, batch, table_VxE, train=train)
    return {**outputs, **detected, "replaced": tokens_BxT != original_BxT}


def with_masked(batch: Batch, tokens_BxM: jax.Array) -> jax.Array:
  """BxT: the tokens of a batch with others at the masked positions."""
  length = batch["tokens"].shape[1]
  # A slot without weight stands for no position.
  places_BxM = jnp.where(batch["masked_weights"] > 0, batch["masked_positions"], length)
  put = jax.vmap(lambda tokens_T, places_M, new_M: tokens_T.at[places_M].set(new_M, mode="drop"))
  return put(batch["tokens"], places_BxM, tokens_BxM)


@dataclasses.dataclass(frozen=True)
class Objective(masked_lm.Objective):
  """ELECTRA's pretraining (Clark et al. 2020, sections 2 and 3.1, appendix A).

  A generator fills the masked positions with tokens that it draws. The model, the discriminator,
  tells of every token whether it was replaced; one that was drawn as it was counts as original. The
  generator has generator_share of the discriminator's width, heads and feed-forward width, as many
  layers, and the same embedding. The loss is that of masked language modelling, the generator's,
  and discriminator_weight times that of the discriminator. Of the masked positions, the published
  code leaves 15% as they are.
  """

  mask_share: float = key(0.85, at_least=0, at_most=1)
  random_share: float = key(0.0, at_least=0, at_most=1)
  next_sentence: bool = False
  generator_share: float = key(0.25, above=0, at_most=1)
  discriminator_weight: float = key(50.0, above=0)

  def __post_init__(self):
    super().__post_init__()
    if self.next_sentence:
      raise UserError("config.objective.next_sentence must be False: replaced_token has no pairs")

  def trains(self, facts):
    return super().trains(facts) and facts.embedding_project

  def model(self, config):
    of_generator = self.generator_config(config)
    generator = Generator(
      models.build_backbone(of_generator),
      heads.MaskedLMHead(of_generator, next_sentence=False, draws=True),
    )
    return Network(models.build_backbone(config), heads.DetectionHead(config), generator)

  def generator_config(self, config: ModelConfig) -> ModelConfig:
    """The generator's shape. Raises UserError where its heads do not divide its width."""
    width = round(config.width * self.generator_share)
    num_heads = max(1, round(config.num_heads * self.generator_share))
    if not width or not config.head_width and width % num_heads:
      raise UserError(
        f"config.objective.generator_share={self.generator_share} makes a generator of width "
        f"{width}, which its {num_heads} heads do not divide: take another share"
      )
    return dataclasses.replace(
      config,
      width=width,
      embedding_width=embedding_width_of(config),
      num_heads=num_heads,
      num_kv_heads=0,
      mlp_dim=max(1, round(config.mlp_dim * self.generator_share)),
    )

  def totals(self, batch):
    real_BxT = (batch["segments"] > 0).astype(jnp.float32)
    return {**super().totals(batch), "tokens": real_BxT.sum()}

  def loss(self, outputs, batch, totals):
    masked_loss, metrics = super().loss(outputs, batch, totals)
    detection = _detection(outputs, batch)
    detection_loss = base.weighted_mean(*detection["rtd_loss"], totals["tokens"])
    loss = masked_loss + self.discriminator_weight * detection_loss
    for name, (values_BxT, weights_BxT) in detection.items():
      metrics[name] = ((values_BxT * weights_BxT).sum(), weights_BxT.sum())
    # The weights of a step's parts sum to 1.
    part = batch["masked_weights"].sum() / jnp.maximum(totals["masked"], 1)
    return loss, {"loss": (loss, part), **metrics}

  def predict(self, outputs, batch):
    sums = {name: base.row_sums(*pair) for name, pair in _detection(outputs, batch).items()}
    return {**super().predict(outputs, batch), **sums}


def _detection(outputs: base.Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
  """name -> (values, weights), BxT each: the metrics of the discriminator.

  Precision is over the tokens that it calls replaced, recall over those that are.
  """
  logits_BxT = outputs["detection_logits"]
  real_BxT = (batch["segments"] > 0).astype(logits_BxT.dtype)
  replaced_BxT = outputs["replaced"].astype(logits_BxT.dtype)
  called_BxT = (logits_BxT > 0).astype(logits_BxT.dtype)
  return {
    "rtd_loss": (jax.nn.softplus(logits_BxT) - replaced_BxT * logits_BxT, real_BxT),
    "rtd_accuracy": ((called_BxT == replaced_BxT).astype(logits_BxT.dtype), real_BxT),
    "rtd_precision": (replaced_BxT, called_BxT * real_BxT),
    "rtd_recall": (called_BxT, replaced_BxT * real_BxT),
  }
