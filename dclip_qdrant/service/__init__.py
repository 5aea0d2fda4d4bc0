"""The student behind HTTP: the Qdrant server's inference protocol, the OpenAI embeddings shape, and a search
page.

limits.py    what a request may ask for, and how it is refused
inputs.py    JSON -> texts and pictures; nothing is opened that a request names
batcher.py   requests that wait together are embedded together
engine.py    students by name, their batchers and figures
app.py       the routes
gallery.py   the search page's routes: collections, hits, thumbnails
run.py       address, token, uvicorn
"""
