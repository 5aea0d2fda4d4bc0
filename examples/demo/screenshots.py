"""The README's pictures, from a finished demo and a Chromium: docs/searches.png is the part of the report
that shows searches before and after, docs/page.png the search page.

    make demo && python examples/demo/screenshots.py
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from dclip_qdrant import Student, open_store, search

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO, DOCS = ROOT / "demo", ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
READY_S = STOP_S = 60


def searches(page: Page) -> None:
    """The report's searches."""
    page.goto((DEMO / "report.html").as_uri())
    page.locator("#searches").screenshot(path=DOCS / "searches.png")


def query_of_the_page() -> str:
    """The first test caption for which the student's best region is in the caption's own picture and the
    base's best isn't."""
    lines = (DEMO / "data" / "captions.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test"]
    base, student = (Student.load(DEMO / name) for name in ("base", "student"))
    before, after = (open_store(name, edge=str(DEMO / "edge")) for name in ("scenes-before", "scenes"))
    try:
        for row in rows:
            for text in row["captions"][1:]:
                (ours,) = search(after, student, text=text, mode="regions", limit=1)
                (theirs,) = search(before, base, text=text, mode="regions", limit=1)
                right = row["file_name"]
                if ours.payload["key"] == right != theirs.payload["key"] and ours.box is not None:
                    return text
    finally:
        before.close()
        after.close()
    raise LookupError("no caption that the student finds by its region and the base doesn't")


def search_page(page: Page, query: str) -> None:
    """The search page with two students side by side and the matching regions outlined."""
    students = ["--student", DEMO / "base", "--student", DEMO / "student"]
    command = [sys.executable, "-m", "dclip_qdrant.cli", "serve", *students, "--edge", DEMO / "edge"]
    with subprocess.Popen(
        [*map(str, command), "--port", "0"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as service:
        try:
            assert service.stderr is not None
            address = service.stderr.readline().rsplit("search page at ", 1)[1].strip()
            _wait(address + "readyz")
            page.goto(address)
            page.select_option("#left", "scenes-before")
            page.select_option("#right", "scenes")
            page.check("[value=regions]")
            page.fill("#text", query)
            page.press("#text", "Enter")
            page.locator("#status", has_text="hits").wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=DOCS / "page.png")
        finally:
            service.terminate()
            service.wait(STOP_S)


def _wait(url: str) -> None:
    end = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=READY_S)
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1000, "height": 760})
            searches(page)
            search_page(page, query_of_the_page())
        finally:
            browser.close()


if __name__ == "__main__":
    main()
