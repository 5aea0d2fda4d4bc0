"""Mixing pairs: near-duplicates, captions that don't fit, counts; pictures by URL, from a server of the
test's own."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.build import build
from dclip_qdrant.pairs.curate import curate, difference_hash
from dclip_qdrant.pairs.fetch import FetchReport, Manners, check, fetch
from dclip_qdrant.pairs.leak import leak


def picture(seed, size=64):
    """Soft blobs: a hash needs structure."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image, quality=90):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def made(folder, rows):
    """Pairs from (name, image, captions, split)."""
    (folder / "src").mkdir(parents=True)
    for name, image, _, _ in rows:
        (folder / "src" / f"{name}.jpg").write_bytes(jpeg(image))
    lines = [
        {"file_name": f"{name}.jpg", "captions": captions, "split": split}
        for name, _, captions, split in rows
    ]
    (folder / "src" / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    build(str(folder / "src"), str(folder / "pairs"))
    return str(folder / "pairs")


def keys(path, split=None):
    return set(Pairs.open(str(path)).table(["key"], (split,) if split else None)["key"].to_pylist())


def reasons(out):
    return {r["key"]: r["reason"] for r in map(json.loads, (out / "rejects.jsonl").read_text().splitlines())}


def test_a_difference_hash_survives_what_does_not_change_the_picture():
    a = picture(1)
    near = [a.resize((48, 48)), ImageEnhance.Brightness(a).enhance(1.1), Image.open(io.BytesIO(jpeg(a, 40)))]
    assert all((difference_hash(a) ^ difference_hash(b)).bit_count() <= 3 for b in near)
    others = [(difference_hash(a) ^ difference_hash(picture(s))).bit_count() for s in range(2, 30)]
    assert min(others) > 10


def test_a_difference_hash_by_hand():
    rising = Image.fromarray(np.tile(np.arange(0, 250, 28, dtype=np.uint8)[:9], (8, 1)))
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0


def test_near_duplicates_leave_train_and_test_stays_whole(tmp_path):
    a = made(
        tmp_path / "a",
        [
            ("one", picture(1), ["x"], "train"),
            ("again", picture(1, 60), ["y"], "train"),
            ("two", picture(2), ["z"], "train"),
            ("v", picture(9), ["v"], "val"),
        ],
    )
    b = made(tmp_path / "b", [("held", picture(2, 62), ["t"], "test"), ("three", picture(3), ["w"], "train")])
    m = curate([(a, None), (b, None)], str(tmp_path / "out"))
    assert keys(tmp_path / "out", "test") == {"1/held.jpg"}
    assert keys(tmp_path / "out", "train") == {
        "0/again.jpg",
        "1/three.jpg",
    }  # the first by name of the two copies; `two` is like a test picture
    why = reasons(tmp_path / "out")
    assert why == {
        "0/one.jpg": "near-duplicate: like 0/again.jpg (train)",
        "0/two.jpg": "near-duplicate: like 1/held.jpg (test)",
    }
    assert m["left_out"] == {"near-duplicate": 2}
    assert m["splits"] == {"train": 2, "val": 1, "test": 1}


def test_counts_are_kept_and_follow_from_the_seed(tmp_path):
    a = made(
        tmp_path / "a",
        [(f"p{i}", picture(i), ["x"], "train") for i in range(12)] + [("v", picture(99), ["v"], "val")],
    )
    curate([(a, 5)], str(tmp_path / "x"))
    curate([(a, 5)], str(tmp_path / "y"))
    curate([(a, 5)], str(tmp_path / "z"), seed=1)
    assert len(keys(tmp_path / "x", "train")) == 5
    assert keys(tmp_path / "x") == keys(tmp_path / "y") != keys(tmp_path / "z")
    assert len(keys(tmp_path / "x", "val")) == 1
    assert len(reasons(tmp_path / "x")) == 7
    with pytest.raises(InputError, match="12 train pictures are left; expected 50"):
        curate([(a, 50)], str(tmp_path / "w"))
    with pytest.raises(UsageError, match="there are pairs here already"):
        curate([(a, 5)], str(tmp_path / "x"))


class Judge:
    """Fits a caption to a picture by its first letter: g(ood) 1, b(ad) 0."""

    class preprocess:
        @staticmethod
        def pixels(image):
            return np.zeros((1, 1, 3), np.uint8)

    def embed_pixels(self, pixels):
        return np.array([[1.0, 0.0] for _ in pixels])

    def embed_texts(self, texts):
        return np.array([[1.0, 0.0] if t.startswith("g") else [0.0, 1.0] for t in texts])


def test_captions_that_do_not_fit_leave_and_a_picture_without_any_leaves_too(tmp_path):
    a = made(
        tmp_path / "a",
        [
            ("one", picture(1), ["good", "bad"], "train"),
            ("two", picture(2), ["bad"], "train"),
            ("v", picture(3), ["bad"], "val"),
        ],
    )
    curate([(a, None)], str(tmp_path / "out"), scorer=Judge(), min_score=0.5)
    table = Pairs.open(str(tmp_path / "out")).table(["key", "captions"]).to_pylist()
    assert {r["key"]: r["captions"] for r in table} == {
        "0/one.jpg": ["good"],
        "0/v.jpg": ["bad"],
    }  # what is measured stays as it is
    assert reasons(tmp_path / "out")["0/two.jpg"].startswith(
        "caption 0: scores 0.000 with its picture, below 0.500"
    )
    with pytest.raises(UsageError, match="`student`"):
        curate([(a, None)], str(tmp_path / "o2"), min_score=0.5)


def test_curated_pairs_are_pairs(tmp_path):
    from dclip_qdrant.tables.contracts import PAIRS

    a = made(tmp_path / "a", [("one", picture(1), ["x"], "train"), ("v", picture(3), ["y"], "val")])
    curate([(a, None)], str(tmp_path / "out"))
    pairs = Pairs.open(str(tmp_path / "out"))
    assert pairs.table(list(PAIRS.columns)).num_rows == 2
    assert len(pairs.fingerprint) == 64


def test_a_leak_on_purpose(tmp_path):
    a = made(
        tmp_path / "a",
        [("one", picture(1), ["x"], "train")]
        + [(f"t{i}", picture(10 + i), ["y"], "test") for i in range(40)]
        + [("v", picture(3), ["z"], "val")],
    )
    count = leak(a, str(tmp_path / "leaked"), share=0.5)
    assert 10 < count < 30
    assert len(keys(tmp_path / "leaked", "test")) == 40
    assert len(keys(tmp_path / "leaked", "train")) == 1 + count
    assert leak(a, str(tmp_path / "leaked"), share=0.5) == count
    assert Pairs.open(str(tmp_path / "leaked")).fingerprint != Pairs.open(a).fingerprint


# --- by URL


@pytest.fixture
def site():
    """/ok/N a picture, /text, /gone, /big, /to/X redirects; counts what it was asked."""
    asked, at = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            import time

            asked.append(self.path)
            at.append(time.monotonic())
            body, code, more = b"", 200, {}
            if self.path.startswith("/ok/"):
                body = jpeg(picture(int(self.path.split("/")[-1])))
            elif self.path == "/text":
                body = b"<html>hello</html>"
            elif self.path == "/big":
                body = b"x" * (2 << 20)
            elif self.path.startswith("/to/"):
                code, more = 302, {"Location": self.path.removeprefix("/to")}
            else:
                code = 404
            self.send_response(code)
            for k, v in more.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked, at
    server.shutdown()
    server.server_close()


MINE = Manners(host_seconds=0.0, private=True, max_bytes=1 << 20)


def test_fetching_lists_what_failed_and_resumes(site, tmp_path):
    url, asked, _ = site
    lines = [
        f"a red thing\t{url}/ok/1",
        f"words\t{url}/text",
        f"gone\t{url}/gone",
        f"large\t{url}/big",
        f"moved\t{url}/to/ok/2",
        f"round\t{url}/to/to/to/to/ok/3",
        "x\tftp://x/y",
    ]
    (tmp_path / "cc.tsv").write_text("".join(line + "\n" for line in lines))
    counts = fetch(str(tmp_path / "cc.tsv"), str(tmp_path / "out"), MINE).row()
    assert counts == {"asked": 7, "fetched": 2, "known": 0, "rejected": 5}
    why = {
        r["url"].rsplit("/", 1)[-1]: r["reason"]
        for r in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    }
    assert "looks like text" in why["text"]
    assert (why["gone"], why["big"], why["3"]) == (
        "answered 404",
        "more than 1,048,576 bytes",
        "more than 2 redirects",
    )
    before = len(asked)
    again = fetch(str(tmp_path / "cc.tsv"), str(tmp_path / "out"), MINE)
    assert again == FetchReport(asked=7, fetched=0, known=7, rejected=0)
    assert len(asked) == before
    m = build(str(tmp_path / "out"), str(tmp_path / "pairs"))
    assert (m["captions"], m["rejects"]) == (2, 0)


def test_one_host_is_asked_slowly_and_only_so_much(site, tmp_path):
    url, asked, at = site
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps({"url": f"{url}/ok/{i}", "caption": "x"}) + "\n" for i in range(9))
    )
    fetch(str(tmp_path / "l.jsonl"), str(tmp_path / "out"), Manners(limit=4, host_seconds=0.05, private=True))
    assert len(asked) == 4
    assert min(np.diff(sorted(at))) >= 0.045


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x",
        "http://localhost:80/x",
        "http://10.1.2.3/x",
        "http://169.254.169.254/latest",
        "http://[::1]/x",
        "file:///etc/passwd",
        "http://u:p@8.8.8.8/x",
    ],
)
def test_a_strangers_list_does_not_reach_inside(url):
    from dclip_qdrant.pairs.fetch import Refused

    with pytest.raises(Refused, match="private network|not an http"):
        check(url, Manners())


def test_a_redirect_to_the_inside_is_refused(monkeypatch):
    from dclip_qdrant.pairs import fetch as module

    seen = []

    def checked(url, manners):
        seen.append(url)
        if len(seen) > 1:
            raise module.Refused("an address of a private network")

    class Opener:
        def open(self, request, timeout):
            import urllib.error

            raise urllib.error.HTTPError(
                request.full_url, 302, "x", {"Location": "http://127.0.0.1/secret"}, None
            )

    monkeypatch.setattr(module, "check", checked)
    monkeypatch.setattr(module.urllib.request, "build_opener", lambda *_: Opener())
    with pytest.raises(module.Refused, match="private network"):
        module.get("http://example.com/a.jpg", Manners())
    assert seen == ["http://example.com/a.jpg", "http://127.0.0.1/secret"]


def test_a_line_of_another_form_is_named(tmp_path):
    (tmp_path / "x.tsv").write_text("no tab here\n")
    with pytest.raises(InputError, match=r"x.tsv:1: .*an address and a caption in two columns"):
        fetch(str(tmp_path / "x.tsv"), str(tmp_path / "out"))
    assert Path(tmp_path / "out" / "images").is_dir()
