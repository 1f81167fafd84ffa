"""AdaLoRA: the paper's algorithm is in `method.py`, its parts are in the files beside it."""

from loralloc.methods.adalora.method import AdaLoRA

__all__ = ["AdaLoRA"]
