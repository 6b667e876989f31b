"""A training batch in words."""

import numpy as np

from llm.data.tokenizer import Tokenizer
from llm.objectives import base


def _decoded(tokenizer: Tokenizer, ids: np.ndarray) -> str:
  return _joined([tokenizer.shown(int(token)) for token in ids], tokenizer)


def _joined(pieces: list[str], tokenizer: Tokenizer) -> str:
  """Pieces with spaces between them, but for single characters."""
  return ("" if tokenizer.name == "bytes" else " ").join(pieces)


def _masked_targets(row: dict) -> dict[int, int]:
  """Position -> the token that a mask hides there."""
  if "masked_positions" not in row:
    return {}
  slots = zip(row["masked_positions"], row["masked_targets"], row["masked_weights"])
  return {int(position): int(target) for position, target, weight in slots if weight}


def _document_lines(row: dict, tokenizer: Tokenizer, masked: dict[int, int]) -> list[str]:
  """The pieces of each document, and the targets that bear loss."""
  segments = row["segments"]
  lines = []
  for segment in range(1, segments.max() + 1):
    places = np.flatnonzero(segments == segment).tolist()
    pieces = []
    for place in places:
      piece = tokenizer.shown(int(row["tokens"][place]))
      if place in masked:
        piece = f"<{tokenizer.shown(masked[place])} => {piece}>"
      pieces.append(piece)
    first, last = row["positions"][places[0]], row["positions"][places[-1]]
    lines.append(f"  document {segment}, positions {first}..{last}: {_joined(pieces, tokenizer)}")
    if "targets" in row:
      # An encoder-decoder has its targets in a row of their own.
      target_places = np.flatnonzero(row.get("decoder_segments", segments) == segment)
      with_loss = target_places[row["weights"][target_places] > 0]
      targets = _decoded(tokenizer, row["targets"][with_loss])
      lines.append(f"    targets (bear loss): {targets}")
  return lines


def _mask_line(row: dict, tokenizer: Tokenizer, masked: dict[int, int]) -> str:
  """How many of the predicted tokens are masked, kept or replaced."""
  counts = {"[MASK]": 0, "kept": 0, "random": 0}
  for position, target in masked.items():
    token = int(row["tokens"][position])
    if token == tokenizer.mask:
      counts["[MASK]"] += 1
    elif token == target:
      counts["kept"] += 1
    else:
      counts["random"] += 1
  kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
  return f"  loss at {len(masked)} positions: {kinds}; shown as <original => what the model sees>"


def _label_lines(row: dict, tokenizer: Tokenizer, objective: base.Objective) -> list[str]:
  """What is to be predicted of each document as a whole: whatever the objective has."""
  lines = []
  for number in np.flatnonzero(row.get("pair_weights", ())):
    in_document = row["segments"] == number + 1
    second = _decoded(tokenizer, row["tokens"][(row["types"] == 1) & in_document])
    truth = "true" if row["next_sentence"][number] else "another document"
    lines.append(f"  next sentence in document {number + 1}: {truth}; second part: {second}")
  for number in np.flatnonzero(row.get("window_weights", ())):
    answer = row["tokens"][row["starts"][number] : row["ends"][number] + 1]
    lines.append(f"  answer in document {number + 1}: {_decoded(tokenizer, answer)}")
  for number in np.flatnonzero(row.get("label_weights", ())):
    label = objective.label_name(row["labels"][number])
    lines.append(f"  label of document {number + 1}: {label}")
  return lines


def row(batch: dict, number: int, tokenizer: Tokenizer, objective: base.Objective) -> str:
  """Row `number` of a batch: its documents, its masks and its labels."""
  arrays = {name: values[number] for name, values in batch.items()}
  segments = arrays["segments"]
  used = int((segments > 0).sum())
  masked = _masked_targets(arrays)
  lines = [f"{used} of {len(segments)} positions used, {segments.max()} document(s)"]
  lines += _document_lines(arrays, tokenizer, masked)
  if masked:
    lines.append(_mask_line(arrays, tokenizer, masked))
  lines += _label_lines(arrays, tokenizer, objective)
  return "\n".join(lines)
