"""Let a checkpoint write. A BERT fills masks instead.

One prompt:       python -m llm.generate --checkpoint=DIR --prompt="..."
                    [--temperature=0.8 --top_k=40 --top_p=0.95 --max_tokens=100]
A prompt a line:  python -m llm.generate --checkpoint=DIR --prompts=FILE
Likeliest tokens: python -m llm.generate --checkpoint=DIR --prompt="..." --explain
Side by side:     python -m llm.generate --checkpoint=DIR --compare=OTHER --prompt="..."
A conversation:   python -m llm.generate --checkpoint=DIR --chat
Masks:            python -m llm.generate --checkpoint=BERT --prompt="Paris is the [MASK] of France."
"""

import contextlib
import importlib
import math
from typing import Callable, Sequence

import tabulate
from absl import flags

import llm
from llm import command, models, reading
from llm.core import UserError, warn
from llm.data.tokenizer import Tokenizer
from llm.inference.filling import fill
from llm.inference.writer import Writer, Written
from llm.models.decoding import Sampling
from llm.objectives import base, chat
from llm.training.experiment import Bundle

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step, a folder of transformers or hf:ORG/NAME."
)
_COMPARE = flags.DEFINE_string("compare", None, "Another checkpoint, to write the same.")
_PROMPT = flags.DEFINE_string(
  "prompt", None, "The text to continue; for a BERT, a text with [MASK]."
)
_PROMPTS = flags.DEFINE_string("prompts", None, "A file with a prompt a line.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token at each step.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw from the likeliest tokens whose probabilities sum to p."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 100, "Tokens to write, at most.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text at which writing ends; may be repeated.")
_CHAT = flags.DEFINE_bool("chat", False, "A conversation at the terminal.")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Show the likeliest tokens at every step.")


def _sampling() -> Sampling:
  """How tokens are drawn. Raises UserError if a flag is out of its bounds."""
  if not 0 <= _TEMPERATURE.value < math.inf:
    raise UserError(f"--temperature={_TEMPERATURE.value} must be a number of at least 0")
  if _TOP_K.value < 0:
    raise UserError(f"--top_k={_TOP_K.value} must be at least 0")
  if not 0 < _TOP_P.value <= 1:
    raise UserError(f"--top_p={_TOP_P.value} must lie in (0, 1]")
  if not 0 <= _SEED.value < 2**32:
    raise UserError(f"--seed={_SEED.value} must lie in [0, 2**32)")
  if _MAX_TOKENS.value < 1:
    raise UserError(f"--max_tokens={_MAX_TOKENS.value} must be positive")
  if "" in _STOP.value:
    raise UserError("--stop must be a text: the empty one is everywhere")
  if not _TEMPERATURE.value:
    _warn_of_idle("where --temperature is 0", _TOP_K, _TOP_P)
  return Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)


def _warn_of_idle(where: str, *idle: flags.FlagHolder):
  """Warns of flags that are given where they change nothing."""
  for flag in idle:
    if flag.present:
      warn(f"--{flag.name} changes nothing {where}")


def _prompts() -> list[str]:
  """The prompt of --prompt, or those of the file of --prompts. Raises UserError."""
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise UserError("give either --prompt or --prompts, a file with a prompt a line")
  if _PROMPT.value is not None:
    return [_PROMPT.value]
  try:
    lines = reading.file_text(_PROMPTS.value or "").splitlines()
  except UserError as error:
    raise UserError(f"--prompts: {error}")
  prompts = [line for line in lines if line.strip()]
  if not prompts:
    raise UserError(f"--prompts={_PROMPTS.value} holds no prompt")
  return prompts


def _template(bundle: Bundle) -> chat.Template:
  """The chat template of a checkpoint, ready to render."""
  source = chat.template_of(base.build(bundle.config.objective), bundle.tokenizer)
  return chat.Template(source, bundle.tokenizer.special.get("bos", ""))


