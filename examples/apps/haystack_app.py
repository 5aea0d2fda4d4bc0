"""Haystack: pictures as documents, a pipeline from text to hits.

python haystack_app.py STUDENT_DIR PICTURES...
"""

import sys

from haystack import Document, Pipeline
from haystack_integrations.components.retrievers.qdrant import QdrantEmbeddingRetriever
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

from dclip_qdrant.apps.haystack import DclipDocumentImageEmbedder, DclipTextEmbedder

folder, pictures = sys.argv[1], sys.argv[2:]
documents = DclipDocumentImageEmbedder(folder).run(
    [Document(content=p, meta={"file_path": p}) for p in pictures]
)["documents"]
store = QdrantDocumentStore(
    ":memory:",
    index="pictures",
    embedding_dim=len(documents[0].embedding),
    similarity="cosine",
    recreate_index=True,
)
store.write_documents(documents)
pipeline = Pipeline()
pipeline.add_component("text", DclipTextEmbedder(folder))
pipeline.add_component("find", QdrantEmbeddingRetriever(document_store=store, top_k=1))
pipeline.connect("text.embedding", "find.query_embedding")
by_text = pipeline.run({"text": {"text": "a red square"}})["find"]["documents"]
by_picture = QdrantEmbeddingRetriever(document_store=store, top_k=1).run(
    query_embedding=documents[0].embedding
)["documents"]
for document in (*by_text, *by_picture):
    print(f"{document.score:.4f}  {document.meta['file_path']}")
