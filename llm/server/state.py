"""What the server must not forget: keys, files, jobs, their events, and models, in SQLite.

Everything that was acknowledged is on the disk. Ids are unguessable, and every row has an owner:
whoever holds a key of that owner may see it.
"""

import contextlib
import json
import pathlib
import secrets
import sqlite3
import threading
import time
from typing import Any, Iterable, Iterator

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
  digest TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS files (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
  filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
  created_at INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
  status TEXT NOT NULL, created_at INTEGER NOT NULL, body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL,
  tag TEXT NOT NULL, created_at INTEGER NOT NULL, body TEXT NOT NULL, UNIQUE (job, tag)
);
CREATE TABLE IF NOT EXISTS models (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
  job TEXT NOT NULL, created_at INTEGER NOT NULL
);
"""
LISTED = ("files", "jobs", "events", "models")  # tables with `number` and `id`


def new_id(kind: str) -> str:
  """An id such as file-4f..., which nobody can guess."""
  return f"{kind}-{secrets.token_hex(12)}"


class State:
  """The database of a workdir. Any thread may use it."""

  def __init__(self, workdir: pathlib.Path):
    self.path = workdir / "state.sqlite"
    self._local = threading.local()
    self.db.executescript(SCHEMA)

  @property
  def db(self) -> sqlite3.Connection:
    """The connection of this thread. It commits every statement, or `with state.all_or_nothing`."""
    if not hasattr(self._local, "connection"):
      connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
      connection.row_factory = sqlite3.Row
      connection.execute("PRAGMA journal_mode=WAL")
      connection.execute("PRAGMA synchronous=FULL")
      self._local.connection = connection
    return self._local.connection

  @contextlib.contextmanager
  def all_or_nothing(self) -> Iterator[None]:
    """What this thread writes inside is written together, or where that fails not at all."""
    with self.db as connection:
      connection.execute("BEGIN IMMEDIATE")
      yield

  def insert(self, table: str, **columns: Any) -> int:
    """Adds a row, unless one of the same unique columns is there; says how many were added."""
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    statement = f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({marks})"
    return self.db.execute(statement, tuple(columns.values())).rowcount

  def rows(self, table: str, **where: Any) -> list[sqlite3.Row]:
    """The rows with these values, oldest first."""
    condition = " AND ".join(f"{name} = ?" for name in where) or "1"
    statement = f"SELECT * FROM {table} WHERE {condition} ORDER BY rowid"
    return self.db.execute(statement, tuple(where.values())).fetchall()

  def row(self, table: str, **where: Any) -> sqlite3.Row | None:
    """The row with these values, if there is one."""
    return next(iter(self.rows(table, **where)), None)

  def delete(self, table: str, **where: Any) -> int:
    """Deletes the rows with these values, and says how many there were."""
    condition = " AND ".join(f"{name} = ?" for name in where)
    return self.db.execute(f"DELETE FROM {table} WHERE {condition}", tuple(where.values())).rowcount

  def move(self, job: str, before: Iterable[str], after: str, **body: Any) -> bool:
    """Moves a job from one of the statuses `before` to `after`; False if it is in none of them.

    body: fields of the job that change with it.
    """
    before = tuple(before)
    statement = (
      "UPDATE jobs SET status = ?, body = json_patch(body, ?) "
      f"WHERE id = ? AND status IN ({', '.join('?' * len(before))})"
    )
    # json_patch would read null as "remove", so a field that is not set is left out.
    return self.db.execute(statement, (after, json.dumps(body), job, *before)).rowcount == 1

  def add_event(self, job: str, tag: str, message: str, level: str = "info", data: Any = None):
    """Adds an event of a job. The same tag is added once, however often it is told."""
    body = {"message": message, "level": level, "data": data}
    body["type"] = "message" if data is None else "metrics"
    self.insert(
      "events",
      id=new_id("ftevent"),
      job=job,
      tag=tag,
      created_at=int(time.time()),
      body=json.dumps(body),
    )
