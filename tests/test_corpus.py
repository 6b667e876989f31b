"""Corpora: what is kept and dropped, and shards that train as the text they came from."""

# Most imports need the extra, whose absence is said first.
# ruff: noqa: E402

import bz2
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="the extra corpus is not installed")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline import filters, readers, writers
from datatrove.pipeline.dedup import minhash
from etils import epath
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from configs import prepare_text, prepare_web, prepare_wikipedia
from llm.checkpoints import manager
from llm.config import DataConfig
from llm.core import UserError
from llm.corpus import (
  accounts,
  executors,
  extraction,
  inputs,
  preparation,
  stages,
  web,
  wikipedia,
)
from llm.corpus import config as corpus_config
from llm.corpus import readers as corpus_readers
from llm.data import documents, packing, sources
from llm.data import shards as shards_lib
from llm.data import tokenizer as tokenizer_lib
from llm.training import loop
from tests.conftest import tiny

LOCAL = executors.Where("local", 1)


def prepare(folder, config, where=LOCAL, **overrides):
  """The figures of a corpus that is prepared in this process."""
  for name, value in overrides.items():
    group, _, key = name.partition("__")
    if key:
      config[group][key] = value
    else:
      config[group] = value
  config["tokenizer"]["vocab_size"] = 300
  return preparation.prepare(corpus_config.freeze(config), epath.Path(folder), where)


def text_config(steps=(), **overrides):
  config = prepare_text.get_config()
  config.steps = tuple(steps)
  config.update(overrides)
  return config


def write_jsonl(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({"text": text, "id": str(i)}) for i, text in enumerate(texts)]
  path.write_text("\n".join(lines) + "\n")


def kept(folder):
  """The documents that a prepared corpus kept."""
  source = sources.parse_one(f"jsonl:{folder}/documents/*.jsonl.zst", DataConfig())
  return list(source.records())


def prose(seed, words=120):
  """A text that no filter of web pages drops: sentences of words, none of them repeated."""
  rng = random.Random(seed)
  parts = []
  for _ in range(words // 12):
    sentence = [rng.choice("the of and to with that have be".split())]
    sentence += [
      "".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(3, 9))) for _ in range(10)
    ]
    parts.append(" ".join([*sentence, rng.choice("the of and".split())]).capitalize() + ".")
  return "\n".join(" ".join(parts[i : i + 2]) for i in range(0, len(parts), 2))


def test_every_document_is_accounted_for(tmp_path):
  """In = kept + dropped at every step, with lines that are broken, empty, no text or too deep."""
  lines = [json.dumps({"text": prose(n)}) for n in range(12)]
  lines[3] = '{"text": '
  lines[5] = "[" * 100_000
  lines[6] = json.dumps({"body": "x"})
  lines[7] = json.dumps({"text": " "})
  lines[8] = json.dumps({"text": prose(9)})  # the same as line 9
  lines[10] = '{"text": "lone surrogate \\ud800 in it"}'
  (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:2]).encode())[:200])
  config = text_config(["exact_duplicates"])
  figures = prepare(tmp_path / "out", config, input=str(tmp_path))
  dropped = figures["dropped"]
  assert figures["documents_in"] >= 12
  assert figures["documents_in"] == figures["documents_out"] + sum(dropped.values())
  for step in figures["steps"]:
    assert step["documents_in"] == step["documents_out"] + sum(step["dropped"].values()), step
  assert dropped["not_json"] == 2
  assert dropped["no_text_field"] == dropped["empty"] == 1
  assert dropped["exact_duplicates"] == 1
  assert len(figures["damaged"]) == 1 and "b.jsonl.gz" in figures["damaged"][0]
  assert len(kept(tmp_path / "out")) == figures["documents_out"]
  text = (tmp_path / "out" / "report.md").read_text()
  assert "not_json" in text and "b.jsonl.gz" in text


def test_shards_hold_what_the_text_holds(tmp_path):
  """Tokens, sentences and documents of shards are those of the same text, read from its files."""
  for name in "ab":
    write_jsonl(tmp_path / "in" / f"{name}.jsonl", [prose(ord(name) + n) for n in range(5)])
  prepare(tmp_path / "out", text_config(), input=str(tmp_path / "in"))
  config = DataConfig(cache=str(tmp_path / "cache"))
  source = sources.parse_one(f"shards:{tmp_path}/out/shards", config)
  text = sources.parse_one(f"jsonl:{tmp_path}/in", config)
  tokenizer = shards_lib.tokenizer(source)
  for how in ("split", "none"):
    of_shards = documents.load(source, tokenizer, how)
    of_text = documents.load(text, tokenizer, how)
    np.testing.assert_array_equal(of_shards.tokens_N[:], of_text.tokens_N)
    np.testing.assert_array_equal(of_shards.sentences, of_text.sentences)
    np.testing.assert_array_equal(of_shards.documents, of_text.documents)
    np.testing.assert_array_equal(of_shards.bounds(), of_text.bounds())
  across = len(shards_lib.Tokens(shards_lib.facts(source)[:1]))
  np.testing.assert_array_equal(
    of_shards.tokens_N[across - 3 : across + 4], of_text.tokens_N[across - 3 : across + 4]
  )
  plans = [
    packing.plan(loaded, 32, np.arange(33), tmp_path / "cache") for loaded in (of_shards, of_text)
  ]
  np.testing.assert_array_equal(plans[0].starts, plans[1].starts)
  decoded = [record["text"] for record in source.records()]
  assert decoded == [
    tokenizer.decode(ids) for ids in tokenizer.encode([r["text"] for r in text.records()])
  ]


