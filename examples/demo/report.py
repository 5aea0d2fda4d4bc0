"""demo/report.html: the table, searches before and after, the curves, what the detector saw. One file, no
scripts, no links out."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curves
import numpy as np
from PIL import Image
from upath import UPath

from dclip_qdrant import Hit, Student, open_store, search
from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.pairs.region_files import load_regions
from dclip_qdrant.pictures.drawing import draw
from dclip_qdrant.pictures.regions import Regions
from dclip_qdrant.serving.stores import Store

STYLE = Path(__file__).with_suffix(".css")
NAMES = {
    "base": "the base it started from",
    "sft": "plain fine-tuning",
    "sft+wise_ft": "plain fine-tuning + WiSE-FT",
    "demo": "DCLIP",
}
COLUMNS = [(way, f"r@{k}") for way in ("t2i", "i2t") for k in (1, 5, 10)]
ROW = 6  # pictures in a row
SHOWN = 4  # searches that improved
YOUR_OWN = """\
dclip-qdrant pairs /your/pictures -o pairs
dclip-qdrant distill --pairs pairs --base ViT-B-32/openai --out run
dclip-qdrant ingest /your/pictures --student run/student --collection pictures --detector yolo
dclip-qdrant search "a red bicycle" --student run/student --collection pictures --mode regions"""


def write(out: Path) -> None:
    """Writes out/report.html from what the demo left in `out`."""
    table = json.loads((out / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    dclip = rows["demo"]
    body = [
        "<h1>A team's own CLIP, made and measured</h1>",
        "<p>A tiny CLIP that has only seen one or two plain objects learns a team's scenes: several objects "
        "with patterns and relations. A teacher looks at regions that a detector found; the student learns "
        "from the teacher and from the captions, with the text tower frozen. "
        f"{dclip['n_images']} held-out scenes, {dclip['n_texts']:,} captions, {dclip['seeds']} seeds.</p>",
        _headline(rows),
        "<h2>Recall</h2><p>In percent: means over seeds, with the standard deviation beside them. Every "
        "trained row learns the same parameters in the same number of student forward passes.</p>",
        f'<div class="card">{_table(table["rows"])}</div>',
        _differences(table["comparisons"]),
        _verdict(table["verdict"]),
        _searches(out),
        f"<h2>Training</h2>{curves.of_runs(table)}",
        "<h2>What the detector sees</h2><p>Held-out scenes with the regions that the teacher is given.</p>",
        _boxes(out),
        f"<h2>Your own pictures</h2><pre>{html.escape(YOUR_OWN)}</pre>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dclip-qdrant demo</title><style>{STYLE.read_text()}</style>"
    )
    page = (
        f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    )
    (out / "report.html").write_text(page)


def _headline(rows: dict[str, Any]) -> str:
    base, sft, dclip = rows["base"], rows["sft"], rows["demo"]
    kept = "–" if dclip["retention"] is None else f"{dclip['retention']:.3f}"
    boxes = (
        (_points(dclip, base), "points of mean R@1 over the base"),
        (_points(dclip, sft), "points over plain fine-tuning, same budget"),
        (kept, "of the base's zero-shot accuracy kept"),
    )
    return (
        '<div class="big">' + "".join(f"<div><b>{b}</b><span>{t}</span></div>" for b, t in boxes) + "</div>"
    )


def _points(a: dict[str, Any], b: dict[str, Any]) -> str:
    return f"{(a['mean_r@1'] - b['mean_r@1']) * 100:+.1f}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = {"t2i": "text→image", "i2t": "image→text"}
    titles = [f"{names[way]}<br>R@{figure[2:]}" for way, figure in COLUMNS] + ["MRR", "retention"]
    lines = ["<tr><th></th>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"]
    for row in rows:
        cells = [_cell(row, *column) for column in COLUMNS]
        cells += [_cell(row, "mrr"), _cell(row, "retention", scale=1, digits=3)]
        kind = ' class="win"' if row["name"] == "demo" else ""
        lines.append(f"<tr{kind}><td>{NAMES.get(row['name'], row['name'])}</td>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(row: dict[str, Any], *path: str, scale: float = 100, digits: int = 1) -> str:
    value, spread = row, row.get("spread", {})
    for key in path:
        value, spread = value[key], (spread or {}).get(key)
    if value is None:
        return "<td>–</td>"
    beside = f" <small>± {spread * scale:.{digits}f}</small>" if spread is not None else ""
    return f"<td>{value * scale:.{digits}f}{beside}</td>"


def _differences(comparisons: Sequence[dict[str, Any]]) -> str:
    lines = []
    for c in comparisons:
        # + 0.0: no "-0.0"
        difference, low, high = (round(v * 100, 1) + 0.0 for v in (c["difference"], *c["ci"]))
        names = f"{NAMES.get(c['of'], c['of'])} minus {NAMES.get(c['than'], c['than'])}"
        lines.append(f"<li>{names}: {difference:+.1f} points, 95% interval {low:.1f} to {high:.1f}</li>")
    title = "<p>Mean R@1 of both directions, paired over pictures, bootstrap over pictures and seeds:</p>"
    return f'{title}<ul class="notes">{"".join(lines)}</ul>'


def _verdict(verdict: dict[str, Any]) -> str:
    sentences = "; ".join(verdict["sentences"])
    return f"<p><b>The verdict</b>: {html.escape(sentences)}.</p>"


def _searches(out: Path) -> str:
    """Searches in the demo's two collections, chosen by the rule that the page states."""
    rows = [json.loads(line) for line in (out / "data" / "captions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    before, after = (Student.load(out / name) for name in ("base", "student"))
    old, new = (open_store(name, edge=str(out / "edge")) for name in ("scenes-before", "scenes"))
    try:
        return _before_and_after(rows, (old, before), (new, after)) + _modes(rows, new, after, out)
    finally:
        old.close()
        new.close()


def _before_and_after(
    rows: Sequence[dict[str, Any]], old: tuple[Store, Student], new: tuple[Store, Student]
) -> str:
    """Captions whose own picture the student finds first and the base doesn't, the furthest climbs first;
    and one of those that went the other way."""
    ranks = np.stack([_own_ranks(rows, *old), _own_ranks(rows, *new)])  # [2, Q], 1 is first
    queries = [(row, text) for row in rows for text in row["captions"][1:]]
    better = np.flatnonzero((ranks[1] == 1) & (ranks[0] > 1))
    worse = np.flatnonzero((ranks[0] == 1) & (ranks[1] > 1))
    lines = [
        '<section id="searches"><h2>Searches, before and after</h2>',
        f"<p>Each query is a caption that is <em>not</em> in the collection; its own picture is outlined. Of "
        f"{len(queries):,} such queries the student finds {len(better)} ({len(better) / len(queries):.1%}) "
        f"first that the base doesn't, and loses {len(worse)} ({len(worse) / len(queries):.1%}) that the "
        f"base finds first. Below: of the former, the {SHOWN} that the base had furthest down; of the "
        "latter, the one that fell furthest.</p>",
    ]
    furthest = better[np.argsort(-ranks[0][better], kind="stable")][:SHOWN]
    fallen = worse[np.argsort(-ranks[1][worse], kind="stable")][:1]
    for q in (*furthest, *fallen):
        row, text = queries[q]
        lines.append(f'<div class="query"><q>{html.escape(text)}</q> ')
        lines.append(f"<small>its picture: number {ranks[0][q]} → number {ranks[1][q]}</small>")
        for when, (store, student) in (("base", old), ("student", new)):
            hits = search(store, student, text=text, limit=ROW)
            lines.append(_row(when, _thumbs(hits, row["file_name"])))
        lines.append("</div>")
    return "".join(lines) + "</section>"


def _own_ranks(rows: Sequence[dict[str, Any]], store: Store, student: Student) -> np.ndarray:
    """[Q] where exact search finds each query's own picture."""
    vectors = {p.payload["key"]: p.image for p in store.scroll(with_vectors=True)}
    pictures = np.stack([vectors[row["file_name"]] for row in rows])
    texts = [text for row in rows for text in row["captions"][1:]]
    owner = np.repeat(np.arange(len(rows)), [len(row["captions"]) - 1 for row in rows])
    similarity = student.embed_texts(texts) @ pictures.T
    own = similarity[np.arange(len(texts)), owner][:, None]
    return 1 + (similarity > own).sum(1)


def _modes(rows: Sequence[dict[str, Any]], store: Store, student: Student, out: Path) -> str:
    lines = [
        "<h2>Dense, hybrid and regions</h2><p>Hybrid adds BM25 over the one caption that each picture was "
        "indexed with. Regions orders by the best-matching region and says which it was. The first three "
        "test scenes, their last captions.</p>"
    ]
    for row in rows[:3]:
        text = row["captions"][-1]
        lines.append(f'<div class="query"><q>{html.escape(text)}</q>')
        for mode in ("dense", "hybrid", "regions"):
            hits = search(store, student, text=text, mode=mode, limit=ROW)
            lines.append(_row(mode, _thumbs(hits, row["file_name"], boxes=mode == "regions")))
        lines.append("</div>")
    lines.append("<h2>Picture queries</h2><p>The first picture is the query; it is left out of the hits.</p>")
    for row in rows[5:8]:
        path = out / "data" / row["file_name"]
        hits = search(store, student, image=path, limit=ROW + 1)
        others = [hit for hit in hits if hit.payload["key"] != row["file_name"]][:ROW]
        asked = f'<div class="thumb">{_img(Image.open(path).convert("RGB"), "query", 208)}</div>'
        lines.append(f'<div class="query">{_row("query", asked)}{_row("hits", _thumbs(others))}</div>')
    return "".join(lines)


def _row(title: str, content: str) -> str:
    return f'<div class="row"><span>{title}</span>{content}</div>'


def _thumbs(hits: Sequence[Hit], right: str | None = None, *, boxes: bool = False) -> str:
    out = []
    for hit in hits:
        image = Image.open(hit.payload["uri"]).convert("RGB")
        if boxes and hit.box is not None:
            matched = Regions(np.array([hit.box], np.float32), np.ones(1, np.float32), (hit.label or "",))
            image = draw(image, matched)
        key = hit.payload["key"]
        kind = "thumb hit" if key == right else "thumb"
        title = f"{html.escape(key)}  {hit.score:.3f}"
        out.append(f'<div class="{kind}" title="{title}">{_img(image, hit.payload["caption"], 208)}</div>')
    return "".join(out)


def _boxes(out: Path) -> str:
    stage = next((out / "stages").glob("regions-*/manifest.json")).parent
    regions = load_regions(UPath(stage))
    rows = next(Pairs.open(str(out / "pairs")).rows(["key", "uri", "image"], ("test",)))[:8]
    pictures = [_img(draw(load_image(r), regions[r["key"]]), f"boxes in {r['key']}", 240) for r in rows]
    return f'<div class="grid">{"".join(pictures)}</div>'


def _img(image: Image.Image, alt: str, width: int) -> str:
    buffer = io.BytesIO()
    image.resize((width, round(width * image.height / image.width))).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'
