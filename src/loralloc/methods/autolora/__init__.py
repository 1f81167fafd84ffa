"""AutoLoRA: the paper's algorithm is in `method.py`, its parts are in the files beside it."""

from loralloc.methods.autolora.method import AutoLoRA

__all__ = ["AutoLoRA"]
