"""The floors: a file imports only from below. And every config key is read somewhere."""

import ast
import dataclasses
import pathlib
import re

from llm import config as config_lib
from llm import models

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLOORS = [
  ("core", "bounded", "blas"),
  ("storage",),
  ("reading",),
  ("config", "cache"),
  ("sharding",),
  ("models", "data"),
  ("rewards",),
  ("objectives",),
  ("checkpoints",),
  ("performance",),
  ("runs",),
  ("corpus",),
  ("training",),
  ("inference",),
  ("studies",),
  ("server",),
]


def floor_of(module: str) -> int:
  part = module.split(".")[1] if "." in module else ""
  for number, names in enumerate(FLOORS):
    if part in names:
      return number
  return len(FLOORS)  # the entry points


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{a.name}" for a in node.names)


def violations():
  for path in sorted((ROOT / "llm").rglob("*.py")):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = floor_of(module)
    for name in imports(path):
      if not name.startswith("llm."):
        continue
      there = floor_of(name)
      same_folder = name.split(".")[1] == module.split(".")[1]
      if there > here or there == here and not same_folder and here < len(FLOORS):
        yield f"{module} imports {name}"


def test_a_file_imports_only_from_below():
  assert list(violations()) == []


def test_models_and_data_do_not_know_each_other():
  for folder, other in (("models", "llm.data"), ("data", "llm.models")):
    for path in (ROOT / "llm" / folder).glob("*.py"):
      assert not [n for n in imports(path) if n.startswith(other)], path


# The import tables name architectures; so do the files of models/.
TABLES = ("models/", "checkpoints/families/", "checkpoints/gguf.py")


def sources_without_tables():
  for path in sorted((ROOT / "llm").rglob("*.py")):
    name = path.relative_to(ROOT / "llm").as_posix()
    if not name.startswith(TABLES):
      yield name, ast.parse(path.read_text())


def test_no_architecture_is_told_by_its_name():
  """No comparison, and no match, with the name of an architecture: facts are asked instead."""
  compared = [
    (name, node.lineno)
    for name, tree in sources_without_tables()
    for node in ast.walk(tree)
    if isinstance(node, ast.Compare | ast.MatchValue)
    and any(isinstance(n, ast.Constant) and n.value in models.NAMES for n in ast.walk(node))
  ]
  assert compared == []


def test_no_objective_is_asked_what_it_can_do():
  """No hasattr or getattr on an objective or its rows: what they can do is declared."""
  asked = [
    (name, node.lineno)
    for name, tree in sources_without_tables()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id in ("hasattr", "getattr")
    and {"objective", "rows", "saved"} & set(ast.unparse(node.args[0]).split("."))
  ]
  assert asked == []


def test_no_batch_is_read_to_learn_shapes():
  """`batches.read(0, ..)` is for training: shapes are those of batch_spec."""
  reads = [
    (name, node.lineno)
    for name, tree in sources_without_tables()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == "read"
    and any(isinstance(arg, ast.Constant) for arg in node.args)
  ]
  assert reads == []


def test_one_file_holds_the_private_names_of_jax():
  private = [
    (path.name, name)
    for path in sorted((ROOT / "llm").rglob("*.py"))
    for name in imports(path)
    if name.startswith("jax._")
  ]
  assert {path for path, _ in private} <= {"processes.py"}


def test_every_config_key_is_read():
  text = "\n".join(p.read_text() for p in (ROOT / "llm").rglob("*.py") if p.name != "config.py")
  for group, cls in config_lib.GROUPS.items():
    for field in dataclasses.fields(cls):
      if group == "mesh":
        continue  # axes are read by name
      assert re.search(rf"\.{field.name}\b|\"{field.name}\"", text), (
        f"nothing reads config.{group}.{field.name}"
      )
