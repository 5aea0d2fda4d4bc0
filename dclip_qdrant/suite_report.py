"""A suite's result for people: Markdown and plots, with the words that figures by themselves don't say."""

import json
from pathlib import Path
from typing import Any

from dclip_qdrant import evaluation

MARK = "<!-- compare:{} -->"
END = "<!-- /compare:{} -->"


def write(result: dict[str, Any], path: Path, *, command: str = "", machine: str = "", leaked: dict[str, Any] | None = None) -> None:
    """Puts the suite's section into the Markdown file (between its marks, if they are there; at the end, if not) and its plots beside it.

    What else stands in the file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = [plot(group, path.parent / f"{result['suite']}-{i}.png") for i, group in enumerate(result["groups"])]
    text = section(result, plots=[p.name if p else None for p in plots], command=command, machine=machine, leaked=leaked)
    begin, end = MARK.format(result["suite"]), END.format(result["suite"])
    old = path.read_text() if path.exists() else ""
    block = f"{begin}\n{text}\n{end}"
    if begin in old and end in old:
        old = old[: old.index(begin)] + block + old[old.index(end) + len(end) :]
    else:
        old = (old.rstrip() + "\n\n" if old else "") + block + "\n"
    path.write_text(old)


def section(result: dict[str, Any], *, plots: list[str | None], command: str, machine: str, leaked: dict[str, Any] | None = None) -> str:
    """The Markdown of one suite."""
    out = [f"## Recipes compared: {result['suite']}", "", result["about"], ""]
    if command:
        out += ["```bash", command, "```", ""]
    if machine:
        out += [machine, ""]
    for group, picture in zip(result["groups"], plots, strict=True):
        out += [f"### {group['title']}", ""]
        if group["about"]:
            out += [group["about"], ""]
        size = group["start"]
        out += [f"Students: {size['image'] / 1e6:.1f} + {size['text'] / 1e6:.1f} M parameters (image + text), {size['ms_per_image']:.1f} ms a picture, "
                f"{size['ms_per_text']:.1f} ms a text (onnxruntime). Measured on {group['split']}: {group['rows'][0]['n_images']:,} pictures, "
                f"{group['rows'][0]['n_texts']:,} captions.", "", evaluation.table(group["rows"]), ""]  # fmt: skip
        cost = {r["name"].removesuffix("+wise_ft"): r for r in group["rows"] if "seconds" in r}
        out += ["Training, a seed: " + "; ".join(f"{n} {r['seconds']:.0f} s ({r['passes']:g} passes over the pictures)" for n, r in cost.items()) + ".", ""]
        out += [*_words(group), ""]
        if picture:
            out += [f"![What WiSE-FT's alpha trades, {group['title']}]({picture})", ""]
        if group["failures"]:
            out += ["Failed: " + "; ".join(f"{k}: {v}" for k, v in group["failures"].items()) + ".", ""]
    if leaked:
        out += [*_leak(result, leaked), ""]
    return "\n".join(out).strip()


def recipe_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What `dclip-qdrant recipes show` tells of each recipe of a suite: its row after WiSE-FT (where it has that) and its differences."""
    out = []
    for group in result["groups"]:
        rows = {r["name"]: r for r in group["rows"] if "seconds" in r}
        for name in dict.fromkeys(n.removesuffix("+wise_ft") for n in rows):
            full = name + "+wise_ft" if name + "+wise_ft" in rows else name
            r = rows[full]
            out.append({"recipe": name, "suite": result["suite"], "group": group["title"], "seeds": r["seeds"], "mean_r@1": r["mean_r@1"], "retention": r["retention"], "seconds": r["seconds"],
                        "differences": [{k: d[k] for k in ("than", "difference", "ci")} for d in group["differences"] if d["of"] == full]})  # fmt: skip
    return out


def update_figures(result: dict[str, Any], path: Path) -> None:
    """Puts a suite's figures into the file, each in the place of the older one of its suite, group and recipe; a part of a suite leaves the rest as it is."""
    key = lambda f: (f["suite"], f["group"], f["recipe"])
    old = {key(f): f for f in (json.loads(path.read_text()) if path.exists() else [])}
    path.write_text(json.dumps(list((old | {key(f): f for f in recipe_figures(result)}).values()), indent=1) + "\n")


def verdict(ci: list[float]) -> str:
    return "better" if ci[0] > 0 else "worse" if ci[1] < 0 else "inside the noise"


def _words(group: dict[str, Any]) -> list[str]:
    """One line a recipe: its differences, and whether they are outside the interval."""
    out = ["Mean R@1 of both directions, in points, paired over pictures (seeds averaged), 95% intervals:", ""]
    by: dict[str, list[dict[str, Any]]] = {}
    for d in group["differences"]:
        by.setdefault(d["of"], []).append(d)
    for name, ds in by.items():
        said = [f"{d['difference'] * 100:+.1f} [{d['ci'][0] * 100:+.1f}, {d['ci'][1] * 100:+.1f}] against {d['than']} ({verdict(d['ci'])})" for d in ds]
        out.append(f"- **{name}**: " + "; ".join(said) + ".")
    return out


def _leak(result: dict[str, Any], leaked: dict[str, Any]) -> list[str]:
    out = [f"### With {leaked['share']:.0%} of the test pictures in train", "", "DCLIP's own code did not keep test pictures out of training (docs of the papers, 1.2). The same runs with such a leak:", ""]
    for a, b in zip(result["groups"], leaked["groups"], strict=True):
        clean = {r["name"]: r for r in a["rows"]}
        for r in b["rows"]:
            if r["name"] in clean:
                was, now = clean[r["name"]]["mean_r@1"] * 100, r["mean_r@1"] * 100
                out.append(f"- {a['title']}, {r['name']}: mean R@1 {was:.1f} clean, {now:.1f} leaked ({now - was:+.1f}).")
    return out


def plot(group: dict[str, Any], path: Path) -> Path | None:
    """Validation recall over retention as alpha goes from the base to the weights as trained, a line a recipe; None where nothing was swept."""
    lines = {name: [p for p in points if "retention" in p and "val_mean_r@1" in p] for name, points in group["sweeps"].items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    from dclip_qdrant.lookup import need

    need("matplotlib", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab10" if len(lines) <= 10 else "tab20")
    for i, (name, points) in enumerate(lines.items()):
        x, y = [p["retention"] for p in points], [100 * p["val_mean_r@1"] for p in points]
        axes.plot(x, y, "o-", ms=3.5, lw=1.2, label=name, color=colours(i))
        axes.plot(x[-1:], y[-1:], "s", ms=6, color=colours(i))
    axes.axvline(1.0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="zero-shot retention", ylabel="mean R@1 on validation (%)", title=f"{group['title']}: WiSE-FT's alpha; squares are the weights as trained")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
