"""LangChain: `Embeddings` with `embed_image`, the community's convention for multimodal models."""

from pathlib import Path
from typing import Any

from langchain_core.embeddings import Embeddings

from dclip_qdrant.serving.student import Student, as_student


class DclipEmbeddings(Embeddings):
    """`QdrantVectorStore(client, name, embedding=DclipEmbeddings(folder), vector_name="image")` over a
    collection of `dclip-qdrant ingest --payload-layout langchain`;
    `similarity_search_by_vector(e.embed_image([path])[0])` searches with a picture."""

    def __init__(self, student: Student | str | Path) -> None:
        self.student = as_student(student)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.student.embed_texts(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]

    def embed_image(self, uris: list[Any]) -> list[list[float]]:
        """Paths (or PIL images) -> vectors."""
        return self.student.embed_images(uris).tolist()
