"""The chat page in a headless Chromium, as people have it before them.

Skipped where chromium or playwright is not installed: `apt-get install chromium`, `pip install playwright`.
"""

import re
import shutil
from pathlib import Path

import pytest

from evaluation_mmer.demo import recipe as lab_recipe
from evaluation_mmer.demo import samples
from mmer import merge
from tests import tiny_world
from tests.chat_server import ChatServer
from tests.test_chat_page import files  # noqa: F401

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
# a container has no sandbox of its own; a made-up microphone; 3-D without a graphics card
OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
OPTIONS += ["--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS) as started:
            yield started


class Page:
    """What a person does on the page. `strangers` are the other hosts that it asked for something."""

    def __init__(self, browser, url, seconds):
        self.page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        self.page.set_default_timeout(seconds * 1000)
        self.strangers, self.crashes = set(), []
        host = url.removeprefix("http://")
        self.page.on("request", lambda asked: None if host in asked.url else self.strangers.add(asked.url[:60]))
        self.page.on("pageerror", lambda error: self.crashes.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#box textarea")

    def attach(self, *paths):
        self.page.set_input_files("#box input[type=file]", [str(path) for path in paths])
        self.wait_for_files(len(paths))

    def wait_for_files(self, count: int):
        """Beside what is attached stands a button for more."""
        self.page.wait_for_function(
            f"document.querySelectorAll('#box [data-testid=container_el] > *').length > {count}"
        )

    def ask(self, text, *paths, route=None) -> str:
        """The answer, or the message that stands in its place."""
        before = self.answers().count()
        if route:
            self.page.locator("#route").get_by_text(route, exact=True).click()
        if paths:
            self.attach(*paths)
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")
        return self.next_answer(before)

    def next_answer(self, before: int) -> str:
        self.page.wait_for_function(
            f"document.querySelectorAll('#chat [data-testid=bot]').length > {before}"
            " && document.querySelector('#box .submit-button')"
            " && (document.querySelector('#wrote')"
            "     || document.querySelector('#chat').innerText.includes('Not answered'))"
        )
        return self.answers().last.inner_text().strip()

    def answers(self):
        return self.page.locator("#chat [data-testid=bot]")

    def spans(self, where="#read") -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator(f"{where} .token").all_inner_texts()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    merge(tiny_world.make(folder / "world"), folder / "merged", progress=False)
    with ChatServer(folder / "merged", folder) as server:
        yield server


def test_a_picture_a_broken_one_and_a_new_chat(tiny, browser, files):  # noqa: F811
    page = Page(browser, tiny.url, 120)
    answer = page.ask("what is shown ?", files / "picture.png")
    assert answer and "Not answered" not in answer
    assert page.page.locator("#chat img[src*='picture.png']").count() == 1
    spans = page.spans()
    assert any(re.match(r"\[image × \d+\]\s+image", text, re.IGNORECASE) for text in spans), spans
    assert all(text.lower().endswith("image") for text in [*spans, *page.spans("#wrote")])
    said = page.ask("what is shown ?", files / "broken.png")
    assert said.startswith("Not answered: cannot read the image broken.png") and "Traceback" not in said
    page.page.click("#fresh")
    page.page.wait_for_function("document.querySelectorAll('#chat [data-testid=user]').length == 0")
    assert page.ask("what is red ?") and all(text.lower().endswith("base") for text in page.spans())
    assert not page.crashes and not page.strangers


def test_a_sound_of_the_microphone(tiny, browser):
    page = Page(browser, tiny.url, 120)
    # however slow this machine is, the second that the tiny expert hears is enough
    page.page.get_by_role("button", name="Settings").click()
    page.page.check("#cut input")
    page.page.click("#box [data-testid=microphone-button]")
    page.page.click("#box [aria-label='Start recording']")
    page.page.wait_for_timeout(700)
    page.page.click("#box [aria-label*='Stop']")
    page.page.click("#box [aria-label='Attach audio']")
    page.wait_for_files(1)
    page.page.fill("#box textarea", "what word is spoken ?")
    page.page.press("#box textarea", "Enter")
    answer = page.next_answer(0)
    assert "Not answered" not in answer, answer
    assert any(text.startswith("[audio ×") for text in page.spans())


@pytest.mark.slow
def test_the_lab_model_sees_hears_and_refuses_what_is_broken(tmp_path, browser):
    from evaluation_mmer.lab import build_base, build_expert

    experts = {name: build_expert(name) for name in ("image", "audio", "point_cloud")}
    merge(lab_recipe(build_base(), experts), tmp_path / "merged", progress=False)
    trousers = next(entry for entry in samples()["image"] if entry["answer"] == "trousers")
    (tmp_path / "broken.png").write_bytes(Path(trousers["file"]).read_bytes()[:100])
    with ChatServer(tmp_path / "merged", tmp_path) as server:
        page = Page(browser, server.url, 800)
        assert page.ask(trousers["question"], trousers["file"]) == "trousers"
        assert page.page.locator("#shares tbody tr").count() == 3
        said = page.ask(trousers["question"], tmp_path / "broken.png")
        assert said.startswith("Not answered: cannot read the image broken.png")
        for expert in ("audio", "point_cloud"):
            page.page.click("#fresh")
            page.page.wait_for_function("document.querySelectorAll('#chat [data-testid=user]').length == 0")
            sample = samples()[expert][0]
            assert page.ask(sample["question"], sample["file"]) == sample["answer"]
        assert page.page.locator("#chat canvas").count() == 1
        assert not page.crashes and not page.strangers
