"""What people really have: files written by hand, shards that broke, archives of Macs, published layouts.
Each line, member or shard ends as a caption of its own picture or as a reject by name."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dclip_qdrant.errors import ImageError, InputError
from dclip_qdrant.pairs import Pairs
from dclip_qdrant.pairs.build import build
from dclip_qdrant.pairs.readers import open_source, read_any
from dclip_qdrant.pictures import images


def jpg(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (i * 37 % 256, i * 91 % 256, i * 53 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"p{i}.jpg").write_bytes(jpg(i))
    return folder


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read(source: Path, **options) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions by key; reasons by the key or place of what can't be used."""
    good, bad = {}, {}
    for picture in read_any(str(source), **options)[1]:
        if picture.error is None:
            assert picture.key not in good
            good[picture.key] = picture.captions
        else:
            bad[picture.key] = str(picture.error)
    return good, bad


LONG = "word " * 30_000 + "end"
LINES = [
    # an unquoted comma: the caption is the rest of the line
    ("c.csv", "image,caption\np0.jpg,a dog, running\np1.jpg,a cat\n", ["a dog, running", "a cat"], []),
    # ... where the caption isn't last nobody can tell
    ("c.csv", "image,caption,n\np0.jpg,a dog, fast,3\np1.jpg,a cat,4\n", [None, "a cat"], ["p0.jpg"]),
    # a mark that nobody closes
    ("c.csv", 'image,caption\np0.jpg,"the big one\np1.jpg,a cat\n', ['"the big one', "a cat"], []),
    # two of them: nothing between is swallowed
    ("c.csv", 'image,caption\np0.jpg,"one\np1.jpg,cat\np2.jpg,end"\n', ['"one', "cat", 'end"'], []),
    # a field over two lines, with marks inside
    (
        "c.csv",
        'image,caption\r\np0.jpg,"two\r\nlines, ""so"""\r\np1.jpg,x\r\n',
        ['two\nlines, "so"', "x"],
        [],
    ),
    ("c.csv", "sep=;\r\nimage;caption\r\np0.jpg;a, b\r\np1.jpg;c\r\n", ["a, b", "c"], []),
    ("c.csv", "\ufeffImage;Caption\r\np0.jpg;läuft\r\n", ["läuft"], []),
    ("c.csv", f'image,caption\np0.jpg,"{LONG}"\n', [LONG], []),
    ("c.tsv", 'image\tcaption\np0.jpg\t"The Scream" II\np1.jpg\t"open\n', ['"The Scream" II', '"open'], []),
    # Flickr30k as published: one line of one picture lost a bar
    (
        "results.csv",
        "image_name| comment_number| comment\np0.jpg| 0| one\np0.jpg| 1   two\np0.jpg| 2| three\n",
        [["one", "three"]],
        ["p0.jpg"],
    ),
    (
        "c.jsonl",
        '{"file_name": "p0.jpg", "caption": "one\u2028two"}\n[1]\n{"file_name": "p1\n',
        ["one\u2028two"],
        [":2", ":3"],
    ),
    (
        "c.jsonl",
        '{"file_name": "p0.jpg", "caption": {"raw": "a", "tokens": ["a"]}}\n'
        '{"file_name": "p1.jpg", "caption": {"en": "a", "de": "b"}}\n'
        '{"file_name": "p2.jpg", "caption": 3}\n',
        ["a", None, None],
        ["p1.jpg", "p2.jpg"],
    ),
    ("x.token", "p0.jpg#0\tone\nno tab\np0.jpg#1\ttwo\u2028three\n", [["one", "two\u2028three"]], [":2"]),
]


@pytest.mark.parametrize(("name", "text", "captions", "rejected"), LINES)
def test_every_line_is_a_caption_or_a_reject(tmp_path, name, text, captions, rejected):
    folder = pictures(tmp_path / "d", 3)
    (folder / name).write_bytes(text.encode())
    good, bad = read(folder)
    for i, wanted in enumerate(captions):
        assert good.get(f"p{i}.jpg") == (wanted if wanted is None or isinstance(wanted, list) else [wanted])
    assert len(bad) == len(rejected)
    for end, place in zip(rejected, bad, strict=True):
        assert place.endswith(end)


