"""A suite's result for people: Markdown and plots, with the words that figures by themselves don't say."""

import json
from pathlib import Path
from typing import Any

from dclip_qdrant.jobs.compare import GroupResult, SuiteResult
from dclip_qdrant.jobs.comparison import AFTER_WISE_FT, Difference, markdown_table
from dclip_qdrant.lookup import need
from dclip_qdrant.tables import storage

BEGIN = "<!-- compare:{} -->"
END = "<!-- /compare:{} -->"


def write_report(
    result: SuiteResult,
    path: Path,
    *,
    command: str = "",
    machine: str = "",
    leaked: SuiteResult | None = None,
    leak_share: float = 0.0,
) -> None:
    """Puts the suite's section into the Markdown file (between its marks, if they are there; at the end, if
    not) and its plots beside it.

    What else stands in the file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = [plot(group, path.parent / f"{result.suite}-{i}.png") for i, group in enumerate(result.groups)]
    names = [p.name if p else None for p in plots]
    text = section(result, plots=names, command=command, machine=machine)
    if leaked:
        text += "\n\n" + "\n".join(_leak_lines(result, leaked, leak_share))
    begin, end = BEGIN.format(result.suite), END.format(result.suite)
    block = f"{begin}\n{text}\n{end}"
    old = path.read_text() if path.exists() else ""
    if begin in old and end in old:
        new = old[: old.index(begin)] + block + old[old.index(end) + len(end) :]
    else:
        new = (old.rstrip() + "\n\n" if old else "") + block + "\n"
    storage.write_text(path, new)


def section(result: SuiteResult, *, plots: list[str | None], command: str, machine: str) -> str:
    """The Markdown of one suite."""
    lines = [f"## Recipes compared: {result.suite}", "", result.about, ""]
    if command:
        lines += ["```bash", command, "```", ""]
    if machine:
        lines += [machine, ""]
    for group, picture in zip(result.groups, plots, strict=True):
        lines += _group_lines(group, picture)
    return "\n".join(lines).strip()


def _group_lines(group: GroupResult, picture: str | None) -> list[str]:
    lines = [f"### {group.title}", ""]
    if group.about:
        lines += [group.about, ""]
    size, first = group.size, group.rows[0]
    lines += [
        f"Students: {size.image / 1e6:.1f} + {size.text / 1e6:.1f} M parameters (image + text), "
        f"{size.ms_per_image:.1f} ms a picture, {size.ms_per_text:.1f} ms a text (onnxruntime). Measured on "
        f"{group.split}: {first.n_images:,} pictures, {first.n_texts:,} captions.",
        "",
        markdown_table(group.rows),
        "",
    ]
    costs = {}
    for row in group.rows:
        if row.seconds is not None and row.passes is not None:
            name = row.name.removesuffix(AFTER_WISE_FT)
            costs[name] = f"{name} {row.seconds:.0f} s ({row.passes:g} passes over the pictures)"
    lines += ["Training, a seed: " + "; ".join(costs.values()) + ".", ""]
    lines += [*_difference_lines(group.differences), ""]
    if picture:
        lines += [f"![What WiSE-FT's alpha trades, {group.title}]({picture})", ""]
    if group.failures:
        lines += ["Failed: " + "; ".join(f"{k}: {v}" for k, v in group.failures.items()) + ".", ""]
    return lines


def _difference_lines(differences: list[Difference]) -> list[str]:
    """One line a recipe: its differences, and whether they are outside the interval."""
    lines = [
        "Mean R@1 of both directions, in points; 95% intervals, paired over pictures, over seeds too:",
        "",
    ]
    by_recipe: dict[str, list[str]] = {}
    for d in differences:
        low, high = d.ci
        text = (
            f"{d.difference * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}] against {d.than} ({d.verdict})"
        )
        by_recipe.setdefault(d.of, []).append(text)
    lines += [f"- **{name}**: " + "; ".join(texts) + "." for name, texts in by_recipe.items()]
    return lines


def recipe_figures(result: SuiteResult) -> list[dict[str, Any]]:
    """What `dclip-qdrant recipes show` tells of each recipe of a suite: its row after WiSE-FT (where it has
    that) and its differences."""
    figures = []
    for group in result.groups:
        # the row after WiSE-FT comes behind the one before it, and takes its place
        row_of = {r.name.removesuffix(AFTER_WISE_FT): r for r in group.rows if r.seconds is not None}
        for name, row in row_of.items():
            own = [d for d in group.differences if d.of == row.name]
            figures.append(
                {
                    "recipe": name,
                    "suite": result.suite,
                    "group": group.title,
                    "seeds": row.seeds,
                    "mean_r@1": row.mean["mean_r@1"],
                    "retention": row.mean["retention"],
                    "seconds": row.seconds,
                    "differences": [{"than": d.than, "difference": d.difference, "ci": d.ci} for d in own],
                }
            )
    return figures


def update_figures(result: SuiteResult, path: Path) -> None:
    """Puts a suite's figures into the file; a part of a suite leaves the rest as it is."""
    put_figures(recipe_figures(result), path)


def put_figures(own: list[dict[str, Any]], path: Path) -> None:
    """Puts figures into the file, each in the place of the older one of its suite, group and recipe."""

    def identity(figures: dict[str, Any]) -> tuple[str, str, str]:
        return figures["suite"], figures["group"], figures["recipe"]

    every = {identity(f): f for f in (json.loads(path.read_text()) if path.exists() else [])}
    every |= {identity(f): f for f in own}
    storage.write_json(path, list(every.values()))


def _leak_lines(result: SuiteResult, leaked: SuiteResult, share: float) -> list[str]:
    lines = [
        f"### With {share:.0%} of the test pictures in train",
        "",
        "DCLIP's own code did not keep test pictures out of training (docs/papers.md). The same runs with "
        "such a leak:",
        "",
    ]
    for clean_group, leaked_group in zip(result.groups, leaked.groups, strict=True):
        clean = {row.name: row.mean["mean_r@1"] * 100 for row in clean_group.rows}
        for row in leaked_group.rows:
            if row.name in clean:
                was, now = clean[row.name], row.mean["mean_r@1"] * 100
                lines.append(
                    f"- {clean_group.title}, {row.name}: mean R@1 {was:.1f} clean, {now:.1f} leaked "
                    f"({now - was:+.1f})."
                )
    return lines


def plot(group: GroupResult, path: Path) -> Path | None:
    """Validation recall over retention as alpha goes from the base to the weights as trained, a line a
    recipe; None where nothing was swept."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, sweep in group.sweeps.items():
        points = [
            (p.retention, 100 * p.val_mean_r1)
            for p in sweep
            if p.retention is not None and p.val_mean_r1 is not None
        ]
        if points:
            lines[name] = points
    if not lines:
        return None
    need("matplotlib", "a plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab10" if len(lines) <= 10 else "tab20")
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", ms=3.5, lw=1.2, label=name, color=colours(i))
        axes.plot(x[-1:], y[-1:], "s", ms=6, color=colours(i))
    axes.axvline(1.0, color="grey", lw=0.8, ls=":")
    axes.set(
        xlabel="zero-shot retention",
        ylabel="mean R@1 on validation (%)",
        title=f"{group.title}: WiSE-FT's alpha; squares are the weights as trained",
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
