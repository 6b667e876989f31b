"""Writes a checkpoint in the layout of `transformers`, or its adapters in that of `peft`."""

import json
import pathlib
import re
from typing import Any, Callable, Iterator, Mapping

import numpy as np
from etils import epath

from llm import config as config_lib
from llm.checkpoints import adapters, export_tokenizer, families, manager, tensors
from llm.checkpoints.families.base import PAIRS, Family, Tensor
from llm.checkpoints.huggingface import WEIGHTS
from llm.core import UserError, flatten
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base, chat


def to_transformers(step: epath.Path, folder: pathlib.Path):
  """Writes a verified checkpoint as a folder that `from_pretrained` loads, adapters merged.

  Raises UserError where transformers has no such class or no place for a parameter.
  """
  config = manager.describe(step).config
  model = config.model
  tokenizer = manager.load_tokenizer(step)
  family = families.of_model(model)
  theirs = _exported_config(family, config, tokenizer)
  leaves = flatten(adapters.merge(manager.restore(step, "params"), model.lora_alpha))
  leaves = {path: leaf for path, leaf in leaves.items() if not re.search(family.dropped, path)}
  exportable = {path for tensor in family.tensors for path in tensor.ours}
  if unknown := sorted(set(leaves) - exportable):
    raise UserError(f"{step}: transformers has no place for {', '.join(unknown)}")
  save(folder / WEIGHTS, lambda: tensors.from_params(family, leaves, model))
  (folder / "config.json").write_text(json.dumps(theirs, indent=2))
  template = chat.template_of(base.build(config.objective), tokenizer)
  entries = {"chat_template": template} if template else {}
  export_tokenizer.write(
    tokenizer, folder, model.max_length, as_definition=family.tokenizer_json, **entries
  )


def _exported_config(
  family: Family, config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  """The content of config.json."""
  theirs = family.config(config.model) | {
    "architectures": [_architecture(family, config.objective)],
    "dtype": "float32",
  }
  ids = {name: tokenizer.id_of(ours) for name, ours in family.special.items()}
  theirs |= {f"{name}_token_id": i for name, i in ids.items() if i >= 0}
  if config.objective["name"] == "classification":
    classes = config.objective["classes"] or ("LABEL_0",)
    theirs |= {
      "id2label": {str(i): c for i, c in enumerate(classes)},
      "label2id": {c: i for i, c in enumerate(classes)},
      "problem_type": "single_label_classification" if len(classes) > 1 else "regression",
    }
  return theirs


def _architecture(family: Family, objective: Mapping[str, Any]) -> str:
  """The class of transformers that has the head of an objective. Raises UserError without one."""
  kind = PAIRS if objective.get("next_sentence") else objective["name"]
  pooling = objective.get("pooling", "auto")
  if kind in family.classes and pooling in ("auto", "first"):
    return family.classes[kind]
  pooled = f" pooled by {pooling}" if "pooling" in objective else ""
  raise UserError(
    f"transformers has no class for {family.ours} with {kind}{pooled}; there is one for "
    f"{', '.join(family.classes)}"
  )


def to_peft(step: epath.Path, folder: pathlib.Path):
  """Writes the adapters and the head of a verified checkpoint in the layout of the `peft` package.

  They apply to the checkpoint from which the run was transferred. Raises UserError where the
  checkpoint has no adapters, or where transformers fuses the adapted layer with others.
  """
  config = manager.describe(step).config
  family = families.of_model(config.model)
  leaves = flatten(manager.restore(step, "params"))
  if not any(adapters.is_adapter(path) for path in leaves):
    raise UserError(f"{step} has no adapters: it was trained without config.model.lora_rank")
  arrays: dict[str, np.ndarray] = {}
  targets: set[str] = set()
  heads: set[str] = set()
  for tensor in family.tensors:
    if _is_adapted(tensor, leaves):
      pairs = _adapter_pairs(tensor, leaves, config.model.num_layers)
      targets |= pairs.keys()
      for name, (a, b) in pairs.items():
        arrays[f"base_model.model.{name}.lora_A.weight"] = a
        arrays[f"base_model.model.{name}.lora_B.weight"] = b
    elif tensor.ours[0].startswith("head/") and tensor.ours[0] in leaves:
      parts = [np.asarray(leaves[path]) for path in tensor.ours]
      heads.add(tensor.theirs.rpartition(".")[0])
      arrays[f"base_model.model.{tensor.theirs}"] = tensor.to_theirs(parts)
  save(folder / "adapter_model.safetensors", lambda: iter(arrays.items()))
  adapter_config = _adapter_config(config, targets, heads)
  (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2))


def _adapter_config(
  config: config_lib.Config, targets: set[str], heads: set[str]
) -> dict[str, Any]:
  """The content of adapter_config.json. targets, heads: modules of transformers."""
  return {
    "peft_type": "LORA",
    "r": config.model.lora_rank,
    "lora_alpha": config.model.lora_alpha,
    "bias": "none",
    "target_modules": sorted(targets),
    "lora_dropout": config.model.lora_dropout,
    "modules_to_save": sorted(heads) or None,
    "base_model_name_or_path": config.transfer.checkpoint,
  }


def _is_adapted(tensor: Tensor, leaves: Mapping[str, Any]) -> bool:
  return any(f"{path.removesuffix('kernel')}lora_a" in leaves for path in tensor.ours)


def _adapter_pairs(
  tensor: Tensor, leaves: Mapping[str, Any], num_layers: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Module of transformers -> (A of rank x inputs, B of outputs x rank), for every layer."""
  if len(tensor.ours) != 1:
    raise UserError(
      f"transformers keeps {', '.join(tensor.ours)} as one layer, and peft has no "
      "adapters for parts of a layer: export the merged checkpoint with `llm.convert to_hf`"
    )
  stem = tensor.ours[0].removesuffix("kernel")
  a_layers = np.asarray(leaves[f"{stem}lora_a"])
  b_layers = np.asarray(leaves[f"{stem}lora_b"])
  module = tensor.theirs.removesuffix(".weight")
  return {module.format(i): (a_layers[i].T, b_layers[i].T) for i in range(num_layers)}


def save(path: pathlib.Path, named_tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]):
  """Writes a safetensors file of float32, one tensor at a time.

  The package's own writer needs all tensors in memory. `named_tensors` is called twice: for the
  header and for the data.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in named_tensors():
    header[name] = {
      "dtype": "F32",
      "shape": tensor.shape,
      "data_offsets": (end, end + 4 * tensor.size),
    }
    end += 4 * tensor.size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in named_tensors():
      file.write(np.ascontiguousarray(tensor, "<f4").data)
