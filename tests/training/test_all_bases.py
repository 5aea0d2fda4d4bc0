"""docs/bases.md says of every open_clip model what its towers answer."""

import re

import open_clip
import pytest
from all_bases import PAGE, ask

LINES = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
ANOTHER_SIZE = re.compile(r"-(\d{3}|quickgelu|plus-240)$")  # of a model that is asked itself


def test_every_model_stands_on_the_page():
    assert set(LINES) - {"model"} == set(open_clip.list_models())


@pytest.mark.slow
def test_towers_answer_as_the_page_says():
    models = open_clip.list_models()
    plain = {name: ANOTHER_SIZE.sub("", name) for name in models}
    asked = [name for name in models if plain[name] == name or plain[name] not in models]
    assert len(asked) > 80
    for name in asked:
        assert ask(name).line() == LINES[name], "python tests/all_bases.py writes the page"
