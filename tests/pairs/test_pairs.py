"""Readers for every format, splits, leaks, rejects, contracts."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dclip_qdrant.errors import InputError, LeakError, SchemaError, UsageError
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.build import build
from dclip_qdrant.tables.contracts import ALL, PAIRS


def picture(i, size=(12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "src" / "images").mkdir(parents=True)
    for i in range(6):
        (tmp_path / "src" / "images" / f"{i}.png").write_bytes(picture(i))
    return tmp_path / "src"


NAMES = [f"{i}.png" for i in range(6)]
CAPTIONS = {n: [f"caption {n} one", f"caption {n}, two"] for n in NAMES}


def write_csv(folder):
    (folder / "captions.csv").write_text(
        "file_name,caption\n" + "".join(f'{n},"{c}"\n' for n in NAMES for c in CAPTIONS[n])
    )
    return folder


def write_tsv(folder):
    (folder / "list.tsv").write_text(
        "image\tcaption\n" + "".join(f"{n}\t{c}\n" for n in NAMES for c in CAPTIONS[n])
    )
    return folder / "list.tsv"


def write_flickr_txt(folder):
    (folder / "captions.txt").write_text(
        "image,caption\n" + "".join(f'{n},"{c}"\n' for n in NAMES for c in CAPTIONS[n])
    )
    return folder


def write_results_csv(folder):
    (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        + "".join(f"{n}| {k}| {c}\n" for n in NAMES for k, c in enumerate(CAPTIONS[n]))
    )
    return folder


def write_token(folder):
    (folder / "results.token").write_text(
        "".join(f"{n}#{k}\t{c}\n" for n in NAMES for k, c in enumerate(CAPTIONS[n]))
    )
    return folder


def write_jsonl(folder):
    (folder / "captions.jsonl").write_text(
        "".join(json.dumps({"file_name": f"images/{n}", "captions": CAPTIONS[n]}) + "\n" for n in NAMES)
    )
    return folder


def write_coco(folder):
    images = [{"id": i, "file_name": n} for i, n in enumerate(NAMES)]
    notes = [{"image_id": i, "caption": c} for i, n in enumerate(NAMES) for c in CAPTIONS[n]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder


def write_karpathy(folder):
    splits = ["train", "restval", "train", "val", "test", "test"]
    images = [
        {"filename": n, "split": s, "sentences": [{"raw": c} for c in CAPTIONS[n]]}
        for n, s in zip(NAMES, splits, strict=True)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


def write_tar(folder):
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                for suffix, data in ((".png", picture(i)), (".txt", "\n".join(CAPTIONS[NAMES[i]]).encode())):
                    info = tarfile.TarInfo(f"{i:06d}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder):
    rows = {
        "image_id": NAMES,
        "image": [picture(i) for i in range(6)],
        "captions": [CAPTIONS[n] for n in NAMES],
    }
    pq.write_table(pa.table(rows), folder / "a.parquet")
    return folder


def write_hf_parquet(folder):
    rows = {
        "image": [{"bytes": picture(i), "path": n} for i, n in enumerate(NAMES)],
        "caption": [CAPTIONS[n] for n in NAMES],
    }
    pq.write_table(pa.table(rows), folder / "a.parquet")
    return folder / "a.parquet"


WRITERS = [
    write_csv,
    write_tsv,
    write_flickr_txt,
    write_results_csv,
    write_token,
    write_jsonl,
    write_coco,
    write_karpathy,
    write_tar,
    write_parquet,
    write_hf_parquet,
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.__name__.removeprefix("write_"))
def test_every_format_gives_the_same_pictures_and_captions(writer, folder, tmp_path):
    manifest = build(str(writer(folder)), str(tmp_path / "out"))
    assert sum(manifest["splits"].values()) == 6
    assert manifest["captions"] == 12
    rows = [r for part in Pairs.open(str(tmp_path / "out")).rows(list(PAIRS.columns)) for r in part]
    assert sorted(c for r in rows for c in r["captions"]) == sorted(c for cs in CAPTIONS.values() for c in cs)
    for r in rows:
        assert np.asarray(load_image(r)).shape == (10, 12, 3)
        assert (r["width"], r["height"]) == (12, 10)
    if writer is write_karpathy:
        assert manifest["splits"] == {"train": 3, "val": 1, "test": 2}
    assert (rows[0]["image"] is not None) == (writer in (write_tar, write_parquet, write_hf_parquet))


def test_split_is_deterministic_and_stays_when_pictures_are_added(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    rows = []
    for i in range(60):
        (src / f"{i}.png").write_bytes(picture(i))
        rows.append({"file_name": f"{i}.png", "caption": "x"})

    def splits(n, out):
        (src / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:n]))
        build(str(src), str(out), fractions=(0.5, 0.25, 0.25))
        t = Pairs.open(str(out)).table(["key", "split"])
        return dict(zip(t["key"].to_pylist(), t["split"].to_pylist(), strict=True))

    few, many, again = splits(40, tmp_path / "a"), splits(60, tmp_path / "b"), splits(60, tmp_path / "c")
    assert many == again
    assert {k: many[k] for k in few} == few
    assert 20 <= sum(v == "train" for v in many.values()) <= 40


def write_split_rows(folder, rows):
    (folder / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_leak_is_refused_even_under_another_name_and_format(folder, tmp_path):
    Image.open(folder / "images" / "0.png").save(folder / "images" / "copy.bmp")
    rows = [{"file_name": f"{i}.png", "caption": "x", "split": "train"} for i in range(4)] + [
        {"file_name": "copy.bmp", "caption": "x", "split": "test"}
    ]
    write_split_rows(folder, [*rows, {"file_name": "5.png", "caption": "x", "split": "val"}])
    with pytest.raises(LeakError, match="'0.png' is 'copy.bmp'"):
        build(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    manifest = build(str(folder), str(tmp_path / "out"), on_leak="drop-train")
    assert manifest["splits"] == {"train": 3, "val": 1, "test": 1}
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert reject["key"] == "0.png"


def test_copies_go_to_one_side_when_we_split(folder, tmp_path):
    for i in range(6):
        (folder / "images" / f"copy{i}.png").write_bytes(picture(i))
    write_split_rows(
        folder, [{"file_name": f"{p}{i}.png", "caption": "x"} for i in range(6) for p in ("", "copy")]
    )
    manifest = build(str(folder), str(tmp_path / "out"), fractions=(0.4, 0.3, 0.3))
    assert manifest["copies"] == 6


def test_train_without_val_gives_some_of_itself(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    rows = []
    for i in range(80):
        (src / f"{i}.png").write_bytes(picture(i))
        rows.append({"file_name": f"{i}.png", "caption": "x", "split": "train" if i < 70 else "dev"})
    write_split_rows(src, rows)
    manifest = build(str(src), str(tmp_path / "out"), split_map={"dev": "test"})
    assert manifest["splits"]["test"] == 10
    assert 1 <= manifest["splits"]["val"] <= 20
    assert sum(manifest["splits"].values()) == 80


def test_rejects_say_path_and_reason_and_are_counted(folder, tmp_path):
    (folder / "images" / "text.jpg").write_text("hello")
    (folder / "images" / "empty.jpg").write_bytes(b"")
    rows = [{"file_name": n, "caption": "fine"} for n in NAMES]
    rows += [{"file_name": f, "caption": "x"} for f in ("text.jpg", "empty.jpg", "missing.jpg")]
    rows += [
        {"file_name": "0.png", "captions": ["again"]},
        {"file_name": "images/1.png", "captions": [""]},
        {"file_name": "images/2.png", "captions": []},
        {"file_name": "images/3.png", "caption": "x", "split": "holdout"},
    ]
    write_split_rows(folder, rows)
    manifest = build(str(folder), str(tmp_path / "out"))
    assert manifest["rejects"] == 6
    assert sum(manifest["splits"].values()) == 6
    assert manifest["captions"] == 7  # a second row of a picture is a second caption
    reasons = {
        json.loads(line)["key"]: json.loads(line)["reason"]
        for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    }
    for key, says in {
        "text.jpg": "looks like text",
        "empty.jpg": "an empty file",
        "missing.jpg": "No such file",
        "images/1.png": "an empty caption",
        "images/2.png": "no caption",
        "images/3.png": "`split_map` holdout=train",
    }.items():
        assert says in reasons[key]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda d: d / "nothing", UsageError, "no such file or folder"),
        (lambda d: d, UsageError, "no captions file"),
        (
            lambda d: (d / "captions.csv").write_text("a,b\n1,2\n") and d,
            InputError,
            "a column for the picture",
        ),
        (
            lambda d: (d / "captions.jsonl").write_text("{oops\n") and d,
            InputError,
            "captions.jsonl:1: not JSON",
        ),
        (lambda d: (d / "x.token").write_text("no tab here\n") and d, InputError, "name.jpg#0<tab>caption"),
        (lambda d: (d / "captions.json").write_text("[]") and d, InputError, "without an images list"),
        (lambda d: (d / "a.parquet").write_bytes(b"PAR1 not really") and d, InputError, "not Parquet"),
        (lambda d: (d / "a.xlsx").write_bytes(b"x") and d / "a.xlsx", UsageError, "a file ending in '.xlsx'"),
    ],
)
def test_unusable_sources_get_one_clear_line(make, error, says, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    with pytest.raises(error, match=says) as e:
        build(str(make(src)), str(tmp_path / "out"))
    assert "\n" not in str(e.value)


def test_pairs_are_not_overwritten_by_accident(folder, tmp_path):
    build(str(write_csv(folder)), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="`overwrite`"):
        build(str(folder), str(tmp_path / "out"))
    build(str(folder), str(tmp_path / "out"), overwrite=True)


def test_a_missing_column_and_a_wrong_type_are_named_at_every_read(folder, tmp_path):
    out = tmp_path / "out"
    build(str(write_csv(folder)), str(out))
    (file,) = out.glob("*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["captions"]), file)
    with pytest.raises(SchemaError, match="no column 'captions'.*captions list<.*dclip-qdrant pairs"):
        Pairs.open(str(out))
    pq.write_table(table.set_column(0, "key", pa.array(range(6))), file)
    with pytest.raises(SchemaError, match="column 'key' of type int64; expected string"):
        Pairs.open(str(out))
    pq.write_table(table.replace_schema_metadata({"dclip.contract": "pairs/99"}), file)
    with pytest.raises(SchemaError, match="pairs/99; expected pairs/1"):
        Pairs.open(str(out))
    pq.write_table(table, file)
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match="not written to the end"):
        Pairs.open(str(out))


def test_contracts_accept_wider_arrow_types():
    for contract in ALL:
        wide = pa.schema(
            [
                pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type)
                for f in contract.schema
            ]
        )
        contract.check(wide, "x")
