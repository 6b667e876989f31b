"""Requests that are wrong in some way, for a server that must answer each with an error object."""

import http.client
import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

TALK = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
  "/v1/chat/completions": {"model": "gpt", "messages": TALK, "max_tokens": 1},
  "/v1/completions": {"model": "gpt", "prompt": "a", "max_tokens": 1},
  "/v1/embeddings": {"model": "bert", "input": "a"},
  "/v1/predict": {"model": "bert", "input": {"text": "a"}},
  # No file of that name: no job is made, whatever else is right.
  "/v1/fine_tuning/jobs": {"model": "gpt", "training_file": "file-none"},
}
KEYS = (
  "model messages prompt input max_tokens max_completion_tokens n stop stream stream_options seed "
  "temperature top_p logprobs top_logprobs echo suffix logit_bias tools response_format user store "
  "encoding_format dimensions method hyperparameters training_file validation_file metadata x"
).split()
TEXTS = st.text(max_size=12) | st.sampled_from(
  [
    "gpt",
    "bert",
    "",
    "\0",
    "../..",
    "\ud800",
    "{{7*7}}",
    "supervised",
    "auto",
    "a" * 5000,
    "ft:x:y",
  ]
)
LEAVES = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf")])
  | st.floats()
  | TEXTS
)
VALUES = st.recursive(
  LEAVES,
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "ids"]) | TEXTS, inner)
    | st.fixed_dictionaries({"role": st.just("user"), "content": inner}).map(lambda turn: [turn])
  ),
  max_leaves=6,
)
FOLDERS = [
  "/v1/files",
  "/v1/files/{}",
  "/v1/files/{}/content",
  "/v1/models/{}",
  "/v1/fine_tuning/jobs",
  "/v1/fine_tuning/jobs/{}",
  "/v1/fine_tuning/jobs/{}/events",
  "/v1/fine_tuning/jobs/{}/checkpoints",
  "/v1/fine_tuning/jobs/{}/cancel",
  "/v1/{}",
  "/{}",
]


class Malformed(NamedTuple):
  """One request."""

  method: str
  path: str
  body: bytes
  kind: str  # content type


@st.composite
def posts(draw) -> Malformed:
  """A body of a known route with a few values that do not belong there; or no JSON at all."""
  path = draw(st.sampled_from(sorted(BODIES)))
  body = dict(BODIES[path])
  for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
    body[key] = draw(VALUES)
  if isinstance(body.get("max_tokens"), int) and "completions" in path:
    body["max_tokens"] = min(body["max_tokens"], 1)  # what is right is answered, and quickly
  text = json.dumps(body).encode()
  if draw(st.integers(0, 9)) == 0:
    text = draw(st.binary(max_size=40) | st.sampled_from([b"", b"[" * 50_000, text[:-2], b"[1]"]))
  kind = draw(st.sampled_from(["application/json"] * 8 + ["text/plain", "multipart/form-data"]))
  return Malformed("POST", path, text, kind)


@st.composite
def uploads(draw) -> Malformed:
  """A form with a wrong file, a wrong purpose, or a wrong form."""
  name = draw(st.sampled_from(["a.jsonl", "../../a", "", "a\\b", "%00", "é" * 300]))
  purpose = draw(st.sampled_from(["fine-tune", "x", ""]))
  line = json.dumps(draw(VALUES)).encode()
  content = draw(st.binary(max_size=60) | st.just(line))
  boundary = draw(st.sampled_from([b"--b", b"--b", b"--c", b""]))
  disposition = f'form-data; name="file"; filename="{name}"'.encode()
  form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode()
  form += b"\r\n--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + content
  return Malformed(
    "POST", "/v1/files", form + b"\r\n" + boundary + b"--\r\n", "multipart/form-data; boundary=b"
  )


@st.composite
def gets(draw) -> Malformed:
  """A path or a query that does not exist."""
  escaped = st.sampled_from("ab0-_.~%2F%00%FF%ED%A0%80?&=;#:@/\\".replace("%", " %").split())
  name = "".join(draw(st.lists(escaped, max_size=6)))
  path = draw(st.sampled_from(FOLDERS)).format(name)
  query = draw(
    st.sampled_from(["", "?limit=0", "?limit=9e9", "?after=x", "?limit=%FF", "?stream=maybe"])
  )
  method = draw(st.sampled_from(["GET", "DELETE", "POST", "PUT", "PATCH"]))
  return Malformed(method, path.replace("#", "") + query, b"", "application/json")


REQUESTS = posts() | uploads() | gets()


def answer(
  connection: http.client.HTTPConnection, key: str, request: Malformed
) -> tuple[int, bytes]:
  """The (status, body) that the server answers."""
  headers = {"authorization": f"Bearer {key}", "content-type": request.kind}
  connection.request(request.method, request.path, request.body, headers)
  response = connection.getresponse()
  return response.status, response.read()


def check(status: int, body: bytes):
  """An answer is no fault of the server's, and an error is an error object."""
  assert status < 500 or status == 507, (status, body)
  if status >= 400:
    error = json.loads(body)["error"]
    assert isinstance(error["message"], str) and error["message"] and "param" in error
