"""Chat templates in Jinja, rendered in a sandbox that lies in a process of its own.

The sandbox keeps a template from the files and the objects of the process. The process bounds its
time and memory: a template may come with somebody's checkpoint, and a short one can ask for an
endless loop or a text of ten gigabytes. This file imports no more than that process needs.
"""

import functools
from typing import Any

import jinja2
import jinja2.sandbox

from llm import bounded

# What all texts of one conversation may take.
SECONDS = 10.0
MEGABYTES = 256
MOST_CHARACTERS = 2**24


def _refuse(message: str):
  """Ends the rendering of a template that calls raise_exception, as those of transformers may."""
  raise jinja2.TemplateError(message)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  # Unoptimized: Jinja would compute constants while it compiles, however large.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, optimized=False
  )
  environment.globals["raise_exception"] = _refuse
  return environment


def fault(source: str) -> str:
  """What keeps a text from being a template, with its line; "" where it is one."""
  try:
    _environment().parse(source)
  except jinja2.TemplateSyntaxError as error:
    return f"line {error.lineno}: {error.message}"
  except RecursionError:
    return "it is nested too deep"
  return ""


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
  return _environment().from_string(source)


def _rendered(request: dict[str, Any]) -> list[str]:
  """The text of each of the contexts of a request, by its template. The process calls it."""
  template = _compiled(request["source"])
  texts = []
  for context in request["contexts"]:
    text = template.render(**context)
    if len(text) > MOST_CHARACTERS:
      raise MemoryError
    text.encode()  # raises where it has half of a surrogate pair, which no tokenizer takes
    texts.append(text)
  return texts


@functools.cache
def _worker() -> bounded.Worker:
  return bounded.Worker("llm.data.templates:_rendered", SECONDS, MEGABYTES)


def render(source: str, contexts: list[dict[str, Any]]) -> list[str]:
  """The texts of a template, one for each context: its variables by name.

  Raises bounded.Failed where the template raises, or takes more than SECONDS or MEGABYTES.
  """
  return _worker()({"source": source, "contexts": contexts})