def test_shards_are_those_of_datatrove(tmp_path):
  """Its own tokenizing block writes the same tokens and ends, byte for byte."""
  from datatrove.pipeline.tokens import DocumentTokenizer
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  texts = [prose(n).replace("\n", " ") for n in range(8)]
  write_jsonl(tmp_path / "in" / "a.jsonl", texts)
  fast = Tokenizer(models.BPE(unk_token="<unk>"))
  fast.pre_tokenizer = pre_tokenizers.Whitespace()
  fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))
  fast.save(str(tmp_path / "tokenizer.json"))
  config = text_config(input=str(tmp_path / "in"))
  config.tokenizer.update(name="huggingface", path=str(tmp_path / "tokenizer.json"))
  config.shards.sentences = "none"
  prepare(tmp_path / "out", config)
  block = DocumentTokenizer(
    str(tmp_path / "theirs"), str(tmp_path / "tokenizer.json"), shuffle_documents=False
  )
  reader = readers.JsonlReader(str(tmp_path / "in"))
  LocalPipelineExecutor([reader, block], logging_dir=str(tmp_path / "logs"), workers=1).run()
  theirs = next((tmp_path / "theirs").glob("*.ds"))
  ours = tmp_path / "out" / "shards" / "00000.ds"
  assert ours.read_bytes() == theirs.read_bytes()
  assert ours.with_suffix(".ds.index").read_bytes() == pathlib.Path(f"{theirs}.index").read_bytes()


