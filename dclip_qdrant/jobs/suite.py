"""A suite: groups of recipes that are compared at the same trainable set, as a TOML file in `suites/`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from dclip_qdrant.errors import RecipeError
from dclip_qdrant.lookup import did_you_mean
from dclip_qdrant.settings import checked, read_toml

HERE = Path(__file__).parent.parent / "suites"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Group(_Part):
    """Recipes at one trainable set."""

    title: str
    about: str = ""
    main: str = Field(
        description=(
            "the recipe that sets detector, trainable set, learning rates and budget for all of the group"
        )
    )
    recipes: tuple[str, ...] = Field((), description="the others")
    set: tuple[str, ...] = Field((), description="settings on top of the main recipe")
    rival: str = Field("sft", description="what every row is held against besides the base")


class Suite(_Part):
    name: str
    about: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    prepare: str = Field("", description="how the pairs are made; for people, nothing is run")
    groups: tuple[Group, ...] = Field(min_length=1)

    @classmethod
    def load(cls, name: str) -> "Suite":
        """A suite by name or path. Raises RecipeError: none there, not TOML, an unknown key."""
        path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
        if not path.is_file():
            raise RecipeError("`suite`", f"no {name!r}", do=did_you_mean(name, suite_names()))
        return checked(cls, read_toml(path), path)

    def only(self, groups: tuple[str, ...], recipes: tuple[str, ...]) -> "Suite":
        """A part of the suite: the groups of these titles and, beside each group's main recipe, these
        recipes; an empty tuple leaves all.

        Raises:
            RecipeError: a title or a recipe that isn't there.
        """
        titles = [g.title for g in self.groups]
        named = sorted({r for g in self.groups for r in g.recipes})
        for parameter, wanted, known in (("groups", groups, titles), ("recipes", recipes, named)):
            for name in wanted:
                if name not in known:
                    came = f"no {name!r} in suite {self.name}"
                    raise RecipeError(f"`{parameter}`", came, do=did_you_mean(name, known))
        kept = []
        for group in self.groups:
            if not groups or group.title in groups:
                rivals = tuple(r for r in group.recipes if not recipes or r in recipes)
                kept.append(group.model_copy(update={"recipes": rivals}))
        return self.model_copy(update={"groups": tuple(kept)})


def suite_names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.toml"))
