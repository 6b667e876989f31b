"""How long a request may be: its bytes are counted as they come, whatever its head says."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm.server import errors
from llm.server.errors import ApiError

BODY = 32 * 2**20  # bytes of a request that is no upload
OVERHEAD = 2**16  # bytes of a form around its file


class Limited:
  """Refuses a request whose body is too long. upload: bytes of a file."""

  def __init__(self, app: ASGIApp, upload: int):
    self.app = app
    self.upload = upload

  async def __call__(self, scope: Scope, receive: Receive, send: Send):
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    limit = self.upload + OVERHEAD if scope["path"] == "/v1/files" else BODY
    sizes = [value for name, value in scope["headers"] if name == b"content-length"]
    if sizes and sizes[0].isdigit() and int(sizes[0]) > limit:
      await errors.response(_too_long(limit))(scope, receive, send)
      return
    received = 0

    async def counted() -> Message:
      nonlocal received
      message = await receive()
      received += len(message.get("body", b""))
      if received > limit:
        raise _too_long(limit)
      return message

    await self.app(scope, counted, send)


def _too_long(limit: int) -> ApiError:
  message = f"the request is longer than {limit:,} bytes"
  return ApiError(message, code="request_too_large", status=413)
