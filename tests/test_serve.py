"""The server, driven by OpenAI's official client over HTTP."""

import concurrent.futures
import http.client
import io
import json
import resource
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks import serving_faults
from llm.core import UserError
from llm.data import tokenizer as tokenizer_lib
from llm.data import tokenizer_training
from llm.inference.embedder import Embedder
from llm.inference.engine import Explained, Full
from llm.inference.growing_text import GrowingText
from llm.server import answers, chat, completions, errors, examples, fine_tuning
from llm.server import files as files_lib
from llm.server.catalog import Base, Catalog
from llm.server.errors import ApiError
from llm.server.state import State
from tests import malformed
from tests.serving import ROOT, Serving, conversations, environment, lines


@pytest.fixture(scope="session")
def serving(gpt_start, bert_start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("serving") / "state"
  running = Serving(
    workdir, f"gpt={gpt_start},bert={bert_start}", "--waiting=8", "--max_upload=1"
  ).start()
  yield running
  running.stop()


@pytest.fixture(scope="session")
def client(serving):
  """With a key that the command made."""
  command = [sys.executable, "-m", "llm.serve", "key", f"--workdir={serving.workdir}"]
  made = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
  return serving.client(made.stdout.strip())


def ended(client, job_id, seconds=120):
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    job = client.fine_tuning.jobs.retrieve(job_id)
    if job.status in ("succeeded", "failed", "cancelled"):
      return job
    time.sleep(0.2)
  raise AssertionError(f"{job_id} has not ended")


def test_from_upload_to_chat(client, serving):
  file = client.files.create(file=("talk.jsonl", conversations(8)), purpose="fine-tune")
  assert client.files.content(file.id).read() == conversations(8)
  job = client.fine_tuning.jobs.create(
    model="gpt",
    training_file=file.id,
    validation_file=file.id,
    suffix="short",
    seed=3,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
  )
  assert job.status == "validating_files" and job.seed == 3
  client.files.delete(file.id)  # the job has its own copy
  job = ended(client, job.id)
  assert job.status == "succeeded", job
  assert job.trained_tokens > 0 and job.hyperparameters.n_epochs == 2
  assert job.hyperparameters.batch_size >= 1  # was "auto"
  events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
  assert events[0].message == "The job has successfully completed"
  assert events[-1].message.startswith("Created") and any(e.type == "metrics" for e in events)
  table = client.files.content(job.result_files[0]).read().decode()
  assert table.startswith("step,train_loss") and "full_valid_loss" in table.splitlines()[0]
  stream = f"/fine_tuning/jobs/{job.id}/events?stream=true"
  told = client.get(stream, cast_to=httpx2.Response).text.split("\n\n")
  assert json.loads(told[0].removeprefix("data: "))["message"].startswith("Created")
  assert events[0].id in told[-3] and told[-2] == "data: [DONE]"
  checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
  assert checkpoints[0].metrics.train_loss > 0
  for model in (job.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint):
    answer = client.chat.completions.create(
      model=model, messages=[{"role": "user", "content": "say 1"}], max_tokens=5, temperature=0
    )
    assert answer.usage.completion_tokens <= 5 and answer.choices[0].finish_reason
  assert job.fine_tuned_model in [model.id for model in client.models.list()]
  assert client.models.retrieve(job.fine_tuned_model).owned_by == "default"
  other = serving.client(serving.key("another"))
  asked = {"model": job.fine_tuned_model, "messages": HELLO}
  assert error(other.chat.completions.create, **asked).code == "model_not_found"
  assert error(other.models.delete, model=job.fine_tuned_model).status_code == 404
  stream = client.chat.completions.create(**asked, max_tokens=60, stream=True)
  first = next(stream)
  assert client.models.delete(job.fine_tuned_model).deleted
  *_, last = [first, *stream]  # what is on its way comes to its end
  assert last.choices[0].finish_reason in ("stop", "length")
  assert error(client.chat.completions.create, **asked).code == "model_not_found"


def error(call, **asked):
  """The error that a call must end with."""
  with pytest.raises(openai.APIStatusError) as raised:
    call(**asked)
  return raised.value


HELLO = [{"role": "user", "content": "hello"}]


def test_a_stream_is_the_same_answer_in_pieces(client):
  asked = dict(model="gpt", messages=HELLO, max_tokens=12, temperature=1.2, seed=7, n=2)
  whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
  texts, tokens, last = ["", ""], [0, 0], None
  for chunk in client.chat.completions.create(
    **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
  ):
    last = chunk
    for choice in chunk.choices:
      texts[choice.index] += choice.delta.content or ""
      tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
  assert texts == [choice.message.content for choice in whole.choices]
  assert tokens == [len(choice.logprobs.content) for choice in whole.choices]
  assert last.usage == whole.usage and last.usage.completion_tokens >= sum(tokens)
  assert texts[0] != texts[1]


def test_completions_take_texts_and_ids(client):
  asked = dict(model="gpt", max_tokens=6, temperature=0, logprobs=2)
  by_text = client.completions.create(prompt=["ab", "the film"], **asked)
  by_ids = client.completions.create(prompt=[list(b"ab"), list(b"the film")], **asked)
  assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
  assert len(by_text.choices[0].logprobs.top_logprobs[0]) == 2
  streamed = client.completions.create(prompt="ab", **asked, stream=True)
  assert "".join(c.choices[0].text for c in streamed) == by_text.choices[0].text


def test_what_is_wrong_is_named(client):
  chat, jobs = client.chat.completions.create, client.fine_tuning.jobs
  for asked, param in [
    ({"temperature": 3}, "temperature"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "robot", "content": "hello"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{**HELLO[0], "weight": 0}]}, "messages"),
    ({"messages": [{**HELLO[0], "name": "Ann"}]}, "messages"),
    ({"model": "bert"}, "model"),
  ]:
    wrong = error(chat, **{"model": "gpt", "messages": HELLO, **asked})
    assert wrong.status_code == 400 and wrong.param == param, (asked, wrong.param)
  assert error(chat, model="no", messages=HELLO).code == "model_not_found"
  file = client.files.create(file=("talk.jsonl", conversations(2)), purpose="fine-tune").id
  for asked, param in [
    ({"model": "bert"}, "model"),
    ({"model": "no"}, None),
    ({"training_file": "../../etc/passwd"}, "training_file"),
    ({"suffix": "a/b"}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"method": {"type": "ppo"}}, "method.type"),
    ({"integrations": [{"type": "wandb"}]}, "integrations"),
    (
      {"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "python"}}}},
      "method.reinforcement.grader",
    ),
  ]:
    wrong = error(jobs.create, **{"model": "gpt", "training_file": file, **asked})
    assert wrong.status_code in (400, 404) and (wrong.param or "").startswith(param or ""), asked
  assert error(jobs.list, after="ftjob-none").param == "after"
  lists = client.files.list, jobs.list, client.models.list
  for call in lists:
    assert error(call, extra_query={"colour": "red"}).param == "colour"
    assert error(call, extra_query={"metadata": {"a": "b"}}).param == "metadata"
  for call in (jobs.list_events, jobs.checkpoints.list):
    wrong = error(call, fine_tuning_job_id="ftjob-none", extra_query={"order": "asc"})
    assert wrong.status_code == 400 and wrong.param == "order"
  assert error(jobs.cancel, fine_tuning_job_id="ftjob-none").status_code == 404
  assert error(client.post, path="/nothing", cast_to=object).status_code == 404