def test_what_is_kept_is_what_datatrove_keeps(tmp_path):
  """The steps of FineWeb beside the same blocks of datatrove, put together by hand."""
  texts = [prose(n) for n in range(12)]
  texts += [prose(3).replace("the", "of", 1), "short text.", prose(20) + "\nlorem ipsum dolor sit."]
  texts += [("again and again. " * 60), "\n".join(f"- item {n}" for n in range(80))]
  texts += [prose(21).replace(".", ""), prose(22) + " {x}."]
  write_jsonl(tmp_path / "in" / "a.jsonl", texts)
  steps = ["gopher_repetition", "gopher_quality", "c4", "fineweb_quality", "near_duplicates"]
  figures = prepare(tmp_path / "out", text_config(steps), input=str(tmp_path / "in"))
  folder = str(tmp_path / "theirs")
  signatures = minhash.MinhashDedupSignature(f"{folder}/signatures")
  stages_by_hand = [
    (
      [
        readers.JsonlReader(str(tmp_path / "in")),
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(),
        filters.FineWebQualityFilter(),
        writers.JsonlWriter(f"{folder}/filtered"),
      ],
      1,
    ),
    ([readers.JsonlReader(f"{folder}/filtered"), signatures], 1),
    ([minhash.MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets")], 14),
    ([minhash.MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove")], 1),
    (
      [
        readers.JsonlReader(f"{folder}/filtered"),
        minhash.MinhashDedupFilter(f"{folder}/remove"),
        writers.JsonlWriter(f"{folder}/kept", compression=None),
      ],
      1,
    ),
  ]
  for number, (blocks, tasks) in enumerate(stages_by_hand):
    logs = f"{folder}/logs/{number}"
    LocalPipelineExecutor(blocks, tasks=tasks, workers=1, logging_dir=logs).run()
  theirs = [json.loads(line) for line in open(f"{folder}/kept/00000.jsonl")]
  ours = kept(tmp_path / "out")
  assert [(r["id"], r["text"]) for r in ours] == [(r["id"], r["text"]) for r in theirs]
  assert 12 <= len(ours) < len(texts)
  assert figures["dropped"]["near_duplicate"] == 1


CASES = {
  # step -> (a text that it drops, one much like it that it keeps)
  "gopher_quality": (prose(1, 36), prose(1, 60)),
  "gopher_repetition": (prose(2) + "\n" + "\n".join(["the same line of it all."] * 40), prose(2)),
  "c4": (prose(3) + "\nlorem ipsum it says.", prose(3) + "\nlorem it says of that."),
  "fineweb_quality": ("\n".join(f"the item {n} of it" for n in range(90)), prose(4)),
  "language": (
    "Das ist ein Satz, und niemand weiß, warum er hier steht. " * 3,
    "This is a sentence, and nobody knows why it stands here. " * 3,
  ),
}


@pytest.mark.parametrize("step", CASES)
def test_a_filter_drops_its_case_and_keeps_the_neighbour(step):
  bad, good = CASES[step]
  settings = corpus_config.GROUPS[step]()
  block = settings.block(step, None)
  survivors = [d.id for d in block.run(iter([Document(bad, "bad"), Document(good, "good")]))]
  assert survivors == ["good"]


def fasttext_model(path):
  """A model of two languages by four words, in the layout of fastText's FastText::saveModel."""
  words = {"the": (4, 0), "and": (4, 0), "der": (0, 4), "und": (0, 4)}
  magic, version, dim, supervised, softmax, buckets = 793712314, 12, 2, 3, 3, 0
  settings = (dim, 5, 5, 1, 5, 1, softmax, supervised, buckets, 0, 0, 100)
  data = struct.pack("<2i12id", magic, version, *settings, 1e-4)
  data += struct.pack("<3i2q", 6, 4, 2, 6, -1)  # entries, words, labels, tokens, none pruned
  for number, name in enumerate([*words, "__label__en", "__label__de"]):
    data += name.encode() + struct.pack("<xqb", 1, number >= len(words))
  for matrix in (list(words.values()), [(1, 0), (0, 1)]):
    data += struct.pack("<?2q", False, len(matrix), dim) + np.array(matrix, "<f4").tobytes()
  path.write_bytes(data)


def test_a_fasttext_model_tells_languages(tmp_path):
  """Softmax of (4, 0): 0.982; a text of which it knows no word has no language."""
  fasttext_model(tmp_path / "lid.bin")
  settings = corpus_config.GROUPS["language"](model=str(tmp_path / "lid.bin"))
  texts = ["the cat\nand dog", "der Hund und", "the der", "nothing known"]
  dropped = []
  samples = accounts.Samples(None, "language")
  samples.write = lambda document, rank: dropped.append(document.metadata)
  block = settings.block("language", samples)
  (english,) = block.run(iter([Document(text, text) for text in texts]))
  assert english.metadata == {"language": "en", "language_score": 0.982}
  reasons = [metadata["filter_reason"] for metadata in dropped]
  assert reasons[0] == "language_de" and reasons[2] == "language_unknown"
  (tmp_path / "lid.bin").write_bytes(b"no model")
  with pytest.raises(UserError, match="config.language.model="):
    list(settings.block("language", samples).run(iter([Document("the", "1")])))


def test_personal_data_is_masked():
  block = corpus_config.GROUPS["mask_personal"]().block("mask_personal", None)
  text = "write to jane.doe@company.org or 8.8.8.8, not to 10.0.0.1 at 5 o'clock"
  (masked,) = block.run(iter([Document(text, "1")]))
  assert masked.text == "write to email@example.com or 22.214.171.124, not to 10.0.0.1 at 5 o'clock"


def test_a_step_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / "my_steps.py").write_text(
    "def shout(document):\n"
    "  document.text = document.text.upper()\n"
    "  return True if 'keep' in document.metadata else 'not marked'\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "in.jsonl").write_text('{"text": "a b", "keep": 1}\n{"text": "c d"}\n')
  config = text_config(["my_steps:shout"])
  figures = prepare(tmp_path / "out", config, input=str(tmp_path / "in.jsonl"))
  assert figures["dropped"] == {"not marked": 1}
  assert [r["text"] for r in kept(tmp_path / "out")] == ["A B"]


def near_pairs(share, count):
  """Pairs of texts that have about `share` of their 5-grams in common."""
  rng = random.Random(share)
  for n in range(count):
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    other = list(words)
    # A Jaccard index s of n-grams is (1 - d) / (1 + d) where a share d of them differs.
    differing = (1 - share) / (1 + share)
    changed = round(differing * len(words) / 5)
    for place in rng.sample(range(2, 398, 5), changed):
      other[place] = f"changed{n}{place}"
    yield " ".join(words), " ".join(other)


@pytest.mark.parametrize("share, low, high", [(0.95, 0.95, 1.0), (0.8, 0.75, 1.0), (0.5, 0.0, 0.2)])
def test_near_duplicates_are_those_of_the_theory(tmp_path, share, low, high):
  """Found with probability 1 - (1 - s^8)^14: 0.9999 at 0.95, 0.92 at 0.8, 0.05 at 0.5."""
  count = 40
  write_jsonl(tmp_path / "in.jsonl", [t for pair in near_pairs(share, count) for t in pair])
  config = text_config(["near_duplicates"])
  figures = prepare(tmp_path / "out", config, input=str(tmp_path / "in.jsonl"))
  assert low <= figures["dropped"].get("near_duplicate", 0) / count <= high
  if share == 0.95:
    assert "Near duplicates" in (tmp_path / "out" / "report.md").read_text()


def test_equal_documents_and_lines_of_several_files(tmp_path):
  write_jsonl(tmp_path / "in" / "a.jsonl", [prose(1), prose(2), prose(1)])
  write_jsonl(tmp_path / "in" / "b.jsonl", [prose(3), prose(2) + " ", prose(2)])
  config = text_config(["exact_duplicates"], input=str(tmp_path / "in"))
  figures = prepare(tmp_path / "out", config)
  assert figures["documents_out"] == 4
  assert len({r["text"] for r in kept(tmp_path / "out")}) == 4
  menu = "home of the news and of all that we have"
  write_jsonl(tmp_path / "lines" / "a.jsonl", [menu + "\n" + prose(n) for n in range(4)])
  prepare(tmp_path / "out2", text_config(["line_duplicates"], input=str(tmp_path / "lines")))
  with_menu = [menu in r["text"] for r in kept(tmp_path / "out2")]
  assert with_menu == [True, False, False, False]
  lines = [f"In {year} the town had {year} people{mark}" for year in (1911, 1925) for mark in ".!"]
  write_jsonl(
    tmp_path / "near" / "a.jsonl", [f"{prose(n)}\n{line}" for n, line in enumerate(lines)]
  )
  prepare(tmp_path / "out3", text_config(["line_duplicates"], input=str(tmp_path / "near")))
  assert all(line in r["text"] for line, r in zip(lines, kept(tmp_path / "out3"), strict=True))


def test_a_reply_to_be_preferred_is_found(tmp_path):
  reply = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
  messages = [{"role": "assistant", "content": prose(7)}]
  record = {"text": "Count.", "chosen": reply, "rejected": messages}
  (tmp_path / "test.jsonl").write_text(json.dumps(record))
  write_jsonl(tmp_path / "in.jsonl", [f"{prose(1)} {reply}", prose(2), prose(7)])
  config = text_config(["decontaminate"], input=str(tmp_path / "in.jsonl"))
  config.decontaminate.against = (f"jsonl:{tmp_path}/test.jsonl",)
  prepare(tmp_path / "out", config)
  assert [r["id"] for r in kept(tmp_path / "out")] == ["1"]


def test_a_folder_is_read_as_it_says(tmp_path):
  """Nothing hidden, no .json beside the data, and no link to a folder passed over in silence."""
  for name in ("a.jsonl", "b.json", ".git/c.jsonl", "sub/d.jsonl"):
    write_jsonl(tmp_path / "in" / name, [prose(1)])
  endings = tuple(corpus_readers.TEXT_FILES)
  names = [piece.path.rsplit("/in/")[1] for piece in inputs.find(str(tmp_path / "in"), endings)]
  assert names == ["a.jsonl", "sub/d.jsonl"]
  (named,) = inputs.find(str(tmp_path / "in" / "b.json"), endings)
  assert len(list(corpus_readers.text_files(named))) == 1
  (tmp_path / "array.json").write_text(json.dumps([{"text": "a"}]))
  with pytest.raises(OSError, match="it is a JSON array"):
    list(corpus_readers.text_files(inputs.find(str(tmp_path / "array.json"), endings)[0]))
  (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "sub")
  with pytest.raises(UserError, match="in/link is a link to a folder"):
    inputs.find(str(tmp_path / "in"), endings)
  (tmp_path / "x.parquet.gz").write_bytes(b"")
  with pytest.raises(UserError, match="Parquet files are not compressed"):
    inputs.find(str(tmp_path / "x.parquet.gz"), endings)


def test_a_stage_begins_when_every_task_before_it_ended_well(tmp_path):
  """Slurm would start it after the last of several arrays, whatever became of the others."""
  output = stages.Output(str(tmp_path))
  plan = [stages.Stage("00-a", [], 3), stages.Stage("01-b", [], 2)]
  where = executors.Where("slurm", 1, partition="cpu")
  first, second, report = executors.chained(plan, output, where, lambda: None)
  assert not first.pipeline and "PYTHONPATH" in first.env_command
  for completed in (0, 2):
    begins = second.pipeline[0]
    with pytest.raises(RuntimeError, match=f"{3 - completed} tasks of .* have not ended well"):
      begins(None, 0, 2)
    for rank in range(2):
      (tmp_path / "logs" / "00-a" / "completions").mkdir(parents=True, exist_ok=True)
      (tmp_path / "logs" / "00-a" / "completions" / f"{rank:05d}").touch()
  (tmp_path / "logs" / "00-a" / "completions" / "00002").touch()
  assert begins(None, 0, 2) is None and report.pipeline[0].tasks == 2


def test_a_planted_test_sentence_is_found(tmp_path):
  """Also a short one, which counts as a whole; texts that share fewer words are kept."""
  long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
  short = "a film that nobody should miss at all, ever"
  (tmp_path / "test.jsonl").write_text(
    "".join(json.dumps({"text": t, "label": "x"}) + "\n" for t in (long, short, "too short"))
  )
  texts = [
    prose(1) + "\nOne, two three four five six seven eight nine ten eleven twelve THIRTEEN!",
    prose(2) + "\n" + long.rsplit(" ", 2)[0].replace("one ", "") + " too short.",
    prose(3) + " A film that nobody should miss at all: ever.",
    prose(4) + " A film that nobody should miss.",
  ]
  write_jsonl(tmp_path / "in.jsonl", texts)
  config = text_config(["decontaminate"], input=str(tmp_path / "in.jsonl"))
  config.decontaminate.against = (f"jsonl:{tmp_path}/test.jsonl",)
  figures = prepare(tmp_path / "out", config)
  assert [r["id"] for r in kept(tmp_path / "out")] == ["1", "3"]
  assert list(figures["dropped"].values()) == [2]
  assert "a film that nobody should miss at all ever" in (tmp_path / "out/report.md").read_text()


ARTICLE = (
  "<page><title>T{n}</title><ns>{ns}</ns><id>{n}</id>{extra}"
  "<revision><text>{text}</text></revision></page>\n"
)


def article(n, text, ns=0, extra=""):
  return ARTICLE.format(n=n, text=text, ns=ns, extra=extra).encode()


def dump(path, count=40, streams=8):
  """A multistream dump: its head, `streams` of pages, its tail, each compressed alone."""
  text = "This is a sentence of article {n} that is long enough to be taken for a paragraph of it."
  pages = [article(n, text.format(n=n)) for n in range(count)]
  parts = [b"<mediawiki><siteinfo/>"]
  parts += [b"".join(pages[i::streams]) for i in range(streams)]
  path.write_bytes(b"".join(bz2.compress(part) for part in [*parts, b"</mediawiki>"]))
  return pages


def ids(piece):
  return [item.id for item in wikipedia.articles(piece)]


def test_a_dump_is_read_in_pieces(tmp_path):
  """Wherever a dump is cut, each article is read once."""
  path = tmp_path / "enwiki-pages-articles1.xml-p1p40.bz2"
  dump(path)
  size = path.stat().st_size
  whole = ids(inputs.Piece(str(path), 0, size, size))
  assert len(whole) == 40
  for count in (2, 3, 7, 40):
    bounds = [size * i // count for i in range(count + 1)]
    pieces = [inputs.Piece(str(path), a, b, size) for a, b in zip(bounds, bounds[1:])]
    assert [i for piece in pieces for i in ids(piece)] == whole


def test_a_dump_whose_streams_end_inside_pages_is_read_in_pieces(tmp_path):
  """As pbzip2 writes them: a page belongs to the piece in which it begins."""
  path = tmp_path / "enwiki-pages-articles1.xml-p1p40.bz2"
  data = b"<mediawiki>" + b"".join(dump(path)) + b"</mediawiki>"
  cuts = [*range(0, len(data), 333), len(data)]
  path.write_bytes(b"".join(bz2.compress(data[a:b]) for a, b in zip(cuts, cuts[1:])))
  size = path.stat().st_size
  bounds = [size * i // 9 for i in range(10)]
  pieces = [inputs.Piece(str(path), a, b, size) for a, b in zip(bounds, bounds[1:])]
  expected = ids(inputs.Piece(str(path), 0, size, size))
  assert len(expected) == 40
  assert [i for piece in pieces for i in ids(piece)] == expected


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "parquet"])
def test_every_kind_of_text_file_compressed_or_not(tmp_path, kind, compression):
  import pyarrow
  from pyarrow import parquet

  texts = [prose(1), prose(2).replace("\n", " ") + " x" * 100_000]  # one is longer than 128 kB
  plain = tmp_path / f"a.{kind}"
  if kind == "jsonl":
    write_jsonl(plain, texts)
  elif kind == "txt":
    plain.write_text("\n\n".join(texts))
  elif kind == "csv":
    plain.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
  else:
    parquet.write_table(pyarrow.table({"text": texts}), plain)
    compression = ""
  if compression:
    with (
      open(f"{plain}{compression}", "wb") as stored,
      {
        "": lambda: stored,
        ".gz": lambda: gzip.GzipFile(fileobj=stored, mode="wb"),
        ".bz2": lambda: bz2.BZ2File(stored, "wb"),
        ".zst": lambda: pyarrow.CompressedOutputStream(stored, "zstd"),
      }[compression]() as file,
    ):
      file.write(plain.read_bytes())
    plain.unlink()
  (piece,) = inputs.find(str(tmp_path), tuple(corpus_readers.TEXT_FILES))
  assert [item.text for item in corpus_readers.text_files(piece)] == texts


def test_links_are_files_and_errors_of_the_system_are_not_damage(tmp_path, monkeypatch):
  write_jsonl(tmp_path / "real" / "a.jsonl", [prose(1)])
  (tmp_path / "linked").mkdir()
  (tmp_path / "linked" / "b.jsonl").symlink_to(tmp_path / "real" / "a.jsonl")
  endings = tuple(corpus_readers.TEXT_FILES)
  assert len(inputs.find(f"{tmp_path}/linked/*.jsonl", endings)) == 1
  config = text_config(input=str(tmp_path / "real"))

  def fails(self, longest):
    yield b'{"text": "a"}\n'
    raise TimeoutError(110, "timed out")

  monkeypatch.setattr(inputs.Piece, "lines", fails)
  with pytest.raises(UserError, match="TimeoutError.*finished tasks are kept"):
    prepare(tmp_path / "out", config)


def test_json_lines_are_read_in_pieces(tmp_path):
  path = tmp_path / "a.jsonl"
  write_jsonl(path, [f"text {n}" for n in range(30)])
  size = path.stat().st_size
  for count in (1, 4, 50):
    bounds = [size * i // count for i in range(count + 1)]
    pieces = [inputs.Piece(str(path), a, b, size) for a, b in zip(bounds, bounds[1:])]
    lines = [line for piece in pieces for line in piece.lines(100)]
    assert b"".join(lines) == path.read_bytes()


def test_pages_that_are_no_articles_are_named(tmp_path):
  """A redirect, a talk page, a broken page, an entity that would expand, markup alone."""
  path = tmp_path / "wiki.xml"
  good = "A sentence that is long enough to be taken for a paragraph of prose, surely, it is."
  bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
  path.write_bytes(
    bomb.encode()
    + article(1, good)
    + article(2, "#REDIRECT [[x]]")
    + article(3, "#bla", extra='<redirect title="x"/>')
    + article(4, good, ns=1)
    + article(5, "&b;")
    + article(6, "{{infobox}}")
    + article(7, good).replace(b"</revision>", b"")
    + article(8, good)[:60]
  )
  config = prepare_wikipedia.get_config()
  figures = prepare(tmp_path / "out", config, input=str(path), steps=("extract",))
  assert figures["documents_in"] == 7
  assert "the last page is cut off" in figures["damaged"][0]
  assert figures["dropped"] == {"redirect": 2, "broken_page": 2, "namespace": 1, "no_text": 1}


def warc(path, pages, gzipped=False):
  """A WARC file of (body, content type, status)."""
  with open(path, "wb") as file:
    writer = WARCWriter(file, gzip=gzipped)
    for number, (body, kind, status) in enumerate(pages):
      headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.0")
      writer.write_record(
        writer.create_warc_record(
          f"http://site/{number}", "response", payload=io.BytesIO(body), http_headers=headers
        )
      )


def html(text, head=""):
  paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
  return f"<html><head>{head}</head><body><article>{paragraphs}</article></body></html>"


def test_pages_of_the_web(tmp_path):
  """Each kind of bad page is counted by its reason, and its neighbours are read."""
  deep = "<div>" * 300_000 + "x"
  french = html("<p>Un texte déjà écrit à l'été.</p>", '<meta charset="utf-8">').encode("latin-1")
  pages = [
    (html(prose(1)).encode(), "text/html", "200 OK"),
    (b"%PDF-1.4 \0 <", "application/pdf", "200 OK"),
    (b"just words", "text/html", "200 OK"),
    (b"<html>\0\0</html>", "text/html", "200 OK"),
    (b"<html>moved</html>", "text/html", "301 Moved"),
    (b"<html></html>", "text/html", "200 OK"),
    (deep.encode(), "text/html", "200 OK"),
    (b"<html>" + b"x" * (web.LARGEST + 1), "text/html", "200 OK"),
    (french, "text/html", "200 OK"),
  ]
  warc(tmp_path / "a.warc.gz", pages, gzipped=True)
  config = prepare_web.get_config()
  config.extract.by = "resiliparse"
  figures = prepare(tmp_path / "out", config, input=str(tmp_path / "a.warc.gz"), steps=("extract",))
  assert figures["documents_in"] == 9
  assert figures["dropped"]["no_html"] == 3
  assert figures["dropped"]["http_status"] == figures["dropped"]["too_large"] == 1
  texts = [record["text"] for record in kept(tmp_path / "out")]
  assert texts[0].split() == prose(1).split()
  assert any("déjà écrit à l'été" in text for text in texts)


def chunked(body):
  parts = [body[i : i + 100] for i in range(0, len(body), 100)]
  return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


CHUNKED = ("Transfer-Encoding", "chunked")
GZIPPED = ("Content-Encoding", "gzip")
BODY = html(prose(1)).encode()
# name -> (headers, what is stored, whether it is a page)
STORED = {
  "chunked": ([CHUNKED], chunked(BODY), True),
  "gzipped": ([GZIPPED], gzip.compress(BODY), True),
  "both": ([CHUNKED, GZIPPED], chunked(gzip.compress(BODY)), True),
  "chunked, stored decoded": ([CHUNKED], BODY, True),
  "gzipped, stored decoded": ([GZIPPED], BODY, True),
  "no such encoding": ([GZIPPED], b"\x1f\x8bgarbage", False),
  "a bomb": ([GZIPPED], gzip.compress(b"<p>" + b"x" * 2 * web.LARGEST), False),
}


@pytest.mark.parametrize("case", STORED)
def test_bodies_are_decoded(tmp_path, case):
  """Each between two plain pages, which are read whatever it is."""
  headers, stored, is_page = STORED[case]
  bodies = [([], BODY), (headers, stored), ([], BODY)]
  with open(tmp_path / "a.warc", "wb") as file:
    writer = WARCWriter(file, gzip=False)
    for number, (more, body) in enumerate(bodies):
      http = StatusAndHeaders("200 OK", [("Content-Type", "text/html"), *more], protocol="HTTP/1.1")
      address = f"http://site/{number}"
      payload = io.BytesIO(body)
      record = writer.create_warc_record(address, "response", payload=payload, http_headers=http)
      writer.write_record(record)
  (piece,) = inputs.find(str(tmp_path), web.ENDINGS)
  pages = list(web.pages(piece))
  assert [getattr(page, "text", None) == BODY.decode() for page in pages] == [True, is_page, True]


def damage(data, how):
  """(a damaged WARC file, the least number of pages that is still read of it)"""
  third = list(re.finditer(rb"Content-Length: (\d+)", data))[3]
  if how == "too long":
    return data[: third.start(1)] + b"999999" + data[third.end(1) :], 3
  if how == "too short":
    return data[: third.start(1)] + b"10" + data[third.end(1) :], 4
  return data[: len(data) * 2 // 3], 2


@pytest.mark.parametrize("how", ["too long", "too short", "cut off"])
def test_a_damaged_warc_file_is_named(tmp_path, how):
  warc(tmp_path / "good.warc", [(html(prose(n)).encode(), "text/html", "200 OK") for n in range(6)])
  data, least = damage((tmp_path / "good.warc").read_bytes(), how)
  (tmp_path / "good.warc").unlink()
  (tmp_path / "bad.warc").write_bytes(data)
  config = prepare_web.get_config()
  config.extract.by = "resiliparse"
  figures = prepare(tmp_path / "out", config, input=str(tmp_path), steps=("extract",))
  assert least <= figures["documents_out"] < 6
  assert figures["dropped"]["wrong_length" if how != "too short" else "no_html"] == 1
  assert bool(figures["damaged"]) == (how != "too short")


def slow(text):
  if "hang" in text:
    threading.Event().wait()
  if "explode" in text:
    return "x" * 2**31
  if "crash" in text:
    os._exit(1)
  if "raise" in text:
    raise ValueError("a bug of the parser")
  return text


def test_a_page_that_hangs_or_explodes_costs_only_itself():
  block = extraction.Extract("extract", slow, 3.0, 512, accounts.Samples(None, "extract"))
  block.dropped.write = lambda document, rank: None
  texts = ["one", "hang", "two", "explode", "three", "crash", "four", "raise", "five"]
  survivors = [d.text for d in block.run(iter([Document(t, t) for t in texts]))]
  assert survivors == ["one", "two", "three", "four", "five"]
  reasons = {name: stat.total for name, stat in block.stats.stats.items()}
  assert reasons["dropped_took_too_long"] == reasons["dropped_out_of_memory"] == 1
  assert reasons["dropped_crashed"] == 1
  assert reasons["dropped_failed (ValueError)"] == 1


READ_BOMBS = """
import resource, sys
from llm.corpus import inputs, readers, wikipedia

start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read, path in ((wikipedia.articles, sys.argv[1]), (readers.text_files, sys.argv[2])):
  (piece,) = inputs.find(path, (".xml", ".jsonl"))
  print([getattr(item, "reason", item.text) for item in read(piece)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_little_that_stands_for_much(tmp_path):
  """Files of a few kilobytes that decompress to hundreds of megabytes take bounded memory."""
  zeros = b"0" * 2**20
  packer = bz2.BZ2Compressor()
  with open(tmp_path / "bomb.xml.bz2", "wb") as file:
    for _ in range(300):
      file.write(packer.compress(zeros))
    file.write(packer.flush())
  with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
    for _ in range(300):
      file.write(zeros)
    file.write(b'\n{"text": "small"}\n')
  command = [sys.executable, "-c", READ_BOMBS]
  command += [str(tmp_path / "bomb.xml.bz2"), str(tmp_path / "bomb.jsonl.gz")]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  pages, texts, kilobytes = done.stdout.splitlines()
  assert pages == "[]" and texts == "['too_large', 'small']"
  assert int(kilobytes) < 250_000


MISTAKES = [
  ({"steps": ("gopher",)}, "there is no step 'gopher'"),
  ({"steps": ("c4", "c4")}, "twice"),
  ({"steps": ("nowhere:f",)}, "nowhere"),
  ({"input": "nothing/here"}, "no such file"),
  ({"input": ""}, "config.input is not set"),
  ({"reader": "pdf"}, "config.reader"),
  ({"steps": ("language",), "language__model": "lid.bin"}, "config.language.model=lid.bin"),
  ({"steps": ("decontaminate",)}, "config.decontaminate.against"),
  ({"steps": (1,)}, "there is no step 1"),
  ({"steps": ("extract",), "extract__by": "magic"}, "config.extract.by"),
  ({"gopher_quality__min_doc_word": 3}, "did you mean config.gopher_quality.min_doc_words"),
  ({"near_duplicates__buckets": 0}, "config.near_duplicates.buckets must be positive"),
  (
    {"steps": ("gopher_quality",), "gopher_quality__min_doc_words": 10**6},
    "gopher_quality dropped",
  ),
]


@pytest.mark.parametrize("overrides, message", MISTAKES)
def test_mistakes_are_one_line(tmp_path, overrides, message):
  write_jsonl(tmp_path / "in.jsonl", [prose(1)])
  config = text_config(input=str(tmp_path / "in.jsonl")).to_dict()
  with pytest.raises(UserError, match=message) as error:
    prepare(tmp_path / "out", config, **overrides)
  assert "\n" not in str(error.value)


def test_an_output_of_another_config_is_refused(tmp_path):
  write_jsonl(tmp_path / "in" / "a.jsonl", [prose(1)])
  config = text_config(input=str(tmp_path / "in"))
  prepare(tmp_path / "out", config)
  shard = tmp_path / "out" / "shards" / "00000.ds"
  written = shard.stat().st_mtime_ns
  prepare(tmp_path / "out", config)
  assert shard.stat().st_mtime_ns == written, "a finished task was run again"
  with pytest.raises(UserError, match="begun with another config.steps"):
    prepare(tmp_path / "out", config, steps=("c4",))
  write_jsonl(tmp_path / "in" / "b.jsonl", [prose(2)])
  with pytest.raises(UserError, match="other input files"):
    prepare(tmp_path / "out", text_config(input=str(tmp_path / "in")))


def test_a_run_on_shards_goes_on(tmp_path, monkeypatch):
  """Its tokenizer is that of the shards when it begins, and its own when it goes on."""
  write_jsonl(tmp_path / "in.jsonl", [prose(n) for n in range(9)])
  prepare(tmp_path / "out", text_config(input=str(tmp_path / "in.jsonl")))
  monkeypatch.setenv("PRETUNE_CACHE", str(tmp_path / "cache"))
  shards = f"shards:{tmp_path}/out/shards"
  options = {"tokenizer__name": "sentencepiece", "tokenizer__vocab_size": 200}
  for steps in (1, 2):
    config = tiny("gpt", shards, training__steps=steps, training__save_every=1, **options)
    loop.train(config, tmp_path / "run", say=lambda *_: None)
  step = manager.find(str(tmp_path / "run"))
  of_shards = shards_lib.tokenizer(sources.parse_one(shards, DataConfig()))
  assert step.name == "2" and manager.load_tokenizer(step).digest() == of_shards.digest()


def test_shards_that_do_not_fit_are_refused(tmp_path):
  write_jsonl(tmp_path / "in.jsonl", [prose(1)])
  config = text_config(input=str(tmp_path / "in.jsonl"))
  config.shards.sentences = "none"
  prepare(tmp_path / "out", config)
  source = sources.parse_one(f"shards:{tmp_path}/out/shards", DataConfig(cache=str(tmp_path / "c")))
  with pytest.raises(UserError, match="another tokenizer"):
    documents.load(source, tokenizer_lib.ByteTokenizer(), "none")
  with pytest.raises(UserError, match="where sentences begin"):
    documents.load(source, shards_lib.tokenizer(source), "split")
  name = tmp_path / "out" / "shards" / "00000.ds.json"
  whole = name.read_text()
  name.write_text(json.dumps({**json.loads(whole), "of": 2}))
  with pytest.raises(UserError, match="1 of its 2 shards are there"):
    documents.load(source, shards_lib.tokenizer(source), "none")
  name.write_text(whole)
  shard = tmp_path / "out" / "shards" / "00000.ds"
  shard.write_bytes(shard.read_bytes()[:-2])
  with pytest.raises(UserError, match="bytes, expected"):
    documents.load(source, shards_lib.tokenizer(source), "none")
  (tmp_path / "out" / "shards" / "00000.ds.json").unlink()
  with pytest.raises(UserError, match="not whole"):
    source.digest()


def test_many_shards_are_one_array(tmp_path):
  """Slices across shards, as other processes unpickle them too."""
  rng = np.random.default_rng(0)
  parts = [rng.integers(0, 900, size).astype("<u2") for size in (5, 1, 7, 3)]
  shards = []
  for number, part in enumerate(parts):
    path = tmp_path / f"{number}.ds"
    path.write_bytes(part.tobytes())
    shards.append(shards_lib.Facts(str(path), "", "", 1, len(part), 2, "none", ""))
  tokens = pickle.loads(pickle.dumps(shards_lib.Tokens(tuple(shards))))
  joined = np.concatenate(parts)
  assert len(tokens) == len(joined)
  for start in range(len(joined) + 1):
    for stop in range(start, len(joined) + 1):
      np.testing.assert_array_equal(tokens[start:stop], joined[start:stop])
  assert tokens[5] == joined[5]


@pytest.mark.parametrize("module", [prepare_text, prepare_web, prepare_wikipedia])
def test_every_config_of_a_corpus_is_valid(module):
  config = module.get_config()
  config.input = "somewhere"
  settings = corpus_config.freeze(config)
  assert corpus_config.freeze(corpus_config.thaw(settings)) == settings
