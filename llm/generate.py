"""Let a checkpoint write; a BERT fills its masks.

python -m llm.generate --checkpoint=DIR --prompt="..." [--temperature=0.8 --top_k=40 --top_p=0.95 --max_tokens=100]
python -m llm.generate --checkpoint=DIR --prompts=FILE            (a prompt a line, written together)
python -m llm.generate --checkpoint=DIR --prompt="..." --explain  (the likeliest tokens at every step)
python -m llm.generate --checkpoint=DIR --compare=OTHER --prompt="..."
python -m llm.generate --checkpoint=DIR --chat                    (a conversation at the terminal)
python -m llm.generate --checkpoint=BERT --prompt="Paris is the [MASK] of France."
"""

import pathlib

import tabulate
from absl import flags

import llm
from llm import command, models
from llm.core import UserError
from llm.inference.filling import fill
from llm.inference.writer import Writer, Written
from llm.models.decoding import Sampling
from llm.objectives import base, chat
from llm.training.experiment import Bundle

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A workdir, a step, a folder of transformers, hf:ORG/NAME."
)
_COMPARE = flags.DEFINE_string("compare", None, "Another checkpoint, which writes beside it.")
_PROMPT = flags.DEFINE_string("prompt", None, "What is continued; of a BERT, a text with [MASK].")
_PROMPTS = flags.DEFINE_string("prompts", None, "A file with a prompt a line.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest; 0: from all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest that reach p together.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 100, "How many tokens at most.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text at which writing ends; may be given again.")
_CHAT = flags.DEFINE_bool("chat", False, "A conversation at the terminal.")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Show the likeliest tokens at every step.")


def _sampling() -> Sampling:
  if _TEMPERATURE.value < 0:
    raise UserError(f"--temperature={_TEMPERATURE.value} must be at least 0")
  if _TOP_K.value < 0:
    raise UserError(f"--top_k={_TOP_K.value} must be at least 0")
  if not 0 < _TOP_P.value <= 1:
    raise UserError(f"--top_p={_TOP_P.value} must lie in (0, 1]")
  if _MAX_TOKENS.value < 1:
    raise UserError(f"--max_tokens={_MAX_TOKENS.value} must be positive")
  return Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)


def _prompts() -> list[str]:
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise UserError("give either --prompt or --prompts, a file with a prompt a line")
  if _PROMPT.value is not None:
    return [_PROMPT.value]
  try:
    lines = pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts={_PROMPTS.value} cannot be read: {error}")
  if not (prompts := [line for line in lines if line.strip()]):
    raise UserError(f"--prompts={_PROMPTS.value} holds no prompt")
  return prompts


def _template(bundle: Bundle) -> chat.Template:
  """The chat template of a checkpoint, ready to render."""
  source = chat.template_of(base.build(bundle.config.objective), bundle.tokenizer)
  return chat.Template(source, bundle.tokenizer.special.get("bos", ""))


def _asked(bundle, prompts: list[str]) -> list:
  """Prompts as a checkpoint wants them: one of chat gets the ids of each as a user's turn of its template."""
  objective = base.build(bundle.config.objective)
  if not objective.chat_template():
    return prompts
  template = _template(bundle)
  return [
    template.opening([{"role": "user", "content": prompt}], bundle.tokenizer) for prompt in prompts
  ]


def _chat(bundle, sampling: Sampling):
  """Reads turns from the terminal and answers them, the text appearing as it is written; ends with the input."""
  if not chat.template_of(base.build(bundle.config.objective), bundle.tokenizer):
    raise UserError(
      "--chat needs a checkpoint of configs/finetune_chat.py, or one that came with a chat template; "
      "--prompt continues any text"
    )
  template, writer, turns = (
    _template(bundle),
    Writer(bundle),
    [],
  )
  print("(an empty line ends the conversation)")
  while asked := input("> "):
    turns.append({"role": "user", "content": asked})
    shown = 0

    def appear(texts):
      nonlocal shown
      print(texts[0][shown:], end="", flush=True)
      shown = len(texts[0])

    (answer,) = writer.write(
      [template.opening(turns, writer.tokenizer)],
      _MAX_TOKENS.value,
      sampling,
      _SEED.value + len(turns),
      _STOP.value,
      seen=appear,
    )
    print()
    turns.append({"role": "assistant", "content": answer.text})


def _show(written: Written, tokenizer, name: str):
  print(f"{name}{written.text}\n  [{len(written.tokens)} tokens, ended by {written.ended}]")
  if _EXPLAIN.value:
    rows = [[f"{tokenizer.pieces[i]} {odds:.1%}" for i, odds in step] for step in written.choices]
    print(
      tabulate.tabulate(rows, headers=("likeliest", "2nd", "3rd", "4th", "5th"), showindex=True)
    )


def main():
  """Writes after every prompt, one checkpoint or two side by side."""
  if not _CHECKPOINT.value:
    raise UserError(
      "--checkpoint is missing: a workdir of llm.train, a folder of transformers or hf:ORG/NAME"
    )
  sampling = _sampling()
  prompts = [] if _CHAT.value else _prompts()
  command.start_cpu()
  if _CHAT.value:
    return _chat(llm.load(_CHECKPOINT.value), sampling)
  bundles = {name: llm.load(name) for name in (_CHECKPOINT.value, _COMPARE.value) if name}
  if models.facts(bundles[_CHECKPOINT.value].config.model).kind == "encoder":
    for prompt in prompts:
      for number, found in enumerate(fill(bundles[_CHECKPOINT.value], prompt), 1):
        print(f"mask {number}: " + ", ".join(f"{piece} {odds:.1%}" for piece, odds in found))
    return
  written = {
    name: Writer(bundle).write(
      _asked(bundle, prompts), _MAX_TOKENS.value, sampling, _SEED.value, _STOP.value
    )
    for name, bundle in bundles.items()
  }
  for number, prompt in enumerate(prompts):
    print(f"prompt: {prompt}")
    for name, texts in written.items():
      _show(texts[number], bundles[name].tokenizer, f"{name}: " if _COMPARE.value else "")


if __name__ == "__main__":
  command.run(main)
