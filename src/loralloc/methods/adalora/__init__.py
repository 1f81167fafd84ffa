"""AdaLoRA: the paper's algorithm is in `method.py`, what it is made of beside it."""

from loralloc.methods.adalora.method import AdaLoRA

__all__ = ["AdaLoRA"]
