"""What the parts of `gpu.py` measure; each is run in a process of its own.

Contenders of a setting share the weights of the frozen model, so that five of them fit beside each other. As many turns
are made as the time allows, between 2 and `Scale.turns`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from compiling import build_compiled
from contenders import INTERVAL, REFERENCE, Setting, Step, build, kernel_in_cpp
from record import Record, append, record
from shapes import SHAPES, Shape
from suites import Make, ablora_round, allocator_figures, graphs_of, modules_of, peaks, ratios, release
from timing import interleave
from torch import nn

from loralloc import native
from loralloc.errors import UserError
from loralloc.kernel import gated_linear

EAGER = (REFERENCE, "peft-adalora", "adalora", "allora", "ablora", "autolora-fast", "adalora-cpp", "allora-cpp")
COMPILED = (REFERENCE, "adalora", "allora", "ablora")


@dataclass(frozen=True)
class Scale:
    """Size, device and duration of the measurements.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        shapes: The smaller and the larger model.
        batches: The smaller and the larger batch.
        rank: Starting rank.
        turns: The most turns of a comparison.
        until: The time at which a part must have ended, on the clock of `time.monotonic`.
    """

    device: str
    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]
    rank: int
    turns: int
    until: float

    def settings(self) -> list[Setting]:
        """Models and batches with PEFT's fp32 adapter, and the smallest with one in half precision."""
        plain = [
            Setting(sharing(shape.with_(batch=batch)), self.rank, self.device)
            for batch in self.batches
            for shape in self.shapes
        ]
        return [*plain, Setting(plain[0].shape, self.rank, self.device, "bf16")]

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()


class Sharing(Shape):
    """A shape whose models all share one copy of the frozen weights."""

    def build(self, device: str) -> nn.Module:
        model = _weights(self, device)
        return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class FourBit(Shape):
    """A shape with its linear layers, but for the head, in 4 bits."""

    def build(self, device: str) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        model: Any = super().build("cpu")
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, nn.Linear):
                few = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=self.dtype, quant_type="nf4"
                )
                few.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                model.model.set_submodule(name, few)
        model.is_loaded_in_4bit = True  # PEFT asks for it
        return model.to(device)


def sharing(shape: Shape, kind: type[Shape] = Sharing) -> Shape:
    """The same shape, built in another way."""
    return kind(**{field.name: getattr(shape, field.name) for field in fields(shape)})


@functools.lru_cache(maxsize=1)
def _weights(shape: Shape, device: str) -> nn.Module:
    return Shape.build(shape, device)


def kernel(scale: Scale) -> Iterator[Record]:
    """Build the kernel in C++, which later parts time, and compare it with the one in Python."""
    started = time.monotonic()
    failures: dict[str, str] = {}
    figures: dict[str, Any] = {}
    try:
        native.build()
        figures = {"seconds": round(time.monotonic() - started, 1), "difference": apart(scale.device)}
    except UserError as error:
        failures["kernel in C++"] = str(error)
    yield record("kernel", Setting(scale.shapes[0], scale.rank, scale.device), figures, failures)


def apart(device: str) -> dict[str, float]:
    """How far output and gradients of the kernels in C++ and in Python are apart, relative, by the layer's dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x, W, A, B = (torch.randn(shape).to(device) for shape in ((64, 256), (256, 256), (12, 256), (256, 12)))
        x, W, gate = x.to(dtype), W.to(dtype), torch.rand(12, device=device)
        results = []
        for wanted in (False, True):
            with kernel_in_cpp(wanted):
                leaves = [tensor.clone().requires_grad_() for tensor in (x, A, gate, B)]
                y = gated_linear(leaves[0], W, None, *leaves[1:], 2.0)
                results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
        pairs = zip(*results, strict=True)
        found[str(dtype)] = max(float((ours - theirs).norm() / theirs.norm()) for theirs, ours in pairs)
    return found


def eager(scale: Scale) -> Iterator[Record]:
    """Steps of training against PEFT's LoRA."""
    settings = scale.settings()
    for index, setting in enumerate(settings):
        yield timed("steps", setting, EAGER, build, scale, scale.left / (len(settings) - index))


def compiled(scale: Scale) -> Iterator[Record]:
    """The same with every block compiled."""
    settings = scale.settings()[:-1]
    for index, setting in enumerate(settings):
        yield timed("compiled", setting, COMPILED, build_compiled, scale, scale.left / (len(settings) - index))