def test_messages_say_what_a_parameter_may_be(client):
  """All of its types, and of what is never used that it is not supported."""
  chat, jobs = client.chat.completions.create, client.fine_tuning.jobs
  for asked in (
    {"frequency_penalty": 1},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"store": True},
  ):
    wrong = error(chat, model="gpt", messages=HELLO, **asked)
    assert wrong.code == "unsupported_parameter" and "unsupported" in wrong.message, asked
  assert "at most 4" in error(chat, model="gpt", messages=HELLO, stop=["a"] * 5).message
  assert error(chat, model="gpt", messages=HELLO, temperature=-1).code == "invalid_value"
  file = client.files.create(file=("talk.jsonl", conversations(2)), purpose="fine-tune").id
  wrong = error(jobs.create, model="gpt", training_file=file, hyperparameters={"n_epochs": 0})
  assert "'auto' or" in wrong.message and "greater than" in wrong.message


def test_files_are_checked_line_by_line(client, serving):
  good = conversations(1)

  def upload(content, name="talk.jsonl", purpose="fine-tune"):
    return error(client.files.create, file=(name, content), purpose=purpose)

  for content, said in [
    (b"", "no line"),
    (good + b"{broken\n", "line 2 is no JSON"),
    (good + b"[" * 100_000 + b"\n", "line 2 is no JSON"),
    (good + b"\xff\xfe\n", "line 2 is no JSON"),
    (good + b"3\n", "line 2 must be a JSON object"),
    (lines([{"messages": []}]), "line 1: messages"),
    (lines([{"messages": [{"role": "user", "content": "\ud800"}]}]), "half a character"),
    (lines([{"input": {"messages": HELLO}, "preferred_output": []}]), "preferred_output"),
    (good * 3 + b"x\n" * 5, "and 2 more"),
  ]:
    wrong = upload(content)
    assert wrong.status_code == 400 and wrong.param == "file" and said in wrong.message, content[
      :90
    ]
  assert upload(good, purpose="assistants").param == "purpose"
  name = "../../../etc/passwd\0.jsonl"
  bomb = lines(
    [{"messages": [*HELLO, {"role": "assistant", "content": "{% for i in range(10**9) %}"}]}]
  )
  file = client.files.create(file=(name, bomb), purpose="fine-tune")
  stored = {path.name for path in (serving.workdir / "files").iterdir()}
  assert file.id in stored and all(name.startswith("file-") for name in stored)
  assert client.files.content(file.id).read() == bomb
  assert client.files.delete(file.id).deleted
  assert error(client.files.retrieve, file_id=file.id).status_code == 404


