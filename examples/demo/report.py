"""demo/report.html: the table, the curves, what the detector saw, and the same queries before and after. One file, no scripts, no links out."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dclip_qdrant.pairs import Pairs, load_image
from dclip_qdrant.preview import draw
from dclip_qdrant.regions import Regions, load_regions
from dclip_qdrant.search import Found, search
from dclip_qdrant.stores import open_store
from dclip_qdrant.student import Student

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #e3e6ec; --card: #fff; --page: #f6f7f9; --good: #12805c; --mark: #e8f5f0; --a: #98a2b3; --b: #d97706; --c: #12805c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --line: #333a47; --card: #1b202a; --page: #12161d; --good: #4cc79b; --mark: #16332a; --a: #7b8698; --b: #f0a040; --c: #4cc79b; } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; margin: 0 0 .3rem } h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem } p { margin: .3rem 0 .9rem; color: var(--soft); max-width: 46rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.2rem; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } th, td { text-align: right; padding: .4rem .32rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 600; font-size: .82rem; vertical-align: bottom } table { font-size: .88rem } tr.win td { background: var(--mark); font-weight: 600 } td small { color: var(--soft); font-weight: 400 }
.big { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.4rem 0 } .big div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .8rem 1.2rem; flex: 1 1 12rem }
.big b { display: block; font-size: 1.7rem; line-height: 1.2 } .big span { color: var(--soft); font-size: .9rem }
.query { margin: 1.1rem 0 1.6rem } .query q { font-weight: 600 } .row { display: flex; align-items: center; gap: .5rem; margin-top: .45rem } .row > span { width: 5.2rem; color: var(--soft); font-size: .85rem; flex: none }
.thumb { position: relative } .thumb img { width: 104px; height: 104px; display: block; border-radius: 8px; border: 3px solid transparent } .thumb.hit img { border-color: var(--good) }
.grid { display: flex; flex-wrap: wrap; gap: .6rem } .grid img { width: 240px; border-radius: 8px } code { background: var(--card); border: 1px solid var(--line); padding: .1rem .35rem; border-radius: 5px; font-size: .88em }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; overflow-x: auto } svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
"""


def _img(image: Image.Image, alt: str, width: int | None = None) -> str:
    buffer = io.BytesIO()
    (image if width is None else image.resize((width, round(width * image.height / image.width)))).save(buffer, "JPEG", quality=85)
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _cell(row: dict, *path: str, scale: float = 100, digits: int = 1) -> str:
    value, spread = row, row.get("spread", {})
    for key in path:
        value, spread = value[key], (spread or {}).get(key)
    if value is None:
        return "<td>–</td>"
    return f"<td>{value * scale:.{digits}f}" + (f" <small>± {spread * scale:.{digits}f}</small>" if spread is not None else "") + "</td>"


def _table(rows: list[dict]) -> str:
    names = {"base": "the base it started from", "sft": "plain fine-tuning", "sft+wise_ft": "plain fine-tuning + WiSE-FT", "dclip": "DCLIP"}
    columns = [("t2i", "r@1"), ("t2i", "r@5"), ("t2i", "r@10"), ("i2t", "r@1"), ("i2t", "r@5"), ("i2t", "r@10")]
    head = (
        "<tr><th></th>"
        + "".join(f"<th>{'text→image' if w == 't2i' else 'image→text'}<br>R@{k[2:]}</th>" for w, k in columns)
        + "<th>MRR</th><th>retention</th></tr>"
    )
    body = ""
    for r in rows:
        win = ' class="win"' if r["name"] == "dclip" else ""
        body += (
            f"<tr{win}><td>{names.get(r['name'], r['name'])}</td>"
            + "".join(_cell(r, *c) for c in columns)
            + _cell(r, "mrr")
            + _cell(r, "retention", scale=1, digits=3)
            + "</tr>"
        )
    return f"<table>{head}{body}</table>"


