"""Transfer: nothing happens that no rule names."""
import numpy as np
import pytest

from llm.checkpoints import transfer
from llm.config import TransferConfig
from llm.core import UserError


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
      ("a", "renamed", "b"), ("head", "fresh", ""), ("head", "dropped", "head"), ("extra", "dropped", "extra")}
  assert "1 renamed (6 parameters)" in transfer.table(audit)


def test_adapt_copies_the_overlap():
  params, audit = moved(tree(a=((4, 3), 0.0)), tree(a=((2, 5), 1.0)), adapt=("^a$",))
  assert params["a"].tolist() == [[1] * 3] * 2 + [[0] * 3] * 2 and audit[0].action == "resized"


@pytest.mark.parametrize("old, rules, message", [
    (tree(a=((2, 3), 1.0)), {}, r"head \(3,\) is not in the checkpoint"),
    (tree(a=((2, 4), 1.0), head=((3,), 1.0)), {}, r"a has shape \(2, 3\) here and \(2, 4\)"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0), z=((1,), 1.0)), {}, r"z \(1,\) of the checkpoint has no place"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"skip": ("nothing",)}, "skip='nothing' matches nothing"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"rename": ("q=>r",)}, "rename='q' matches nothing"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"adapt": ("a$",)}, r"adapt='a\$' matches nothing"),
    (tree(a=((2, 3), 1.0), head=((3,), 1.0)), {"skip": ("(",)}, "no regular expression"),
    (tree(a=((2, 3), 1.0), b=((2, 3), 1.0), head=((3,), 1.0)), {"rename": ("b=>a",)}, "both"),
])
def test_what_no_rule_explains_stops_with_the_list(old, rules, message):
  with pytest.raises(UserError, match=message):
    moved(NEW, old, **rules)
