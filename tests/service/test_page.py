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
    page.click("#examples button")
    assert page.locator("#examples").is_hidden()
    page.locator("#status", has_text="Some of the pictures").wait_for()


def test_the_keyboard_reaches_everything(page):
    ask(page)
    page.focus("#text")
    seen = set()
    for _ in range(60):
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


def test_a_newcomer_sees_pictures_and_what_to_try(page):
    page.locator("#status", has_text="Some of the pictures in first").wait_for()
    assert page.locator(".hit").count() == 24
    words = page.locator("#tries button").first.inner_text()
    page.locator("#tries button").first.click()
    page.locator("#status", has_text="hits").wait_for()
    assert page.input_value("#text") == words
    assert page.locator("#tries").is_hidden()


def test_more_and_less_like_this(page):
    ask(page)
    keys = page.locator(".hit .what").all_inner_texts()
    page.locator(".hit [aria-label='More like this']").first.click()
    page.locator("#examples .like").wait_for()
    page.locator("#status", has_text="hits").wait_for()
    page.locator(".hit [aria-label='Less like this']").nth(1).click()
    page.locator("#examples .unlike").wait_for()
    page.locator("#status", has_text="hits").wait_for()
    assert "like=" in page.url
    assert "unlike=" in page.url
    assert page.locator(".hit .what").all_inner_texts() != keys
    page.locator("#examples .like button").click()
    page.locator("#examples .unlike button").click()
    page.locator("#status", has_text="hits").wait_for()
    page.locator(f".hit .what >> text={keys[0]}").first.wait_for()


def test_back_brings_the_search_before_with_its_filters(page):
    label = page.locator("#labels button").first
    ask(page, "a red square")
    label.click()
    page.locator("#status", has_text="hits").wait_for()
    assert "label=" in page.url
    ask(page, "two circles")
    page.fill("#filter", "width>=1")
    page.press("#filter", "Enter")
    page.locator("#status", has_text="hits").wait_for()
    page.go_back()
    page.go_back()
    for _ in range(100):
        if page.input_value("#text") == "a red square":
            break
        page.wait_for_timeout(100)
    assert page.input_value("#text") == "a red square"
    assert page.locator("#labels button").first.get_attribute("aria-pressed") == "true"
    assert page.input_value("#filter") == ""


def test_arrows_walk_between_hits(page):
    ask(page)
    loaded(page)
    page.locator(".frame").first.focus()
    page.keyboard.press("ArrowRight")
    at = "[...document.querySelectorAll('.frame')].indexOf(document.activeElement)"
    assert page.evaluate(at) == 1
    page.keyboard.press("ArrowDown")
    assert page.evaluate(at) > 2
    page.keyboard.press("Enter")
    before = page.inner_text("#zoom-text")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#zoom-text") != before
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#zoom-text") == before
    page.keyboard.press("Escape")


def test_two_students_show_how_ranks_differ(page):
    page.select_option("#right", "second")
    ask(page)
    first, second = (page.locator(".panel").nth(n) for n in range(2))
    order = first.locator(".what").all_inner_texts()
    moves = second.locator(".score").all_inner_texts()
    assert all("·" in move for move in moves)
    assert not any("▲" in text or "▼" in text for text in first.locator(".score").all_inner_texts())
    for rank, (caption, move) in enumerate(
        zip(second.locator(".what").all_inner_texts(), moves, strict=True)
    ):
        if order.count(caption) == 1 and caption in order:
            by = order.index(caption) - rank
            assert move.endswith("=" if by == 0 else f"▲{by}" if by > 0 else f"▼{-by}")


def test_a_service_that_is_gone_is_said_and_nothing_old_is_shown(browser, service):
    context = browser.new_context()
    page = context.new_page()
    page.goto(service)
    page.wait_for_selector(".hit")
    ask(page)
    page.route("**/api/search", lambda route: route.abort())
    page.fill("#text", "two circles")
    page.press("#text", "Enter")
    page.locator("#status", has_text="doesn't answer").wait_for()
    assert page.locator(".hit").count() == 0
    page.unroute("**/api/search")
    page.route("**/api/search", lambda route: route.fulfill(status=502, body="<html>Bad gateway</html>"))
    page.press("#text", "Enter")
    page.locator("#status", has_text="no JSON").wait_for()
    context.close()


def test_a_picture_that_cant_be_shown_is_no_broken_frame(browser, service):
    context = browser.new_context()
    page = context.new_page()
    page.route("**/api/picture/**", lambda route: route.fulfill(status=404, body="{}"))
    page.goto(service + "/?q=a+red+square&in=first")
    page.locator(".hit .gone").first.wait_for()
    assert page.locator(".hit img").count() == 0
    assert "--pictures" in page.locator(".hit .gone").first.inner_text()
    context.close()


def test_what_hardly_fits_is_grey(browser, service):
    """With a probability that `tune` left: here the answer is made to have one."""
    import json

    def with_probability(route):
        answer = route.fetch()
        found = answer.json()
        for rank, hit in enumerate(found["hits"]):
            hit["probability"] = 0.9 if rank < 3 and "square" in route.request.post_data else 0.1
        route.fulfill(status=200, content_type="application/json", body=json.dumps(found))

    context = browser.new_context()
    page = context.new_page()
    page.route("**/api/search", with_probability)
    page.goto(service + "/?q=a+red+square&in=first")
    page.locator("#status", has_text="3 hits in").wait_for()
    assert page.locator(".hit.unlikely").count() == 21
    assert "90%" in page.locator(".score").first.inner_text()
    page.fill("#text", "two circles")
    page.press("#text", "Enter")
    page.locator("#status", has_text="Nothing here seems to fit").wait_for()
    context.close()


def test_without_javascript_the_page_says_what_to_do(browser, service):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(service)
    assert "dclip-qdrant search" in page.inner_text("noscript")
    context.close()


def test_nothing_typed_says_so(page):
    page.click("button.primary")
    assert "Type some words" in page.inner_text("#status")


def test_on_a_phone_nothing_sticks_out(browser, service):
    context = browser.new_context(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(service + "/?q=a+red+square&in=first&beside=second&mode=regions")
    page.wait_for_selector(".hit")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    # the controls are folded: at most a quarter of the screen before a search's hits
    assert page.locator("#controls").get_attribute("open") is None
    assert page.locator("header").bounding_box()["height"] < 740 / 4
    folder = os.environ.get("DCLIP_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(800)
        page.screenshot(path=f"{folder}/phone.png")
    context.close()


def test_captions_are_text_not_html(page):
    page.locator("#status", has_text="Some of the pictures").wait_for()  # nothing is drawn after it
    page.route(
        "**/api/picture/**",
        lambda route: route.fulfill(
            status=200, content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>'
        ),
    )
    page.evaluate(
        "draw([{collection: 'c', answer: {student: 's', cutoff: 0.5, hits: [{id: 'x', score: 1, key: 'k', "
        "caption: '<img src=x onerror=alert(1)>', width: 10, height: 10}]}}])"
    )
    assert page.locator(".hit .what img").count() == 0
    assert page.locator(".hit .what").inner_text().startswith("<img")
