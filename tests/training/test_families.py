"""One small model of each family that open_clip has, with random weights: trained for a step, exported,
checked against torch, and loaded again by stock open_clip."""

import json
import warnings

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY
from model_folders import model_folder
from PIL import Image

from dclip_qdrant.jobs.export import check_parity, export
from dclip_qdrant.recipe import Recipe
from dclip_qdrant.serving.student import Student
from dclip_qdrant.training.data import Cache
from dclip_qdrant.training.loop import fit
from dclip_qdrant.training.models import two_tower
from dclip_qdrant.training.models.trial import try_recipe, try_towers
from dclip_qdrant.training.student_task import StudentTask

pytestmark = pytest.mark.slow

TEXT = TINY["model_cfg"]["text_cfg"]
BOTH_WAYS = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def timm(name, size, **options):
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": size, **options}


FAMILIES = {
    "ViT with QuickGELU": {**TINY["model_cfg"], "quick_gelu": True},
    "SigLIP": {
        "embed_dim": 192,
        "vision_cfg": timm("vit_tiny_patch16_224", 224, timm_pool="map", timm_proj="none"),
        "text_cfg": {**BOTH_WAYS, "tokenizer_kwargs": {"clean": "canonicalize"}},
        "custom_text": True,
    },
    "MobileCLIP": {
        "embed_dim": 48,
        "vision_cfg": timm("fastvit_t8", 64, timm_pool="avg", timm_proj=None),
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "EVA02": {
        "embed_dim": 48,
        "vision_cfg": timm("eva02_tiny_patch14_224", 224, timm_pool="token", timm_proj=None),
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "ConvNeXt": {
        "embed_dim": 48,
        "vision_cfg": timm("convnext_atto", 64, timm_pool="", timm_proj="linear"),
        "text_cfg": TEXT,
    },
    "ResNet": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "CoCa": {
        "embed_dim": 32,
        "vision_cfg": {
            **TINY["model_cfg"]["vision_cfg"],
            "attentional_pool": True,
            "output_tokens": True,
            "attn_pooler_heads": 2,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "CLIPA": {
        "embed_dim": 32,
        "vision_cfg": {
            **TINY["model_cfg"]["vision_cfg"],
            "no_ln_pre": True,
            "pool_type": "avg",
            "final_ln_after_pool": True,
        },
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
}
# how an image tower that ends in no linear map can be recognised: it is refused by recipes that fold into one
REFUSED_BY_BEST = {"SigLIP", "CoCa"}


def preprocessing(config):
    return {**TINY["preprocess_cfg"], "size": config["vision_cfg"]["image_size"]}


LARGE = ("MobileCLIP", "SigLIP", "EVA02", "ResNet")  # an export of half a minute each


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=[pytest.mark.long] if f in LARGE else []) for f in FAMILIES],
)
def base(request, tmp_path_factory):
    config = {"model_cfg": FAMILIES[request.param], "preprocess_cfg": preprocessing(FAMILIES[request.param])}
    folder = model_folder(tmp_path_factory.mktemp("family") / "base", json.loads(json.dumps(config)), 0)
    return request.param, folder


CAPTIONS = [["A red dog, running!", "a dog"], ["two CATS & a bird"], ["a bird in a tree"], ["rain"]]


def pictures(size):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)) for _ in CAPTIONS]


class InMemory:
    """Stands where `data.Pictures` does."""

    def __init__(self, images):
        self.load = images.__getitem__


def trained(folder, kind):
    """A step of plain fine-tuning of both towers."""
    model = two_tower.load(folder)
    count = [len(c) for c in CAPTIONS]
    cache = Cache(
        keys=list("abcd"),
        crop=np.tile(np.array([0, 0, 1, 1], np.float32), (4, 1, 1)),
        flip=np.zeros((4, 1), bool),
        trunk=np.zeros((4, 1, 0), np.float16),
        image=np.zeros((4, 1, model.dim), np.float16),
        texts=np.zeros((sum(count), model.dim), np.float16),
        first=np.concatenate([[0], np.cumsum(count)]),
    )
    settings = [f"student.train={json.dumps(kind)}", 'student.text="full"', "train.epochs=1"]
    recipe = Recipe.load("sft", [*settings, "train.lr=1e-3", "train.batch_size=4"])
    task = StudentTask(
        model, recipe, InMemory(pictures(model.preprocess.size)), CAPTIONS, cache, seed=0, same_base=False
    )
    before = model.weights()
    fit(
        task,
        epochs=1,
        batch_size=4,
        chunk_size=2,
        warmup=0,
        schedule="constant",
        clip_norm=1.0,
        checkpoint_s=60,
        seed=0,
    )
    model.merge_lora()
    after = model.weights()
    assert {k for k in before if not torch.equal(before[k], after[k])}, "nothing learned"
    return model