def _as_trained(bundle: Bundle, prompts: list[str]) -> Sequence[str | list[int]]:
  """The prompts in the form that a checkpoint was trained on.

  A checkpoint of chat gets the ids of a conversation that opens with the prompt; others the text.
  """
  if not base.build(bundle.config.objective).chat_template():
    return prompts
  template = _template(bundle)
  return [
    template.opening([{"role": "user", "content": prompt}], bundle.tokenizer) for prompt in prompts
  ]


def _chat(bundle: Bundle, sampling: Sampling):
  """Answers turns from the terminal until an empty line or the end of the input."""
  if not chat.template_of(base.build(bundle.config.objective), bundle.tokenizer):
    raise UserError(
      "--chat needs a checkpoint of configs/finetune_chat.py, or one that came with a chat "
      "template; --prompt continues any text"
    )
  template = _template(bundle)
  writer = Writer(bundle)
  turns = []
  print("(an empty line or Ctrl-D ends the conversation)")
  while message := _typed():
    turns.append({"role": "user", "content": message})
    (answer,) = writer.write(
      [template.opening(turns, writer.tokenizer)],
      _MAX_TOKENS.value,
      sampling,
      _SEED.value + len(turns),
      _STOP.value,
      on_progress=_printer(),
    )
    print()
    turns.append({"role": "assistant", "content": answer.text})


def _typed() -> str:
  """What the user types, with the line editing of a shell; "" at the end of the input."""
  with contextlib.suppress(ImportError):  # some systems lack it
    importlib.import_module("readline")  # `input` uses it once it is imported
  try:
    return input("> ")
  except EOFError:
    print()
    return ""


def _printer() -> Callable[[list[str]], None]:
  """A function that is called with a text as it grows, and prints what is new of it."""
  printed = 0

  def print_new(texts: list[str]):
    nonlocal printed
    print(texts[0][printed:], end="", flush=True)
    printed = len(texts[0])

  return print_new


def _fill_masks(bundle: Bundle, prompts: list[str]):
  """Prints the likeliest pieces for each [MASK] of each prompt."""
  for prompt in prompts:
    for number, candidates in enumerate(fill(bundle, prompt), 1):
      likeliest = ", ".join(f"{piece} {probability:.1%}" for piece, probability in candidates)
      print(f"mask {number}: {likeliest}")


def _print_written(written: Written, tokenizer: Tokenizer, prefix: str):
  """Prints a text and how it ended, and with --explain the likeliest tokens at every step."""
  print(f"{prefix}{written.text}\n  [{len(written.tokens)} tokens, ended by {written.ended}]")
  if not _EXPLAIN.value:
    return
  rows = []
  for step in written.choices:
    rows.append([f"{tokenizer.shown(token)} {probability:.1%}" for token, probability in step])
  print(tabulate.tabulate(rows, headers=("likeliest", "2nd", "3rd", "4th", "5th"), showindex=True))


def main():
  """Continues every prompt, by one checkpoint or by two side by side."""
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, a folder of transformers or hf:ORG/NAME"
    )
  sampling = _sampling()
  prompts = [] if _CHAT.value else _prompts()
  command.start_cpu()
  if _CHAT.value:
    _warn_of_idle("with --chat", _PROMPT, _PROMPTS, _COMPARE, _EXPLAIN)
    _chat(llm.load(_CHECKPOINT.value), sampling)
    return
  bundles = {name: llm.load(name) for name in (_CHECKPOINT.value, _COMPARE.value) if name}
  first = bundles[_CHECKPOINT.value]
  if models.facts(first.config.model).kind == "encoder":
    _warn_of_idle("for a BERT", _COMPARE, _EXPLAIN, _TEMPERATURE, _MAX_TOKENS, _SEED, _STOP)
    _fill_masks(first, prompts)
    return
  written = {}
  for name, bundle in bundles.items():
    writer = Writer(bundle)
    written[name] = writer.write(
      _as_trained(bundle, prompts), _MAX_TOKENS.value, sampling, _SEED.value, _STOP.value
    )
  for number, prompt in enumerate(prompts):
    print(f"prompt: {prompt}")
    for name, texts in written.items():
      prefix = f"{name}: " if _COMPARE.value else ""
      _print_written(texts[number], bundles[name].tokenizer, prefix)


if __name__ == "__main__":
  command.run(main)
