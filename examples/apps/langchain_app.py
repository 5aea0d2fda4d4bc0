"""LangChain over a collection that `dclip-qdrant ingest --payload-layout langchain` filled; here it is filled
in place.

python langchain_app.py STUDENT_DIR PICTURES...
"""

import sys

from langchain_qdrant import QdrantVectorStore, RetrievalMode
from qdrant_client import QdrantClient, models

from dclip_qdrant.apps.langchain import DclipEmbeddings

embeddings, pictures = DclipEmbeddings(sys.argv[1]), sys.argv[2:]
client = QdrantClient(":memory:")
size = len(embeddings.embed_query("size"))
client.create_collection(
    "pictures", vectors_config={"image": models.VectorParams(size=size, distance=models.Distance.COSINE)}
)
rows = [
    models.PointStruct(
        id=i, vector={"image": vector}, payload={"page_content": path, "metadata": {"path": path}}
    )
    for i, (path, vector) in enumerate(zip(pictures, embeddings.embed_image(pictures), strict=True))
]
client.upsert("pictures", rows)
store = QdrantVectorStore(
    client=client,
    collection_name="pictures",
    embedding=embeddings,
    vector_name="image",
    retrieval_mode=RetrievalMode.DENSE,
)
for document, score in (
    *store.similarity_search_with_score("a red square", k=1),
    *store.similarity_search_with_score_by_vector(embeddings.embed_image([pictures[0]])[0], k=1),
):
    print(f"{score:.4f}  {document.metadata['path']}")
