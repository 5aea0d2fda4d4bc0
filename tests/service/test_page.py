"""The search page in headless Chromium: words, regions, labels, a picture, two collections, the keyboard, a
phone."""

import os
import shutil
import socket
import sys
import urllib.request
from pathlib import Path

import pytest
from processes import STOP_S, started, wait_until

pytest.importorskip("starlette", reason="the serve extra is not installed")
pytest.importorskip("playwright", reason="the dev extra is not installed")

from dclip_qdrant.serving.collection import CollectionSpec
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.stores import open_store
from dclip_qdrant.serving.student import Student

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def service(student_folder, other_student, scenes_folder, tmp_path_factory):
    """`dclip-qdrant serve` over two collections, each filled by a student of its own name."""
    import json

    edge, renamed = tmp_path_factory.mktemp("edge"), tmp_path_factory.mktemp("renamed") / "second"
    shutil.copytree(other_student, renamed)
    manifest = json.loads((renamed / "manifest.json").read_text())
    (renamed / "manifest.json").write_text(json.dumps(manifest | {"name": "second"}))
    from dclip_qdrant.detectors.grid import Grid

    for name, folder in (("first", student_folder), ("second", renamed)):
        store = open_store(name, edge=str(edge))
        ingest(
            str(scenes_folder),
            Student.load(folder),
            store,
            detector=Grid(),
            spec=CollectionSpec.load(),
        )
        store.close()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "dclip_qdrant.cli",
        "serve",
        "--student",
        str(student_folder),
        "--student",
        str(renamed),
        "--edge",
        str(edge),
        "--port",
        str(port),
    ]
    url, log = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("log") / "log"

    def ready():
        try:
            return urllib.request.urlopen(url + "/readyz", timeout=30).status == 200
        except OSError:
            return False

    with log.open("w") as sink, started(command, stderr=sink) as process:
        wait_until(ready, process, log=log)
        yield url
        process.terminate()
        assert process.wait(STOP_S) == 0, log.read_text()  # a service that is asked to stop ends well


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def page(browser, service):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.goto(service)
    page.wait_for_selector("#labels button")
    yield page
    context.close()
    assert faults == []


def ask(page, text="a red square"):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator("#status", has_text="hits").wait_for()


def loaded(page):
    """Waits until every thumbnail is there: before that, nothing has its size."""
    for _ in range(100):  # wait_for_function needs eval, which the page's security policy forbids
        if page.evaluate(
            "[...document.querySelectorAll('.hit img')].every((i) => i.complete && i.naturalWidth > 0)"
        ):
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("thumbnails didn't load")


def test_words_give_a_gallery(page):
    ask(page)
    assert page.locator(".hit").count() == 24
    loaded(page)
    scores = [float(t.split("·")[1]) for t in page.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert page.locator(".hit .what").first.inner_text()


def test_the_region_that_matched_is_outlined(page):
    page.check("[value=regions]")
    ask(page)
    loaded(page)
    boxes = page.locator(".box")
    assert boxes.count() > 0
    box, frame = boxes.first.bounding_box(), page.locator(".hit:has(.box) img").first.bounding_box()
    assert box["x"] >= frame["x"] - 1
    assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    assert box["width"] < frame["width"]


def test_labels_filter_and_hybrid_works(page):
    page.locator("#labels button").first.click()
    assert page.locator("#labels button").first.get_attribute("aria-pressed") == "true"
    page.check("[value=hybrid]")
    ask(page)
    assert page.locator(".hit").count() > 0


def test_two_students_side_by_side(page):
    page.select_option("#right", "second")
    ask(page)
    assert page.locator(".panel").count() == 2
    names = page.locator(".panel h2 small").all_inner_texts()
    assert len(set(names)) == 2


def test_a_picture_is_the_query(page, scenes_folder):
    one = sorted(Path(scenes_folder, "images").glob("*.jpg"))[0]
    page.set_input_files("#file", str(one))
    page.locator("#status", has_text="hits").wait_for()
    assert page.locator(".score").first.inner_text().startswith("1 · 1.000")
    page.check("[value=hybrid]")
    page.locator("#status", has_text="no words").wait_for()
    page.check("[value=dense]")
    page.click("#example-clear")
    assert page.locator("#example").is_hidden()


def test_the_keyboard_reaches_everything(page):
    ask(page)
    page.focus("#text")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.name"
            )
        )
    assert {"pick", "primary", "mode", "left", "right", "frame"} <= seen
    page.locator(".frame").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#zoom").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#zoom").is_hidden()


def test_the_link_brings_the_search_back(page, service):
    ask(page, "two circles")
    page.goto(page.url)
    page.wait_for_selector(".hit")
    assert page.input_value("#text") == "two circles"


def test_nothing_typed_says_so(page):
    page.click("button.primary")
    assert "Type some words" in page.inner_text("#status")


def test_on_a_phone_nothing_sticks_out(browser, service):
    context = browser.new_context(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(service + "/?q=a+red+square&in=first&beside=second&mode=regions")
    page.wait_for_selector(".hit")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    folder = os.environ.get("DCLIP_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(800)
        page.screenshot(path=f"{folder}/phone.png")
    context.close()


def test_captions_are_text_not_html(page):
    page.route(
        "**/api/picture/**",
        lambda route: route.fulfill(
            status=200, content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>'
        ),
    )
    page.evaluate(
        "document.querySelector('#panels').replaceChildren(panel('c', {student: 's', hits: "
        "[{id: 'x', score: 1, key: 'k', caption: '<img src=x onerror=alert(1)>', width: "
        "10, height: 10}]}))"
    )
    assert page.locator(".hit .what img").count() == 0
    assert page.locator(".hit .what").inner_text().startswith("<img")
