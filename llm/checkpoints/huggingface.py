"""Checkpoints in the layout of `transformers`: import and export, without torch.

`read` turns a folder of config.json, *.safetensors and tokenizer files into parameters, a config
and a tokenizer. `export` writes such a folder from a checkpoint. The tables in families/ say
which tensor becomes which parameter.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any, Callable, Iterator, Mapping, Protocol

import numpy as np
import safetensors
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from llm import config as config_lib
from llm import reading
from llm.checkpoints import adapters, families, layout, manager, vocabulary
from llm.checkpoints.families.base import PAIRS, Family, Tensor
from llm.config import ModelConfig
from llm.core import STACKED, Params, UserError, first_line, flatten, unflatten
from llm.data import tokenizer as tokenizer_lib
from llm.models.architecture import padded_vocab
from llm.objectives import base, chat

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

MOST_PADDING = 1024  # rows of an embedding without a piece: Qwen3 has 267 of them

SENTENCEPIECE_PROTOS: Any = sentencepiece_model_pb2  # protobuf adds its classes at import


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


class TensorReader(Protocol):
  """Tensors by name, read one at a time, and the path that errors name."""

  @property
  def folder(self) -> pathlib.Path: ...

  def __iter__(self) -> Iterator[str]: ...

  def __getitem__(self, name: str) -> np.ndarray: ...


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


def _objective(family: Family, names: set[str], config: Mapping[str, Any]) -> base.Objective:
  """The objective that the heads of a checkpoint serve.

  names: of its tensors. config: its config.json.
  """
  if "classifier.weight" in names:
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


def _stack(
  family: Family, weights: TensorReader, wanted: dict[str, tuple[int, ...]], model: ModelConfig
) -> Params:
  """The parameters of a checkpoint of transformers: layers stacked, the vocabulary padded.

  wanted: path -> shape of the parameters to fill. Raises UserError on a tensor that is missing,
  has another shape, has no place here, or is not the copy that the family says it is.
  """
  unread = _names_to_read(family, weights, model)
  leaves = {}
  for tensor in family.tensors:
    if all(path in wanted for path in tensor.ours):
      leaves |= _read_leaves(family, tensor, weights, unread, wanted, model)
  if unread:
    message = f"{weights.folder}: no place for {', '.join(sorted(unread.values())[:4])}"
    if len(unread) > 4:
      message += f" and {len(unread) - 4} more tensors"
    raise UserError(message)
  return unflatten(leaves)


def _names_to_read(family: Family, weights: TensorReader, model: ModelConfig) -> dict[str, str]:
  """Name in the family's table -> name in the file, without buffers and tied copies.

  Raises UserError where a tied tensor differs from what it copies.
  """
  names = {families.full_name(family, name): name for name in weights}
  for name, file_name in list(names.items()):
    if re.search(family.buffers, name):
      del names[name]
      continue
    source = family.tied.get(name)
    if source not in names or (name == "lm_head.weight" and not model.tied):
      continue
    if not np.array_equal(weights[file_name], weights[names[source]]):
      raise UserError(f"{file_name} differs from {source}: for this model_type they must be tied")
    del names[name]
  return names


def _read_leaves(
  family: Family,
  tensor: Tensor,
  weights: TensorReader,
  unread: dict[str, str],
  wanted: dict[str, tuple[int, ...]],
  model: ModelConfig,
) -> dict[str, np.ndarray]:
  """path -> array of one entry of the table. Removes what it reads from `unread`."""
  stacked = STACKED in tensor.ours[0]
  file_names = []
  for number in range(tensor.first, model.num_layers) if stacked else range(1):
    name = tensor.theirs.format(number)
    if name not in unread:
      if tensor.ours[0].startswith("head/"):
        return {}  # the checkpoint has no such head; the transfer reports what stays fresh
      raise UserError(f"{weights.folder}: the tensor {name} is missing")
    file_names.append(unread.pop(name))
  layer_shapes = [wanted[path][1:] if stacked else wanted[path] for path in tensor.ours]
  layers = []
  if tensor.first:
    layers = [[np.ones(shape, np.float32) for shape in layer_shapes]] * tensor.first
  layers += [_parts(family, tensor, weights, name, layer_shapes, model) for name in file_names]
  leaves = {}
  for path, parts in zip(tensor.ours, zip(*layers)):
    leaves[path] = np.stack(parts) if stacked else parts[0]
  return leaves


def _parts(
  family: Family,
  tensor: Tensor,
  weights: TensorReader,
  name: str,
  layer_shapes: list[tuple[int, ...]],
  model: ModelConfig,
) -> list[np.ndarray]:
  """The arrays of one layer, one for every path of `tensor`."""
  array = weights[name]
  if tensor.ours[0] in vocabulary.PATHS:
    rows = padded_vocab(model.vocab_size)
    if family.padded:
      array = array[:rows]
    if len(array) == model.vocab_size:
      array = np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
  try:
    return tensor.to_ours(array, layer_shapes)
  except ValueError:
    raise UserError(
      f"{weights.folder}: {name} has shape {array.shape}, which does not fit config.json"
    )


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
  params = _stack(family, weights, wanted, model)
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


def export(step: epath.Path, folder: pathlib.Path):
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
  _save(folder / WEIGHTS, lambda: _tensors(family, leaves, model))
  (folder / "config.json").write_text(json.dumps(theirs, indent=2))
  template = chat.template_of(base.build(config.objective), tokenizer)
  entries = {"chat_template": template} if template else {}
  write_tokenizer(
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


def export_adapters(step: epath.Path, folder: pathlib.Path):
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
  _save(folder / "adapter_model.safetensors", lambda: iter(arrays.items()))
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


def _tensors(
  family: Family, leaves: Mapping[str, np.ndarray], model: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Names and tensors of transformers, converted one at a time."""
  for tensor in family.tensors:
    if any(path not in leaves for path in tensor.ours):
      continue
    parts = [np.asarray(leaves[path]) for path in tensor.ours]
    if tensor.ours[0] in vocabulary.PATHS:
      parts = [parts[0] if family.padded else parts[0][: model.vocab_size]]
    if STACKED in tensor.ours[0]:
      for layer in range(tensor.first, model.num_layers):
        yield tensor.theirs.format(layer), tensor.to_theirs([part[layer] for part in parts])
    else:
      yield tensor.theirs, tensor.to_theirs(parts)