def _curve(series: dict[str, list[tuple[float, float]]], title: str, unit: str) -> str:
    """A line chart as inline SVG; one line a series of (epoch, value)."""
    w, h, left, bottom, top = 500, 250, 46, 30, 28
    points = [p for s in series.values() for p in s]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-6), min(ys), max(max(ys), min(ys) + 1e-6)
    pad = (y1 - y0) * 0.08
    y0, y1 = y0 - pad, y1 + pad
    at = lambda x, y: (left + (x - x0) / (x1 - x0) * (w - left - 14), h - bottom - (y - y0) / (y1 - y0) * (h - bottom - top))
    out = f'<svg viewBox="0 0 {w} {h}" width="{w}" role="img" aria-label="{html.escape(title)}"><text x="{left}" y="16">{html.escape(title)}</text>'
    for i in range(4):
        v = y0 + (y1 - y0) * i / 3
        _, y = at(x0, v)
        out += f'<line x1="{left}" x2="{w - 14}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{v:.3g}</text>'
    for x in sorted(
        {float(f"{v:.2g}") for v in np.linspace(x0, x1, 5)}
        if x1 <= 1
        else {round(v) for v in np.linspace(x0, x1, min(6, int(x1 - x0) + 1))}
    ):
        out += f'<text x="{at(x, y0)[0]:.1f}" y="{h - 10}" text-anchor="middle">{x:g}</text>'
    out += f'<text x="{w - 14}" y="{h - 10}" text-anchor="end" dy="-14">{unit}</text>'
    names = ""
    for i, (name, s) in enumerate(series.items()):
        colour = ("var(--b)", "var(--c)", "var(--a)")[i % 3]
        out += (
            f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" points="'
            + " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in s))
            + '"/>'
        )
        names += f'<tspan dx="10" style="fill:{colour}">{html.escape(name)}</tspan>'
    out += f'<text x="{w - 14}" y="16" text-anchor="end" style="font-weight:600">{names}</text>'  # beside the title: no line passes there
    return out + "</svg>"


def _curves(table: dict) -> str:
    runs: dict[str, dict] = {}
    for label, path in table["runs"].items():
        if label.endswith("seed 0"):
            runs[label.split()[1]] = json.loads((Path(path) / "manifest.json").read_text())["metrics"]
    out = ""
    if table.get("teacher"):
        history = table["teacher"]["history"]
        out += _curve({"teacher": [(r["epoch"], r["loss"]) for r in history]}, "Teacher: InfoNCE over epochs", "epoch")
    out += _curve(
        {n: [(r["epoch"], r["info_nce"]) for r in m["history"]] for n, m in runs.items()}, "Students: InfoNCE over epochs (train)", "epoch"
    )
    out += _curve(
        {n: [(p["alpha"], p["val"]) for p in m["sweep"]] for n, m in runs.items()}, "WiSE-FT: mean validation recall over alpha", "alpha"
    )
    return f'<div class="grid">{out}</div>'


def _hits(hits: list[Found], right: str | None, boxes: bool) -> str:
    out = ""
    for h in hits:
        image = Image.open(h.payload["uri"]).convert("RGB")
        if boxes and h.box is not None:
            one = Regions(np.array([h.box], np.float32), np.ones(1, np.float32), (h.label,))
            image = draw(image, one).resize((208, 208))
        cls = "thumb hit" if h.payload["key"] == right else "thumb"
        out += f'<div class="{cls}" title="{html.escape(h.payload["key"])}  {h.score:.3f}">{_img(image, h.payload["caption"], 208)}</div>'
    return out


