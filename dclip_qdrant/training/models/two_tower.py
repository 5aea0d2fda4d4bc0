"""An open_clip model as the rest of the product sees it: two towers, what of them learns, and in which order
their layers stand."""

import hashlib
import re
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.pictures.preprocess import Preprocess
from dclip_qdrant.recipe import StudentSettings
from dclip_qdrant.training.models import lora, projections
from dclip_qdrant.training.models.bases import hash_tensors, open_base

LIKE_LENGTH = 64  # captions of like length that a CPU reads together

_ATTENTION = re.compile(
    r"\.attn\.(in_proj_weight|in_proj_bias|out_proj\.|qkv\.|q\.|k\.|v\.|proj\.|q_proj\.|k_proj\.|v_proj\."
    r"|\w*_proj_weight)"
)


class TwoTower(nn.Module):
    """`open_clip` model, its preprocessing and its tokenizer.

    Norms stay in eval mode while training (batch statistics of a few pictures of one domain are what makes
    fine-tuned CLIPs collapse).
    """

    model: Any  # an open_clip model; what its towers are called differs by family

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        tokenizer: Any,
        *,
        name: str,
        config: dict,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.model, self.preprocess, self.tokenizer = model.eval(), preprocess, tokenizer
        self.name, self.config, self.fingerprint = name, config, fingerprint
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "TwoTower":
        return super().train(False)

    # --- shapes

    @property
    def _text(self) -> Any:
        """Where token_embedding, transformer and ln_final are: the model itself or its `text` tower."""
        return self.model if hasattr(self.model, "token_embedding") else self.model.text

    @property
    def dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def context_length(self) -> int:
        """The longest text in tokens."""
        text: Any = self._text
        if isinstance(
            text, HFTextEncoder
        ):  # its positions say what it could read, its tokenizer what it was taught
            return self.tokenizer.context_length
        return text.context_length if hasattr(text, "context_length") else self.model.context_length

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp()

    @property
    def dynamic_text(self) -> bool:
        """A causal text tower that reads its answer at the end token: padding changes nothing and can be cut
        off."""
        t = self._text
        pool = getattr(t, "text_pool_type", getattr(t, "pool_type", None))
        return (
            hasattr(t, "token_embedding")
            and getattr(t, "attn_mask", None) is not None
            and pool in ("argmax", "eos")
            and getattr(t, "cls_emb", None) is None
        )

    # --- forward

    def normalised(self, pixels: Tensor, preprocess: Preprocess | None = None) -> Tensor:
        """[B, S, S, 3] uint8 -> [B, 3, S, S] float, on the tensor's own device (a quarter of the bytes to
        copy there), by the model's own mean and std or those of `preprocess`.

        Channels stay last in memory, the order that convolutions are fastest in: 1.2 to 1.4 times on a CPU.
        """
        own = preprocess or self.preprocess
        mean = torch.tensor(own.mean, device=pixels.device)
        std = torch.tensor(own.std, device=pixels.device)
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, D], not normalised (by CoCa it is)."""
        out = self.model.encode_image(pixels)
        return out[0] if isinstance(out, tuple) else out

    @property
    def _image_head(self) -> projections.Place | None:
        return projections.image_head(self.model.visual, self.dim)

    @property
    def has_trunk(self) -> bool:
        """A tower of timm's: its features below the output projection can be had by themselves."""
        return hasattr(self.model.visual, "trunk") and hasattr(self.model.visual, "head")

    @property
    def trunk_frozen(self) -> bool:
        """Nothing below the projection learns: the trunk's features can be computed once and kept."""
        if not self.has_trunk:
            return False
        learning = (n for n, p in self.model.named_parameters() if p.requires_grad and _is_image(n))
        return all(self.is_projection(n) for n in learning)

    def trunk_mark(self) -> str:
        """What the image trunk sees follows from this: a hash of its weights and of the preprocessing."""
        mark = hashlib.sha256(repr(self.preprocess).encode())
        trunk = self.model.visual.trunk.state_dict(prefix="visual.trunk.")
        hash_tensors(mark, {name: value for name, value in trunk.items() if not self.is_projection(name)})
        return mark.hexdigest()

    def trunk(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, F], what `head` turns into the embedding."""
        place = self._image_head
        if place is None or place.parent is self.model.visual:
            return self.model.visual.trunk(pixels)
        with projections.left_out(place):
            return self.model.visual.trunk(pixels)

    def head(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, D], not normalised."""
        place = self._image_head
        return features if place is None else place.value(features)

    def encode_patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> the embedding [B, D] and a map of patch features in the embedding's space [B, D, h,
        w], neither normalised.

        Raises:
            RecipeError: a tower that gives no map.
        """
        visual = self.model.visual
        if self.has_trunk:
            features = visual.trunk.forward_features(pixels)
            image = visual.head(visual.trunk.forward_head(features))  # a projection of its own included
            skip = getattr(visual.trunk, "num_prefix_tokens", 0)
            patches = features[:, skip:] if features.ndim == 3 else features.flatten(2).mT
            patches = self.head(patches) if patches.shape[-1] == visual.trunk.num_features else patches
        elif hasattr(visual, "_embeds") and getattr(visual, "attn_pool", None) is None:
            x = visual.transformer(visual._embeds(pixels))
            pooled, _ = visual._pool(x)
            image = pooled if visual.proj is None else pooled @ visual.proj
            patches = visual.ln_post(x[:, 1:])
            patches = patches if visual.proj is None else patches @ visual.proj
        else:
            raise RecipeError(
                "objectives",
                f"patch features of {self.name}",
                "a ViT of open_clip or a timm trunk",
                'of = "regions" works with any',
            )
        side = int(patches.shape[1] ** 0.5)
        if side * side != patches.shape[1] or patches.shape[-1] != image.shape[-1]:
            raise RecipeError(
                "objectives",
                f"{patches.shape[1]} patches of width {patches.shape[-1]} from {self.name}",
                "a square map in the embedding's space",
            )
        return image, patches.mT.unflatten(2, (side, side))

    def encode_rois(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] and boxes [B, R, 4] (x0, y0, x1, y1 as parts of the input) -> the embedding [B, D] and
        each box's mean patch feature [B, R, D].

        RoIAlign (He et al. 2017) to one cell.
        """
        from torchvision.ops import roi_align

        image, patches = self.encode_patches(pixels)
        h, w = patches.shape[2:]
        scale = torch.tensor([w, h, w, h], dtype=torch.float32, device=boxes.device)
        pooled = roi_align(patches.float(), list(boxes.float() * scale), output_size=1, aligned=True)
        return image, pooled[:, :, 0, 0].unflatten(0, boxes.shape[:2])

    @property
    def pad_id(self) -> int:
        """The token that stands behind a text that is shorter than others of its batch."""
        if isinstance(self._text, HFTextEncoder):  # what it reads under a mask
            config: Any = self._text.config
            return int(config.pad_token_id or 0)
        inner = getattr(self.tokenizer, "tokenizer", None)  # Hugging Face's inside open_clip's; CLIP's own: 0
        return int(getattr(inner, "pad_token_id", None) or 0)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the text tower knows."""
        config: Any = getattr(self._text, "config", None)
        if isinstance(self._text, HFTextEncoder):
            return int(config.vocab_size)
        return int(self._text.token_embedding.num_embeddings)

    def tokens(self, texts: list[str]) -> Tensor:
        """[B, L] ids; L is the longest text of the batch where the tower allows that, else the context
        length."""
        ids = self.tokenizer(texts, context_length=self.context_length)
        if self.dynamic_text:
            ids = ids[:, : int(self._end(ids).max()) + 1]
        elif isinstance(self._text, HFTextEncoder):  # reads padding under a mask
            config: Any = self._text.config
            ids = ids[:, : max(1, int(ids.ne(config.pad_token_id).sum(1).max()))]
        return ids

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, W] after the final norm (dynamic text towers only)."""
        t = self._text
        n = ids.shape[1]
        x = t.token_embedding(ids) + t.positional_embedding[:n]
        return t.ln_final(t.transformer(x, attn_mask=t.attn_mask[:n, :n]))

    def _project(self, x: Tensor) -> Tensor:
        place = self._text_head
        if place is None:
            return x
        return place.value(x) if isinstance(place.value, nn.Module) else x @ place.value

    def encode_text(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, D], not normalised."""
        if not self.dynamic_text:
            return self.model.encode_text(ids)
        return self._project(self.hidden(ids)[torch.arange(len(ids), device=ids.device), self._end(ids)])

    def encode_captions(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, D], as `encode_text`. On a CPU captions of like length go together: few of a batch
        are as long as its longest, to which all are padded."""
        if not self.dynamic_text or ids.device.type != "cpu" or len(ids) <= LIKE_LENGTH:
            return self.encode_text(ids)
        end = self._end(ids)
        order = end.argsort(stable=True)
        parts = [self.encode_text(ids[at, : int(end[at].max()) + 1]) for at in order.split(LIKE_LENGTH)]
        return torch.cat(parts)[order.argsort()]

    @property
    def _text_head(self) -> projections.Place | None:
        return projections.text_head(self._text)

    @property
    def has_text_trunk(self) -> bool:
        """What the text tower reads below its output projection can be had by itself."""
        return self._text_head is not None

    @property
    def text_trunk_frozen(self) -> bool:
        """Nothing below the text projection learns: what it reads of a caption can be computed once and
        kept."""
        if self._text_head is None:
            return False
        learning = (n for n, p in self.model.named_parameters() if p.requires_grad and not _is_image(n))
        return all(self.is_projection(n) for n in learning if not n.startswith("logit"))

    def text_trunk(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, W], what `text_head` turns into the embedding."""
        if self.dynamic_text:
            return self.hidden(ids)[torch.arange(len(ids), device=ids.device), self._end(ids)]
        place = self._text_head
        assert place is not None  # asked of towers that have one alone
        with projections.left_out(place):
            return self.model.encode_text(ids)

    def text_head(self, features: Tensor) -> Tensor:
        """[B, W] -> [B, D], not normalised."""
        return self._project(features)

    def _end(self, ids: Tensor) -> Tensor:
        t = self._text
        if getattr(t, "text_pool_type", getattr(t, "pool_type", None)) == "eos":
            return (ids == (t.text_eos_id if hasattr(t, "text_eos_id") else t.eos_id)).int().argmax(-1)
        return ids.argmax(-1)

    def encode_words(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L] -> sentence vectors [B, D], projected token features [B, L, D], and the mask [B, L] of real
        words (no begin, end or padding)."""
        if self.dynamic_text:
            features = self._project(self.hidden(ids))
            at, end = torch.arange(ids.shape[1], device=ids.device)[None], self._end(ids)[:, None]
            sentence = features[torch.arange(len(ids), device=ids.device), end[:, 0]]
            return sentence, features, (at > 0) & (at < end)
        special = torch.tensor(sorted(special_ids(self.tokenizer)), device=ids.device)
        return self.model.encode_text(ids), self._project(self._states(ids)), ~torch.isin(ids, special)

    def _states(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, W] of text towers that read both ways, before their projection.

        Raises:
            RecipeError: a tower that gives no features of its tokens.
        """
        t: Any = self._text
        if isinstance(t, TextTransformer) and self._text_head is not None:
            x, mask = t._embeds(ids)
            return t.ln_final(t.transformer(x, attn_mask=mask))
        if t is self.model:  # an open_clip CLIP, whose text tower's parts are its own
            x = t.token_embedding(ids) + t.positional_embedding
            return t.ln_final(t.transformer(x, attn_mask=t.attn_mask))
        if isinstance(t, HFTextEncoder):
            config: Any = t.config
            mask = ids.ne(config.pad_token_id).to(torch.int64)
            return t.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        raise RecipeError(
            "teacher.spans",
            f"'tokens' with the text tower of {self.name}",
            "a text tower that gives features of its tokens",
            'teacher.spans = "phrases"',
        )

    def text_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The words of `encode_words` and their mask: DCLIP's spans."""
        return self.encode_words(ids)[1:]

    # --- what learns

    def layers(self, tower: str) -> list[list[str]]:
        """Parameter names of `image` or `text` from the first layer to the output projection: for layer decay
        and `last_n`."""
        mine = [
            n
            for n, _ in self.model.named_parameters()
            if _is_image(n) == (tower == "image") and not n.startswith("logit")
        ]
        if tower == "image" and self.has_trunk and hasattr(self.model.visual.trunk, "group_matcher"):
            from timm.models import group_parameters

            groups = group_parameters(self.model.visual.trunk, self.model.visual.trunk.group_matcher())
            rank = {f"visual.trunk.{n}": g for g, names in groups.items() for n in names}
            top = max(rank.values(), default=0) + 1
            of = lambda n: rank.get(n, top)
        else:
            blocks = [re.search(r"(?:resblocks|blocks|layer)\.?(\d+)\.", n) for n in mine]
            last = max((int(b.group(1)) for b in blocks if b), default=0)
            number = {n: int(b.group(1)) for n, b in zip(mine, blocks, strict=True) if b}
            of = lambda n: number.get(
                n, last + 1 if projections.PARAMETERS.search(n) or ".ln_post" in n or "ln_final" in n else -1
            )
        order = sorted({of(n) for n in mine})
        return [[n for n in mine if of(n) == level] for level in order]

    def is_projection(self, name: str) -> bool:
        """Whether a parameter belongs to an output projection."""
        return bool(projections.PARAMETERS.search(name))

    def choose(
        self, tower: str, trainable: str, *, last_n: int = 2, rank: int = 8, alpha: float = 16.0
    ) -> list[str]:
        """Lets the chosen parameters of one tower learn; their names. `lora` adds low-rank updates (merge
        with `merge_lora`)."""
        layers = self.layers(tower)
        every = [n for layer in layers for n in layer]
        if trainable == "frozen":
            chosen = []
        elif trainable == "proj":
            chosen = [n for n in every if projections.PARAMETERS.search(n)]
        elif (
            trainable == "attn_proj"
        ):  # DCLIP's set: q, k, v and out of every attention, and the output projection
            chosen = [n for n in every if _ATTENTION.search(n) or projections.PARAMETERS.search(n)]
        elif trainable == "last_n":
            chosen = [n for layer in layers[-1 - last_n :] for n in layer] if len(layers) > 1 else every
        elif trainable == "full":
            chosen = every
        else:
            return lora.add(self.model, every, rank, alpha)
        params = dict(self.model.named_parameters())
        for name in chosen:
            params[name].requires_grad_(True)
        return chosen

    def choose_towers(self, settings: StudentSettings) -> tuple[list[str], list[str]]:
        """Lets what a recipe's `student` names learn in both towers; the image side's names, the text
        side's."""
        options = {"last_n": settings.last_n, "rank": settings.lora_rank, "alpha": settings.lora_alpha}
        return (
            self.choose("image", settings.train, **options),
            self.choose("text", settings.text, **options),
        )

    def merge_lora(self) -> None:
        """Folds low-rank updates into the weights: afterwards the model is a plain open_clip model again."""
        lora.merge(self.model)

    @torch.no_grad()
    def map_outputs(self, image: Tensor, text: Tensor) -> None:
        """Multiplies each tower's embeddings by a matrix [D, D], x -> x @ map, folded into the output
        projection. The same rotation for both changes no similarity.

        Raises:
            RecipeError: a tower that doesn't end in a projection.
        """
        for projection, matrix in zip(self.output_projections(), (image, text), strict=True):
            if isinstance(projection, nn.Linear):
                projection.weight.copy_(matrix.T @ projection.weight.to(matrix))  # in the map's precision
                if projection.bias is not None:
                    projection.bias.copy_(projection.bias.to(matrix) @ matrix)
            else:
                projection.copy_(projection.to(matrix) @ matrix)

    def output_projections(self) -> list[nn.Linear | Tensor]:
        """The last linear map of the image tower and of the text tower.

        Raises:
            RecipeError: a tower that doesn't end in a projection.
        """
        visual = self.model.visual
        places = {
            "image": (
                projections.Place(visual, "proj"),
                self._image_head,
                projections.Place(getattr(visual, "attnpool", None), "c_proj"),
            ),
            "text": (self._text_head,),
        }
        out = []
        for tower, candidates in places.items():
            maps = (projections.last_linear(place, self.dim) for place in candidates)
            projection = next((p for p in maps if p is not None), None)
            if projection is None:
                raise RecipeError(
                    "index and hubness",
                    f"the {tower} tower of {self.name} doesn't end in a projection",
                    "one that does",
                    "a recipe without them, like dclip",
                )
            out.append(projection)
        return out

    def weights(self) -> dict[str, Tensor]:
        """The plain open_clip state dict as it stands, low-rank updates merged; copies, on the CPU."""
        return lora.merged_state(self.model)

    def load_weights(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids that are no words: begin, end, padding."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:  # Hugging Face's
        return {0, *inner.all_special_ids} if tokenizer.strip_sep_token else set(inner.all_special_ids)
    return {0, tokenizer.sot_token_id, tokenizer.eot_token_id}


def _is_image(name: str) -> bool:
    return name.startswith("visual.")


def interpolate(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """WiSE-FT (Wortsman et al. 2022, eq. 1): (1 - alpha) start + alpha end, for floating-point entries; the
    others from `end`."""
    return {
        k: torch.lerp(start[k].float(), v.float(), alpha).to(v.dtype) if v.is_floating_point() else v
        for k, v in end.items()
    }


def load(name: str, *, weights: bool = True) -> TwoTower:
    """A model by open_clip name, or a local folder; see `open_base`, whose errors it raises."""
    base = open_base(name, weights=weights)
    return TwoTower(
        base.model,
        base.preprocess,
        base.tokenizer,
        name=name,
        config=base.config,
        fingerprint=base.fingerprint,
    )
