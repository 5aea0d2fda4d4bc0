"""An ordinary qdrant-client app. It has never heard of dclip-qdrant: `dclip-qdrant autoregister --enable
STUDENT_DIR` made the model's name known.

python untouched.py MODEL PICTURES...
"""

import sys

from qdrant_client import QdrantClient, models

MODEL, PICTURES = sys.argv[1], sys.argv[2:]


def main() -> None:
    client = QdrantClient(":memory:")  # or QdrantClient("http://localhost:6333")
    size = client.get_embedding_size(MODEL)
    client.create_collection(
        "pictures", vectors_config=models.VectorParams(size=size, distance=models.Distance.COSINE)
    )
    points = [
        models.PointStruct(id=i, vector=models.Image(image=path, model=MODEL), payload={"path": path})
        for i, path in enumerate(PICTURES)
    ]
    client.upload_points("pictures", points, batch_size=8, parallel=2, wait=True)
    for query in (
        models.Document(text="a red square", model=MODEL),
        models.Image(image=PICTURES[0], model=MODEL),
    ):
        (hit,) = client.query_points("pictures", query=query, limit=1).points
        print(f"{hit.score:.4f}  {hit.payload['path']}")


if __name__ == "__main__":
    main()
