"""Transfer: nothing happens that no rule names."""

import importlib.util
import pathlib

import numpy as np
import pytest

from llm import config as config_lib
from llm.checkpoints import transfer, vocabulary
from llm.config import ModelConfig, TransferConfig
from llm.core import UserError, unflatten
from llm.objectives import base


def tree(**leaves):
  return {name: np.full(shape, value, np.float32) for name, (shape, value) in leaves.items()}


def moved(new, old, **rules):
  return transfer.transfer(new, old, TransferConfig(**rules))


NEW = tree(a=((2, 3), 0.0), head=((3,), 0.0))


def test_every_parameter_is_accounted_for():
  old = tree(b=((2, 3), 1.0), head=((5,), 2.0), extra=((4,), 3.0))
  params, audit = moved(NEW, old, rename=("^b$=>a",), skip=("^head$", "^extra$"))
  assert (params["a"] == 1.0).all() and (params["head"] == 0.0).all()
  assert {(e.path, e.action, e.source) for e in audit} == {
    ("a", "renamed", "b"),
    ("head", "fresh", ""),
    ("head", "dropped", "head"),
    ("extra", "dropped", "extra"),
  }
  assert "1 renamed (6 parameters)" in transfer.table(audit)


def test_adapt_copies_the_overlap():
  params, audit = moved(tree(a=((4, 3), 0.0)), tree(a=((2, 5), 1.0)), adapt=("^a$",))
  assert params["a"].tolist() == [[1] * 3] * 2 + [[0] * 3] * 2 and audit[0].action == "resized"


@pytest.mark.parametrize(
  "old, rules, message",
  [
    (tree(a=((2, 3), 1.0)), {}, r"head \(3,\) is not in the checkpoint"),
    (tree(a=((2, 4), 1.0), head=((3,), 1.0)), {}, r"a has shape \(2, 3\) here and \(2, 4\)"),
    (
      tree(a=((2, 3), 1.0), head=((3,), 1.0), z=((1,), 1.0)),
      {},
      r"z \(1,\) of the checkpoint has no place",
    ),
    (
      tree(a=((2, 3), 1.0), head=((3,), 1.0)),
      {"skip": ("nothing",)},
      "skip='nothing' matches nothing",
    ),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"rename": ("q=>r",)}, "rename='q' matches nothing"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"adapt": ("a$",)}, r"adapt='a\$' matches nothing"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"skip": ("(",)}, "no regular expression"),
    (tree(a=((2, 3), 1.0), b=((2, 3), 1.0), head=((3,), 1.0)), {"rename": ("b=>a",)}, "both"),
    (tree(a=((2, 3), 1.0)), {"rename": (r"a=>\9",)}, "is no replacement by a regex"),
  ],
)
def test_what_no_rule_explains_stops_with_the_list(old, rules, message):
  with pytest.raises(UserError, match=message):
    moved(NEW, old, **rules)


def layers(values, width=3):
  return {
    "backbone": {
      "layers": {"mlp": {"kernel": np.stack([np.full((2, width), v, np.float32) for v in values])}}
    }
  }


def test_layers_are_addressed_one_by_one():
  """Every other layer of six, the last of four fresh, and what is left over dropped by name."""
  params, audit = moved(
    layers([0] * 4),
    layers([1, 2, 3, 4, 5, 6]),
    skip=("layers/3/", "layers/[135]-old/"),
    rename=(r"layers/([135])/=>layers/\1-old/", "layers/2/=>layers/1/", "layers/4/=>layers/2/"),
  )
  assert params["backbone"]["layers"]["mlp"]["kernel"][:, 0, 0].tolist() == [1, 3, 5, 0]
  assert sorted((e.path, e.action, e.source) for e in audit) == [
    ("backbone/layers/0/mlp/kernel", "copied", "backbone/layers/0/mlp/kernel"),
    ("backbone/layers/1/mlp/kernel", "dropped", "backbone/layers/1/mlp/kernel"),
    ("backbone/layers/1/mlp/kernel", "renamed", "backbone/layers/2/mlp/kernel"),
    ("backbone/layers/2/mlp/kernel", "renamed", "backbone/layers/4/mlp/kernel"),
    ("backbone/layers/3/mlp/kernel", "dropped", "backbone/layers/3/mlp/kernel"),
    ("backbone/layers/3/mlp/kernel", "fresh", ""),
    ("backbone/layers/5/mlp/kernel", "dropped", "backbone/layers/5/mlp/kernel"),
  ]


