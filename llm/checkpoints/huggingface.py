"""Checkpoints in the layout of `transformers`, in and out, without torch.

A folder of config.json, *.safetensors and tokenizer files becomes a checkpoint of ours, or is made from
one; what goes where stands in families.py.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any, Callable, Iterator, Mapping

import jax
import numpy as np
import safetensors
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from llm import config as config_lib
from llm.checkpoints import adapters, families, manager, vocabulary
from llm.checkpoints.families import Family
from llm.config import ModelConfig
from llm.core import STACKED, Params, UserError, first_line, flatten, unflatten
from llm.data import tokenizer as tokenizer_lib
from llm.models.architecture import padded_vocab
from llm.objectives import base, chat

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

MOST_PADDING = 1024  # rows of an embedding without a piece: Qwen3 has 267 of them


def is_layout(folder: pathlib.Path) -> bool:
  """Whether a folder is one of transformers: its config.json says what model it is."""
  return (folder / "config.json").is_file() and "model_type" in _json(folder / "config.json")


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}")
  if not isinstance(found, dict):
    raise UserError(f"{path} must hold an object")
  return found


def fetch(name: str) -> pathlib.Path:
  """A checkpoint of the hub, ORG/NAME, in the hub's own cache. Raises UserError without network."""
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(f"hf:{name} needs the package huggingface_hub: pip install -e '.[hf]'")
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
      )
    )
  except Exception as error:  # its network, name and cache errors have no common base
    raise UserError(f"hf:{name} cannot be fetched: {first_line(error)}")


class Weights:
  """The tensors of a folder by name, read one at a time. Raises UserError on what is damaged or unsafe."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self._files = folder, {}
    if (folder / INDEX).is_file():
      where = _json(folder / INDEX).get("weight_map")
      if not isinstance(where, dict):
        raise UserError(f"{folder / INDEX} has no weight_map")
      names = set(where.values())
    elif (folder / WEIGHTS).is_file():
      names = {WEIGHTS}
    else:
      pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
      )
      raise UserError(
        f"{folder} has no {WEIGHTS}"
        + (
          f": {pickles[0]} is a pickle, which can run code when it is read; convert it where you trust it, "
          "with save_pretrained(..., safe_serialization=True)"
          if pickles
          else ""
        )
      )
    for name in sorted(names):
      for key in self._open(name).keys():
        self._files[key] = name

  def _open(self, name):
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise UserError(
        f"{self.folder / INDEX}: the shard {name!r} must be a file of the same folder"
      )
    path = self.folder / name
    if not path.is_file():
      raise UserError(f"{self.folder / INDEX} names {name}, which is not there")
    # The hub's cache links to its own folder of blobs; a link to anywhere else is refused.
    roots = (self.folder.resolve(), self.folder.resolve().parent.parent / "blobs")
    if path.resolve().parent not in roots:
      raise UserError(f"{path} is a link to a file outside its folder")
    try:
      return safetensors.safe_open(path, framework="numpy")
    except Exception as error:  # SafetensorError, and MemoryError or OSError on a lying header
      raise UserError(f"{path} is damaged or no safetensors file: {first_line(error)}")

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __getitem__(self, name: str) -> np.ndarray:
    with self._open(self._files[name]) as file:
      return np.asarray(file.get_tensor(name), np.float32)


def shapes(model: ModelConfig, objective: base.Objective) -> dict[str, tuple[int, ...]]:
  """path -> shape of every parameter of a model with the head of an objective."""
  model = dataclasses.replace(model, dtype="float32", scan="unroll", attention="reference")
  spec = objective.batch_spec(model, min(8, model.max_length))
  row = {name: np.zeros((1, *array.shape), array.dtype) for name, array in spec.items()}
  network = objective.model(model)
  tree = jax.eval_shape(lambda: network.init(jax.random.key(0), row, train=False)["params"])
  return {path: leaf.shape for path, leaf in flatten(tree).items()}


def _objective(family: Family, names: set[str], config: Mapping[str, Any]) -> base.Objective:
  """What the checkpoint was made for, by the heads that it has."""
  if "classifier.weight" in names:
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    classes = tuple(labels[key] for key in sorted(labels, key=int))
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
  family: Family, weights: Weights, wanted: dict[str, tuple[int, ...]], model: ModelConfig
) -> Params:
  """Our parameters, layers stacked and the vocabulary padded."""
  theirs = {families.full_name(family, name): name for name in weights}
  for name, original in list(theirs.items()):
    if re.search(family.buffers, name):
      del theirs[name]
    elif (
      name in family.tied
      and family.tied[name] in theirs
      and (model.tied or name != "lm_head.weight")
    ):
      if not np.array_equal(weights[original], weights[theirs[family.tied[name]]]):
        raise UserError(
          f"{original} is not tied to {family.tied[name]}: untied output layers are not supported"
        )
      del theirs[name]
  leaves = {}
  for tensor in family.tensors:
    if not all(path in wanted for path in tensor.ours):
      continue
    stacked = STACKED in tensor.ours[0]
    numbers = range(tensor.first, model.num_layers) if stacked else range(1)
    found = [theirs.pop(tensor.theirs.format(i), None) for i in numbers]
    if None in found:
      if tensor.ours[0].startswith("head/"):
        continue  # a checkpoint without this head; transfer says what then stays fresh
      missing = tensor.theirs.format(numbers[found.index(None)])
      raise UserError(f"{weights.folder}: the tensor {missing} is missing")
    one = [wanted[path][1:] if stacked else wanted[path] for path in tensor.ours]
    layers = [[np.ones(shape, np.float32) for shape in one]] * tensor.first
    layers += [_parts(family, tensor, weights, name, one, model) for name in found]
    for path, parts in zip(tensor.ours, zip(*layers)):
      leaves[path] = np.stack(parts) if stacked else parts[0]
  if theirs:
    raise UserError(
      f"{weights.folder}: no place for {', '.join(sorted(theirs.values())[:4])}"
      + (f" and {len(theirs) - 4} more tensors" if len(theirs) > 4 else "")
    )
  return unflatten(leaves)


def _parts(
  family: Family, tensor: families.Tensor, weights: Weights, name: str, one, model: ModelConfig
) -> list[np.ndarray]:
  found = weights[name]
  if tensor.ours[0] in vocabulary.PATHS:
    rows = padded_vocab(model.vocab_size)
    if family.padded:
      found = found[:rows]
    if len(found) == model.vocab_size:
      found = np.pad(found, [(0, rows - len(found))] + [(0, 0)] * (found.ndim - 1))
  try:
    return tensor.to_ours(found, one)
  except ValueError:
    raise UserError(
      f"{weights.folder}: {name} has shape {found.shape}, which does not fit config.json"
    )


def read_tokenizer(folder: pathlib.Path) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a folder, and its chat template if it has one."""
  path = folder / "tokenizer_config.json"
  said = _json(path) if path.is_file() else {}
  made, template, alone = (
    _pieces(folder, said),
    said.get("chat_template", ""),
    folder / "chat_template.jinja",
  )
  if isinstance(template, list):  # several by name
    template = next((t["template"] for t in template if t.get("name") == "default"), "")
  made.template = alone.read_text(encoding="utf-8") if alone.is_file() else template
  return made


