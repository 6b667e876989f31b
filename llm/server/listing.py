"""Lists that page by cursor: `after` is the id of the last item seen, `limit` a page's size."""

import sqlite3
from typing import Any, Callable

from fastapi import Depends, Request

from llm.server.errors import ApiError
from llm.server.state import LISTED, State


def page(
  state: State,
  table: str,
  show: Callable[[sqlite3.Row], dict[str, Any]],
  after: str | None,
  limit: int,
  order: str = "desc",
  **where: Any,
) -> dict[str, Any]:
  """A page of the rows with these values, newest first. Raises ApiError on a wrong cursor."""
  assert table in LISTED
  conditions = [f"{name} = ?" for name in where]
  values = list(where.values())
  if after:
    last = state.row(table, id=after, **where)
    if last is None:
      raise ApiError(f"after={after!r} is not in this list", "after", "invalid_value")
    conditions.append("number < ?" if order == "desc" else "number > ?")
    values.append(last["number"])
  statement = (
    f"SELECT * FROM {table} WHERE {' AND '.join(conditions) or '1'} "
    f"ORDER BY number {'DESC' if order == 'desc' else 'ASC'} LIMIT ?"
  )
  rows = state.db.execute(statement, (*values, limit + 1)).fetchall()
  return of([show(row) for row in rows[:limit]], len(rows) > limit)


def check_query(request: Request):
  """A dependency of lists: raises ApiError where a parameter would be ignored, such as a filter."""
  known = {field.alias for field in request.scope["route"].dependant.query_params}
  for name in request.query_params:
    if name not in known:
      message = f"unknown or unsupported parameter: {name}"
      raise ApiError(message, name.partition("[")[0], "unsupported_parameter")


CHECKED = [Depends(check_query)]


def of(items: list[dict[str, Any]], has_more: bool = False) -> dict[str, Any]:
  """The items as OpenAI's client reads a list."""
  return {
    "object": "list",
    "data": items,
    "has_more": has_more,
    "first_id": items[0].get("id") if items else None,
    "last_id": items[-1].get("id") if items else None,
  }
