"""CLIP-TD's own task: pictures and sentences judged together by one fused encoder (docs/papers.md 4), taught
by CLIP.

examples.py  one example, whatever it was read from; low-shot and domain-shift splits
readers.py   VQA v2, SNLI-VE and VCR in their published formats
scores.py    VQA's soft accuracy, VCR's Q->A, QA->R, Q->AR, plain accuracy
teacher.py   what CLIP says of pictures, crops, sentences and words, and how sure it is
task.py      the training: task loss, targeted and weighted distillation, two steps
run.py       from examples to a table
"""
