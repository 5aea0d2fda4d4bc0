"""ComKD-CLIP's own task: a labelled set with few examples of some classes, adapted to and tested on classes
never labelled (docs/papers.md 2).

protocol.py  splits and figures (numpy alone)
comkd.py     the two stages: a prompt-tuned teacher, a student that learns from it without labels
run.py       one protocol from start to table
"""
