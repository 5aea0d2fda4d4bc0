"""Mapped vectors until the true ones are there: the map, and a collection that is promoted in between."""

import json

import numpy as np
import pytest

from dclip_qdrant.detectors.grid import Grid
from dclip_qdrant.errors import UsageError
from dclip_qdrant.metrics import normalise
from dclip_qdrant.serving import bridge
from dclip_qdrant.serving.bridge import BRIDGED, learn
from dclip_qdrant.serving.change import promote
from dclip_qdrant.serving.ingest import ingest
from dclip_qdrant.serving.reindex import reindex
from dclip_qdrant.serving.search import search
from dclip_qdrant.serving.stores import place
from dclip_qdrant.serving.student import Student

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(bridge, "LEAST", 20)


@pytest.fixture(params=["edge", "memory"])
def here(request, tmp_path):
    where = {"edge": str(tmp_path / "edge")} if request.param == "edge" else {"url": ":memory:"}
    opened = place(**where)
    yield opened
    opened.close()


@pytest.fixture
def old(here, student, scenes_folder):
    store = here.open("old")
    ingest(scenes_folder, student, store, detector=Grid(1, 2, 0.0))
    return store


@pytest.fixture(scope="module")
def other(other_student):
    return Student.load(other_student)


def told(store):
    return {
        p.id: (p.payload, p.image.round(4).tolist(), p.regions.round(4).tolist())
        for p in store.scroll(with_vectors=True)
    }


def test_a_linear_map_is_found_again(rng):
    """Against least squares, and on vectors that it never saw."""
    turn = rng.normal(size=(12, 9))
    old = rng.normal(size=(400, 12))
    new = old @ turn + 0.5
    found = learn(old, new)
    centred, *_ = np.linalg.lstsq(old - old.mean(0), new - new.mean(0), rcond=None)
    np.testing.assert_allclose(found.weight, centred, atol=0.01)
    fresh = rng.normal(size=(50, 12))
    np.testing.assert_allclose((found(fresh) * normalise(fresh @ turn + 0.5)).sum(1), 1, atol=1e-4)
    assert found.likeness == pytest.approx(1, abs=1e-3)


def test_noise_is_not_learned(rng):
    """Without any connection the map says little else than the mean, and its likeness says so."""
    old, new = rng.normal(size=(100, 60)), normalise(rng.normal(size=(100, 30)) + 0.3)
    found = learn(old, new)
    plain = float((normalise(new.mean(0)[None]) * new).sum(1).mean())
    assert found.likeness == pytest.approx(plain, abs=0.12)


def test_too_few_pictures_teach_nothing():
    with pytest.raises(UsageError, match="20 or more"):
        learn(np.ones((5, 3)), np.ones((5, 3)))


def test_after_it_all_is_as_without_a_bridge(here, old, other):
    plain, _ = reindex(here, "old", other, to="plain")
    seen = []

    def bridged(count, likeness):
        store = here.open("new")
        mapped = [p for p in store.scroll() if p.payload.get(BRIDGED)]
        assert (count, len(mapped), store.count()) == (30, 30, 60)
        assert {p.payload["student"] for p in mapped} == {other.model_name}
        assert len(search(store, other, text="a red square", mode="regions", limit=60)) == 60
        seen.append(likeness)

    new, report = reindex(here, "old", other, to="new", bridge=30, bridged=bridged)
    assert len(seen) == 1
    assert 0 < seen[0] <= 1
    assert (report.embedded, report.unchanged, report.rejected) == (30, 30, 0)
    assert told(new) == told(plain)


def test_a_run_that_was_killed_goes_on(here, old, other):
    class Killed(Exception):
        pass

    def kill(count, likeness):
        raise Killed

    with pytest.raises(Killed):
        reindex(here, "old", other, to="new", bridge=30, bridged=kill)
    filled = []
    new, report = reindex(here, "old", other, to="new", bridge=30, bridged=lambda n, _: filled.append(n))
    assert filled == [0]  # they were there
    assert report.embedded == 30
    assert not any(p.payload.get(BRIDGED) for p in new.scroll())


def test_promoted_in_between_it_follows_its_writers(here, old, other, scenes_folder):
    """The alias moves as soon as there are mapped vectors: what writers then change and delete in the new
    collection stays so, and mapped vectors become true ones."""
    here.point("live", "old")
    wrote = {}

    def bridged(count, likeness):
        promote(here, "live", "new", force=True)
        store = here.open("new")
        mapped = [p for p in store.scroll() if p.payload.get(BRIDGED)]
        true = [p for p in store.scroll() if not p.payload.get(BRIDGED)]
        store.delete([mapped[0].id, true[0].id])
        store.set_payloads({mapped[1].id: mapped[1].payload | {"price": 5}})
        store.set_payloads({true[1].id: true[1].payload | {"price": 6}})
        wrote.update(gone={mapped[0].id, true[0].id}, mapped=mapped[1].id, true=true[1].id)

    new, report = reindex(here, "old", other, to="new", bridge=30, bridged=bridged)
    points = {p.id: p for p in new.scroll(with_vectors=True)}
    assert len(points) == 58
    assert not wrote["gone"] & points.keys()
    assert not any(p.payload.get(BRIDGED) for p in points.values())
    assert (points[wrote["mapped"]].payload["price"], points[wrote["true"]].payload["price"]) == (5, 6)
    assert report.embedded == 29
    for point in points.values():
        wanted = other.embed_images([scenes_folder / point.payload["key"]])[0]
        np.testing.assert_allclose(point.image, wanted, atol=1e-4)


def test_ingesting_a_mapped_picture_embeds_it(here, old, other, scenes_folder):
    class Killed(Exception):
        pass

    def kill(count, likeness):
        raise Killed

    with pytest.raises(Killed):
        reindex(here, "old", other, to="new", bridge=30, bridged=kill)
    new = here.open("new")
    report = ingest(scenes_folder, other, new, detector=Grid(1, 2, 0.0))
    assert (report.embedded, report.unchanged + report.updated) == (30, 30)
    assert not any(p.payload.get(BRIDGED) for p in new.scroll())


def test_the_command_line_says_when_it_can_be_promoted(student_folder, other_student, tmp_path, rng):
    from click.testing import CliRunner
    from PIL import Image

    from dclip_qdrant.cli import main

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(130):
        values = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number:03d}.png")
    edge = str(tmp_path / "edge")
    store = place(edge=edge)
    ingest(folder, Student.load(student_folder), store.open("p"))
    store.close()
    arguments = ["reindex", "--from", "p", "--to", "q", "--student", str(other_student), "--edge", edge]
    arguments += ["--rejects", str(tmp_path / "rejects.jsonl"), "--quiet", "--bridge", "100"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "q can be searched and promoted: 30 points have mapped vectors" in done.stderr
    assert json.loads(done.stdout)["points"] == 130
