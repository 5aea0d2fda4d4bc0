"""docs/bases.md says of every open_clip model what its towers answer."""

import os
import re

import open_clip
import pytest
from all_bases import PAGE, ask

LINES = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
SIZES = {"bigG", "XL", "plus", "base", "large", "xlarge", "xxlarge", "gopt", "LTT"}


def family(model):
    """The words of a model's name that say no size."""
    words = re.split(r"[-_]", model)
    return tuple(w for w in words if re.fullmatch(r"[A-Za-z]{2,}\d?|EVA\d+|RN\d+", w) and w not in SIZES)


def test_every_model_stands_on_the_page():
    assert set(LINES) - {"model"} == set(open_clip.list_models())


@pytest.mark.slow
def test_towers_answer_as_the_page_says():
    """Every third family's first model; every model with DCLIP_ALL_BASES=1, which takes minutes."""
    models = open_clip.list_models()
    first = {family(name): name for name in reversed(models)}
    asked = models if os.environ.get("DCLIP_ALL_BASES") else sorted(first.values())[::3]
    assert len(asked) > 10
    for name in asked:
        assert ask(name).line() == LINES[name], "python tests/all_bases.py writes the page"
