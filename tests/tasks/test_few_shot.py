"""ComKD-CLIP's own task: splits and figures by hand, prompts that start as the model they are put before,
both stages' losses against their formulas, a whole run."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dclip_qdrant.errors import InputError, RecipeError
from dclip_qdrant.pairs.labelled import Labelled
from dclip_qdrant.tasks.few_shot import comkd, protocol
from dclip_qdrant.tasks.few_shot.prompts import ImagePrompts, TextPrompts
from dclip_qdrant.training.models.two_tower import TwoTower, load


@pytest.fixture(scope="module")
def tower(tiny_base):
    return load(str(tiny_base))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    import scenes

    folder = tmp_path_factory.mktemp("many")
    scenes.write_labelled(folder, 120)
    return folder


def made(names, labels):
    return Labelled(tuple(names), tuple(labels), ("x",) * len(labels), "print")


def test_harmonic_mean_by_hand():
    assert protocol.harmonic_mean(0.8694, 0.8073) == pytest.approx(0.8372, abs=5e-5)  # 2bn / (b + n)
    assert protocol.harmonic_mean(0.75, 0.25) == pytest.approx(0.375)
    assert protocol.harmonic_mean(0.9, 0.0) == 0.0


def test_base_to_novel_splits_classes_in_two_and_pictures_apart():
    data = made("abcde", [c for c in range(5) for _ in range(10)])
    s = protocol.base_to_novel(data, shots=3)
    assert (s.base.tolist(), s.novel.tolist()) == ([0, 1, 2], [3, 4])
    labels = np.array(data.labels)
    assert np.bincount(labels[s.shots], minlength=5).tolist() == [3, 3, 3, 0, 0]
    assert np.bincount(labels[s.test]).tolist() == [5] * 5
    assert np.bincount(labels[s.unlabelled]).tolist() == [5] * 5
    assert not set(s.test) & (set(s.unlabelled) | set(s.shots))
    assert set(s.shots) <= set(s.unlabelled)
    again = protocol.base_to_novel(data, shots=3)
    assert (s.test == again.test).all()
    assert (s.test != protocol.base_to_novel(data, shots=3, seed=1).test).any()


def test_a_class_of_one_picture_is_refused():
    with pytest.raises(InputError, match="b: 1 pictures of this class"):
        protocol.base_to_novel(made("ab", [0, 0, 0, 1]))


def test_accuracy_is_among_the_side_s_own_classes():
    # 3 classes; pictures of 0, 0, 1, 2. Over all, picture 1 is wrong by class 2; among base {0, 1} it is
    # right.
    logits = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 9.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    labels = np.array([0, 0, 1, 2])
    assert protocol.accuracy(logits, labels, np.arange(3)) == pytest.approx(0.5)
    assert protocol.accuracy(logits, labels, np.array([0, 1])) == pytest.approx(2 / 3)
    split = protocol.Split(np.array([0, 1]), np.array([2]), *(np.zeros(0, int),) * 3)
    assert protocol.figures(logits, labels, split) == pytest.approx(
        {"base": 2 / 3, "novel": 1.0, "harmonic_mean": 0.8}
    )


def test_ties_are_wrong():
    assert protocol.accuracy(np.ones((2, 2)), np.array([0, 1]), np.arange(2)) == 0.0


def test_text_prompts_start_as_the_plain_prompt(tower):
    names = ["red star", "moon"]
    prompts = TextPrompts(tower, names, depth=1)
    with torch.no_grad():
        torch.testing.assert_close(
            prompts(), tower.encode_text(tower.tokens(["a photo of a red star.", "a photo of a moon."]))
        )
        prompts.context += 1
        other = prompts.with_names(["house"])
        torch.testing.assert_close(other.context, prompts.context)
        assert other().shape == (1, 32)


def test_text_prompts_of_deeper_layers_stand_where_the_context_stands(tower):
    """Against the layers run by hand."""
    prompts = TextPrompts(tower, ["red star", "moon"], depth=2)
    text, ids = tower._text, prompts.ids
    n = ids.shape[1]
    with torch.no_grad():
        prompts.context += torch.randn_like(prompts.context)
        x = text.token_embedding(ids)
        x[:, 1:5] = prompts.context[0]
        x = x + text.positional_embedding[:n]
        for i, block in enumerate(text.transformer.resblocks):
            if i == 1:
                x[:, 1:5] = prompts.context[1]
            x = block(x, attn_mask=text.attn_mask[:n, :n])
        want = tower._project(text.ln_final(x)[torch.arange(2), ids.argmax(1)])
        torch.testing.assert_close(prompts(), want)
        # and nothing of it is left in the tower
        plain = tower.encode_text(ids)
        assert not torch.allclose(plain, want)
        torch.testing.assert_close(tower.encode_text(ids), plain)


@pytest.fixture
def bert(tmp_path, tower):
    """A tower that reads by a BERT of two layers."""
    transformers = pytest.importorskip("transformers", reason="pip install 'dclip-qdrant[hf]'")
    from open_clip.hf_model import HFTextEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", ".", "red", "star", "moon", "house"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    text = HFTextEncoder(
        str(tmp_path), output_dim=32, pretrained=False, pooler_type="mean_pooler", proj_type="linear"
    )

    class Words:
        context_length, strip_sep_token = 16, False

        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, texts, context_length):
            out = tokenizer(texts, padding="max_length", max_length=context_length, return_tensors="pt")
            return out.input_ids

    model = torch.nn.Module()
    model.text, model.visual = text, tower.model.visual
    model.encode_text = text
    return TwoTower(model, tower.preprocess, Words(), name="bert", config={"embed_dim": 32}, fingerprint="b")


def test_text_prompts_of_a_bert(bert):
    names = ["red star", "moon"]
    with torch.no_grad():
        prompts = TextPrompts(bert, names, depth=1)
        assert prompts.context.shape == (1, 4, 16)
        plain = bert.encode_text(bert.tokens(["a photo of a red star.", "a photo of a moon."]))
        torch.testing.assert_close(prompts(), plain)
        deep = TextPrompts(bert, names, depth=9)
        assert deep.context.shape == (2, 4, 16)
        # the layers by hand: without padding there is nothing to mask
        deep = TextPrompts(bert, names[:1], depth=2)
        reader = bert._text.transformer
        words = reader.embeddings.word_embeddings(deep.ids)
        words[:, 1:5] = deep.context[0]
        x = reader.embeddings(inputs_embeds=words)
        for i, layer in enumerate(reader.encoder.layer):
            if i == 1:
                x[:, 1:5] = deep.context[1]
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(deep(), bert._text.proj(x.mean(1)))
    deep().sum().backward()
    assert (deep.context.grad.abs().sum((1, 2)) > 0).all()


def test_a_text_tower_of_unknown_layers_is_refused(bert):
    bert.model.text = torch.nn.Identity()
    with pytest.raises(RecipeError, match="prompts: the text tower of bert; expected a causal text tower"):
        TextPrompts(bert, ["moon"])


def test_image_prompts_reach_every_layer_and_leave_the_tower_alone(tower):
    before = {k: v.clone() for k, v in tower.model.state_dict().items()}
    prompts, pixels = ImagePrompts(tower, count=2, depth=2), torch.randn(3, 3, 32, 32)
    out = prompts(pixels)
    assert out.shape == (3, 32)
    out.square().sum().backward()
    assert (prompts.tokens.grad.abs().sum((1, 2)) > 0).all()  # both layers' tokens
    assert {n for n, _ in prompts.named_parameters()} == {"tokens"}
    assert all(torch.equal(v, before[k]) for k, v in tower.model.state_dict().items())


def test_a_tower_without_tokens_gets_a_frame(tower):
    from types import SimpleNamespace

    conv = SimpleNamespace(
        model=SimpleNamespace(visual=object()),
        preprocess=SimpleNamespace(size=32),
        encode_image=lambda x: x.flatten(1),
        name="conv",
    )
    prompts, pixels = ImagePrompts(conv, frame=4), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(prompts(pixels), pixels.flatten(1))
    with torch.no_grad():
        prompts.pixels += 1
    changed = (prompts(pixels) != pixels.flatten(1)).reshape(3, 32, 32)
    assert changed[:, :4].all()
    assert not changed[:, 4:28, 4:28].any()


def test_teacher_loss_is_cross_entropy_plus_promptsrcs_terms(tower, rng):
    pixels, labels = rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), np.array([0, 1, 1, 0])
    task = comkd.PromptedTeacher(tower, pixels, labels, ["star", "moon"], lr=1e-3, depth=2)
    batch = task.batch(np.arange(4), 0)
    loss, terms = task.loss(task.encode(batch), task.fixed(batch))
    unit = lambda x: F.normalize(x, dim=-1)
    image, text = unit(task.modules(tower.normalised(batch.pixels))), unit(task.objectives())
    plain = unit(tower.encode_image(tower.normalised(batch.pixels)))
    old = unit(tower.encode_text(tower.tokens(["a photo of a star.", "a photo of a moon."])))
    # a new open_clip model's temperature, CLIP's at its start
    logits, was = (
        image @ text.T / 0.07,
        plain @ old.T / 0.07,
    )
    ce = -logits.log_softmax(1)[torch.arange(4), torch.tensor(labels)].mean()
    kl = (logits.softmax(1) * 0 + was.softmax(1) * (was.log_softmax(1) - logits.log_softmax(1))).sum(
        1
    ).mean() / 2
    assert loss.item() == pytest.approx(
        (ce + 25 * (text - old).abs().mean() + 10 * (image - plain).abs().mean() + kl).item(), rel=1e-4
    )
    assert terms["ce"] == pytest.approx(ce.item(), rel=1e-4)


def test_student_loss_is_kl_plus_alignment_and_needs_no_label(tower, rng):
    pixels = rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    unit = lambda x: F.normalize(x, dim=-1)
    teacher, texts = unit(torch.randn(4, 6)), unit(torch.randn(3, 6))
    task = comkd.UnlabelledStudent(tower, pixels, teacher.numpy(), texts, scale=100.0, lr=1e-3, align=2.0)
    with torch.no_grad():
        task.student.attention.alpha.fill_(0.5)
    batch = task.batch(np.arange(4), 0)
    loss, _terms = task.loss(task.encode(batch), task.fixed(batch))
    u = task.student.project(tower.normalised(batch.pixels))
    a = task.student.attention
    fused = u + 0.5 * ((a.query(u) @ a.key(texts).T / 6**0.5).softmax(1) @ a.value(texts))
    q_t, q_s = (100 * teacher @ texts.T).log_softmax(1), (100 * fused @ texts.T).log_softmax(1)
    kl = (q_t.exp() * (q_t - q_s)).sum(1).mean()
    align = (u.mean(0) - teacher.mean(0)).abs().sum() + (
        u.var(0, unbiased=False) - teacher.var(0, unbiased=False)
    ).abs().sum()
    assert loss.item() == pytest.approx((kl + 2 * align).item(), rel=1e-4)
    assert "label" not in batch.fixed


def test_a_run_from_start_to_table_and_again(labelled, tiny_base, tmp_path):
    from dclip_qdrant.tasks.few_shot.run import Config, adapt, table

    config = Config(shots=4, teacher_epochs=1, student_epochs=1, batch_size=8, depth=2)
    options = {"teacher": str(tiny_base), "student": str(tiny_base), "out": str(tmp_path), "config": config}
    out = adapt(str(labelled), **options)
    assert [r["name"] for r in out["rows"]] == [
        "student, zero-shot",
        "teacher, zero-shot",
        "teacher, prompted",
        "comkd_clip",
    ]
    for r in out["rows"]:
        assert r["harmonic_mean"] == pytest.approx(protocol.harmonic_mean(r["base"], r["novel"]))
    assert "| comkd_clip |" in table(out)
    lines = []
    assert adapt(str(labelled), log=lines.append, **options)["rows"] == out["rows"]
    assert lines[1:] == ["teacher: reused", "student: reused"]
    assert json.loads((tmp_path / "few_shot.json").read_text()) == out


def test_other_sets_and_domains(labelled, tiny_base, tmp_path):
    from dclip_qdrant.tasks.few_shot.run import Config, adapt

    config = Config(shots=2, teacher_epochs=1, student_epochs=1, batch_size=8, depth=1)
    out = adapt(
        str(labelled),
        teacher=str(tiny_base),
        student=str(tiny_base),
        out=str(tmp_path / "o"),
        config=config,
        cross=(str(labelled),),
        domains=(str(labelled),),
    )
    assert out["protocol"] == "transfer"
    (crossed,), (shifted,) = out["cross"].values(), out["domains"].values()
    assert len(crossed) == len(shifted) == 4
    # the same pictures under the same names: texts are the same either way
    assert [r["accuracy"] for r in crossed] == pytest.approx([r["accuracy"] for r in shifted])
    strange = tmp_path / "strange"
    for name in ("moon", "unicorn"):
        (strange / name).mkdir(parents=True)
        for i in range(2):
            (strange / name / f"{i}.jpg").write_bytes(next((labelled / "moon").glob("*.jpg")).read_bytes())
    with pytest.raises(InputError, match="classes unicorn"):
        adapt(
            str(labelled),
            teacher=str(tiny_base),
            student=str(tiny_base),
            out=str(tmp_path / "o"),
            config=config,
            domains=(str(strange),),
        )