def test_an_answer_can_be_sent_back_as_the_client_has_it():
  """Its message has keys that hold nothing."""
  message = openai.types.chat.ChatCompletionMessage(role="assistant", content="a").model_dump()
  assert message["refusal"] is None and "tool_calls" in message
  (ours,) = examples.messages_of([{**message, "name": ""}], "messages")
  assert ours == {"role": "assistant", "content": "a"}
  for key in ("refusal", "tool_calls", "audio", "annotations", "function_call", "name"):
    with pytest.raises(UserError, match=f"message 1: {key} is not supported"):
      examples.messages_of([{**message, key: "something"}], "messages")
  with pytest.raises(UserError, match="weight is not supported"):
    examples.messages_of([{**message, "weight": 1}], "messages", learned=False)


WORDS = ["the cat sat on a mat", "a cat that sat", "at a mat"] * 9
VOCABULARIES = {
  "sentencepiece": lambda: tokenizer_lib.SentencePieceTokenizer(
    tokenizer_training.train_sentencepiece(WORDS, 300, lowercase=False)
  ),
  "bytes": tokenizer_lib.ByteTokenizer,
  "huggingface": lambda: tokenizer_lib.HuggingFaceTokenizer(
    tokenizer_lib.ByteTokenizer().definition()
  ),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_the_text_of_a_prompt_goes_on_with_its_space(kind):
  """As a completion does. An answer of a chat begins without one."""
  tokenizer = VOCABULARIES[kind]()
  ids = tokenizer.encode(["the cat sat"])[0]
  cut = len(tokenizer.encode(["the cat"])[0])
  for before, expected in ((ids[:cut], " sat"), ((), tokenizer.decode(ids[cut:]))):
    growing = GrowingText(tokenizer, (), before)
    text = "".join(growing.add(token) for token in ids[cut:]) + growing.end()
    assert text == expected and growing.count == len(ids) - cut


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_tokens_with_probabilities_are_the_text(kind):
  """Their texts with the spaces between words, their bytes with those of half characters."""
  tokenizer = VOCABULARIES[kind]()
  text = "the cat sat é on €a mat"
  growing = GrowingText(tokenizer)
  explained = []
  for token in tokenizer.encode([text])[0]:
    explained.append(Explained(token, -1.0, [(token, -1.0)], growing.recent))
    growing.add(token)
  told = answers.logprobs(tokenizer, explained)
  assert b"".join(bytes(one["bytes"]) for one in told).decode() == text
  assert "".join(one["token"] for one in told[: len("the")]).startswith("the")
  whole = [
    one["token"] for one in told if not one["token"].startswith("<") and one["bytes"] < [128]
  ]
  assert "".join(whole) == "the cat sat  on a mat"
  assert [one["token"] for one in told] == [one["top_logprobs"][0]["token"] for one in told]
  offsets = completions._logprobs(tokenizer, explained, 5)["text_offset"]
  starts = [offset for offset, one in zip(offsets, told) if one["token"].startswith((" ", "▁"))]
  assert [text[start - 5] for start in starts] == [" "] * len(starts) and len(starts) >= 5


def test_tokens_of_one_text_do_not_hide_each_other():
  tokenizer = VOCABULARIES["sentencepiece"]()
  ids = [tokenizer.pieces.index(piece) for piece in ("▁a", "a", "▁sat")]
  one = Explained(ids[0], -1.0, [(ids[0], -1.0), (ids[1], -2.0), (ids[2], -3.0)], ())
  told = completions._logprobs(tokenizer, [one], 0)
  assert told["tokens"] == ["a"]
  assert told["top_logprobs"] == [{"▁a": -1.0, "a": -2.0, "sat": -3.0}]


def test_a_prompt_that_is_surely_too_long_is_not_encoded():
  """To encode megabytes takes seconds. The talkers here could not."""
  talker = types.SimpleNamespace(max_length=4, tokenizer=None)
  text = "a" * 1025
  turns = [{"role": "user", "content": text[:1000]}, {"role": "user", "content": text[1000:]}]
  for call, asked in [(chat._opening, turns), (completions._encoded, ["a", text])]:
    with pytest.raises(ApiError, match="the prompt has 1025 characters; the model has 4") as raised:
      call(talker, asked)
    assert raised.value.code == "context_length_exceeded"
  embedder = types.SimpleNamespace(config=talker, tokenizer=None)
  with pytest.raises(UserError, match="a text has 1025 characters"):
    Embedder.embed(embedder, ["a", text])


def test_what_is_gone_meanwhile_is_not_found(tmp_path, monkeypatch):
  """A file between the look at its row and at its content, a checkpoint that a run removes."""
  state = State(tmp_path)
  files = files_lib.Files(tmp_path, state)
  row = files.add("me", "a.jsonl", "fine-tune", io.BytesIO(conversations(1)), check=True)
  files.path(row["id"]).unlink()
  supervisor = types.SimpleNamespace(workdir=lambda job: tmp_path / job)
  server = types.SimpleNamespace(files=files, state=state, supervisor=supervisor)
  request = types.SimpleNamespace(app=types.SimpleNamespace(state=types.SimpleNamespace()))
  request.app.state.server = server
  with pytest.raises(ApiError) as raised:
    files_lib.content(request, "me", row["id"])
  assert raised.value.status == 404
  with pytest.raises(ApiError) as raised:
    fine_tuning._keep(files, "me", row["id"], "training_file", tmp_path)
  assert raised.value.code == "file_not_found" and raised.value.param == "training_file"
  state.insert("jobs", id="job", owner="me", status="running", created_at=0, body="{}")
  kept, gone = tmp_path / "job/checkpoints/4", tmp_path / "job/checkpoints/2"
  kept.mkdir(parents=True)
  monkeypatch.setattr(fine_tuning.progress, "steps", lambda workdir: [kept, gone])
  listed = fine_tuning.checkpoints(request, "me", "job")
  assert [item["step_number"] for item in listed["data"]] == [4]


def test_a_model_that_loads_keeps_nobody_waiting(tmp_path):
  """Not those who ask for another model. Those who ask for the same one load it once."""
  catalog = Catalog(tmp_path, State(tmp_path), {"slow": "slow", "quick": "quick"}, 1, 1, 4)
  for name in ("slow", "quick"):
    (tmp_path / name).touch()
    catalog.bases[name] = Base(str(tmp_path / name), "decoder", 8, False)
  began, may_end, loaded = threading.Event(), threading.Event(), []

  def make(checkpoint):
    loaded.append(checkpoint)
    if checkpoint.endswith("slow"):
      began.set()
      assert may_end.wait(30)
    return object()

  catalog._make_talker = make
  with concurrent.futures.ThreadPoolExecutor() as pool:
    slow = [pool.submit(catalog.talker, "me", "slow") for _ in range(3)]
    assert began.wait(30)
    quick = pool.submit(catalog.talker, "me", "quick")
    try:
      assert quick.result(5)
    finally:
      may_end.set()
    assert slow[0].result() is slow[1].result() is slow[2].result()
  assert len(loaded) == 2


def test_of_a_file_of_broken_lines_little_is_kept(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"[" * 300 + b"\n" + b"x\n" * 100_000 + b'"' + b"a" * 2**26 + b'"\n')
  tracemalloc.start()
  with pytest.raises(UserError, match="line 3 is no JSON.*and 99999 more"):
    list(examples.read(path, examples.any_method))
  assert tracemalloc.get_traced_memory()[1] < 2**26
  tracemalloc.stop()
  path.write_bytes(conversations(1) + b'{"a": "' + b"a" * 2**24 + b'"}\n' + b"x\n")
  with pytest.raises(UserError, match="line 2 has more than 16,777,216 bytes; line 3 is no JSON"):
    list(examples.read(path, examples.any_method))


def test_lists_page_by_cursor(client):
  ids = [
    client.files.create(file=(f"{n}.jsonl", conversations(1)), purpose="fine-tune").id
    for n in range(3)
  ]
  assert [file.id for file in client.files.list(limit=2)][:3] == ids[::-1]
  assert [file.id for file in client.files.list(limit=1, order="asc")][-3:] == ids
  page = client.files.list(limit=1, after=ids[1])
  assert page.data[0].id == ids[0]


def test_a_key_sees_its_owners_things_alone(client, serving):
  other = serving.client(serving.key("other"))
  file = client.files.create(file=("mine.jsonl", conversations(1)), purpose="fine-tune").id
  job = client.fine_tuning.jobs.create(model="gpt", training_file=file).id
  client.fine_tuning.jobs.cancel(job)
  assert list(other.files.list()) == [] and list(other.fine_tuning.jobs.list()) == []
  assert error(other.files.content, file_id=file).status_code == 404
  assert error(other.files.delete, file_id=file).status_code == 404
  assert error(other.fine_tuning.jobs.create, model="gpt", training_file=file).param
  for call in ("retrieve", "cancel", "pause", "resume", "list_events"):
    wrong = error(getattr(other.fine_tuning.jobs, call), fine_tuning_job_id=job)
    assert wrong.status_code == 404
  assert error(serving.client("sk-wrong").files.list).code == "invalid_api_key"
  assert "sk-" not in (serving.workdir / "state.sqlite").read_bytes().decode("latin-1")


def test_an_encoder_embeds(client, bert_start):
  vectors = client.embeddings.create(model="bert", input=["a film", "a story that ends", "a film"])
  first, second, third = (item.embedding for item in vectors.data)
  assert len(first) == 32 and first == third and first != second
  assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
  as_numbers = client.embeddings.create(model="bert", input="a film", encoding_format="float")
  assert as_numbers.data[0].embedding == pytest.approx(first, abs=1e-5)
  assert error(client.embeddings.create, model="gpt", input="a").param == "model"
  wrong = error(client.post, path="/predict", cast_to=object, body={"model": "bert", "input": {}})
  assert wrong.status_code == 400


def test_too_much_at_once_is_told(client, serving):
  """What could never fit is the client's fault; what may fit later is told so."""
  wrong = error(
    client.completions.create, model="gpt", prompt=["a"] * 64, max_tokens=100, n=2, stream=False
  )
  assert wrong.status_code == 400 and "128 answers" in wrong.message and "24" in wrong.message
  busy = errors.response(errors.of_exception(Full("9 requests wait already")))
  assert busy.status_code == 429 and busy.headers["retry-after"]
  answer = client.completions.create(model="gpt", prompt="a", max_tokens=1)
  assert answer.usage.completion_tokens == 1


def test_no_malformed_request_is_a_fault_of_the_server(serving):
  key = serving.key("fuzz")
  connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=60)

  @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
  @given(malformed.REQUESTS)
  def ask(request):
    malformed.check(*malformed.answer(connection, key, request))

  ask()


