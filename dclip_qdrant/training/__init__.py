"""The training wing's engine: `loop.py` is plain torch and knows no Ray."""
