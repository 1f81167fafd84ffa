"""ABLoRA: the paper's algorithm is in `method.py`, its parts are in the files beside it."""

from loralloc.methods.ablora.method import ABLoRA

__all__ = ["ABLoRA"]
