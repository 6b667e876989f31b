"""A checkpoint that answers conversations, many at once."""

from llm.inference.engine import Engine
from llm.inference.writer import Writer
from llm.objectives import base, chat
from llm.training.experiment import Bundle


class Talker:
  """A decoder with its chat template: the checkpoint's, or else that of llm/objectives/chat.py."""

  def __init__(self, bundle: Bundle, rows: int, waiting: int):
    self.tokenizer = bundle.tokenizer
    self.max_length = bundle.config.model.max_length
    source = chat.template_of(base.build(bundle.config.objective), bundle.tokenizer)
    bos = bundle.tokenizer.special.get("bos", "")
    self.template = chat.Template(source or chat.TEMPLATE, bos)
    self.engine = Engine(Writer(bundle), rows, waiting)

  def opening(self, messages: list[dict]) -> list[int]:
    """The ids of a conversation, up to where the assistant begins its answer."""
    return self.template.opening(messages, self.tokenizer)
