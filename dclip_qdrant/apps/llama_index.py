"""LlamaIndex: a `MultiModalEmbedding`."""

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import MultiModalEmbedding

from dclip_qdrant.serving.student import Student, as_student


class DclipEmbedding(MultiModalEmbedding):
    """`DclipEmbedding(folder)`: texts and pictures in one space. The async twins run the same code on a
    thread."""

    _student: Student = PrivateAttr()

    def __init__(self, student: Student | str | Path, **kwargs: Any) -> None:
        loaded = as_student(student)
        super().__init__(model_name=loaded.model_name, **kwargs)
        self._student = loaded

    @classmethod
    def class_name(cls) -> str:
        return "DclipEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._student.embed_texts(texts).tolist()

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embedding(query)

    def _get_image_embeddings(self, img_file_paths: list[Any]) -> list[Embedding]:
        return self._student.embed_images(img_file_paths).tolist()

    def _get_image_embedding(self, img_file_path: Any) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_image_embedding(self, img_file_path: Any) -> Embedding:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)
