"""The loss covers the assistant's tokens alone, for any template that goes turn by turn."""

import dataclasses
import json

import numpy as np
import pytest

from llm.checkpoints import manager
from llm.config import DataConfig, ModelConfig
from llm.core import UserError
from llm.data import sources
from llm.data import tokenizer as tokenizer_lib
from llm.objectives import base, chat
from llm.training.experiment import prepare, without_data
from tests.conftest import tiny

BYTES, GPT = tokenizer_lib.ByteTokenizer(), ModelConfig(name="gpt")
CHATML = (
  "{% for message in messages %}"
  "<|im_start|>{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
  "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
  "{% elif message.role == 'assistant' %} {{ message.content }} {{ eos_token }}"
  "{% else %}<<SYS>>{{ message.content }}<</SYS>>"
  "{% endif %}{% endfor %}"
)
TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi?"},
  {"role": "assistant", "content": "Yes.", "weight": 0},
  {"role": "user", "content": "Né 東?"},
  {"role": "assistant", "content": "Ünd so."},
  {"role": "user", "content": "more"},
  {"role": "assistant", "content": "No.\n\nNever."},
]


def source_of(path, *records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return sources.parse(f"jsonl:{path}", DataConfig())[0]


def rows_of(source, length=256, **more):
  return chat.Objective(**{"template": chat.TEMPLATE, **more}).rows(
    source, BYTES, DataConfig(), GPT, length
  )


def learned(example):
  """What bears loss, decoded, with | for the end token: one text a run of tokens."""
  runs, previous = [], -2
  for at in np.flatnonzero(example["weights"]):
    if at != previous + 1:
      runs.append([])
    runs[-1].append(example["targets"][at])
    previous = at
  return [
    "|".join(
      BYTES.decode(part) for part in np.split(np.array(r), np.flatnonzero(np.array(r) == BYTES.eos))
    )
    for r in runs
  ]


def test_a_text_cannot_end_a_turn():
  """The character that stands for the end token while a template renders is in no message."""
  template = chat.Template(chat.TEMPLATE)
  turns = [{"role": "user", "content": f"a{chat.END}b"}]
  assert template.opening(turns, BYTES) == list(b"### Instruction:\nab\n\n### Response:\n")


@pytest.mark.parametrize(
  "template, around", [(chat.TEMPLATE, "{}|"), (CHATML, "{}|"), (LLAMA2, " {} |")]
)
def test_the_assistants_tokens_alone_are_learned(template, around, tmp_path):
  rows = rows_of(source_of(tmp_path / "a.jsonl", {"messages": TALK}), 512, template=template)
  example = rows.example(0, None)
  assert learned(example) == [
    around.format(t["content"]) for t in TALK if t["role"] == "assistant" and t.get("weight", 1)
  ]
  whole = chat.Template(template).render(TALK).replace(chat.END, "")
  used = example["segments"] > 0
  assert BYTES.decode([*example["tokens"][used], example["targets"][used][-1]]) == whole
  assert (example["targets"][used][:-1] == example["tokens"][used][1:]).all()


def test_a_mask_that_is_dropped_is_seen(tmp_path):
  """The same conversation with every weight on gives another loss: the test above would notice."""
  rows = rows_of(source_of(tmp_path / "a.jsonl", {"messages": TALK}), 512)
  example = rows.example(0, None)
  everything = {**example, "weights": (example["segments"] > 0).astype(np.float32)}
  losses = {"losses": np.random.default_rng(0).random((1, 512)), "correct": np.zeros((1, 512))}

  def value(e):
    return float(
      chat.Objective().loss(
        losses, {k: v[None] for k, v in e.items()}, {"tokens": e["weights"].sum()}
      )[0]
    )

  assert value(example) != pytest.approx(value(everything), rel=1e-3) and "".join(
    learned(everything)
  ) not in learned(example)


def test_conversations_are_packed_whole_and_cut_by_turns_from_the_left(tmp_path):
  short = [
    {"instruction": f"say {n}", "input": "" if n % 2 else "it", "output": str(n) * 3}
    for n in range(9)
  ]
  endless = {
    "messages": [
      m
      for n in range(6)
      for m in (
        {"role": "user", "content": f"ask {n}" * 4},
        {"role": "assistant", "content": f"tell {n}" * 3},
      )
    ]
  }
  never = {
    "messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
  }
  rows = rows_of(source_of(tmp_path / "a.jsonl", *short, endless, never), 200)
  said = [text for i in range(len(rows)) for text in learned(rows.example(i, None))]
  kept = [t for t in said if t.startswith("tell")]
  assert sorted(t for t in said if not t.startswith("tell")) == sorted(
    str(n) * 3 + "|" for n in range(9)
  )
  assert 0 < len(kept) < 6 and kept == [f"tell {n}" * 3 + "|" for n in range(6)][-len(kept) :]
  assert rows.note.startswith("10 conversations in") and rows.note.endswith(
    "1 lost their first turns, 1 left out as too long"
  )
  assert "it" in chat.conversation(short[0])[0]["content"] and len(rows) < 10


@pytest.mark.parametrize(
  "record, message",
  [
    ({"messages": TALK[:2]}, "a.jsonl:1: the conversation has no assistant turn"),
    (
      {"messages": [{"role": "robot", "content": "x"}]},
      "message 1 has the unknown role 'robot'; known: system, user, assistant",
    ),
    (
      {"messages": [{"role": "user"}]},
      "message 1 must be an object with the texts role and content",
    ),
    ({"messages": "hello"}, "messages must be a list"),
    ({"instruction": "x"}, "expected `messages`, or the texts"),
    (
      {"messages": [{"role": "assistant", "content": "x", "weight": 2}]},
      "weight 2; it must be 0 or 1",
    ),
    (
      {"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y"}]},
      "no conversation fits",
    ),
  ],
)
def test_conversations_that_cannot_be_learned_are_said(record, message, tmp_path):
  with pytest.raises(UserError, match=message):
    rows_of(source_of(tmp_path / "a.jsonl", record))