def test_an_upload_that_is_too_long_is_refused(serving, client):
  """By what its head says, and where the head says nothing by what comes."""
  url = ("127.0.0.1", serving.port)
  for head in (b"content-length: 99000000000\r\n", b"transfer-encoding: chunked\r\n"):
    with socket.create_connection(url, timeout=60) as connection:
      form = b"content-type: multipart/form-data; boundary=b\r\n"
      connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: x\r\n" + form + head + b"\r\n")
      if b"chunked" in head:
        start = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        try:
          for part in (start, *[b"x" * 2**20] * 3):
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        except OSError:  # the server has answered and closed
          pass
      assert b" 413 " in connection.recv(100)
  assert not list((serving.workdir / "files").glob("*.tmp"))


def test_a_full_disk_takes_nothing_and_breaks_nothing(serving, client):
  """A limit on the size of files stands for the disk."""
  _, hard = resource.prlimit(serving.process.pid, resource.RLIMIT_FSIZE)
  before = sorted((serving.workdir / "files").iterdir())
  resource.prlimit(serving.process.pid, resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    wrong = error(client.files.create, file=("a.jsonl", conversations(3_000)), purpose="fine-tune")
  finally:
    resource.prlimit(serving.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
  assert wrong.status_code == 507 and wrong.code == "insufficient_storage"
  assert sorted((serving.workdir / "files").iterdir()) == before
  assert client.files.create(file=("a.jsonl", conversations(3)), purpose="fine-tune").id


@pytest.mark.slow
def test_preferences_are_learned_and_a_job_that_was_paused_goes_on(client, serving):
  answers = [{"role": "assistant", "content": text} for text in ("aaa", "bbb")]
  line = {"input": {"messages": HELLO}, "preferred_output": answers[:1]}
  content = lines([{**line, "non_preferred_output": answers[1:]}] * 8)
  file = client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
  method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 3}}}
  jobs = client.fine_tuning.jobs
  job = jobs.create(model="gpt", training_file=file.id, validation_file=file.id, method=method)
  while jobs.retrieve(job.id).status != "running":
    time.sleep(0.1)
  assert jobs.pause(job.id).status == "paused"
  assert error(jobs.pause, fine_tuning_job_id=job.id).code == "wrong_status"
  time.sleep(1)
  assert jobs.retrieve(job.id).status == "paused"
  assert jobs.resume(job.id).status == "queued"
  job = ended(client, job.id)
  assert job.status == "succeeded" and job.method.dpo.hyperparameters.beta == 0.2
  table = client.files.content(job.result_files[0]).read().decode()
  assert "train_margin" in table.splitlines()[0]
  resolved = json.loads((serving.workdir / "jobs" / job.id / "run" / "resolved.json").read_text())
  assert resolved["training"]["keep_best"] == "min:loss"