def calls(scale: Scale) -> Iterator[Record]:
    """The allocator's calls; on a GPU also what the host waits for in a whole step."""
    setting = Setting(scale.shapes[0], scale.rank, scale.device)
    counted, failures = allocator_figures(setting, ("peft-adalora", "adalora", "allora", "ablora"))
    yield record("calls", setting, {"modules": modules_of(setting), "calls": counted}, failures)


def memory(scale: Scale) -> Iterator[Record]:
    """Peak memory of a step, one contender at a time."""
    for adapter in ("fp32", "bf16"):
        setting = Setting(scale.shapes[0], scale.rank, scale.device, adapter)
        found, failures = peaks(setting, (REFERENCE, "peft-adalora", "adalora", "allora"))
        yield record("memory", setting, {"peak_bytes": found}, failures)


def round_of_ablora(scale: Scale) -> Iterator[Record]:
    """A round against the naive loop, at few ranks."""
    yield ablora_round(Setting(scale.shapes[0], 2, scale.device), ("fast",))


def four_bit(scale: Scale) -> Iterator[Record]:
    """Steps of training over a base model in 4 bits."""
    setting = Setting(sharing(scale.shapes[0], FourBit), scale.rank, scale.device)
    yield timed("four-bit", setting, (REFERENCE, "adalora", "allora"), build, scale, scale.left)


PARTS: dict[str, Callable[[Scale], Iterator[Record]]] = {
    "kernel": kernel,
    "eager": eager,
    "compiled": compiled,
    "calls": calls,
    "memory": memory,
    "round": round_of_ablora,
    "four-bit": four_bit,
}


def timed(
    suite: str,
    setting: Setting,
    names: tuple[str, ...],
    make: Make,
    scale: Scale,
    seconds: float,
) -> Record:
    """Interleave contenders for so many seconds; ratios are against `REFERENCE`."""
    until = time.monotonic() + seconds
    built: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for name in names:
        contender = make(name, setting) if time.monotonic() < until else "no time was left to build it"
        if isinstance(contender, str):
            failures[name] = contender
        else:
            built[name] = contender
    figures: dict[str, Any] = {"modules": modules_of(setting)}
    if REFERENCE in built:
        turn = _seconds_of_a_turn(built, setting.device)
        turns, block = turns_in(until - time.monotonic(), turn, scale.turns)
        times = interleave({name: step.step for name, step in built.items()}, turns, setting.device, block)
        figures |= {"turns": turns, "block": block, **ratios(times, REFERENCE)}
        figures["parameters"] = {name: step.parameters for name, step in built.items()}
        figures |= graphs_of(built)
    built.clear()
    release(setting.device)
    return record(suite, setting, figures, failures)


def turns_in(seconds: float, turn: float, most: int = 8) -> tuple[int, int]:
    """How many turns of how many steps fit into the time, where one step of each contender takes `turn` seconds.

    A block of `INTERVAL` steps holds one that allocates. If not even two such turns fit, blocks are shorter; two turns
    of one step are made in any case.

    >>> turns_in(60, 1), turns_in(900, 1), turns_in(12, 1), turns_in(0, 1)
    ((6, 10), (8, 10), (2, 6), (2, 1))
    """
    turns = int(seconds / (INTERVAL * turn))
    return (min(turns, most), INTERVAL) if turns >= 2 else (2, max(1, int(seconds / (2 * turn))))


def _seconds_of_a_turn(built: dict[str, Step], device: str) -> float:
    times = interleave({name: step.step for name, step in built.items()}, 1, device)
    return sum(sum(seconds) for seconds in times.wall.values())


def scale_of(rehearse: bool, seconds: float) -> Scale:
    """The scale of the real measurement, or of a rehearsal."""
    now = time.monotonic()
    if not rehearse:
        return Scale("cuda", (SHAPES["llama-1b"], SHAPES["llama-3b"]), (4, 16), 12, 8, now + 0.9 * seconds)
    tiny = SHAPES["tiny"].with_(dtype=torch.bfloat16, hidden=64, inner=64)  # bitsandbytes takes 64 numbers at a time
    return Scale("cpu", (tiny, tiny.with_(layers=3, hidden=128, inner=128)), (2,), 4, 2, now + 3600)


def main(arguments: list[str] | None = None) -> None:
    """Measure one part; print every record and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=60, help="what it may take")
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    options = parser.parse_args(arguments)
    scale = scale_of(options.rehearse, options.seconds)
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: rehearse with --rehearse, or run on a machine with a GPU")
    torch.set_num_threads(1)
    for made in PARTS[options.part](scale):
        append(made, options.results / f"speed-{scale.device}.jsonl")
        print(json.dumps({key: made[key] for key in made if key not in ("versions", "machine", "command")}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
