"""`loralloc env`: what to paste into a bug report."""

from __future__ import annotations

import platform
from importlib import metadata

import typer

from loralloc._version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "trl", "bitsandbytes")


def env() -> None:
    """Show versions and devices, for bug reports."""
    import torch

    from loralloc import native

    rows = {"loralloc": __version__, "python": platform.python_version(), "platform": platform.platform()}
    rows |= {package: _version(package) for package in PACKAGES}
    rows["cpu threads"] = str(torch.get_num_threads())
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows["gpu"] = ", ".join(gpus) or "none"
    if gpus:
        rows["bf16"] = "yes" if torch.cuda.is_bf16_supported() else "no"
    rows["kernel"] = "in Python (loralloc build-kernel compiles it)" if native.loaded() is None else "in C++"
    for name, value in rows.items():
        typer.echo(f"{name:14} {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
