"""Checkpoints in the layout of `transformers` are read, without torch.

`read` turns a folder of config.json, *.safetensors and tokenizer files into parameters, a config
and a tokenizer. The tables in families/ say which tensor becomes which parameter. export.py is the
way back.
"""

import dataclasses
import pathlib
from typing import Any, Iterator, Mapping

import numpy as np
import safetensors

from llm import config as config_lib
from llm import reading
from llm.checkpoints import families, layout, manager, tensors
from llm.checkpoints.families.base import Family
from llm.checkpoints.tensors import TensorReader
from llm.config import ModelConfig
from llm.core import Params, UserError, first_line
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

MOST_PADDING = 1024  # rows of an embedding without a piece: Qwen3 has 267 of them


def is_layout(folder: pathlib.Path) -> bool:
  """Whether a folder holds a checkpoint of transformers: a config.json with a model_type."""
  return (folder / "config.json").is_file() and "model_type" in _json(folder / "config.json")


def _json(path: pathlib.Path) -> dict[str, Any]:
  return reading.read_json(path, dict[str, Any])


def fetch(name: str) -> pathlib.Path:
  """Downloads the checkpoint ORG/NAME into the hub's cache and returns its folder.

  Raises UserError where the download fails or the package huggingface_hub is missing.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(f"hf:{name} needs the package huggingface_hub: pip install -e '.[hf]'")
  patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # its network, name and cache errors have no common base
    raise UserError(f"hf:{name} cannot be fetched: {first_line(error)}")


class Weights:
  """The tensors of a folder by name, read one at a time as float32.

  Raises UserError on files that are missing, damaged, pickled or outside the folder.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._files: dict[str, str] = {}  # tensor -> file
    for file_name in sorted(self._file_names()):
      for tensor_name in self._open(file_name).keys():
        self._files[tensor_name] = file_name

  def _file_names(self) -> set[str]:
    if (self.folder / INDEX).is_file():
      return set(reading.read_json(self.folder / INDEX, layout.Index).weight_map.values())
    if (self.folder / WEIGHTS).is_file():
      return {WEIGHTS}
    message = f"{self.folder} has no {WEIGHTS}"
    pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
    if pickles:
      message += (
        f": {pickles[0]} is a pickle, and reading a pickle can run code; convert it on a machine "
        "where you trust it, with save_pretrained(..., safe_serialization=True)"
      )
    raise UserError(message)

  def _open(self, name: str) -> Any:
    if not name or pathlib.PurePath(name).name != name:
      raise UserError(f"{self.folder / INDEX}: the shard {name!r} must be in the same folder")
    path = self.folder / name
    if not path.is_file():
      raise UserError(f"{self.folder / INDEX} names {name}, which is not there")
    # The hub's cache links to its own folder of blobs. A link to any other folder is refused.
    roots = (self.folder.resolve(), self.folder.resolve().parent.parent / "blobs")
    if path.resolve().parent not in roots:
      raise UserError(f"{path} is a link to a file outside its folder")
    try:
      return safetensors.safe_open(path, framework="numpy")
    except Exception as error:  # SafetensorError, or MemoryError or OSError on a false header
      raise UserError(f"{path} is damaged or not a safetensors file: {first_line(error)}")

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __getitem__(self, name: str) -> np.ndarray:
    with self._open(self._files[name]) as file:
      return np.asarray(file.get_tensor(name), np.float32)


Converted = tuple[Params, config_lib.Config, tokenizer_lib.Tokenizer]


def read(folder: pathlib.Path, tokenizer_path: pathlib.Path | None = None) -> Converted:
  """Parameters, config and tokenizer of a checkpoint of transformers.

  tokenizer_path: a file or a folder, where the checkpoint itself comes without a tokenizer. Raises
  UserError where the conversion would not be exact.
  """
  if not is_layout(folder):
    raise UserError(
      f"{folder} is no folder of transformers: it has no config.json with a model_type"
    )
  theirs = _json(folder / "config.json")
  family = families.find(theirs)
  tokenizer = layout.read_tokenizer(tokenizer_path or folder, family.sentinels if family else 0)
  return assemble(theirs, tokenizer, Weights(folder))