def _save(path: pathlib.Path, tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]):
  """Writes a safetensors file of float32, one tensor at a time.

  The package's own writer needs all tensors in memory. `tensors` is called twice: for the header
  and for the data.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors():
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
    for _, tensor in tensors():
      file.write(np.ascontiguousarray(tensor, "<f4").data)


def unigram_definition(tokenizer: tokenizer_lib.SentencePieceTokenizer) -> bytes:
  """tokenizer.json of a SentencePiece unigram model: the same pieces, scores and normalisation.

  Raises UserError where the model is not a unigram model.
  """
  proto = SENTENCEPIECE_PROTOS.ModelProto.FromString(tokenizer.files[tokenizer.FILE])
  if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
    raise UserError("only unigram models of SentencePiece can be written as tokenizer.json")
  pieces = [(p.piece, p.score) for p in proto.pieces]
  byte_fallback = proto.trainer_spec.byte_fallback
  fast = tokenizers.Tokenizer(
    tokenizers.models.Unigram(pieces, unk_id=tokenizer.unk, byte_fallback=byte_fallback)
  )
  fast.normalizer = _unigram_normalizer(proto)
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  fast.decoder = _unigram_decoder(byte_fallback)
  fast.add_special_tokens([tokenizer.pieces[i] for i in tokenizer.special_ids])
  return fast.to_str().encode()


def _unigram_normalizer(proto: Any) -> Any:
  """The normalisation of a SentencePiece model.

  Where the line break is a piece, a private-use character carries it through the normalisation.
  No text has that character.
  """
  normalizers = tokenizers.normalizers
  line_break_is_piece = any(p.piece == "\n" for p in proto.pieces)
  steps = []
  if line_break_is_piece:
    steps.append(normalizers.Replace("\n", "\ue001"))
  if charsmap := proto.normalizer_spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(charsmap))
  steps.append(normalizers.Strip())
  steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
  if line_break_is_piece:
    steps.append(normalizers.Replace("\ue001", "\n"))
  return normalizers.Sequence(steps)


def _unigram_decoder(byte_fallback: bool) -> Any:
  decoders = tokenizers.decoders
  if not byte_fallback:
    return decoders.Metaspace(prepend_scheme="always")
  return decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )


def write_tokenizer(
  tokenizer: tokenizer_lib.Tokenizer,
  folder: pathlib.Path,
  max_length: int,
  *,
  as_definition: bool = False,
  **entries: str,
):
  """Writes the tokenizer's files as AutoTokenizer reads them.

  as_definition: writes a WordPiece vocabulary as tokenizer.json. entries: additional keys of
  tokenizer_config.json.
  """
  tokenizer_class, files = _tokenizer_files(tokenizer, as_definition)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  special: dict[str, Any] = {
    f"{name}_token": tokenizer.pieces[getattr(tokenizer, name)]
    for name in ("pad", "unk", "cls", "sep", "mask", "eos")
    if getattr(tokenizer, name) >= 0
  }
  if tokenizer.extra:
    special["extra_ids"] = tokenizer.extra
  settings = {
    "tokenizer_class": tokenizer_class,
    "do_lower_case": tokenizer.lowercase,
    "model_max_length": max_length,
    **special,
    **entries,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _tokenizer_files(
  tokenizer: tokenizer_lib.Tokenizer, as_definition: bool
) -> tuple[str, Mapping[str, bytes]]:
  """The class of transformers that reads a tokenizer, and its files by name."""
  if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer):
    # T5Tokenizer supports no special pieces but those of T5, whose first piece is <pad>.
    if tokenizer.pieces[0] == "<pad>":
      return "T5Tokenizer", tokenizer.files
    return "PreTrainedTokenizerFast", {"tokenizer.json": unigram_definition(tokenizer)}
  if isinstance(tokenizer, tokenizer_lib.WordPieceTokenizer):
    if as_definition:
      return "PreTrainedTokenizerFast", {"tokenizer.json": tokenizer.definition()}
    return "BertTokenizer", tokenizer.files
  if isinstance(tokenizer, tokenizer_lib.ByteTokenizer):
    return "PreTrainedTokenizerFast", {"tokenizer.json": tokenizer.definition()}
  return "PreTrainedTokenizerFast", tokenizer.files
