"""Haystack: a text embedder for queries and an embedder of documents that are pictures."""

from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from dclip_qdrant.serving.student import Student


class _Embedder:
    """Loads the student when the pipeline is warmed up, or on first use."""

    def __init__(self, student: str) -> None:
        self.folder = str(student)
        self._student: Student | None = None

    def warm_up(self) -> None:
        _ = self.student

    @property
    def student(self) -> Student:
        self._student = self._student or Student.load(self.folder)
        return self._student


@component
class DclipTextEmbedder(_Embedder):
    """text -> embedding."""

    def __init__(self, student: str) -> None:
        _Embedder.__init__(self, student)  # haystack makes the class anew: super() would look for the old one

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, student=self.folder)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DclipTextEmbedder":
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        return {"embedding": self.student.embed_texts([text])[0].tolist()}


@component
class DclipDocumentImageEmbedder(_Embedder):
    """documents with a picture's path in `meta[file_path_meta_field]` -> the same with its embedding."""

    def __init__(self, student: str, file_path_meta_field: str = "file_path") -> None:
        _Embedder.__init__(self, student)  # haystack makes the class anew: super() would look for the old one
        self.file_path_meta_field = file_path_meta_field

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, student=self.folder, file_path_meta_field=self.file_path_meta_field)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DclipDocumentImageEmbedder":
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        missing = [d.id for d in documents if self.file_path_meta_field not in d.meta]
        if missing:
            raise ValueError(
                f"{len(missing)} documents have no meta[{self.file_path_meta_field!r}], the "
                f"first is {missing[0]}"
            )
        vectors = self.student.embed_images([d.meta[self.file_path_meta_field] for d in documents])
        return {
            "documents": [replace(d, embedding=v.tolist()) for d, v in zip(documents, vectors, strict=True)]
        }