def assemble(
  theirs: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer, weights: TensorReader
) -> Converted:
  """Parameters, config and tokenizer from what stands in a checkpoint of transformers.

  theirs: config.json. weights: the tensors by name. Raises UserError where the conversion would not
  be exact.
  """
  folder = weights.folder
  family = families.find(theirs)
  if family is None:
    raise UserError(
      f"{folder}: model_type {theirs.get('model_type')!r} is not supported; supported: "
      f"{', '.join(families.MODEL_TYPES)}"
    )
  model = _model_config(family, theirs, tokenizer.vocab_size, set(weights))
  if tokenizer.vocab_size != model.vocab_size:
    raise UserError(
      f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces, but the embedding has "
      f"{model.vocab_size} rows"
    )
  objective = _objective(family, set(weights), theirs)
  wanted = base.shapes(objective, model)
  if family.kept:
    pretraining = base.shapes(base.build({"name": "masked_lm"}), model)
    wanted |= {path: pretraining[path] for path in family.kept}
  params = tensors.to_params(family, weights, wanted, model)
  config = config_lib.freeze(config_lib.defaults(base.to_mapping(objective)))
  training = dataclasses.replace(
    config.training, sequence_length=min(config.training.sequence_length, model.max_length)
  )
  return params, dataclasses.replace(config, model=model, training=training), tokenizer


def _model_config(
  family: Family, theirs: Mapping[str, Any], num_pieces: int, names: set[str]
) -> ModelConfig:
  """The model of a config.json, corrected by the size of the tokenizer and the tensors' names."""
  model = family.model(theirs)
  if family.padded and 0 <= model.vocab_size - num_pieces < MOST_PADDING:
    model = dataclasses.replace(model, vocab_size=num_pieces)
  if family.tied_unscaled and not model.tied and "lm_head.weight" not in names:
    model = dataclasses.replace(model, tied=True, scaled_output=False)
  return model


def _objective(family: Family, names: set[str], config: Mapping[str, Any]) -> base.Objective:
  """The objective that the heads of a checkpoint serve.

  names: of its tensors. config: its config.json.
  """
  if "classifier.weight" in names:
    _expect_classes_of_texts(config)
    given = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    labels = reading.shaped(given, dict[int, str], "config.json: id2label")
    classes = tuple(labels[number] for number in sorted(labels))
    regression = len(classes) == 1
    return base.build(
      {
        "name": "classification",
        "num_classes": len(classes),
        "classes": () if regression else classes,
      }
    )
  if "qa_outputs.weight" in names:
    return base.build({"name": "span_qa"})
  pretraining = next(iter(family.classes)).partition(" ")[0]
  if pretraining != "masked_lm":
    return base.build({"name": pretraining})
  pairs = any("seq_relationship" in name for name in names)
  return base.build({"name": "masked_lm", "next_sentence": pairs})


def _expect_classes_of_texts(config: Mapping[str, Any]):
  """Raises UserError where a classifier is not one of texts, into classes that exclude another."""
  if config.get("problem_type") == "multi_label_classification":
    raise UserError("config.json: problem_type='multi_label_classification' is not supported")
  kinds = reading.shaped(config.get("architectures") or [], list[str], "config.json: architectures")
  if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
    raise UserError(
      f"config.json: architectures={kinds} has a classifier that is not of texts: only "
      "..ForSequenceClassification is supported"
    )


def write(
  params: Params,
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  workdir: pathlib.Path,
  source: str,
):
  """Writes parameters as step 0 of a new workdir, without an optimizer state.

  source: where they come from, for the description of the checkpoint.
  """
  writer = manager.Manager(workdir, keep=1, tokenizer=tokenizer)
  writer.save(0, params, None, {"config": config_lib.thaw(config), "metrics": {}, "source": source})
  writer.close()