def _pieces(folder: pathlib.Path, said: Mapping[str, Any]) -> tokenizer_lib.Tokenizer:
  """Of tokenizer.json, vocab.txt, vocab.json with merges.txt, or spiece.model; said: tokenizer_config.json."""
  has = lambda *names: all((folder / name).is_file() for name in names)
  if has("tokenizer.json"):
    tokens = {name: said.get(f"{name}_token") for name in (*tokenizer_lib.SPECIAL, "bos")}
    special = {
      name: token["content"] if isinstance(token, dict) else token
      for name, token in tokens.items()
      if token
    }
    return tokenizer_lib.HuggingFaceTokenizer(
      (folder / "tokenizer.json").read_bytes(), special=special
    )
  if has("vocab.txt"):
    return tokenizer_lib.WordPieceTokenizer(
      (folder / "vocab.txt").read_bytes(), said.get("do_lower_case", True)
    )
  if has("vocab.json", "merges.txt"):
    fast = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    fast.add_special_tokens([t for t in ("<|endoftext|>",) if fast.token_to_id(t) is not None])
    return tokenizer_lib.HuggingFaceTokenizer(fast.to_str().encode())
  if has("spiece.model"):
    family = families.find(_json(folder / "config.json"))
    extra = said.get("extra_ids", family.sentinels if family else 0)
    return tokenizer_lib.SentencePieceTokenizer((folder / "spiece.model").read_bytes(), extra=extra)
  raise UserError(
    f"{folder} has no tokenizer: tokenizer.json, vocab.txt, vocab.json with merges.txt, or spiece.model"
  )


Converted = tuple[Params, config_lib.Config, tokenizer_lib.Tokenizer]


def read(folder: pathlib.Path) -> Converted:
  """A folder of transformers, ours. Raises UserError on what cannot be exact."""
  if not is_layout(folder):
    raise UserError(
      f"{folder} is no folder of transformers: it has no config.json with a model_type"
    )
  return assemble(_json(folder / "config.json"), read_tokenizer(folder), Weights(folder))