def test_a_step_an_export_and_back_into_stock_open_clip(base, tmp_path):
    family, folder = base
    start = two_tower.load(folder)
    try_towers(start)
    try_recipe(Recipe.load("sft"), set(), start, start)
    model = trained(folder, "lora" if family == "EVA02" else "full")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        out = export(model, tmp_path / "student", name="s", metrics={}, recipe={"name": "s"})
    assert check_parity(model, Student.load(out)) <= 1e-5
    stock, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}", output_dict=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    shown, texts = pictures(model.preprocess.size), [c for own in CAPTIONS for c in own]
    student = Student.load(out)
    with torch.no_grad():
        image = stock.eval().encode_image(torch.stack([transform(p) for p in shown]), normalize=True)
        text = stock.encode_text(tokenizer(texts), normalize=True)
    np.testing.assert_allclose(student.embed_images(shown), image.numpy(), atol=1e-5)
    np.testing.assert_allclose(student.embed_texts(texts), text.numpy(), atol=1e-5)


def test_trunk_and_head_are_the_tower(base):
    family, folder = base
    model = two_tower.load(folder)
    size = model.preprocess.size
    pixels = torch.randn(2, 3, size, size)
    ids = model.tokenizer(["a red dog", "two cats"], context_length=model.context_length)
    with torch.no_grad():
        if model.has_trunk:
            stock = model.model.encode_image(pixels)
            torch.testing.assert_close(model.head(model.trunk(pixels)), stock)
            torch.testing.assert_close(
                model.model.encode_image(pixels), stock
            )  # nothing is left out for good
        if model.text_trunk_frozen:
            stock = model.model.encode_text(ids)
            torch.testing.assert_close(model.text_head(model.text_trunk(ids)), stock)
            torch.testing.assert_close(model.model.encode_text(ids), stock)
    if family in ("EVA02", "MobileCLIP"):  # the projection is the trunk's own last layer
        assert all(n.startswith("visual.trunk.head.") for n in model.choose("image", "proj"))
        assert model.trunk_frozen


def test_what_best_folds_into_the_projections_is_what_the_towers_then_say(base):
    family, folder = base
    model = two_tower.load(folder)
    if family in REFUSED_BY_BEST:
        with pytest.raises(Exception, match="doesn't end in a projection"):
            model.output_projections()
        return
    try_recipe(Recipe.load("best"), set(), model, model)
    size = model.preprocess.size
    pixels = torch.randn(2, 3, size, size)
    ids = model.tokens(["a red dog", "two cats"])
    torch.manual_seed(1)
    image_map, text_map = (torch.linalg.qr(torch.randn(model.dim, model.dim)).Q for _ in range(2))
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(ids)
        model.map_outputs(image_map, text_map)
        torch.testing.assert_close(model.encode_image(pixels), image @ image_map, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.encode_text(ids), text @ text_map, atol=1e-4, rtol=1e-4)


def test_words_of_a_text_tower_that_reads_both_ways(base):
    family, folder = base
    if family not in ("SigLIP", "CLIPA"):
        pytest.skip("a causal text tower, or one that gives no tokens")
    model = two_tower.load(folder)
    captions = ["a red dog", "two"]
    ids = model.tokens(captions)
    with torch.no_grad():
        sentence, words, mask = model.encode_words(ids)
        torch.testing.assert_close(sentence, model.model.encode_text(ids))
    assert mask.sum(1).tolist() == [3, 1]  # begin, end and padding are no words
    assert words.shape == (2, model.context_length, model.dim)
