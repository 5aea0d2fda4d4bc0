"""The student as fastembed models: the same vectors as ours, through qdrant-client's every way in, in
workers, and in apps that never mention us."""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image
from processes import python

pytest.importorskip("fastembed", reason="the fastembed extra is not installed")

from dclip_qdrant.apps import autoregister, registration
from dclip_qdrant.errors import UsageError
from dclip_qdrant.pictures.images import open_rgb, read
from dclip_qdrant.serving.student import Student

TEXTS = ["a red ball", "two dogs &amp; a “cat” ﬁne", "ＦＵＬＬ  width\n text", "word " * 90]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setenv(registration.ENV, "")
    for known in (registration._names, registration._spelled, registration._loaded):
        known.clear()


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """RGB, palette, transparent, greyscale, and one that lies on its side."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    noise.save(tmp_path / "rgb.png")
    noise.quantize(8).save(tmp_path / "palette.png")
    alpha = noise.convert("RGBA")
    alpha.putalpha(100)
    alpha.save(tmp_path / "alpha.png")
    noise.convert("L").save(tmp_path / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=exif)
    return sorted(tmp_path.iterdir())


def test_what_we_use_of_fastembed_is_there():
    import inspect

    from fastembed import ImageEmbedding, LateInteractionMultimodalEmbedding, TextEmbedding
    from fastembed.common.model_description import DenseModelDescription, ModelSource

    for cls in (TextEmbedding, ImageEmbedding, LateInteractionMultimodalEmbedding):
        assert isinstance(cls.EMBEDDINGS_REGISTRY, list)
        assert all(callable(m._list_supported_models) for m in cls.EMBEDDINGS_REGISTRY)
    given = inspect.signature(DenseModelDescription).parameters
    assert {"model", "sources", "model_file", "description", "license", "size_in_GB", "dim"} <= set(given)
    assert "hf" in inspect.signature(ModelSource).parameters


def test_apps_get_the_command_lines_vectors(student_folder, pictures):
    from fastembed import ImageEmbedding, LateInteractionMultimodalEmbedding, TextEmbedding

    name = registration.register(student_folder)
    student = Student.load(student_folder)
    assert name == student.model_name
    for called in (name, name.upper(), f"dclip/{student.name}"):
        text, image = TextEmbedding(called), ImageEmbedding(called)
        np.testing.assert_allclose(np.stack(list(text.embed(TEXTS))), student.embed_texts(TEXTS), atol=1e-5)
        ours = student.embed_images([open_rgb(read(p), p) for p in pictures])
        np.testing.assert_allclose(np.stack(list(image.embed(pictures))), ours, atol=1e-5)
        np.testing.assert_allclose(
            np.stack(list(image.embed([Image.open(p) for p in pictures]))), ours, atol=1e-5
        )
    assert text.embedding_size == image.embedding_size == student.dim
    np.testing.assert_allclose(
        next(iter(text.query_embed("a red ball"))), student.embed_texts(["a red ball"])[0], atol=1e-5
    )
    assert text.token_count("a red ball") == 5  # three words, start, end
    regions = LateInteractionMultimodalEmbedding(name)
    assert next(iter(regions.embed_text("a red ball"))).shape == (1, student.dim)
    rows = next(iter(regions.embed_image(str(pictures[0]))))
    assert rows.shape == (1 + registration.TOP_K, student.dim)
    np.testing.assert_allclose(rows[0], ours[0], atol=1e-5)


def test_through_qdrant_client(student_folder, pictures):
    from qdrant_client import QdrantClient, models

    name = registration.register(student_folder)
    student = Student.load(student_folder)
    client = QdrantClient(":memory:")
    vectors = {
        "image": models.VectorParams(size=client.get_embedding_size(name), distance=models.Distance.COSINE),
        "regions": models.VectorParams(
            size=student.dim,
            distance=models.Distance.COSINE,
            hnsw_config=models.HnswConfigDiff(m=0),
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        ),
    }
    client.create_collection("c", vectors_config=vectors)
    points = [
        models.PointStruct(
            id=i,
            vector={
                "image": models.Image(image=str(p), model=name),
                "regions": models.Image(image=str(p), model=name + "/regions"),
            },
            payload={"name": p.name},
        )
        for i, p in enumerate(pictures)
    ]
    client.upsert("c", points)
    ours = student.embed_images([open_rgb(read(p), p) for p in pictures])
    stored = {
        r.id: np.array(r.vector["image"])
        for r in client.retrieve("c", range(len(pictures)), with_vectors=True)
    }
    for i, v in enumerate(ours):
        np.testing.assert_allclose(stored[i], v, atol=1e-5)
    scores = ours @ student.embed_texts(["a red ball"])[0]
    found = client.query_points(
        "c", query=models.Document(text="a red ball", model=name), using="image", limit=5
    ).points
    np.testing.assert_allclose([h.score for h in found], np.sort(scores)[::-1], atol=1e-5)
    found = client.query_points(
        "c", query=models.Image(image=str(pictures[2]), model=name), using="image", limit=1
    ).points
    assert (found[0].payload["name"], round(found[0].score, 4)) == (pictures[2].name, 1.0)
    rescored = client.query_points(
        "c",
        prefetch=models.Prefetch(
            query=models.Document(text="a red ball", model=name), using="image", limit=5
        ),
        query=models.Document(text="a red ball", model=name + "/regions"),
        using="regions",
        limit=5,
    ).points
    assert len(rescored) == 5
    assert all(r.score >= scores[r.id] - 1e-5 for r in rescored)  # the whole picture is one of the rows
    recommended = client.query_points(
        "c",
        query=models.RecommendQuery(
            recommend=models.RecommendInput(positive=[models.Document(text="a red ball", model=name)])
        ),
        using="image",
        limit=5,
    ).points
    assert [r.id for r in recommended] == list(np.argsort(-scores))


def test_a_second_student_of_the_same_name_is_refused(student_folder, other_student, tmp_path):
    name = registration.register(student_folder)
    assert registration.register(student_folder) == name  # twice is fine
    with pytest.raises(UsageError, match="one student a name"):
        registration.register(other_student)
    second = registration.register(other_student, alias=False)
    assert second != name
    alias = "dclip/" + Student.load(student_folder).name
    assert registration.registered()[alias] == str(student_folder.resolve())
    registration.register(other_student, replace=True)
    assert registration.registered()[alias] == str(other_student.resolve())


def test_a_broken_folder_warns_and_never_stops_the_app(tmp_path, monkeypatch):
    monkeypatch.setenv(registration.ENV, str(tmp_path / "gone"))
    with pytest.warns(RuntimeWarning, match="no such folder"):
        registration.register_environment()


APP = """
import sys
from qdrant_client import QdrantClient, models
{register}
NAME = {name!r}