def assemble(theirs: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer, weights) -> Converted:
  """Their config, tensors by name (with the `folder` they came from) and tokenizer, ours."""
  folder = weights.folder
  family = families.find(theirs)
  if family is None:
    raise UserError(
      f"{folder}: model_type {theirs.get('model_type')!r} is not supported; supported: "
      f"{', '.join(families.MODEL_TYPES)}"
    )
  model = family.model(theirs)
  if family.padded and 0 <= model.vocab_size - tokenizer.vocab_size < MOST_PADDING:
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
  if family.tied_unscaled and not model.tied and "lm_head.weight" not in set(weights):
    model = dataclasses.replace(model, tied=True, scaled_output=False)
  if tokenizer.vocab_size != model.vocab_size:
    raise UserError(
      f"{folder}: the tokenizer has {tokenizer.vocab_size} pieces and the embedding {model.vocab_size} rows"
    )
  objective = _objective(family, set(weights), theirs)
  wanted = shapes(model, objective)
  if family.kept:
    pretraining = shapes(model, base.build({"name": "masked_lm"}))
    wanted |= {path: pretraining[path] for path in family.kept}
  params = _stack(family, weights, wanted, model)
  config = config_lib.freeze(config_lib.defaults(base.to_mapping(objective)))
  training = dataclasses.replace(
    config.training, sequence_length=min(config.training.sequence_length, model.max_length)
  )
  return params, dataclasses.replace(config, model=model, training=training), tokenizer


def write(
  params: Params,
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  workdir: pathlib.Path,
  source: str,
):
  """A checkpoint of ours with parameters alone."""
  writer = manager.Manager(workdir, keep=1, keep_best="", tokenizer=tokenizer)
  writer.save(0, params, None, {"config": config_lib.thaw(config), "metrics": {}, "source": source})
  writer.close()


def _architecture(family: Family, objective: Mapping[str, Any]) -> str:
  """Their class with the head of an objective."""
  kind = families.PAIRS if objective.get("next_sentence") else objective["name"]
  pooling = objective.get("pooling", "auto")
  if kind in family.classes and pooling in ("auto", "first"):
    return family.classes[kind]
  pooled = f" pooled by {pooling}" if "pooling" in objective else ""
  raise UserError(
    f"transformers has no class for {family.ours} with {kind}{pooled}; there is one for "
    f"{', '.join(family.classes)}"
  )


