"""Bad input by grammar at every boundary: each case works or ends as a UserError of one line."""

import pytest

from tests import fuzz

# Cases of each boundary, fewer where one takes long. `python -m tests.fuzz` tries for long.
FEW = {"checkpoints": 8, "descriptions": 8, "published": 15, "templates": 20, "configs": 40}
NAMES = [
  "configs",
  "config programs",
  "arguments",
  "records",
  "templates",
  "predictions",
  "published",
  "checkpoints",
  "descriptions",
  "workdirs",
  "caches",
]


@pytest.fixture(scope="module")
def boundaries(corpus):
  return fuzz.boundaries(corpus)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_cases(name, boundaries, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # a broken cache folder is made here
  fuzz.run(boundaries[name], FEW.get(name, 30), 0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_good_works(name, boundaries, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert fuzz.is_kept(boundaries[name], boundaries[name].good)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_more_cases(name, boundaries, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  worked, refused = fuzz.run(boundaries[name], 3 * FEW.get(name, 30), 1)
  if name != "caches":  # what is damaged there is made again
    assert refused, "no case was bad: the grammar breaks nothing"


def test_every_boundary_is_tried(boundaries):
  assert list(boundaries) == NAMES
