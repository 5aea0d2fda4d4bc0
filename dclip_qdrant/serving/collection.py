"""What a collection is: vectors, indexes and the student that fills it. Wishes are TOML
(`schemas/collections/`); reality is compared with them."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dclip_qdrant.errors import MismatchError, UsageError
from dclip_qdrant.lookup import did_you_mean
from dclip_qdrant.serving.student import Student
from dclip_qdrant.settings import checked, read_toml

LANGUAGE = Literal[
    "danish",
    "dutch",
    "english",
    "finnish",
    "french",
    "german",
    "greek",
    "hungarian",
    "italian",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "spanish",
    "swedish",
    "turkish",
]  # that every engine has both a stemmer and stop words for
# tenant is a keyword whose points lie together, for collections that many customers share
PayloadIndex = Literal["keyword", "tenant", "uuid", "integer", "float", "bool", "datetime", "geo", "bm25"]
META = "dclip"  # the key under which a collection's metadata holds ours


class VectorSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    multivector: bool = False
    hnsw: bool = True
    on_disk: bool = False
    datatype: Literal["float32", "float16"] = "float32"
    quantization: Literal["none", "int8", "turbo4", "turbo2", "binary"] = "none"
    dim: int | None = Field(
        None,
        gt=0,
        description="store the first so many components (for students that were trained for it); null: all",
    )
    oversampling: float | None = Field(
        None,
        ge=0,
        description="quantised searches compare so many times as many candidates with the originals; 0: none",
    )
    ef: int | None = Field(
        None, gt=0, description="candidates that HNSW keeps while it searches; null: the engine's own"
    )


class TextSpec(BaseModel):
    """How texts with a bm25 index, and queries for them, are cut into words: the same on every engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tokenizer: Literal["multilingual", "word", "whitespace", "prefix"] = Field(
        default="multilingual",
        description="multilingual also finds words in languages that are written without spaces",
    )
    language: LANGUAGE | None = Field(
        default=None,
        description="whose endings and stop words are taken off (runs finds running); null: none",
    )
    ascii_folding: bool = Field(default=True, description="cafe finds café")


class CollectionSpec(BaseModel):
    """The wish. Cosine distance throughout: vectors are unit vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: str = ""
    vectors: dict[Literal["image", "regions"], VectorSpec] = Field(min_length=1)
    payload_indexes: dict[str, PayloadIndex] = {}
    text: TextSpec = TextSpec()
    indexing_threshold: int | None = Field(
        None,
        gt=0,
        description="KB of vectors from which HNSW and quantisation are used; null: the engine's own",
    )
    shards: int | None = Field(
        default=None, gt=0, description="of a server's cluster; null: the server's own"
    )
    replicas: int | None = Field(default=None, gt=0, description="of each shard; null: the server's own")
    write_consistency: int | None = Field(
        default=None,
        gt=0,
        description="replicas that must have a write before it counts; null: the server's own",
    )

    @classmethod
    def load(cls, name: str | Path = "default") -> "CollectionSpec":
        """A spec by name or path. Raises UsageError for an unknown name, bad TOML or a wrong key."""
        folder = specs_folder()
        path = Path(name) if str(name).endswith(".toml") else folder / f"{name}.toml"
        if not path.is_file():
            known = [p.stem for p in folder.glob("*.toml")]
            raise UsageError("`spec`", f"no {str(name)!r}", do=did_you_mean(str(name), known))
        return checked(cls, read_toml(path), path)

    @classmethod
    def of(cls, described: dict[str, Any]) -> "CollectionSpec":
        """The spec of a collection that there is, from `Store.describe`; the default one, where somebody else
        made it."""
        keys = ("vectors", "payload_indexes", "text")
        known = {key: described[key] for key in keys if described.get(key)}
        if not all(isinstance(vector, dict) for vector in known.get("vectors", {}).values()):
            return cls.load()
        return cls.model_validate(known) if "vectors" in known else cls.load()


def specs_folder() -> Path:
    """`schemas/collections/`: inside an installed package, or beside it in a checkout."""
    inside = Path(str(files("dclip_qdrant"))) / "schemas" / "collections"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "schemas" / "collections"


def metadata_of(student: Student, **more: Any) -> dict[str, Any]:
    """What a collection remembers of the student that fills it, and what else is given."""
    who = {"student": student.model_name, "fingerprint": student.fingerprint, "dim": student.dim}
    return {META: who | {"version": 1} | more}


def check_student(metadata: dict[str, Any], student: Student, collection: str) -> None:
    """Raises MismatchError unless this very student filled the collection."""
    remembered = metadata.get(META)
    if remembered is None:
        came = "a collection that dclip-qdrant didn't make"
        do = "another name for `collection`"
        raise MismatchError(collection, came, f"one filled by {student.model_name}", do)
    if remembered["fingerprint"] != student.fingerprint:
        filler = remembered["student"]
        do = f"query with {filler}, or ingest into another collection"
        expected = f"{student.model_name}, the student given"
        raise MismatchError(collection, f"filled by {filler}", expected, do)
