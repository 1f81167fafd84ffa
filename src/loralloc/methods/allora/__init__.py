"""ALLoRA: the paper's algorithm is in `method.py`, what it is made of beside it."""

from loralloc.methods.allora.method import ALLoRA

__all__ = ["ALLoRA"]
