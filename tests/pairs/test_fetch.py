"""Pictures by their addresses: what lists look like, what servers do, and how a run goes on."""

import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dclip_qdrant.errors import InputError, UsageError
from dclip_qdrant.pairs.addresses import addresses
from dclip_qdrant.pairs.build import build
from dclip_qdrant.pairs.fetch import FetchReport, Manners, check, fetch
from dclip_qdrant.pictures import http


def jpeg(i):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (i * 37 % 256, i * 91 % 256, i * 53 % 256)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def site():
    """/ok/N a picture, /text, /gone, /big, /to/X redirects; counts what it was asked."""
    asked, at = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            at.append(time.monotonic())
            body, code, more = b"", 200, {}
            if self.path.startswith("/ok/"):
                body = jpeg(int(self.path.split("/")[-1]))
            elif self.path == "/text":
                body = b"<html>hello</html>"
            elif self.path == "/my%20photo":
                body = jpeg(9)
            elif self.path == "/short":
                body, more = b"abc", {"Content-Length": "100"}
            elif self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(600):  # a byte now and then, for minutes
                    try:
                        self.wfile.write(b"x")
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(0.1)
                return
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
    assert (tmp_path / "out" / "images").is_dir()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cc3m.tsv", "one\thttp://h/1\ntwo\thttp://h/2\n"),
        ("cc12m.tsv", "http://h/1\tone\nhttp://h/2\ttwo\n"),
        ("head.tsv", "caption\turl\none\thttp://h/1\ntwo\thttp://h/2\n"),
        ("laion.csv", 'URL,TEXT,height\nhttp://h/1,one,3\nhttp://h/2,"two",4\n'),
        ("l.jsonl", '{"url": "http://h/1", "caption": "one"}\n{"url": "http://h/2", "text": "two"}\n'),
        ("t.parquet", ""),
    ],
)
def test_lists_in_any_order_and_format(tmp_path, name, text):
    if text:
        (tmp_path / name).write_text(text)
    else:
        pq.write_table(
            pa.table({"url": ["http://h/1", "http://h/2"], "caption": ["one", "two"]}), tmp_path / name
        )
    rows = [(row.url, row.caption, row.error) for row in addresses(str(tmp_path / name))]
    assert rows == [("http://h/1", "one", None), ("http://h/2", "two", None)]


def test_rows_without_an_address_or_a_caption_are_named(tmp_path):
    (tmp_path / "x.tsv").write_text("one\thttp://h/1\nno tab\ntwo\tnowhere\n \thttp://h/4\n")
    rows = list(addresses(str(tmp_path / "x.tsv")))
    assert [row.error for row in rows] == [
        None,
        "'no tab': no address in column 2",
        "'two\\tnowhere': no address in column 2",
        "no caption",
    ]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:80x/a.jpg", "host or port"),
        ("http://h/a\x01b.jpg", "control characters"),
        ("ftp://h/a", "not an http or https"),
        ("http:///a", "not an http or https"),
    ],
)
def test_odd_addresses_are_refused(url, says):
    with pytest.raises(http.HttpRefused, match=says):
        http.tidy(url)


def test_addresses_are_escaped_as_browsers_do():
    assert http.tidy(" http://h/my photo.jpg?a=b c ") == "http://h/my%20photo.jpg?a=b%20c"
    assert http.tidy("http://bücher.example/ä%20b") == "http://xn--bcher-kva.example/%C3%A4%20b"
    assert http.tidy("HTTP://h:8080") == "http://h:8080/"


def test_odd_servers_cost_their_own_line(site, tmp_path):
    url, _, _ = site
    rude = socket.socket()
    rude.bind(("127.0.0.1", 0))
    rude.listen(1)

    def not_http():
        other, _ = rude.accept()
        with other:
            other.recv(999)
            other.sendall(b"220 mail.example.org ESMTP\r\n")

    threading.Thread(target=not_http, daemon=True).start()
    lines = [f"{url}/my photo", f"http://127.0.0.1:{rude.getsockname()[1]}/x", f"{url}/short", f"{url}/drip"]
    (tmp_path / "x.tsv").write_text("".join(f"words\t{line}\n" for line in lines))
    manners = Manners(host_seconds=0.0, private=True, timeout=2.0)
    began = time.monotonic()
    report = fetch(str(tmp_path / "x.tsv"), str(tmp_path / "out"), manners)
    assert time.monotonic() - began < 50  # dripping would go on for a minute
    rude.close()
    assert (report.fetched, report.rejected) == (1, 3)
    why = {
        row["url"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    }
    assert "BadStatusLine" in why[lines[1]]
    assert "IncompleteRead" in why[lines[2]]
    assert why[lines[3]] == "took longer than 6 s"


def test_a_killed_run_goes_on_and_a_second_caption_is_kept(site, tmp_path):
    url, asked, _ = site
    rows = [
        (f"{url}/ok/1", "one"),
        (f"{url}/ok/2", "two"),
        (f"{url}/ok/1", "one more"),
        (f"{url}/ok/1", "one"),
    ]
    (tmp_path / "x.tsv").write_text("".join(f"{caption}\t{at}\n" for at, caption in rows))
    out = tmp_path / "out"
    report = fetch(str(tmp_path / "x.tsv"), str(out), MINE)
    assert (report.asked, report.fetched, report.known, report.rejected) == (4, 2, 2, 0)
    assert len(asked) == 2
    journal = out / "captions.jsonl"
    whole = journal.read_text()
    journal.write_text(whole[: whole.rindex("{") + 20])  # killed while it wrote its last line
    again = fetch(str(tmp_path / "x.tsv"), str(out), MINE)
    assert again.fetched == 0
    assert journal.read_text() == whole
    build(str(out), str(tmp_path / "pairs"))
    captions = [
        r["captions"] for r in pq.read_table(next((tmp_path / "pairs").glob("*.parquet"))).to_pylist()
    ]
    assert sorted(captions) == [["one", "one more"], ["two"]]


def test_somebody_elses_captions_are_not_written_to(tmp_path):
    (tmp_path / "x.tsv").write_text("one\thttp://h/1\n")
    (tmp_path / "out").mkdir()
    theirs = '{"file_name": "a.jpg", "caption": "mine"}\n'
    (tmp_path / "out" / "captions.jsonl").write_text(theirs)
    with pytest.raises(UsageError, match="none of ours"):
        fetch(str(tmp_path / "x.tsv"), str(tmp_path / "out"), MINE)
    assert (tmp_path / "out" / "captions.jsonl").read_text() == theirs
