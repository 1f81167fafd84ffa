"""AutoLoRA: the paper's algorithm is in `method.py`, what it is made of beside it."""

from loralloc.methods.autolora.method import AutoLoRA

__all__ = ["AutoLoRA"]
