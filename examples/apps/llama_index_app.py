"""LlamaIndex: the student as a MultiModalEmbedding; vectors go to Qdrant by its own client.

python llama_index_app.py STUDENT_DIR PICTURES...
"""

import sys

from llama_index.core.schema import ImageNode
from qdrant_client import QdrantClient, models

from dclip_qdrant.apps.llama_index import DclipEmbedding

embedding, pictures = DclipEmbedding(sys.argv[1]), sys.argv[2:]
nodes = [
    ImageNode(image_path=path, embedding=v)
    for path, v in zip(pictures, embedding.get_image_embedding_batch(pictures), strict=True)
]
client = QdrantClient(":memory:")
client.create_collection(
    "pictures",
    vectors_config=models.VectorParams(size=len(nodes[0].embedding), distance=models.Distance.COSINE),
)
client.upsert(
    "pictures",
    [models.PointStruct(id=n.node_id, vector=n.embedding, payload={"path": n.image_path}) for n in nodes],
)
for vector in (embedding.get_query_embedding("a red square"), embedding.get_image_embedding(pictures[0])):
    (hit,) = client.query_points("pictures", query=vector, limit=1).points
    print(f"{hit.score:.4f}  {hit.payload['path']}")
