"""Settings that follow the size of the model, of the batch, of the run and of the data.

A config names a published run (config.recipe). What it leaves at -1 is carried over from that run
to its own by the rules below. At the published width, batch and steps, it is what was published.
"""

import dataclasses
import math

from llm.config import Config, RecipeConfig

# The power of the number of tokens with which the best rate falls. Bjorck et al. 2024 (section 3)
# find 0.32 at one batch size. From published runs to minutes it is 0.2 (docs/recipes.md).
TOKENS_POWER = 0.2
# Narrow models get no higher rate.
HIGHEST_RATE = 1e-2
# Small data are not gone through more often.
MOST_EPOCHS = 20
# A run that saves at the end of every epoch saves within a longer one too.
MOST_UNSAVED = 200


def learning_rate(config: Config) -> float:
  """The highest rate of Adam for the run of a config whose steps are known.

  That of the published run, times four factors:

  - (published width / width) ** width_power. With a power of 1, updates of hidden layers stay as
    large beside their outputs (Yang et al. 2022, table 3).
  - published layers / layers for a deeper model, where the recipe says its layers. It is for layers
    that are normalised after the addition, as BERT's are: what an update changes in the output
    grows with their number (Liu et al. 2020, section 4). Measured at 2, 4 and 8 layers
    (docs/recipes.md), where GPT, Llama and T5 have one best rate.
  - sqrt(tokens a step / published), by the noise of the gradient (Malladi et al. 2022, section 4).
  - (published tokens of the run / tokens) ** TOKENS_POWER: short runs take larger steps. Where the
    recipe says its layers this factor is at most 1: with more than the rate of its recipe, a short
    run of BERT stays at the frequencies of words (docs/recipes.md).
  """
  recipe = config.recipe
  rate = recipe.learning_rate * (recipe.width / config.model.width) ** recipe.width_power
  if recipe.num_layers:
    rate *= min(1.0, recipe.num_layers / config.model.num_layers)
  if recipe.batch_tokens:
    batch_tokens = config.training.batch_size * config.training.sequence_length
    batch_ratio = batch_tokens / recipe.batch_tokens
    rate *= batch_ratio**0.5
    if recipe.steps:
      tokens_ratio = batch_ratio * config.training.steps / recipe.steps
      factor = tokens_ratio**-TOKENS_POWER
      rate *= min(1.0, factor) if recipe.num_layers else factor
  return float(f"{min(rate, max(HIGHEST_RATE, recipe.learning_rate)):.3g}")


def epochs(recipe: RecipeConfig, steps_an_epoch: float) -> float:
  """The epochs of the recipe, or more where they are few steps.

  Fine-tuning in few steps often fails (Mosbach et al. 2021, section 6; Zhang et al. 2021, section
  6).
  """
  return max(recipe.epochs, min(MOST_EPOCHS, math.ceil(recipe.least_steps / steps_an_epoch)))


def resolved(config: Config, steps_an_epoch: float, goal: str) -> Config:
  """The config with all set that follows from its recipe, its data and its objective.

  goal: of the objective (objectives/base.py). The epochs become steps.
  """
  training = config.training
  steps = training.steps
  if not steps:
    if training.epochs == -1:
      training = dataclasses.replace(training, epochs=epochs(config.recipe, steps_an_epoch))
    steps = max(1, math.ceil(training.epochs * steps_an_epoch))
  epoch = max(1, math.ceil(steps_an_epoch))
  eval_every = epoch if training.eval_every == -1 else training.eval_every
  save_every = training.save_every
  if save_every == -1:
    save_every = math.ceil(epoch / math.ceil(epoch / MOST_UNSAVED))
  keep_best = training.keep_best
  if keep_best == "auto":
    keep_best = goal if config.data.eval else ""
  training = dataclasses.replace(
    training,
    steps=steps,
    epochs=0.0,
    eval_every=eval_every,
    save_every=save_every,
    keep_best=keep_best,
  )
  config = dataclasses.replace(config, training=training)
  if config.optimizer.learning_rate != -1:
    return config
  optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate(config))
  return dataclasses.replace(config, optimizer=optimizer)
