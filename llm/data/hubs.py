"""Data sets of TFDS and of the Hugging Face hub.

Classes come by their names, which know their numbers; a missing class is None. spec: the source as
the config names it. What a hub does not give raises UserError.
"""

from typing import Any, Iterator

from llm.core import UserError, first_line


class ClassName(str):
  """The name of a class. number: of the class in its data set, whose order has a meaning."""

  number: int


def _class_name(name: str, number: int) -> ClassName:
  named = ClassName(name)
  named.number = number
  return named


def _tfds_builder(name: str, spec: str) -> Any:
  """The data set's builder (`Any`: its annotations lack keywords)."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(name, file_format="array_record")
  except Exception as error:  # an unknown name, no network, a folder that cannot be read, ..
    raise UserError(f"{spec}: {first_line(error)}")


def tfds_version(name: str, spec: str) -> str:
  """The name of a data set of TFDS with its configuration and version."""
  return _tfds_builder(name, spec).info.full_name


def tfds_records(name: str, split: str, spec: str) -> Iterator[dict]:
  """The records of a data set of TFDS."""
  import tensorflow_datasets as tfds

  builder = _tfds_builder(name, spec)
  try:
    builder.download_and_prepare(file_format="array_record")
    data = builder.as_data_source(split=split)
  except Exception as error:
    raise UserError(f"{spec}: {first_line(error)}")
  classes = {
    key: feature
    for key, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  for number in range(len(data)):
    record = {key: _tfds_value(value, classes.get(key)) for key, value in data[number].items()}
    yield {**record, "_where": f"{spec} record {number}"}


def _tfds_value(value: Any, label: Any) -> Any:
  """A value of TFDS as Python's own type. label: the feature of a class, None for other values."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if label is not None:
    return _class_name(label.int2str(int(value)), int(value)) if value >= 0 else None
  if hasattr(value, "item") and value.ndim == 0:
    return value.item()
  return value


def _hf_dataset(name: str, split: str, spec: str) -> Any:
  try:
    import datasets  # pyright: ignore[reportMissingImports] (part of the extra hf)
  except ImportError:
    raise UserError(f"{spec} needs the extra hf: pip install -e '.[hf]'")
  path, _, config = name.partition(":")
  try:
    return datasets.load_dataset(path, config or None, split=split)
  except Exception as error:
    raise UserError(f"{spec}: {first_line(error)}")


def hf_fingerprint(name: str, split: str, spec: str) -> str:
  """A hash of the content of a data set of the hub."""
  return _hf_dataset(name, split, spec)._fingerprint


def hf_records(name: str, split: str, spec: str) -> Iterator[dict]:
  """The records of a data set of the hub, NAME or NAME:CONFIG."""
  data = _hf_dataset(name, split, spec)
  class_names = {
    key: feature.names for key, feature in data.features.items() if hasattr(feature, "names")
  }
  for number, record in enumerate(data):
    for key, names in class_names.items():
      if isinstance(record[key], int):
        label = record[key]
        record[key] = _class_name(names[label], label) if label >= 0 else None
    yield {**record, "_where": f"{spec} record {number}"}
