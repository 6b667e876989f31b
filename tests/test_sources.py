"""Sources made of files: compressed, in Parquet, a folder of them."""

import bz2
import gzip
import json

import pyarrow
import pytest
from hypothesis import strategies
from pyarrow import parquet

from llm.config import DataConfig
from llm.core import UserError
from llm.data import sources
from tests import fuzz, grammars

COMPRESSED = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}
SQUAD = {
  "data": [
    {
      "paragraphs": [
        {"context": "Ann sang.", "qas": [{"id": 1, "question": "Who?", "answers": []}]}
      ]
    }
  ]
}
FILES = {
  "text": ("a.txt", "one, naïve\ntwo\n\nthree\n"),
  "jsonl": ("a.jsonl", '{"text": "one"}\n{"text": "日本"}\n'),
  "csv": ("a.csv", 'text,label\n"x, y",1\n'),
  "squad": ("a.json", json.dumps(SQUAD)),
}


def source(spec: str, fields: str = "") -> sources.Source:
  return sources.parse_one(spec, DataConfig(fields=fields))


def texts(spec: str, fields: str = "") -> list[str]:
  return [record["text"] for record in source(spec, fields).records()]


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("ending", list(COMPRESSED))
def test_a_compressed_file_is_read_as_the_file(kind, ending, tmp_path):
  name, content = FILES[kind]
  (tmp_path / name).write_text(content)
  packed = tmp_path / f"packed_{name}{ending}"
  packed.write_bytes(COMPRESSED[ending](content.encode()))
  assert texts(f"{kind}:{packed}") == texts(f"{kind}:{tmp_path / name}") != []


@pytest.mark.parametrize("ending", list(COMPRESSED))
@pytest.mark.parametrize("damage", ["cut off", "not compressed"])
def test_a_damaged_compressed_file_is_one_line(ending, damage, tmp_path):
  content = "\n".join(f"line {number * 7919 % 1000}" for number in range(5000)).encode()
  packed = COMPRESSED[ending](content)
  path = tmp_path / f"a.txt{ending}"
  path.write_bytes(packed[: len(packed) // 2] if damage == "cut off" else content)
  with pytest.raises(UserError, match=f"a.txt{ending}: cut off or damaged after line") as error:
    texts(f"text:{path}")
  assert "\n" not in str(error.value)


def test_parquet_is_read_in_batches_with_renamed_columns(tmp_path):
  path = tmp_path / "a.parquet"
  rows = {"body": [f"text {i}" for i in range(2500)], "class": [i % 2 for i in range(2500)]}
  parquet.write_table(pyarrow.table(rows), path, row_group_size=700)
  found = list(source(f"parquet:{path}", "text=body,label=class").records())
  assert [(r["text"], r["label"]) for r in found] == list(zip(rows["body"], rows["class"]))


def test_a_parquet_file_without_the_column_is_one_line(tmp_path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.table({"body": ["a"], "class": [1]}), path)
  with pytest.raises(UserError, match="a.parquet row 1: no field 'txt'.*are body, class"):
    texts(f"parquet:{path}", "text=txt")
  with pytest.raises(UserError, match="a.parquet row 1: the field 'text' must be a string"):
    texts(f"parquet:{path}")


def test_a_bad_row_of_parquet_is_named(tmp_path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.table({"text": ["some"] * 1500 + [None]}), path)
  with pytest.raises(UserError, match="a.parquet row 1501: the field 'text' must be a string"):
    texts(f"parquet:{path}")


def test_a_damaged_parquet_file_is_one_line(tmp_path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.table({"text": ["some text"] * 100}), path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match="a.parquet: not a whole Parquet file") as error:
    texts(f"parquet:{path}")
  assert "\n" not in str(error.value)


def test_broken_bytes_are_one_line(tmp_path):
  """Bytes changed, lost or put in: the records are read, or one line says what is wrong."""
  rows = [{"text": f"some text {i}", "label": i % 2} for i in range(50)]
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet")
  lines = "\n".join(map(json.dumps, rows)).encode()
  good = {f"jsonl:a.jsonl{ending}": pack(lines) for ending, pack in COMPRESSED.items()}
  good["parquet:a.parquet"] = (tmp_path / "whole.parquet").read_bytes()
  for spec, data in good.items():
    kind, name = spec.split(":")

    def attempt(content, folder, kind=kind, name=name):
      (folder / name).write_bytes(content)
      texts(f"{kind}:{folder / name}")

    boundary = fuzz.Boundary(grammars.broken_bytes(strategies.just(data)), attempt, data)
    worked, refused = fuzz.run(boundary, 100, 0)
    assert refused > 20, spec


def test_a_folder_means_its_files(tmp_path):
  for name in ("b.txt", "a.txt", ".hidden.txt", "notes.md", "deeper/c.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  (tmp_path / "d.TXT.gz").write_bytes(gzip.compress(b"d"))
  assert texts(f"text:{tmp_path}") == ["a.txt", "b.txt", "d"]
  assert texts(f"text:{tmp_path}/") == ["a.txt", "b.txt", "d"]
  # A pattern that matches a folder and its files gives each file once.
  assert texts(f"text:{tmp_path}/deep*/**") == ["deeper/c.txt"]
  with pytest.raises(UserError, match=r"no file in the folder .* ends in \.jsonl or \.ndjson"):
    texts(f"jsonl:{tmp_path}")


def test_a_folder_changes_its_digest_with_its_files(tmp_path):
  (tmp_path / "a.txt").write_text("one")
  before = source(f"text:{tmp_path}").digest()
  assert before == source(f"text:{tmp_path}/a.txt").digest()
  (tmp_path / "notes.md").write_text("not read")
  assert before == source(f"text:{tmp_path}").digest()
  (tmp_path / "b.txt").write_text("two")
  assert before != source(f"text:{tmp_path}").digest()


def test_splits_are_for_kinds_that_have_them(tmp_path):
  parsed = {kind: source(f"{kind}:name[part]") for kind in sources.KINDS}
  with_split = {kind for kind, found in parsed.items() if found.split == "part"}
  assert with_split == {"embedded", "made", "tfds", "hf"}
  assert all(parsed[kind].name == "name[part]" for kind in parsed.keys() - with_split)


def test_what_people_have_is_read(tmp_path, monkeypatch):
  """A JSON array, tab-separated values, a home folder, Windows line ends, a byte-order mark."""
  records = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
  (tmp_path / "a.json").write_text("\n" + json.dumps(records, indent=1))
  (tmp_path / "a.tsv").write_text("text\tlabel\none\ta\ntwo\tb\n")
  (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\none,a\r\ntwo,b\r\n")
  monkeypatch.setenv("HOME", str(tmp_path))
  for spec in ("jsonl:~/a.json", "tsv:~/a.tsv", "csv:~/a.csv"):
    source = sources.parse_one(spec, DataConfig())
    assert [{"text": r["text"], "label": r["label"]} for r in source.records()] == records


def test_a_quote_is_a_character_like_others_between_tabs(tmp_path):
  """Read as CSV, the second line would swallow the third."""
  lines = ['"Good film\t1', 'bad film"\t0', '"Jar" is what?\t1']
  (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
  records = source(f"tsv:{tmp_path}/a.tsv").records()
  assert [f"{record['text']}\t{record['label']}" for record in records] == lines
