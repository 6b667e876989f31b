"""Bad input by grammar, as strategies of hypothesis: what parses and what does not, by one tree.

Each strategy begins with something good and breaks its structure in a few places, so that most
cases get past the first check and none looks like the next.
"""

import copy
import json

from hypothesis import strategies as st

NASTY_TEXTS = [
  "",
  " ",
  "\x00",
  "a\x00b",
  "\ud800",
  "x\udfffy",
  "\u2028",
  "\ufeff",
  "😀",
  "e\u0301" * 40,
  "a" * 5000,
  "../../etc/passwd",
  "/dev/zero",
  "{{ 1 }}",
  "%s%n",
  "(a+)+$",
  "nan",
  "1e999",
]
NASTY_NUMBERS = [
  0,
  -1,
  1,
  3,
  2**31,
  2**32,
  2**63,
  2**70,
  -(2**70),
  10**400,
  0.5,
  -0.5,
  1e308,
  float("inf"),
  float("-inf"),
  float("nan"),
]
leaves = st.one_of(
  st.none(),
  st.booleans(),
  st.sampled_from(NASTY_NUMBERS),
  st.sampled_from(NASTY_TEXTS),
  st.text(max_size=20),
  st.integers(),
)
values = st.recursive(
  leaves,
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


def places(tree, path=()):
  """The path of every node of a tree of dicts and lists, the root's first."""
  yield path
  items = ()
  if isinstance(tree, dict):
    items = tree.items()
  elif isinstance(tree, list):
    items = enumerate(tree)
  for key, value in items:
    yield from places(value, (*path, key))


@st.composite
def broken_trees(draw, trees):
  """A tree of JSON with one to three nodes replaced, removed, renamed or wrapped."""
  tree = copy.deepcopy(draw(trees))
  for _ in range(draw(st.integers(1, 3))):
    path = draw(st.sampled_from(list(places(tree))))
    if not path:
      tree = draw(st.one_of(st.just(tree), values))
      continue
    parent = tree
    for key in path[:-1]:
      parent = parent[key]
    how = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "rename"]))
    if how == "replace":
      parent[path[-1]] = draw(values)
    elif how == "wrap":
      wrap = draw(st.sampled_from([lambda node: [node], lambda node: {"a": node}, str]))
      parent[path[-1]] = wrap(parent[path[-1]])
    elif how == "remove":
      del parent[path[-1]]
    elif isinstance(parent, dict):
      parent[draw(st.text(max_size=6))] = parent.pop(path[-1])
  return tree


@st.composite
def broken_bytes(draw, contents):
  """Bytes with up to four places flipped, cut, doubled or filled with what parsers trip over."""
  data = bytearray(draw(contents))
  for _ in range(draw(st.integers(0, 4))):
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    how = draw(st.sampled_from(["flip", "cut", "end", "insert", "double"]))
    if how == "flip" and data:
      data[at] ^= draw(st.integers(1, 255))
    elif how == "cut":
      del data[at : at + draw(st.integers(1, 40))]
    elif how == "end":
      del data[at:]
    elif how == "double":
      data[at:at] = data[at : at + draw(st.integers(1, 40))]
    else:
      data[at:at] = draw(st.sampled_from(INSERTED))
  return bytes(data)


INSERTED = [
  b"\n",
  b"\x00",
  b'"',
  b"\xff",
  b"null",
  b"1e999",
  b"{}",
  b"\r",
  "\u2028".encode(),
  b"[" * 3000,
  b'{"a":' * 3000,
  b"\\ud800",
  b"9" * 5000,
]


def as_json(tree) -> bytes:
  """JSON as Python writes it: lone surrogates are escapes, infinities are words."""
  return json.dumps(tree).encode()


def json_files(tree):
  """The bytes of a JSON file that began as a tree."""
  return broken_bytes(broken_trees(st.just(tree)).map(as_json))


def json_lines(trees):
  """The bytes of a file of JSON lines: some as they should be, some broken."""
  line = st.one_of(st.sampled_from(trees), broken_trees(st.sampled_from(trees)))
  lines = st.lists(line.map(as_json), min_size=1, max_size=6)
  return broken_bytes(lines.map(lambda parts: b"\n".join([*map(as_json, trees), *parts])))


# Jinja: statements around expressions, among them those that never end or take all memory.
LITERALS = ["1", "10**9", "'x'", "[]", "{}", "none", "messages", "eos_token", "m.content", "a.b"]
FILTERS = ["upper", "length", "join", "list", "center(10**9)", "indent(10**8)", "tojson", "nosuch"]
expressions = st.recursive(
  st.sampled_from(LITERALS),
  lambda inner: st.one_of(
    st.builds("({} * {})".format, inner, inner),
    st.builds("({} ** {})".format, inner, inner),
    st.builds("({} ~ {})".format, inner, inner),
    st.builds("({}|{})".format, inner, st.sampled_from(FILTERS)),
    st.builds("range({})".format, inner),
    st.builds("lipsum(n={})".format, inner),
    st.builds("'%{}d' % {}".format, st.sampled_from(["", "3", "1000000000"]), inner),
    st.builds("({}).__class__".format, inner),
    st.builds("raise_exception({})".format, inner),
  ),
  max_leaves=4,
)
statements = st.recursive(
  st.builds("{{{{ {} }}}}".format, expressions)
  | st.sampled_from(["a", "\ud800", "\x00", "{%", "{#"]),
  lambda inner: st.one_of(
    st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, expressions, inner),
    st.builds("{{% if {} %}}{}{{% endif %}}".format, expressions, inner),
    st.builds("{{% set x = {} %}}{}".format, expressions, inner),
    st.builds("{{% macro f() %}}{}{{{{ f() }}}}{{% endmacro %}}{{{{ f() }}}}".format, inner),
    st.builds("{}{}".format, inner, inner),
  ),
  max_leaves=4,
)

# Config files: programs that raise, end, or return something else.
BODIES = [
  "return None",
  "return 3",
  "return {}",
  "return []",
  "import sys; sys.exit(3)",
  "raise SystemExit",
  "1 / 0",
  "raise ValueError('two\\nlines')",
  "raise BaseException",
  "raise OSError",
  "raise MemoryError",
  "import no_such_module",
  "from configs import pretrain_gpt; return pretrain_gpt.get_config('tiny')",
  "from configs import pretrain_gpt; return pretrain_gpt.get_config('no such')",
  "return get_config()",
  "yield",
]
config_programs = st.one_of(
  st.builds("def get_config():\n  {}\n".format, st.sampled_from(BODIES)),
  st.builds("def get_config(task):\n  {}\n".format, st.sampled_from(BODIES)),
  st.builds("{}\ndef get_config(): return 1\n".format, st.sampled_from(BODIES)),
  st.sampled_from(
    ["get_config = 3", "", "def get_config(:", "\x00", "x = '\ud800'", "\ufeffx = 1"]
  ),
)