def _galleries(out: Path) -> str:
    """Queries by captions that are not in the collection; those whose picture moved are shown, first the best gains, then one that got worse."""
    students = {"before": Student.load(out / "base"), "after": Student.load(out / "student")}
    stores = {"before": open_store("scenes-before", edge=str(out / "edge")), "after": open_store("scenes", edge=str(out / "edge"))}
    rows = [json.loads(line) for line in (out / "data" / "captions.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["split"] == "test"][:150]
    find = lambda when, **how: search(stores[when], students[when], **how)
    moved = []
    for r in rows:
        text = r["captions"][2]
        ranks = []
        for when in ("before", "after"):
            keys = [h.payload["key"] for h in find(when, text=text, limit=50)]
            ranks.append(keys.index(r["file_name"]) + 1 if r["file_name"] in keys else 51)
        moved.append((ranks[0] - ranks[1], ranks, r, text))
    moved.sort(key=lambda m: (m[1][1] > 6, -m[0]))  # those that came onto the first row, by how far
    page = "<h2>Text queries, before and after</h2><p>Each query is a caption that is <em>not</em> in the collection; its own picture is outlined. Of 150 queries, the four that came furthest onto the first row, and, for honesty, the one that lost most.</p>"
    for _, ranks, r, text in [*moved[:4], min(moved, key=lambda m: m[0])]:
        page += f'<div class="query"><q>{html.escape(text)}</q> <small>rank {_rank(ranks[0])} → {_rank(ranks[1])}</small>'
        for when in ("before", "after"):
            page += f'<div class="row"><span>{when}</span>{_hits(find(when, text=text, limit=6), r["file_name"], False)}</div>'
        page += "</div>"
    page += "<h2>Dense, hybrid and regions</h2><p>Hybrid adds BM25 over the one caption that each picture was indexed with. Regions orders by the best-matching region and says which it was.</p>"
    for r in rows[:3]:
        text = r["captions"][4]
        page += f'<div class="query"><q>{html.escape(text)}</q>'
        for mode in ("dense", "hybrid", "regions"):
            page += f'<div class="row"><span>{mode}</span>{_hits(find("after", text=text, mode=mode, limit=6), r["file_name"], mode == "regions")}</div>'
        page += "</div>"
    page += "<h2>Picture queries</h2><p>The first picture is the query; it is left out of the hits.</p>"
    for r in rows[5:8]:
        image = Image.open(out / "data" / r["file_name"]).convert("RGB")
        hits = [h for h in find("after", image=image, limit=7) if h.payload["key"] != r["file_name"]][:6]
        page += f'<div class="query"><div class="row"><span>query</span><div class="thumb">{_img(image, "query", 208)}</div></div><div class="row"><span>hits</span>{_hits(hits, None, False)}</div></div>'
    for s in stores.values():
        s.close()
    return page


def _rank(rank: int) -> str:
    return str(rank) if rank <= 50 else "over 50"


def _boxes(out: Path) -> str:
    stage = next((out / "stages").glob("regions-*/manifest.json")).parent
    from upath import UPath

    found = load_regions(UPath(stage))
    rows = next(Pairs.open(str(out / "pairs")).rows(["key", "uri", "image"], ("test",)))[:8]
    return '<div class="grid">' + "".join(_img(draw(load_image(r), found[r["key"]]), f"boxes in {r['key']}", 240) for r in rows) + "</div>"


def write(out: Path) -> None:
    """Writes out/report.html from what the demo left in `out`."""
    table = json.loads((out / "table.json").read_text())
    rows = {r["name"]: r for r in table["rows"]}
    base, sft, dclip = rows["base"], rows["sft"], rows["dclip"]
    gain = lambda a, b: f"{(a['mean_r@1'] - b['mean_r@1']) * 100:+.1f}"
    notes = "".join(
        f"<li>{c['of']} minus {c['than']}: {c['difference'] * 100:+.1f} points, 95% paired-bootstrap interval {c['ci'][0] * 100:+.1f} to {c['ci'][1] * 100:+.1f}</li>"
        for c in table["comparisons"]
    )
    kept = "–" if dclip["retention"] is None else f"{dclip['retention']:.3f}"
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>dclip-qdrant demo</title><style>{STYLE}</style></head><body>
<h1>A team's own CLIP, made and measured</h1>
<p>A tiny CLIP that has only seen one or two plain objects learns a team's scenes: several objects with patterns and relations. A teacher looks at regions that a detector found; the student
learns from the teacher and from the captions, with the text tower frozen. {dclip["n_images"]} held-out scenes, {dclip["n_texts"]:,} captions, {dclip["seeds"]} seeds.</p>
<div class="big"><div><b>{gain(dclip, base)}</b><span>points of mean R@1 over the base</span></div><div><b>{gain(dclip, sft)}</b><span>points over plain fine-tuning, same budget</span></div>
<div><b>{kept}</b><span>of the base's zero-shot accuracy kept</span></div></div>
<h2>The table</h2><p>Recall in percent, means over seeds with the standard deviation beside them. Same trainable set and same number of student forward passes in every trained row.</p><div class="card">{_table(table["rows"])}</div>
<p style="margin-top:.8rem">Mean R@1 of both directions, paired over pictures:</p><ul style="margin-top:0;color:var(--soft)">{notes}</ul>
<h2>How it learned</h2>{_curves(table)}
<h2>What the detector sees</h2><p>Held-out scenes with the regions that the teacher is given.</p>{_boxes(out)}
{_galleries(out)}
<h2>Your own pictures</h2><pre>dclip-qdrant pairs /your/pictures -o /data/pairs
ray job submit --working-dir . -- python ray_jobs/distill.py --pairs /data/pairs --base ViT-B-32/openai --out /data/run
dclip-qdrant ingest /your/pictures --student /data/run/student --collection pictures</pre></body></html>
"""
    (out / "report.html").write_text(page)