def export(step: pathlib.Path, folder: pathlib.Path):
  """Writes a verified checkpoint as a folder that `from_pretrained` loads, adapters merged. Raises
  UserError where transformers has no such class."""
  config = config_lib.freeze(manager.describe(step)["config"])
  model, tokenizer = config.model, manager.load_tokenizer(step)
  family = families.of_model(model)
  theirs = family.config(model) | {
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
  leaves = flatten(adapters.merge(manager.restore(step, "params"), model.lora_alpha))
  held = {path for tensor in family.tensors for path in tensor.ours}
  if strange := sorted(set(leaves) - held):
    raise UserError(f"{step}: transformers has no place for {', '.join(strange)}")
  _save(folder / WEIGHTS, lambda: _tensors(family, leaves, model))
  (folder / "config.json").write_text(json.dumps(theirs, indent=2))
  template = chat.template_of(base.build(config.objective), tokenizer)
  more = {"chat_template": template} if template else {}
  write_tokenizer(tokenizer, folder, model.max_length, as_definition=family.tokenizer_json, **more)


def export_adapters(step: pathlib.Path, folder: pathlib.Path):
  """Writes the adapters of a verified checkpoint, and its head, alone, in the layout of the `peft` package.

  They stand beside the checkpoint that the run was transferred from. Raises UserError where there are none, or
  theirs is a fused layer.
  """
  config = config_lib.freeze(manager.describe(step)["config"])
  family, leaves = families.of_model(config.model), flatten(manager.restore(step, "params"))
  if not any(adapters.is_adapter(path) for path in leaves):
    raise UserError(f"{step} has no adapters: it was trained without config.model.lora_rank")
  made, targets, heads = {}, set(), set()
  for tensor in family.tensors:
    stem = [path.removesuffix("kernel") for path in tensor.ours]
    if any(f"{s}lora_a" in leaves for s in stem):
      if len(stem) > 1:
        raise UserError(
          f"transformers keeps {', '.join(tensor.ours)} as one layer, to which peft knows no separate adapters: "
          "export the merged checkpoint with `llm.convert to_hf`"
        )
      a, b = (np.asarray(leaves[f"{stem[0]}lora_{x}"]) for x in "ab")
      for layer in range(config.model.num_layers):
        name = tensor.theirs.removesuffix(".weight").format(layer)
        targets.add(name)
        made |= {
          f"base_model.model.{name}.lora_A.weight": a[layer].T,
          f"base_model.model.{name}.lora_B.weight": b[layer].T,
        }
    elif tensor.ours[0].startswith("head/") and tensor.ours[0] in leaves:
      heads.add(tensor.theirs.rpartition(".")[0])
      made[f"base_model.model.{tensor.theirs}"] = tensor.to_theirs(
        [np.asarray(leaves[path]) for path in tensor.ours]
      )
  _save(folder / "adapter_model.safetensors", lambda: iter(made.items()))
  (folder / "adapter_config.json").write_text(
    json.dumps(
      {
        "peft_type": "LORA",
        "r": config.model.lora_rank,
        "lora_alpha": config.model.lora_alpha,
        "bias": "none",
        "target_modules": sorted(targets),
        "lora_dropout": config.model.lora_dropout,
        "modules_to_save": sorted(heads) or None,
        "base_model_name_or_path": config.transfer.checkpoint,
      },
      indent=2,
    )
  )


def _tensors(
  family: Family, leaves: Mapping[str, np.ndarray], model: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Their tensors by name, made one at a time."""
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
  """A safetensors file of float32, tensor by tensor: the package's own writer wants all of them at once."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
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
  """tokenizer.json of a SentencePiece unigram model: the same pieces, scores and normalisation. Raises UserError."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files[tokenizer.FILE])
  if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
    raise UserError("only unigram models of SentencePiece can be written as tokenizer.json")
  pieces = [(p.piece, p.score) for p in proto.pieces]
  in_bytes = proto.trainer_spec.byte_fallback
  fast = tokenizers.Tokenizer(
    tokenizers.models.Unigram(pieces, unk_id=tokenizer.unk, byte_fallback=in_bytes)
  )
  charsmap = proto.normalizer_spec.precompiled_charsmap
  normalizers = tokenizers.normalizers
  # Line breaks that are pieces of their own pass the normalisation as a private-use character, which is in no text.
  own = any(p.piece == "\n" for p in proto.pieces)
  hide, show = (
    [normalizers.Replace(a, b)] if own else [] for a, b in (("\n", "\ue001"), ("\ue001", "\n"))
  )
  fast.normalizer = normalizers.Sequence(
    [
      *hide,
      *([normalizers.Precompiled(charsmap)] if charsmap else []),
      normalizers.Strip(),
      normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
      *show,
    ]
  )
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  decoders = tokenizers.decoders
  spell = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ]
  fast.decoder = (
    decoders.Sequence(spell) if in_bytes else decoders.Metaspace(prepend_scheme="always")
  )
  fast.add_special_tokens([tokenizer.pieces[i] for i in tokenizer.special_ids])
  return fast.to_str().encode()


def write_tokenizer(
  tokenizer: tokenizer_lib.Tokenizer,
  folder: pathlib.Path,
  max_length: int,
  *,
  as_definition: bool = False,
  **more: str,
):
  """The tokenizer's files, as AutoTokenizer reads them.

  as_definition: a WordPiece vocabulary becomes a tokenizer.json. more: other keys of
  tokenizer_config.json.
  """
  files, kind = (
    tokenizer.files,
    {"wordpiece": "BertTokenizer"}.get(tokenizer.name, "PreTrainedTokenizerFast"),
  )
  if tokenizer.name == "sentencepiece":
    kind = (
      "T5Tokenizer" if tokenizer.pieces[0] == "<pad>" else kind
    )  # theirs knows T5's own special pieces alone
    files = files if kind == "T5Tokenizer" else {"tokenizer.json": unigram_definition(tokenizer)}
  elif as_definition and tokenizer.name == "wordpiece":
    files, kind = {"tokenizer.json": tokenizer.definition()}, "PreTrainedTokenizerFast"
  for name, data in files.items():
    (folder / name).write_bytes(data)
  special = {
    f"{name}_token": tokenizer.pieces[getattr(tokenizer, name)]
    for name in ("pad", "unk", "cls", "sep", "mask", "eos")
    if getattr(tokenizer, name) >= 0
  }
  special |= {"extra_ids": tokenizer.extra} if tokenizer.extra else {}
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": kind,
        "do_lower_case": tokenizer.lowercase,
        "model_max_length": max_length,
        **special,
        **more,
      },
      indent=2,
    )
  )
