"""What learns, layers, LoRA, interpolation, and the same numbers as stock open_clip."""

from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from dclip_qdrant.errors import RecipeError, UsageError
from dclip_qdrant.training.models.two_tower import interpolate, load


@pytest.fixture
def model(tiny_base):
    return load(str(tiny_base))


def test_same_embeddings_as_open_clip(model, tiny_base, rng):
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_base}")
    stock.eval()
    texts = ["a red star", "a very long caption about a large striped blue house above a ring", ""]
    from PIL import Image

    picture = Image.fromarray(rng.integers(0, 256, (50, 41, 3), dtype=np.uint8))
    with torch.no_grad():
        ids = open_clip.get_tokenizer(f"local-dir:{tiny_base}")(texts)
        torch.testing.assert_close(
            model.encode_text(model.tokens(texts)), stock.encode_text(ids), atol=1e-5, rtol=1e-4
        )
        pixels = torch.from_numpy(model.preprocess.normalise(model.preprocess.pixels(picture)[None]))
        torch.testing.assert_close(pixels[0], preprocess(picture), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_image(pixels), stock.encode_image(pixels))


@pytest.mark.parametrize("size", [(64, 48), (33, 77), (10, 20), (32, 32), (501, 499)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_preprocessing_is_torchvisions(size, mode, rng):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    from dclip_qdrant.pictures.preprocess import Preprocess

    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    cfg = PreprocessCfg(size=32, resize_mode=mode)
    ours = Preprocess(size=32, resize_mode=mode)
    got = ours.normalise(ours.pixels(picture)[None])[0]
    np.testing.assert_allclose(got, image_transform_v2(cfg, is_train=False)(picture).numpy(), atol=1e-5)


def test_texts_are_padded_as_the_tokenizer_pads_them(model):
    assert model.pad_id == 0  # CLIP's own
    ids = model.tokenizer(["a red star"])[0]
    assert ids[-1] == model.pad_id
    model.tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=1))  # SigLIP's, in open_clip's
    assert model.pad_id == 1
    model.tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=None))
    assert model.pad_id == 0


def test_attn_proj_is_dclips_set(model):
    names = set(model.choose("image", "attn_proj"))
    assert names == {
        f"visual.transformer.resblocks.{i}.attn.{p}"
        for i in range(2)
        for p in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    } | {"visual.proj"}
    assert {n for n, p in model.model.named_parameters() if p.requires_grad} == names


def test_last_n_full_and_frozen(model):
    assert model.choose("text", "frozen") == []
    last = model.choose("image", "last_n", last_n=1)
    assert all(
        ".resblocks.1." in n or n in ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias")
        for n in last
    )
    assert set(model.choose("image", "full")) == {
        n for n, _ in model.model.named_parameters() if n.startswith("visual.")
    }
    text = model.choose("text", "full")
    assert "text_projection" in text
    assert not any(n.startswith(("visual", "logit")) for n in text)


def test_layers_run_from_the_stem_to_the_projection(model):
    layers = model.layers("image")
    assert "visual.conv1.weight" in layers[0]
    assert all(".resblocks.0." in n for n in layers[1])
    assert "visual.proj" in layers[-1]
    assert "token_embedding.weight" in model.layers("text")[0]


def with_timm_trunk():
    net = open_clip.model.CLIP(
        8,
        {
            "timm_model_name": "resnet18",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    from dclip_qdrant.pictures.preprocess import Preprocess
    from dclip_qdrant.training.models.two_tower import TwoTower

    return TwoTower(
        net,
        Preprocess(64),
        open_clip.get_tokenizer("ViT-B-32"),
        name="t",
        config={"embed_dim": 8},
        fingerprint="",
    )


def test_timm_trunk_is_recognised_as_frozen_and_its_features_give_the_same_embedding():
    model = with_timm_trunk()
    assert model.choose("image", "attn_proj") == ["visual.head.proj.weight"]
    assert model.trunk_frozen
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.head(model.trunk(x)), model.encode_image(x))
    assert any(n.startswith("visual.trunk.layer4") for n in model.choose("image", "last_n", last_n=1))
    assert not model.trunk_frozen


def test_norms_stay_in_eval_mode(model):
    model.train()
    assert not any(m.training for m in model.modules())


def test_lora_changes_nothing_at_first_and_merges_into_what_was_trained(model):
    torch.manual_seed(0)
    ids, x = model.tokens(["a red star"]), torch.randn(2, 3, 32, 32)
    before = model.encode_image(x), model.encode_text(ids)
    names = model.choose("image", "lora", rank=2) + model.choose("text", "lora", rank=2)
    assert names
    torch.testing.assert_close(model.encode_image(x), before[0])
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    for _ in range(3):
        loss = model.encode_image(x).pow(2).sum() + model.encode_text(ids).pow(2).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    trained = model.encode_image(x), model.encode_text(ids)
    assert (trained[0] - before[0]).abs().max() > 1e-3
    snapshot = model.weights()
    model.merge_lora()
    torch.testing.assert_close(model.encode_image(x), trained[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_text(ids), trained[1], atol=1e-5, rtol=1e-4)
    assert set(model.model.state_dict()) == set(snapshot)
    for k, v in model.model.state_dict().items():
        torch.testing.assert_close(v, snapshot[k])


def test_interpolation_by_hand():
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(7)},
    )
    out = interpolate(start, end, 0.25)
    assert out["w"].tolist() == [1.0, 2.0]
    assert out["n"] == 7


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", "no such folder"),
        ("ViT-B-33/openai", "did you mean 'ViT-B-32'"),
        ("ViT-B-32", "TAG one of"),
        ("ViT-B-32/opnai", "no weights 'opnai'"),
    ],
)
def test_wrong_base_gets_one_clear_line(name, says):
    with pytest.raises(UsageError, match=says) as e:
        load(name)
    assert "\n" not in str(e.value)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no open_clip_model\.safetensors"):
        load(str(tmp_path))


