"""ABLoRA: the paper's algorithm is in `method.py`, what it is made of beside it."""

from loralloc.methods.ablora.method import ABLoRA

__all__ = ["ABLoRA"]
