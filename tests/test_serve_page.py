"""The page, in a headless Chromium."""

import os
import pathlib
import shutil

import pytest

from tests.serving import conversations, lines
from tests.test_serve import client, serving  # noqa: F401  the fixtures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# Where pictures of the page are wanted: a folder.
PICTURES = os.environ.get("PRETUNE_PICTURES", "")


pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here: apt-get install chromium"),
]


@pytest.fixture
def page(serving, client):  # noqa: F811
  """The page, opened with a key. No script on it may fail."""
  from playwright.sync_api import sync_playwright

  with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    faults = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(f"http://127.0.0.1:{serving.port}/")
    page.fill("#key", "sk-wrong")
    page.click("text=Open")
    page.wait_for_selector("#error:has-text('API key')")
    page.fill("#key", client.api_key)
    page.click("text=Open")
    yield page
    assert faults == []
    browser.close()


def test_the_page_starts_a_job_and_lets_two_models_answer(page, tmp_path):
  upload(page, tmp_path / "talk.jsonl", conversations(40))
  start_job(page)
  page.wait_for_selector("#job-name:has-text('succeeded')", timeout=120_000)
  assert page.locator("#curve polyline.train").count() == 1
  assert page.locator("#curve polyline.valid").count() == 1
  assert "successfully completed" in page.inner_text("#events")
  picture(page, "serving_job", "#job")
  ask(page)
  picture(page, "serving_chat", "main > section:first-child")


def test_the_page_starts_a_job_with_rewards(page, client, tmp_path):  # noqa: F811
  asked = {"messages": [{"role": "user", "content": "say it"}], "answer": "a"}
  upload(page, tmp_path / "prompts.jsonl", lines([asked] * 8))
  page.select_option("#base", "gpt")
  page.select_option("#training", label="prompts.jsonl")
  assert not page.is_visible("#reference")
  page.select_option("#method", "reinforcement")
  page.select_option("#compare", "rouge_l")
  page.fill("#rate", "0")
  page.click("#start button")
  page.wait_for_selector("#error:has-text('learning_rate_multiplier')")
  page.fill("#rate", "2.5")
  page.fill("#batch", "8")
  page.click("#start button")
  page.wait_for_selector("#curve text:has-text('train reward')", timeout=120_000)
  job = client.fine_tuning.jobs.list(limit=1).data[0]
  grader = job.method.reinforcement.grader
  assert (grader.type, grader.evaluation_metric) == ("text_similarity", "rouge_l")
  assert (grader.input, grader.reference) == ("{{sample.output_text}}", "{{item.answer}}")
  settings = job.method.reinforcement.hyperparameters
  assert (settings.batch_size, settings.learning_rate_multiplier) == (8, 2.5)
  page.click("#cancel")
  page.wait_for_selector("#job-name:has-text('cancelled')")


def test_the_page_starts_a_job_with_preferences(page, client, tmp_path):  # noqa: F811
  pair = {
    "input": {"messages": [{"role": "user", "content": "say it"}]},
    "preferred_output": [{"role": "assistant", "content": "a"}],
    "non_preferred_output": [{"role": "assistant", "content": "b"}],
  }
  upload(page, tmp_path / "pairs.jsonl", lines([pair] * 8))
  page.select_option("#base", "gpt")
  page.select_option("#training", label="pairs.jsonl")
  assert not page.is_visible("#beta")
  page.select_option("#method", "dpo")
  page.fill("#beta", "0.5")
  page.fill("#epochs", "50")
  page.click("#start button")
  page.wait_for_selector("#job-name:text-matches('queued|running')")
  job = client.fine_tuning.jobs.list(limit=1).data[0]
  assert job.method.dpo.hyperparameters.beta == 0.5
  page.click("#cancel")
  page.wait_for_selector("#job-name:has-text('cancelled')")


def upload(page, path: pathlib.Path, content: bytes):
  path.write_bytes(content)
  page.set_input_files("#file", path)
  page.click("text=Upload")
  page.wait_for_selector(f"#files td:has-text('{path.name}')")


def start_job(page):
  page.select_option("#base", "gpt")
  page.select_option("#training", label="talk.jsonl")
  page.select_option("#validation", label="talk.jsonl")
  page.fill("#epochs", "12")
  page.fill("#suffix", "page")
  page.click("#start button")


def ask(page):
  """Asks both models and points at a token of the second."""
  page.wait_for_selector(".side:nth-child(2) option:has-text(':page:')", state="attached")
  tuned = page.locator(".side:nth-child(2) option:has-text(':page:')").first
  page.locator("select.model").nth(0).select_option("gpt")
  page.locator("select.model").nth(1).select_option(tuned.get_attribute("value"))
  page.fill("#message", "say 1")
  page.fill("#tokens", "8")
  page.click("text=Send")
  page.locator("p.assistant[data-ended]").nth(1).wait_for()
  assert 1 <= page.locator(".side:nth-child(1) .token").count() <= 8
  page.locator(".side:nth-child(2) .token").first.hover()
  likely = page.inner_text("#likely").split("\n\n")
  assert len(likely[0].splitlines()) == 5 and "%" in likely[0]


def picture(page, name: str, selector: str):
  """Keeps a picture of a part of the page, with what lies over it."""
  if PICTURES:
    page.locator(selector).scroll_into_view_if_needed()
    page.screenshot(path=pathlib.Path(PICTURES) / f"{name}.png")