def main():
    client = QdrantClient(":memory:", local_inference_batch_size=2)
    size = client.get_embedding_size(NAME)
    params = models.VectorParams(size=size, distance=models.Distance.COSINE)
    client.create_collection("c", vectors_config={{"image": params}})
    pictures = [models.Image(image=p, model=NAME) for p in sys.argv[1:]]
    points = [models.PointStruct(id=i, vector={{"image": p}}) for i, p in enumerate(pictures)]
    client.upload_points("c", points, batch_size=2, parallel=2)
    assert client.count("c").count == len(points)
    import json
    records = client.retrieve("c", range(len(points)), with_vectors=True)
    print(json.dumps([r.vector["image"] for r in records]))

if __name__ == "__main__":
    {inside}
    main()
"""


def _run_app(
    tmp_path: Path, source: str, pictures: list[Path], env: dict[str, str] | None = None
) -> np.ndarray:
    app = tmp_path / "app.py"
    app.write_text(source)
    clean = (
        {k: v for k, v in os.environ.items() if k != registration.ENV} | {"HF_HUB_OFFLINE": "1"} | (env or {})
    )
    done = python(app, *pictures, env=clean, code=0)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["top", "guarded"])
def test_upload_points_in_parallel(student_folder, pictures, tmp_path, where):
    """qdrant-client's workers are fresh processes: they must know the student, wherever the app registered
    it."""
    student = Student.load(student_folder)
    line = f"import dclip_qdrant; dclip_qdrant.register({str(student_folder)!r})"
    source = APP.format(
        register=line if where == "top" else "",
        inside=line if where == "guarded" else "pass",
        name=student.model_name,
    )
    vectors = _run_app(tmp_path, source, pictures)
    np.testing.assert_allclose(
        vectors, student.embed_images([open_rgb(read(p), p) for p in pictures]), atol=1e-5
    )


@pytest.mark.slow
def test_an_unmodified_app_with_autoregister(student_folder, pictures, tmp_path):
    """In an environment of its own: enable, run an app that never mentions us, disable, and it no longer
    knows the name."""
    env = tmp_path / "env"
    python("-m", "venv", "--without-pip", env, code=0)
    own = env / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = processes.run([own, "-c", where], code=0).stdout.strip()
    # the child environment sees what this one has: the packages and the checkout
    paths = [p for p in sys.path if p.endswith("site-packages")] + [str(Path(__file__).resolve().parents[2])]
    Path(packages, "_parent.pth").write_text("\n".join(paths) + "\n")
    cli = lambda *a: processes.run([own, "-m", "dclip_qdrant.cli", "autoregister", *a])
    done = cli("--enable", str(student_folder))
    assert done.returncode == 0, done.stderr
    assert str(student_folder) in cli("--status").stdout
    student = Student.load(student_folder)
    app = tmp_path / "app.py"
    app.write_text(APP.format(register="", inside="pass", name=f"dclip/{student.name}"))
    run = lambda **more: processes.run(
        [own, app, *pictures], env={**os.environ, "HF_HUB_OFFLINE": "1", **more}
    )
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    ours = student.embed_images([open_rgb(read(p), p) for p in pictures])
    np.testing.assert_allclose(np.array(json.loads(done.stdout.splitlines()[-1])), ours, atol=1e-5)
    off = run(DCLIP_AUTOREGISTER="0")
    assert off.returncode != 0
    assert "Unsupported embedding model: dclip/tiny" in off.stderr
    assert cli("--disable").returncode == 0
    assert not Path(packages, autoregister.PTH).exists()
    assert not Path(packages, autoregister.LIST).exists()
    assert run().returncode != 0


def test_the_hook_is_silent_where_nothing_is_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(autoregister, "site", lambda: str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoregister.register_listed()


@pytest.fixture
def two(student_folder, other_student):
    """A guarded client, a collection that the first student filled, and both registered: they have one name
    and one width."""
    from qdrant_client import QdrantClient, models

    from dclip_qdrant import guard
    from dclip_qdrant.serving.collection import metadata_of

    mine = registration.register(student_folder)
    other = registration.register(other_student, alias=False)
    client = guard(QdrantClient(":memory:"))
    dim = Student.load(student_folder).dim
    params = models.VectorParams(size=dim, distance=models.Distance.COSINE)
    client.create_collection("c", vectors_config=params, metadata=metadata_of(Student.load(student_folder)))
    client.create_collection("foreign", vectors_config=params)
    client.upsert(
        "c", [models.PointStruct(id=1, vector=models.Document(text="a red ball", model=mine), payload={})]
    )
    return client, mine, other


def test_a_guarded_client_refuses_the_wrong_student_everywhere(two, pictures):
    from qdrant_client import models

    from dclip_qdrant.errors import MismatchError

    client, mine, other = two
    right, wrong = (models.Document(text="x", model=m) for m in (mine, other))
    point = models.PointStruct(id=2, vector=models.Image(image=str(pictures[0]), model=other), payload={})
    assert client.query_points("c", query=right).points[0].id == 1
    assert client.query_points(
        "c", query=models.Document(text="x", model="dclip/tiny")
    ).points  # the alias is the right student's
    for call in (
        lambda: client.query_points("c", query=wrong),
        lambda: client.query_points(
            "c", prefetch=[models.Prefetch(query=wrong)], query=models.FusionQuery(fusion=models.Fusion.RRF)
        ),
        lambda: client.query_points(
            "c", query=models.RecommendQuery(recommend=models.RecommendInput(positive=[wrong]))
        ),
        lambda: client.query_batch_points("c", requests=[models.QueryRequest(query=wrong)]),
        lambda: client.upsert("c", [point]),
        lambda: client.upsert(collection_name="c", points=[point]),
        lambda: client.upload_points("c", iter([point])),
        lambda: client.update_vectors("c", [models.PointVectors(id=1, vector=wrong)]),
        lambda: client.query_points(
            "c", query=models.Document(text="x", model="dclip/never@00000000")
        ),  # a name that nobody registered
    ):
        with pytest.raises(MismatchError, match=r"filled by dclip/tiny@.*was asked to embed"):
            call()
    assert client.count("c").count == 1
    assert client.query_points("foreign", query=wrong).points == []  # nothing of ours to protect there


def test_a_guarded_client_follows_an_alias_that_moves(two, other_student):
    from qdrant_client import models

    from dclip_qdrant.errors import MismatchError
    from dclip_qdrant.serving.collection import metadata_of

    client, _, other = two
    student = Student.load(other_student)
    client.create_collection(
        "d",
        vectors_config=models.VectorParams(size=student.dim, distance=models.Distance.COSINE),
        metadata=metadata_of(student),
    )
    point_at = lambda name: client.update_collection_aliases(
        [
            models.CreateAliasOperation(
                create_alias=models.CreateAlias(collection_name=name, alias_name="live")
            )
        ]
    )
    query = models.Document(text="x", model=other)
    point_at("c")
    with pytest.raises(MismatchError):
        client.query_points("live", query=query)
    client.delete_collection("c")
    point_at("d")
    assert client.query_points("live", query=query).points == []


def test_an_async_client_is_guarded_too(student_folder, other_student):
    import asyncio

    from qdrant_client import AsyncQdrantClient, models

    from dclip_qdrant import guard
    from dclip_qdrant.errors import MismatchError
    from dclip_qdrant.serving.collection import metadata_of

    mine, other = registration.register(student_folder), registration.register(other_student, alias=False)

    async def go():
        client = guard(AsyncQdrantClient(":memory:"))
        params = models.VectorParams(size=Student.load(student_folder).dim, distance=models.Distance.COSINE)
        await client.create_collection(
            "c", vectors_config=params, metadata=metadata_of(Student.load(student_folder))
        )
        assert (await client.query_points("c", query=models.Document(text="x", model=mine))).points == []
        with pytest.raises(MismatchError):
            await client.query_points("c", query=models.Document(text="x", model=other))
        await client.close()

    asyncio.run(go())


def test_a_collection_of_short_vectors_is_filled_and_queried_through_options(student_folder, pictures):
    from qdrant_client import QdrantClient, models

    name, client = registration.register(student_folder), QdrantClient(":memory:")
    client.create_collection("c", vectors_config=models.VectorParams(size=6, distance=models.Distance.COSINE))
    short = {"options": {"dim": 6}}
    client.upsert(
        "c",
        [
            models.PointStruct(id=i, vector=models.Image(image=str(p), model=name, **short), payload={})
            for i, p in enumerate(pictures)
        ],
    )
    hits = client.query_points(
        "c", query=models.Image(image=str(pictures[2]), model=name, **short), limit=9
    ).points
    assert hits[0].id == 2
    student = Student.load(student_folder)
    vectors = student.embed_images([open_rgb(read(p), p) for p in pictures])[:, :6]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert hits[1].score == pytest.approx(np.sort(vectors @ vectors[2])[-2], abs=1e-5)
    assert client.query_points("c", query=models.Document(text="a red ball", model=name, **short)).points
    with pytest.raises(UsageError, match="1 to"):
        client.query_points("c", query=models.Document(text="a red ball", model=name, options={"dim": 9999}))