@pytest.mark.parametrize(
  "template, message",
  [
    ("{% for %}", "is no Jinja template"),
    ("{{ messages[99].content.missing.deep }}", "does not render"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not render: SecurityError"),
    (
      "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
      "one after another",
    ),
  ],
)
def test_templates_do_nothing_but_render(template, message, tmp_path):
  with pytest.raises(UserError, match=message):
    rows_of(source_of(tmp_path / "a.jsonl", {"messages": TALK[1:]}), template=template)


@pytest.mark.parametrize("kind", ["chat", "preference", "grpo"])
def test_a_run_takes_the_template_that_its_start_was_trained_with(
  kind, gpt_start, tmp_path, monkeypatch
):
  """And its own where it names one."""
  described = manager.describe(manager.find(gpt_start))

  def describe(step):
    objective = {**base.defaults("chat"), "template": CHATML}
    return dataclasses.replace(
      described, config=dataclasses.replace(described.config, objective=objective)
    )

  monkeypatch.setattr(manager, "describe", describe)
  for template, expected in (("", CHATML), (chat.TEMPLATE, chat.TEMPLATE)):
    config = tiny("gpt", f"jsonl:{tmp_path}/a.jsonl", transfer__checkpoint=str(gpt_start))
    objective = {**base.defaults(kind), "template": template}
    experiment = without_data(dataclasses.replace(config, objective=objective))
    assert experiment.objective.chat_template() == expected
    assert experiment.config.objective["template"] == expected


def test_rows_of_a_run_on_a_checkpoint_have_no_more_tokens_than_its_positions(gpt_start, tmp_path):
  """So the configs serve small models too. From scratch it is an error (tests/test_commands.py)."""
  source = source_of(tmp_path / "a.jsonl", {"messages": TALK[1:3] + TALK[3:5]})
  config = tiny(
    "gpt", source.spec, transfer__checkpoint=str(gpt_start), training__sequence_length=512
  )
  config = dataclasses.replace(config, objective=base.defaults("chat"))
  said = []
  training = prepare(config, say=said.append)
  assert training.config.training.sequence_length == 64
  assert training.batches.rows[0].example(0, None)["tokens"].shape == (64,)
  assert any("rows        of 64 tokens, not 512" in line for line in said)
  assert without_data(config, say=said.append).config.training.sequence_length == 64