@pytest.mark.parametrize("kind", ["clip", "timm", "timm with bias"])
def test_a_rotation_turns_both_towers_and_no_similarity(kind, model, rng):
    if kind != "clip":
        model = with_timm_trunk()
    if kind == "timm with bias":
        head = model.model.visual.head.proj
        model.model.visual.head.proj = torch.nn.Linear(head.in_features, head.out_features).requires_grad_(
            False
        )
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(model.dim, model.dim)))[0])
    pixels = torch.from_numpy(
        rng.normal(size=(3, 3, model.preprocess.size, model.preprocess.size)).astype(np.float32)
    )
    ids = model.tokens(["a red star", "two houses", "a ring"])
    with torch.no_grad():
        before = model.encode_image(pixels), model.encode_text(ids)
        model.map_outputs(turn, turn)
        after = model.encode_image(pixels), model.encode_text(ids)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, (a.double() @ turn).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[0] @ after[1].T, before[0] @ before[1].T, atol=1e-4, rtol=1e-4)


def test_a_rotation_needs_projections(model):
    model.model.visual.proj = None
    with pytest.raises(RecipeError, match="image tower .* doesn't end in a projection"):
        model.map_outputs(torch.eye(model.dim), torch.eye(model.dim))


def test_a_learned_rotation_is_orthogonal_and_makes_short_prefixes_better(rng):
    """Vectors whose signal is spread evenly over all 32 components by a random rotation: 8 components find
    what all 32 find only after ours."""
    from dclip_qdrant.metrics import mean_r1, normalise, ranks
    from dclip_qdrant.recipe import IndexSettings, ObjectiveSettings
    from dclip_qdrant.training import rotation

    signal = rng.normal(size=(300, 32)) * np.r_[np.ones(8), np.full(24, 0.1)]
    spread = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    image, text = (
        normalise(
            (signal + 0.3 * rng.normal(size=signal.shape) * np.r_[np.ones(8), np.full(24, 0.1)]) @ spread
        )
        for _ in range(2)
    )
    cfg = IndexSettings(
        objectives=(ObjectiveSettings(name="matryoshka", dims=(8,)),), steps=30, batch_size=128
    )
    turn, facts = rotation.learn(image, text, np.arange(300), cfg, seed=0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(32).double(), atol=1e-5, rtol=0)
    assert facts["loss_after"] < facts["loss_before"]
    score = lambda a, b: mean_r1(ranks(normalise(a[:, :8]), normalise(b[:, :8]), np.arange(300))).mean()
    whole = mean_r1(ranks(image, text, np.arange(300))).mean()
    assert score(image, text) < 0.8 * whole
    assert score(image @ turn.numpy(), text @ turn.numpy()) > 0.9 * whole


def test_captions_of_like_length_together_are_the_same_captions(model, rng):
    model.choose("text", "full")
    texts = ["star " * int(n) for n in rng.integers(1, 12, 150)]
    ids, weight = model.tokens(texts), torch.randn(model.dim)
    found = []
    for encode in (model.encode_text, model.encode_captions):
        out = encode(ids)
        model.zero_grad()
        (out @ weight).square().mean().backward()
        found.append((out.detach(), model._text.token_embedding.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * one.abs().max().item(), rtol=0)