def test_text_that_is_no_utf8_costs_its_own_line(tmp_path):
    folder = pictures(tmp_path / "d", 3)
    (folder / "captions.csv").write_bytes(b"image,caption\np0.jpg,caf\xe9\np1.jpg,fine\n")
    good, bad = read(folder)
    assert good == {"p1.jpg": ["fine"]}
    assert [reason.endswith("not UTF-8 text") for reason in bad.values()] == [True]
    (folder / "captions.csv").write_bytes("image\tcaption\np0.jpg\tcafé\n".encode("utf-16"))
    assert read(folder)[0] == {"p0.jpg": ["café"]}


def test_one_row_a_caption_is_one_picture_in_every_format(tmp_path):
    folder = pictures(tmp_path / "d", 4)
    rows = [
        {"image": f"p{i}.jpg", "caption": f"{i} {k}", "price": 10.5, "sku": "007"}
        for k in range(3)
        for i in range(4)
    ]
    wanted = {f"p{i}.jpg": [f"{i} {k}" for k in range(3)] for i in range(4)}
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.json").write_text(json.dumps(rows))
    lines = [",".join(map(str, row.values())) for row in rows]
    (folder / "t.csv").write_text("\n".join(["image,caption,price,sku", *lines]) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    data = [{"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} for row in rows]
    pq.write_table(
        pa.table({"image": data, "caption": [row["caption"] for row in rows]}), folder / "b.parquet"
    )
    for name in ("t.jsonl", "t.json", "t.csv", "t.parquet", "b.parquet"):
        assert read(folder / name) == (wanted, {}), name
    for name in ("t.jsonl", "t.csv", "t.parquet"):  # and the same of what stands beside
        extras = {json.dumps(p.extra) for p in read_any(str(folder / name))[1]}
        assert extras == {'{"price": 10.5, "sku": "007"}'}, name


def test_ids_of_captions_are_not_ids_of_pictures(tmp_path):
    folder = pictures(tmp_path / "d", 2)
    rows = [
        {"id": 10 * i + k, "file_name": f"p{i}.jpg", "caption": f"{k}"} for i in range(2) for k in range(2)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(folder)[0] == {"p0.jpg": ["0", "1"], "p1.jpg": ["0", "1"]}
    rows = [
        {"id": f"sku-{i}", "file_name": f"p{i}.jpg", "caption": f"{k}"} for i in range(2) for k in range(2)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(folder)[0] == {"sku-0": ["0", "1"], "sku-1": ["0", "1"]}


def sample(i: int, words: str) -> list[tuple[str, bytes]]:
    return [(f"{i:06d}.jpg", jpg(i)), (f"{i:06d}.txt", words.encode())]


@pytest.mark.parametrize("cut", [1.0, 0.5, "empty", "page", "header", "no end"])
def test_a_broken_shard_costs_itself(tmp_path, cut):
    folder = tmp_path / "d"
    for shard in range(3):
        tar(
            folder / f"{shard:05d}.tar",
            [m for i in range(4) for m in sample(100 * shard + i, f"{shard} {i}")],
        )
    file = folder / "00001.tar"
    data = file.read_bytes()
    members = 2 * 1024 * 4  # of four samples: a header and a block for each member
    broken = {
        1.0: data,
        0.5: data[: len(data) * 3 // 10],
        "empty": b"",
        "page": b"<html>502</html>" * 90,
        "header": data[: 2 * 1024 + 100],
        "no end": data[:members],
    }[cut]
    file.write_bytes(broken)
    good, bad = read(folder)
    assert sum(not key.startswith("0001") for key in good) == 8
    assert set(bad) == (set() if cut == 1.0 else {"00001.tar"})
    if cut == "no end":
        assert len(good) == 12
    if cut == "header":  # one whole sample stands before the header that was cut
        assert len(good) == 9


def test_macs_leave_no_trace_and_names_with_dots_are_pictures_each(tmp_path):
    dot = b"\x00\x05\x16\x07" + bytes(60)
    members = [("./._a.v1.jpg", dot), ("./a.v1.jpg", jpg(1)), ("./._a.v1.txt", dot), ("./a.v1.txt", b"one")]
    members += [
        ("./a.v2.jpg", jpg(2)),
        ("./a.v2.txt", b"two"),
        ("__MACOSX/._b.jpg", dot),
        (".DS_Store", b"x"),
    ]
    members += [("b.jpg", jpg(3)), ("b.json", b'{"caption": "three", "license": "CC0"}')]
    members += [("c.jpg", jpg(4)), ("c.json", b"[1, 2]"), ("d.txt", b"nothing to see")]
    tar(tmp_path / "x.tar", members)
    good, bad = read(tmp_path / "x.tar")
    assert good == {"a.v1": ["one"], "a.v2": ["two"], "b": ["three"]}
    assert "no object" in bad["c"]
    assert "no picture among txt" in bad["d"]


def test_shards_that_count_from_the_same_number_keep_all_their_pictures(tmp_path):
    for shard in range(2):
        tar(tmp_path / f"{shard:05d}.tar", [m for i in range(3) for m in sample(i, f"{shard} {i}")])
    wanted = {f"{shard:05d}/{i:06d}": [f"{shard} {i}"] for shard in range(2) for i in range(3)}
    assert read(tmp_path) == (wanted, {})
    layout = open_source(str(tmp_path))  # shard by shard, as workers read them
    assert {p.key for file in layout.files for p in layout.pictures_of(file)} == set(wanted)
    # a name that comes again somewhere: the later one is named by its shard
    tar(tmp_path / "00001.tar", [m for i in (7, 1) for m in sample(i, f"1 {i}")])
    assert set(read(tmp_path)[0]) == {"000000", "000001", "000002", "000007", "00001/000001"}


def test_a_name_that_every_row_has_names_nothing(tmp_path):
    data = [{"bytes": jpg(i), "path": "image.jpg"} for i in range(4)]
    pq.write_table(pa.table({"image": data, "caption": [str(i) for i in range(4)]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == {f"a.parquet-{i:08d}": [str(i)] for i in range(4)}
    # no name at all: rows of one picture that follow each other belong together
    data = [{"bytes": jpg(i // 2), "path": None} for i in range(6)]
    pq.write_table(pa.table({"image": data, "caption": [str(i) for i in range(6)]}), tmp_path / "a.parquet")
    assert sorted(read(tmp_path / "a.parquet")[0].values()) == [["0", "1"], ["2", "3"], ["4", "5"]]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"],
        ["data/train-0", "data/val-0", "data/test-0"],
        ["split=train/part", "split=dev/part", "split=test/part"],
    ],
)
def test_splits_in_names_are_kept(tmp_path, names):
    for start, name in enumerate(names):
        file = tmp_path / "d" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        data = [{"bytes": jpg(10 * start + i), "path": f"{start}{i}.jpg"} for i in range(4)]
        pq.write_table(pa.table({"image": data, "caption": ["words"] * 4}), file)
    manifest = build(str(tmp_path / "d"), str(tmp_path / "out"))
    assert manifest["splits"] == {"train": 4, "val": 4, "test": 4}
    # one file alone says nothing of how its owner divides
    only = next(
        (tmp_path / "d").rglob("*test*/*.parquet"), next((tmp_path / "d").rglob("test*.parquet"), None)
    )
    assert only is not None
    assert {p.split for p in read_any(str(only))[1]} == {None}


def test_imagefolder_and_text_files_beside_pictures(tmp_path):
    for split in ("train", "test"):
        folder = pictures(tmp_path / "hf" / split, 2)
        lines = [json.dumps({"file_name": f"p{i}.jpg", "text": f"{split} {i}"}) for i in range(2)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    rows = list(read_any(str(tmp_path / "hf"))[1])
    assert {(p.key, p.split, *p.captions) for p in rows} == {
        (f"{split}/p{i}.jpg", split, f"{split} {i}") for split in ("train", "test") for i in range(2)
    }
    # img2dataset's files: folders of a.jpg, a.txt, a.json beside tables without pictures
    side = pictures(tmp_path / "files" / "00000", 2)
    for i in range(2):
        (side / f"p{i}.txt").write_text(f"caption {i}\n")
        (side / f"p{i}.json").write_text("{}")
    pq.write_table(pa.table({"url": ["http://h/0"], "caption": ["x"]}), tmp_path / "files" / "00000.parquet")
    (tmp_path / "files" / "00000_stats.json").write_text("{}")
    assert read(tmp_path / "files")[0] == {f"00000/p{i}.jpg": [f"caption {i}"] for i in range(2)}


def test_flickr8k_as_published_keeps_its_splits(tmp_path):
    pictures(tmp_path / "Flicker8k_Dataset", 4)
    lines = "".join(f"p{i}.jpg#{k}\tA thing {k} .\n" for i in range(4) for k in range(2))
    (tmp_path / "Flickr8k.token.txt").write_text(lines)
    (tmp_path / "Flickr8k.lemma.token.txt").write_text(lines)
    for name, i in (("train", 0), ("dev", 1), ("test", 2)):
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text(f"p{i}.jpg\n")
    rows = list(read_any(str(tmp_path))[1])
    assert [(p.key, p.split) for p in rows] == [
        ("p0.jpg", "train"), ("p1.jpg", "val"), ("p2.jpg", "test"), ("p3.jpg", "train"),
    ]  # fmt: skip


def test_coco_without_captions_is_named_and_ids_may_be_text(tmp_path):
    pictures(tmp_path, 2)
    images = [{"id": str(i), "file_name": f"p{i}.jpg"} for i in range(2)]
    boxes = {"images": images, "annotations": [{"image_id": 0, "bbox": [1, 2, 3, 4]}]}
    (tmp_path / "x.json").write_text(json.dumps(boxes))
    with pytest.raises(InputError, match="instances_.*has boxes"):
        list(read_any(str(tmp_path / "x.json"))[1])
    notes = [{"image_id": i, "caption": f"thing {i}"} for i in range(2)] + [{"image_id": 1, "caption": 3}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": notes}))
    good, bad = read(tmp_path / "x.json")
    assert good == {"p0.jpg": ["thing 0"], "p1.jpg": ["thing 1"]}
    assert len(bad) == 1


def test_addresses_are_absolute_and_pictures_on_the_web_are_never_fetched(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "d", 2)
    rows = "image,caption\np0.jpg,a\nhttp://127.0.0.1:9/x.jpg,b\np1.jpg,c\n"
    (folder / "captions.csv").write_text(rows)
    monkeypatch.chdir(tmp_path)
    manifest = build("d", "out")
    assert manifest["rejects"] == 1
    (reject,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert "never fetched here" in json.loads(reject)["reason"]
    uris = Pairs.open("out").table(["uri"])["uri"].to_pylist()
    assert uris == [str(tmp_path / "d" / f"p{i}.jpg") for i in range(2)]


def test_an_empty_caption_costs_itself(tmp_path):
    folder = pictures(tmp_path / "d", 1)
    (folder / "captions.csv").write_text("image,caption\np0.jpg,one\np0.jpg,\np0.jpg,two\n")
    manifest = build(str(folder), str(tmp_path / "out"))
    assert (manifest["captions"], manifest["rejects"]) == (2, 1)


@pytest.mark.parametrize(
    "value", ['"half \\ud83d"', json.dumps([[[1]]] * 1).replace("1", "[" * 40 + "]" * 40)]
)
def test_what_no_payload_can_hold_costs_its_row(tmp_path, value):
    folder = pictures(tmp_path / "d", 2)
    first = '{"file_name": "p0.jpg", "caption": "a", "more": ' + value + "}\n"
    (folder / "captions.jsonl").write_text(first + '{"file_name": "p1.jpg", "caption": "b", "x": NaN}\n')
    good, bad = read(folder)
    assert good == {"p1.jpg": ["b"]}
    assert set(bad) == {"p0.jpg"}


def test_damaged_parquet_costs_itself(tmp_path):
    for i in range(2):
        data = {"image": [jpg(i)], "caption": ["x"], "id": [f"{i}"]}
        pq.write_table(pa.table(data), tmp_path / f"{i}.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-30])
    good, bad = read(tmp_path)
    assert good == {"0": ["x"]}
    assert set(bad) == {"1.parquet"}


def test_an_archive_below_a_photo_library_does_not_hide_it(tmp_path):
    pictures(tmp_path / "photos", 2)
    tar(tmp_path / "photos" / "backup" / "old.tar", sample(1, "old"))
    assert set(read(tmp_path / "photos", captions=False)[0]) == {"p0.jpg", "p1.jpg"}


def test_ids_of_a_csv_stay_as_they_are_written(tmp_path):
    folder = pictures(tmp_path / "d", 2)
    (folder / "captions.csv").write_text("id,image,caption,price\n1e5,p0.jpg,a,1\n2.50,p1.jpg,b,2.5\n")
    rows = list(read_any(str(folder))[1])
    assert [(p.key, p.extra) for p in rows] == [("1e5", {"price": 1.0}), ("2.50", {"price": 2.5})]


def test_what_no_reader_took_is_counted_by_kind(tmp_path):
    from dclip_qdrant.pairs.readers import Account, left_out_line, open_source

    folder = tmp_path / "phone"
    (folder / "trip").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.jpg", "b.jfif", "trip/c.JPE"):
        Image.new("RGB", (8, 8), "red").save(folder / name, "JPEG")
    (folder / "a.txt").write_text("a red square")
    for name in ("d.HEIC", "e.heic", "trip/scan.jp2", "notes", ".DS_Store", "._a.jpg", "lonely.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    for name in ("@eaDir", ".thumbnails"):
        (folder / name).mkdir()
        Image.new("RGB", (4, 4)).save(folder / name / "a.jpg")
    account = Account(open_source(str(folder), captions=False))
    assert sorted(p.key for p in account.pictures()) == ["a.jpg", "b.jfif", "trip/c.JPE"]
    counts = account.left_out()
    wanted = {
        ".heic": 2,
        "hidden or system folders": 2,
        ".jp2": 1,
        "without a suffix": 1,
        ".txt": 1,
        "linked folders, not entered (more)": 1,
    }
    assert counts == wanted
    said = left_out_line("folder", counts)
    assert said.startswith("read as folder; left out: 2 ")
    assert "2 .heic" in said

    (folder / "captions.csv").write_text("image,caption\na.jpg,a red square\n")
    account = Account(open_source(str(folder)))
    assert [p.key for p in account.pictures()] == ["a.jpg"]
    counts = account.left_out()
    assert (counts[".jfif"], counts[".jpe"]) == (1, 1)
    assert ".csv" not in counts
    assert ".jpg" not in counts


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    from dclip_qdrant.errors import ImageError
    from dclip_qdrant.pictures.images import read

    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="a pipe, a device or a folder"):
        read(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="can't be read"):
        read(tmp_path / "nothing.jpg")


def test_a_name_that_is_not_utf8_costs_itself(tmp_path):
    folder = os.fsencode(tmp_path / "old")
    os.mkdir(folder)
    for name in (b"a.png", b"caf\xe9.png"):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(jpg(1))
    rows = list(open_source(str(tmp_path / "old"), captions=False).pictures())
    assert [row.key for row in rows if row.error is None] == ["a.png"]
    (bad,) = [row for row in rows if row.error is not None]
    assert bad.key == "caf\N{REPLACEMENT CHARACTER}.png"
    assert "a file name that is not UTF-8" in str(bad.error)


def test_system_folders_of_a_bucket_are_passed_over_too():
    from upath import UPath

    top = UPath("memory://nas-library")
    for name in ("a.png", "@eaDir/a.png", ".thumbnails/a.png", "trip/b.png", "trip/._b.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(jpg(1))
    keys = [p.key for p in open_source(str(top), captions=False).pictures()]
    assert sorted(keys) == ["a.png", "trip/b.png"]


def test_numbers_that_no_payload_holds_and_names_that_no_disk_holds_cost_their_own_row(tmp_path):
    names = {
        "0.jpg": '"x": 18446744073709551615',
        "1.jpg": '"x": 1' + "0" * 30,
        "2.jpg": '"x": -9223372036854775809',
    }
    rows = [f'{{"file_name": "{name}", {extra}}}' for name, extra in names.items()]
    rows += ['{"file_name": "3\\u0000.jpg"}', json.dumps({"file_name": "y" * 5000 + ".jpg"})]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    _, pictures = read_any(str(tmp_path))
    made = list(pictures)
    assert [p.key for p in made if p.error is None] == ["0.jpg", "3\0.jpg", "y" * 5000 + ".jpg"]
    assert all("a whole number of more than 64 bits" in str(p.error) for p in made if p.error is not None)
    for picture in made[-2:]:
        with pytest.raises(ImageError, match="can't be read"):
            images.read(picture.uri)


@pytest.mark.parametrize("name", ["uri", "image"])
def test_a_date_beyond_python_s_years_costs_its_own_row(name, tmp_path):
    pictures = ["0.jpg", "1.jpg"] if name == "uri" else [b"a", b"b"]
    days = pa.array([1, 2**30], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({name: pictures, "caption": ["a", "b"], "taken": days}), tmp_path / "t.parquet")
    made = read_any(str(tmp_path / "t.parquet"))[1]
    first, second = sorted(made, key=lambda picture: picture.error is not None)
    assert first.extra == {"taken": "1970-01-02"}
    assert "a date beyond the years 1 to 9999" in str(second.error)
