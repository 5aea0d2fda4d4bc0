"""What `distill` asks the job for."""

import pytest
from click.testing import CliRunner

from dclip_qdrant.cli.train import distill_command
from dclip_qdrant.jobs import distill as job


@pytest.mark.parametrize(
    ("arguments", "recipe", "rivals"),
    [
        (["--base", "B"], "best", ["sft"]),
        (["--base", "B", "--teacher", "T"], "joint", ["sft"]),
        (["--student", "B", "--teacher", "T"], "joint", ["sft"]),
        (["--base", "B", "--teacher", "T", "--recipe", "soft"], "soft", ["sft"]),
        (["--base", "B", "--recipe", "sft"], "sft", []),
    ],
)
def test_a_teacher_of_its_own_makes_joint_the_default(arguments, recipe, rivals, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def distill(request):
        asked.append(request)
        raise Asked

    asked = []
    monkeypatch.setattr(job, "distill", distill)
    command = ["--pairs", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(distill_command, command)
    assert isinstance(result.exception, Asked), result.output
    (request,) = asked
    assert request.recipe.name == recipe
    assert [rival.name for rival in request.compare] == rivals
