"""The steps between reading and tokenizing, each a dataclass whose fields are its thresholds.

`STEPS`, at the end of the file, lists them all. A step of one's own is a function, named in
config.steps as module:function. It takes a document of datatrove and returns True to keep it, or
False, or the reason why it is dropped. It may change `document.text`.
"""

import dataclasses
import functools
import importlib
import pathlib
from typing import Any, Callable

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
  C4QualityFilter,
  FineWebQualityFilter,
  GopherQualityFilter,
  GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter

from llm.config import key
from llm.core import UserError, first_line
from llm.corpus.accounts import Samples
from llm.corpus.decontamination import Decontaminate
from llm.corpus.duplicates import ExactDuplicates, LineDuplicates, NearDuplicates
from llm.corpus.extraction import EXTRACTORS, Extract
from llm.corpus.words import ENGLISH


@dataclasses.dataclass(frozen=True)
class Extraction:
  """Markup to main text."""

  # trafilatura or resiliparse for HTML, wikitext, or a function of one's own, as module:function.
  by: str = "trafilatura"
  # The most that one document may take.
  seconds: float = key(5.0, above=0)
  megabytes: int = key(1024, at_least=64)

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    function = EXTRACTORS.get(self.by) or imported(self.by, "config.extract.by", EXTRACTORS)
    return Extract(name, function, self.seconds, self.megabytes, dropped)


@dataclasses.dataclass(frozen=True)
class Language:
  """Keeps texts of these languages (ISO 639), where the model is this sure."""

  keep: tuple = ("en",)
  least: float = key(0.65, at_least=0, at_most=1)
  # A fastText model such as lid.176.bin; "": py3langid, whose model comes with its package.
  model: str = ""

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    if self.model and not pathlib.Path(self.model).is_file():
      raise UserError(f"config.language.model={self.model}: no such file, e.g. lid.176.bin")
    return LanguageFilter(self, dropped)


class LanguageFilter(BaseFilter):
  """Keeps the texts of some languages, and counts all of them."""

  name = "language"

  def __init__(self, language: Language, dropped: Any):
    super().__init__(dropped)
    self.language = language
    self._model: Any = None

  def filter(self, doc: Document) -> bool | tuple[bool, str]:
    if self._model is None:
      self._model = _language_model(self.language.model)
    name, score = self._model(doc.text)
    self.stat_update(f"language {name}")
    doc.metadata["language"] = name
    doc.metadata["language_score"] = round(score, 3)
    if name not in self.language.keep:
      return False, f"language_{name}"
    return (True, "") if score >= self.language.least else (False, "language_unsure")


def _language_model(path: str) -> Callable[[str], tuple[str, float]]:
  """A function from a text to its language and a score between 0 and 1."""
  if not path:
    from py3langid import langid

    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    return identifier.classify
  import fasttext

  try:
    model = fasttext.load_model(path)
  except ValueError as error:
    raise UserError(f"config.language.model={path}: {first_line(error)}")

  def classify(text: str) -> tuple[str, float]:
    labels: Any
    labels, scores = model.predict(text.replace("\n", " "))
    if not labels:  # it knows no part of the text
      return "unknown", 0.0
    return labels[0].removeprefix("__label__"), float(scores[0])

  return classify


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
  """Drops texts that repeat themselves (Rae et al. 2021, table A1)."""

  dup_line_frac: float = 0.3
  dup_para_frac: float = 0.3
  dup_line_char_frac: float = 0.2
  dup_para_char_frac: float = 0.2
  # Characters in the most frequent n-gram, and in all repeated ones, for n of 2 to 4 and 5 to 10.
  top_2_gram: float = 0.2
  top_3_gram: float = 0.18
  top_4_gram: float = 0.16
  dup_5_gram: float = 0.15
  dup_6_gram: float = 0.14
  dup_7_gram: float = 0.13
  dup_8_gram: float = 0.12
  dup_9_gram: float = 0.11
  dup_10_gram: float = 0.10

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    tops: Any = ((2, self.top_2_gram), (3, self.top_3_gram), (4, self.top_4_gram))
    duplicates: Any = tuple((n, getattr(self, f"dup_{n}_gram")) for n in range(5, 11))
    return GopherRepetitionFilter(
      dup_line_frac=self.dup_line_frac,
      dup_para_frac=self.dup_para_frac,
      dup_line_char_frac=self.dup_line_char_frac,
      dup_para_char_frac=self.dup_para_char_frac,
      top_n_grams=tops,
      dup_n_grams=duplicates,
      exclusion_writer=_writer(dropped),
      language=ENGLISH,
    )


