"""ALLoRA: the paper's algorithm is in `method.py`, its parts are in the files beside it."""

from loralloc.methods.allora.method import ALLoRA

__all__ = ["ALLoRA"]
