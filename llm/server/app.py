"""The server: its parts, its routes, and the page at /."""

import contextlib
import dataclasses
import pathlib
from typing import Any, AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

from llm.server import chat, completions, errors, files, fine_tuning, limits, listing, reading
from llm.server.catalog import Catalog
from llm.server.errors import ApiError
from llm.server.files import Files, Owner
from llm.server.state import State
from llm.server.supervisor import Supervisor

PAGE = pathlib.Path(__file__).parent / "page"
PAGES = {"/": "index.html", "/script.js": "script.js", "/style.css": "style.css"}
# The page runs its own script alone, and nobody may show it inside another page.
HEADERS = {
  "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
}


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much the server takes on.

  jobs: that run at once. slots: rows that a model writes at once. waiting: requests that may wait
  for a slot. models: in memory at once. upload: bytes of a file.
  """

  jobs: int = 1
  slots: int = 16
  waiting: int = 64
  models: int = 4
  upload: int = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Server:
  """What a workdir holds, and what is at work on it."""

  state: State
  files: Files
  catalog: Catalog
  supervisor: Supervisor


def open_server(workdir: pathlib.Path, served: dict[str, str], limits: Limits) -> Server:
  """The server of a workdir, whose jobs do not run yet."""
  workdir.mkdir(parents=True, exist_ok=True)
  state = State(workdir)
  uploads = Files(workdir, state)
  catalog = Catalog(workdir, state, served, limits.slots, limits.waiting, limits.models)
  return Server(state, uploads, catalog, Supervisor(workdir, state, uploads, limits.jobs))


def build(server: Server, most: Limits) -> FastAPI:
  """The application. Jobs run while it does."""

  @contextlib.asynccontextmanager
  async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    server.supervisor.start()
    yield
    server.supervisor.stop()
    server.catalog.close()

  app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
  app.state.server = server
  errors.add_handlers(app)
  app.add_middleware(limits.Limited, upload=most.upload)
  for part in (files, fine_tuning, chat, completions, reading):
    app.include_router(part.router)
  checked = listing.CHECKED
  app.add_api_route("/v1/models", list_models, methods=["GET"], dependencies=checked)
  app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
  app.add_api_route("/v1/models/{name:path}", delete_model, methods=["DELETE"])
  for path, name in PAGES.items():
    app.add_api_route(path, _page(name), methods=["GET"])
  return app


def _page(name: str) -> Any:
  """A route that gives a file of the page."""

  def get() -> FileResponse:
    return FileResponse(PAGE / name, headers=HEADERS)

  return get


def list_models(request: Request, owner: Owner) -> dict[str, Any]:
  models = request.app.state.server.catalog.listed(owner)
  return {"object": "list", "data": models}


def get_model(request: Request, owner: Owner, name: str) -> dict[str, Any]:
  for model in request.app.state.server.catalog.listed(owner):
    if model["id"] == name:
      return model
  raise errors.unknown("model", name, "model_not_found")


def delete_model(request: Request, owner: Owner, name: str) -> dict[str, Any]:
  server: Server = request.app.state.server
  if name in server.catalog.served:
    raise ApiError(f"{name} is served by --models and cannot be deleted here", "model", status=403)
  if not server.state.delete("models", id=name, owner=owner):
    raise errors.unknown("model", name, "model_not_found")
  server.catalog.forget(name)
  return {"id": name, "object": "model", "deleted": True}