@dataclasses.dataclass(frozen=True)
class GopherQuality:
  """Drops texts that are no prose (Rae et al. 2021, section A.1.1)."""

  min_doc_words: int = 50
  max_doc_words: int = 100_000
  min_avg_word_length: int = 3
  max_avg_word_length: int = 10
  max_symbol_word_ratio: float = 0.1
  max_bullet_lines_ratio: float = 0.9
  max_ellipsis_lines_ratio: float = 0.3
  max_non_alpha_words_ratio: float = 0.8
  # How many of these words occur at least: the, be, to, of, and, that, have, with.
  min_stop_words: int = 2

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    return GopherQualityFilter(
      **dataclasses.asdict(self), exclusion_writer=_writer(dropped), language=ENGLISH
    )


@dataclasses.dataclass(frozen=True)
class C4:
  """Drops lines that are no sentences, and texts of few (Raffel et al. 2020, section 2.2)."""

  remove_citations: bool = True
  # FineWeb leaves this one out: it drops most.
  filter_no_terminal_punct: bool = True
  min_num_sentences: int = 5
  min_words_per_line: int = 3
  max_word_length: int = 1000
  filter_lorem_ipsum: bool = True
  filter_javascript: bool = True
  filter_curly_bracket: bool = True
  filter_policy: bool = True

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    return C4QualityFilter(
      **dataclasses.asdict(self), exclusion_writer=_writer(dropped), language=ENGLISH
    )


@dataclasses.dataclass(frozen=True)
class FineWebQuality:
  """Drops lists and pages of short or repeated lines (Penedo et al. 2024, section 3.6)."""

  line_punct_thr: float = 0.12
  short_line_thr: float = 0.67
  short_line_length: int = 30
  char_duplicates_ratio: float = 0.01
  new_line_ratio: float = 0.3

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    return FineWebQualityFilter(
      **dataclasses.asdict(self), exclusion_writer=_writer(dropped), language=ENGLISH
    )


@dataclasses.dataclass(frozen=True)
class MaskPersonal:
  """Replaces addresses of mail, and public ones of the internet protocol, as FineWeb does."""

  emails: bool = True
  addresses: bool = True

  def block(self, name: str, dropped: Samples) -> PipelineStep:
    return PIIFormatter(
      remove_emails=self.emails,
      remove_ips=self.addresses,
      email_replacement="email@example.com",
      ip_replacement="22.214.171.124",
    )


class OwnStep(BaseFilter):
  """A function of the user's own."""

  def __init__(self, name: str, function: Callable[[Document], Any], dropped: Any):
    self.name = name
    super().__init__(dropped)
    self.function = function

  def filter(self, doc: Document) -> bool | tuple[bool, str]:
    answer = self.function(doc)
    if answer is True and not doc.text.strip():
      return False, "empty"
    if isinstance(answer, str):
      return False, answer
    if not isinstance(answer, bool):
      raise UserError(f"{self.name} returned {answer!r}, expected True, False or a reason")
    return answer


def _writer(dropped: Samples) -> Any:
  """The samples as a filter of datatrove takes them: it calls the three methods that they have."""
  return dropped


def imported(path: str, where: str, known: Any) -> Callable[..., Any]:
  """The function that module:function names. Raises UserError where there is none."""
  module, colon, name = path.partition(":")
  if not colon:
    raise UserError(f"{where}={path!r}: expected one of {', '.join(known)}, or module:function")
  try:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
  except (ImportError, AttributeError) as error:
    raise UserError(f"{where}={path!r}: {first_line(error)}")


STEPS: dict[str, Any] = {
  "extract": Extraction,
  "language": Language,
  "gopher_repetition": GopherRepetition,
  "gopher_quality": GopherQuality,
  "c4": C4,
  "fineweb_quality": FineWebQuality,
  "mask_personal": MaskPersonal,
  "exact_duplicates": ExactDuplicates,
  "line_duplicates": LineDuplicates,
  "near_duplicates": NearDuplicates,
  "decontaminate": Decontaminate,
}