def test_layers_of_one_fate_share_a_line():
  _, audit = moved(layers([0] * 4), layers([1] * 4))
  assert transfer.table(audit) == "transfer    4 copied (24 parameters)" and len(audit) == 4
  _, skipped = moved(layers([0] * 4), layers([1] * 4), skip=(".",))
  assert "backbone/layers/0..3/mlp/kernel" in transfer.table(skipped)
  with pytest.raises(
    UserError, match=r"layers/4..5/mlp/kernel \(2, 3\) of the checkpoint has no place"
  ):
    moved(layers([0] * 4), layers([1] * 6))


class Words:
  """A tokenizer of whole words, lower-cased letters otherwise."""

  pad, unk, cls, sep, mask, eos = 0, 1, -1, -1, -1, -1

  def __init__(self, *words):
    self.pieces = ["<pad>", "<unk>", *words]

  def decode(self, ids):
    return " ".join(self.pieces[i] for i in ids)

  def encode(self, texts):
    known = {p: i for i, p in enumerate(self.pieces)}
    return [
      [known[text]] if text in known else [known.get(c, self.unk) for c in text] for text in texts
    ]


def test_another_vocabulary_is_matched_by_piece_and_text():
  old, new = Words("a", "b", "cat", "ab"), Words("cat", "ba", "zz", "b", "[", "a")
  found = vocabulary.match(new, old)
  assert found.rows == ((0,), (1,), (4,), (3, 2), (), (3,), (), (2,))
  fresh, loaded = np.full((8, 2), -1.0), np.arange(12.0).reshape(6, 2)
  rows = found.apply(fresh, loaded)
  assert (
    rows[2].tolist() == loaded[4].tolist()
    and rows[3].tolist() == ((loaded[2] + loaded[3]) / 2).tolist()
  )
  assert (rows[[4, 6]] == -1).all() and str(
    found
  ) == "5 rows from one piece, 1 from the mean of several, 2 fresh"


def test_a_new_vocabulary_keeps_the_logits_of_unchanged_pieces(tmp_path, corpus):
  """Bytes in another order: the same text has the same loss."""
  from llm.training import loop
  from tests.conftest import tiny

  model = "\n".join(
    [
      "[PAD]",
      "[UNK]",
      "[CLS]",
      "[SEP]",
      "[MASK]",
      *"abcdefghijklmnopqrstuvwxyz.",
      *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
  )
  (tmp_path / "old.txt").write_text(model + "\n")
  (tmp_path / "new.txt").write_text(
    "\n".join([*model.split("\n")[:5], *model.split("\n")[:4:-1]]) + "\n"
  )
  common = dict(
    tokenizer__name="wordpiece", data__eval=f"text:{corpus}", objective__next_sentence=False
  )
  first = loop.train(
    tiny("bert", f"text:{corpus}", tokenizer__path=str(tmp_path / "old.txt"), **common),
    tmp_path / "a",
  )
  moved_on = tiny(
    "bert",
    f"text:{corpus}",
    tokenizer__path=str(tmp_path / "new.txt"),
    transfer__checkpoint=str(tmp_path / "a"),
    transfer__vocabulary="match",
    training__steps=1,
    optimizer__learning_rate=1e-12,
    **common,
  )
  second = loop.train(moved_on, tmp_path / "b")
  # 10% of the masked tokens become a random piece, drawn by number: those differ, and no more.
  assert second["eval"]["mlm_loss"] == pytest.approx(first["eval"]["mlm_loss"], rel=0.05)
  audit = (tmp_path / "b" / "transfer.json").read_text()
  assert audit.count('"matched"') == 2 and "58 rows from one piece" in audit


@pytest.mark.parametrize(
  "name, pretraining",
  [
    ("bert", {"name": "masked_lm"}),
    ("modernbert", {"name": "masked_lm", "next_sentence": False}),
    ("electra", {"name": "replaced_token"}),
  ],
)
@pytest.mark.parametrize("task", ["classification", "qa"])
def test_the_fine_tuning_configs_fit_every_encoder(name, pretraining, task):
  """Their skip rules as they stand: nothing is missing, nothing is left over, no rule is idle."""
  path = pathlib.Path(__file__).parents[1] / "configs" / f"finetune_{task}.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = config_lib.freeze(module.get_config())
  model = ModelConfig(
    name=name,
    num_layers=1,
    width=16,
    num_heads=2,
    mlp_dim=32,
    vocab_size=40,
    max_length=32,
    dropout=0.0,
  )
  objective = base.build(config.objective).fit((), None)
  fresh, saved = (
    {path: np.zeros(shape) for path, shape in base.shapes(objective, model).items()}
    for objective in (objective, base.build(pretraining))
  )
  _, audit = transfer.transfer(unflatten(fresh), unflatten(saved), config.transfer)
  copied = {entry.path for entry in audit if entry.action == "copied"}
  assert {
    path for path in fresh if path.startswith("backbone/") and "/layers/" not in path
  } <= copied
