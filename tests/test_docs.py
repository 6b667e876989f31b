"""The documentation holds: commands exist, links lead somewhere, the README stays short."""

import bz2
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from llm.cache import cache_dir
from tests import documented
from tests.conftest import sentences

ROOT = documented.ROOT
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CACHE = cache_dir()  # the user's own: taken before conftest gives the tests another
ONE_DEVICE = {k: v for k, v in ENVIRONMENT.items() if k != "JAX_NUM_CPU_DEVICES"}


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_every_command_is_accepted():
  """Flags, verbs, config files, settings and keys exist, and values are within their bounds."""
  pages = {tuple(c): page.name for page in documented.PAGES for c in documented.commands(page)}
  listed = [(page, command) for command, page in pages.items()]
  assert len(listed) > 50
  done = subprocess.run(
    [sys.executable, "-m", "tests.documented"],
    input=json.dumps([command for _, command in listed]),
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  statuses = json.loads(done.stdout)
  refused = [(*entry, status) for entry, status in zip(listed, statuses) if status]
  assert not refused, f"{refused}\n{done.stderr}"


@pytest.mark.slow
def test_a_wrong_command_would_be_seen():
  commands = {
    "huge": ["llm.train", "--config=configs/pretrain_bert.py:huge", "--workdir=W"],
    "widht": ["llm.train", "--config=configs/pretrain_bert.py", "--config.model.widht=3"],
    "maks": ["llm.train", "--config=configs/pretrain_bert.py", "--config.objective.maks=3"],
    "optimizer": ["llm.train", "--config=configs/pretrain_bert.py", "--config.optimizer.name=x"],
    "promt": ["llm.generate", "--promt=a"],
    "sideways": ["llm.convert", "sideways", "--source=a"],
  }
  done = subprocess.run(
    [sys.executable, "-m", "tests.documented"],
    input=json.dumps(list(commands.values())),
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert all(json.loads(done.stdout))
  position = 0
  for says in commands:  # one after another, so each message follows the one before
    position = done.stderr.index(says, position)


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, as the site makes them."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def links():
  for page in documented.PAGES:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
      if "://" not in target:
        yield page, target


@pytest.mark.parametrize("page, target", links(), ids=lambda value: getattr(value, "stem", value))
def test_a_link_leads_somewhere(page, target):
  path, _, anchor = target.partition("#")
  file = page.parent / path if path else page
  assert file.is_file()
  assert not anchor or anchor in anchors(file)


def pages_of(nav) -> list[str]:
  """The files that a navigation names."""
  found = []
  for entry in nav:
    for value in entry.values():
      found += [value] if isinstance(value, str) else pages_of(value)
  return found


def test_every_page_is_in_the_navigation():
  site = tomllib.loads((ROOT / "zensical.toml").read_text())
  named = pages_of(site["project"]["nav"])
  assert sorted(named) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_files_that_are_named_exist():
  """Paths in backticks, such as `llm/core.py`."""
  folders = "llm|configs|examples|benchmarks|launch|tests|docs"
  for page in documented.PAGES:
    for path in re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", page.read_text()):
      placeholder = "NAME" in path
      assert placeholder or (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_page_on_adding_shows_code_as_it_is():
  files = ("examples/reverse_words.py", "llm/data/sources.py", "llm/data/record_files.py")
  code = "".join((ROOT / file).read_text() for file in files)
  for block in documented.blocks(ROOT / "docs" / "adding.md", "python"):
    assert block in code


# Appended to the commands that are run: less of everything, by the config file of the command.
SMALL_MODEL = [
  "--config.model.num_layers=1",
  "--config.model.width=32",
  "--config.model.num_heads=2",
  "--config.model.mlp_dim=64",
  "--config.model.max_length=512",
  "--config.tokenizer.name=bytes",
]
SMALL_RUN = [
  "--config.training.epochs=0",
  "--config.training.steps=2",
  "--config.training.batch_size=4",
  "--config.training.sequence_length=256",
]
PRETRAINING = SMALL_MODEL + SMALL_RUN
SMALL_CORPUS = ["--workers=1", "--config.tokenizer.vocab_size=100"]
OVERRIDES = {
  "pretrain_bert": PRETRAINING,
  "pretrain_gpt": PRETRAINING,
  "pretrain_t5": [*PRETRAINING, "--config.tokenizer.sentinels=100"],
  "reverse_words": SMALL_RUN,
  "prepare_wikipedia": SMALL_CORPUS,
  "prepare_text": SMALL_CORPUS,
  "prepare_web": [*SMALL_CORPUS, "--config.steps=('extract',)"],
}

# Pages whose commands are run, one after another in one folder.
RUN = (
  "README.md",
  "corpora.md",
  "classification.md",
  "questions.md",
  "chat.md",
  "preferences.md",
  "adding.md",
)
# Commands that need a network or other hardware, that wait at the terminal or take minutes.
NOT_RUN = re.compile(
  r"llm.show batch|hf:|tfds:|embedded:|gs://|:175b|v5p|v5e|--chat|quickstart|:alpaca|:reviews"
  r"|slurm|llm.study|llm.serve"
)


def smaller(command: list[str]) -> list[str]:
  """A command with the overrides of its config."""
  for argument in command:
    if argument.startswith("--config="):
      name = pathlib.Path(argument.removeprefix("--config=").partition(":")[0]).stem
      if command[0] == "llm.preflight":
        return command
      return [*command, *OVERRIDES.get(name, SMALL_RUN)]
  return command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
  """A folder with the files that the pages name."""
  folder = tmp_path_factory.mktemp("documented")
  for name in ("configs", "examples"):
    (folder / name).symlink_to(ROOT / name)
  documents = ["\n".join(sentences(i, 6)) for i in range(24)]
  (folder / "corpus").mkdir()
  (folder / "corpus" / "a.txt").write_text("\n\n".join(documents[:20]) + "\n")
  (folder / "held_out.txt").write_text("\n\n".join(documents[20:]) + "\n")
  (folder / "prompts.txt").write_text("the film\na joy\n")
  page = "<page><title>T</title><ns>0</ns><id>{}</id><revision><text>{}</text></revision></page>"
  articles = [
    page.format(i, f"{text} {text}".replace("\n", " ")) for i, text in enumerate(documents)
  ]
  (folder / "my_steps.py").write_text("def no_poems(document):\n  return True\n")
  (folder / "dumps").mkdir()
  (folder / "dumps" / "a.xml.bz2").write_bytes(bz2.compress("".join(articles).encode()))
  (folder / "crawl").mkdir()
  write_warc(folder / "crawl" / "a.warc.gz", documents)
  labelled = [{"text": s, "label": ("bad", "good")[i % 2]} for i, s in enumerate(sentences(1, 24))]
  questions = [
    {"id": str(i), "question": "What was it?", "answers": [{"text": "a joy", "answer_start": 4}]}
    for i in range(8)
  ]
  conversation = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Red."}]
  paragraph = {"context": "was a joy to watch", "qas": questions}
  squad = {"version": "1.1", "data": [{"title": "a", "paragraphs": [paragraph]}]}
  records = {
    "train": labelled,
    "eval": labelled[:8],
    "pairs_of_texts": [
      {"sentence1": r["text"], "sentence2": "x", "label": r["label"]} for r in labelled
    ],
    "conversations": [{"messages": conversation}] * 8,
    "held_out_conversations": [{"messages": conversation}] * 8,
    "pairs": [{"prompt": "Name a colour.", "chosen": "Red.", "rejected": "No."}] * 8,
    "targets": [{"text": r["text"], "target": r["label"]} for r in labelled],
  }
  for name, lines in records.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  for name in ("squad_train", "squad_dev"):
    (folder / f"{name}.json").write_text(json.dumps(squad))
  return folder


def write_warc(path: pathlib.Path, texts: list[str]):
  """A page of each text."""
  from warcio.statusandheaders import StatusAndHeaders
  from warcio.warcwriter import WARCWriter

  headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
  with open(path, "wb") as file:
    writer = WARCWriter(file, gzip=True)
    for number, text in enumerate(texts):
      page = f"<html><body><article><p>{text}</p></article></body></html>".encode()
      address = f"http://site/{number}"
      record = writer.create_warc_record(
        address, "response", payload=io.BytesIO(page), http_headers=headers
      )
      writer.write_record(record)


def python(arguments: list[str], folder: pathlib.Path, given: str = "") -> str:
  """What Python prints. given: its standard input."""
  done = subprocess.run(
    [sys.executable, *arguments],
    input=given,
    cwd=folder,
    env=ONE_DEVICE,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
  return done.stdout


def chosen() -> list[list[str]]:
  """The commands that are run, each once."""
  pages = {page.name: page for page in documented.PAGES}
  found = []
  for name in RUN:
    for command in documented.commands(pages[name]):
      if command not in found and not NOT_RUN.search(" ".join(command)):
        found.append(command)
  return found


@pytest.mark.slow
def test_commands_run_as_they_are_written(workplace):
  """On small settings, in the order of the pages; then the README's lines of Python."""
  commands = [smaller(command) for command in chosen()]
  python(["-m", "tests.documented", "run"], workplace, json.dumps(commands))
  (lines,) = documented.blocks(ROOT / "README.md", "python")
  losses = python(["-c", lines], workplace)
  assert len(re.findall(r"\d\.\d+", losses)) == len("The history of the film") - 1


@pytest.mark.slow
def test_the_notebook_of_two_phases(tmp_path):
  """Runs from the first cell to the last, in fewer steps, and no output is committed."""
  import nbclient
  import nbformat

  notebook = nbformat.read(ROOT / "examples" / "two_phases.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  for cell in notebook.cells:
    cell.source = cell.source.replace("training__steps=500", "training__steps=50")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("PRETUNE_CACHE", str(CACHE))
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):  # it trains for longer than it compiles
      patch.delenv(name, raising=False)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
  shown = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
  assert "pretrained" in shown and "bag of words" in shown