@pytest.mark.slow
def test_rewards_are_learned_and_the_model_is_served(client):
  """The grader of each line is its own: half of the prompts want an a, the others a b."""
  talks = [
    {"messages": [{"role": "user", "content": letter * 3}], "wanted": {"letter": letter}}
    for letter in "ab" * 16
  ]
  file = client.files.create(file=("prompts.jsonl", lines(talks)), purpose="fine-tune")
  grader = {
    "type": "string_check",
    "name": "has the letter",
    "input": "{{sample.output_text}}",
    "reference": "{{item.wanted.letter}}",
    "operation": "like",
  }
  faster = {"n_epochs": 6, "batch_size": 8, "learning_rate_multiplier": 1_000.0}
  method = {"grader": grader, "hyperparameters": faster}
  job = client.fine_tuning.jobs.create(
    model="gpt",
    training_file=file.id,
    seed=1,
    method={"type": "reinforcement", "reinforcement": method},
  )
  job = ended(client, job.id)
  assert job.status == "succeeded", job
  assert job.method.reinforcement.grader.operation == "like" and job.trained_tokens > 0
  told = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
  rewards = [event.data["train_reward"] for event in told if event.type == "metrics"][::-1]
  assert len(rewards) == 24 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
  table = client.files.content(job.result_files[0]).read().decode()
  assert "train_reward" in table.splitlines()[0] and len(table.splitlines()) == 25
  answer = client.chat.completions.create(
    model=job.fine_tuned_model, messages=talks[0]["messages"], max_tokens=40, seed=1, n=4
  )
  assert any("a" in choice.message.content for choice in answer.choices)
  grader = {**grader, "reference": "{{item.nothing}}"}
  method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
  job = client.fine_tuning.jobs.create(model="gpt", training_file=file.id, method=method)
  job = ended(client, job.id)
  assert job.status == "failed" and "line 1 has no field 'nothing'" in job.error.message
  assert job.error.param == "training_file"


@pytest.mark.slow
def test_a_workdir_has_one_server(serving):
  second = Serving(serving.workdir, "")
  with pytest.raises(AssertionError, match="error: another run is at work in"):
    second.start()


@pytest.mark.slow
def test_a_killed_server_loses_nothing_and_its_jobs_end_as_if_undisturbed(gpt_start, tmp_path):
  outcome = serving_faults.kill(tmp_path, gpt_start, 2, 0)
  counted = {name: outcome.pop(name) for name in ("kills", "files", "jobs")}
  assert counted["jobs"] == 1 and not any(outcome.values()), outcome
