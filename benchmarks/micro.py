"""Where the time of a step goes: the measurements behind LOG.md. Processor time, one thread, medians, interleaved.

python benchmarks/micro.py parts --shape llama-512    # forward, backward, allocator, optimizer
python benchmarks/micro.py operators --shape llama-512  # a step by operator, as the profiler sees it
python benchmarks/micro.py onestep --shape llama-512  # frozen layer and update as one step of the graph, or as two
python benchmarks/micro.py layer                      # a layer whose products cost nothing: what is beside them
python benchmarks/micro.py ways                       # the kernel as ordinary operations, and by hand
python benchmarks/micro.py mixed                      # the same in bf16 and under autocast, where it is by hand
python benchmarks/micro.py products                   # an adapter's narrow products, either way around
python benchmarks/micro.py repeats --shape llama-512  # a forward pass of 1 to 32 copies of a batch
python benchmarks/micro.py averages                   # AdaLoRA's running averages: stacks, or lists of tensors
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from unittest.mock import patch

import torch
from contenders import Setting, build
from peft import LoraConfig, get_peft_model
from shapes import SHAPES
from timing import bytes_alive, interleave, peak_memory
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.profiler import profile

from loralloc import AdaLoRA, Budget, attach, kernel

Parts = Mapping[str, Callable[[], object]]


def interleaved(parts: Parts, turns: int) -> dict[str, float]:
    """Median milliseconds of processor time of each part, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(turns):
        for name, part in parts.items():
            started = time.process_time()
            part()
            times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def parts(shape: str, rank: int, turns: int) -> None:
    """Forward, backward, the allocator's two parts, optimizer, clearing."""
    whole: dict[str, Callable[[], object]] = {}
    names = ("peft-lora", "peft-adalora", "adalora")
    for name in names:
        step = build(name, Setting(SHAPES[shape], rank))
        if isinstance(step, str):
            raise SystemExit(f"{name}: {step}")
        losses: list[Tensor] = []
        whole |= {
            f"{name} forward": lambda losses=losses, step=step: losses.append(step.loss()),
            f"{name} backward": lambda losses=losses: losses.pop().backward(),
            f"{name} before": step.before_step,
            f"{name} optimizer": step.optimizer.step,
            f"{name} after": step.after_step,
            f"{name} clearing": step.optimizer.zero_grad,
        }
    found = interleaved(whole, turns)
    for name in names:
        mine = {key.removeprefix(f"{name} "): value for key, value in found.items() if key.startswith(f"{name} ")}
        show(f"{shape}, r {rank}, {name}, ms", {**mine, "all": sum(mine.values())})


def operators(shape: str, rank: int, turns: int, shown: int = 16) -> None:
    """Milliseconds of a step by operator, without the operators that it calls; the profiler slows every call down."""
    found: dict[str, dict[str, float]] = {}
    for name in ("frozen", "peft-lora", "adalora"):
        step = build(name, Setting(SHAPES[shape], rank))
        if isinstance(step, str):
            raise SystemExit(f"{name}: {step}")
        step.step()
        with profile() as seen:
            for _ in range(turns):
                step.step()
        found[name] = {event.key: event.self_cpu_time_total / 1000 / turns for event in seen.key_averages()}
    largest = sorted({key for own in found.values() for key in own}, key=lambda key: -max(_of(found, key)))
    for key in largest[:shown]:
        show(key, dict(zip(found, _of(found, key), strict=True)))
    show("all", {name: sum(own.values()) for name, own in found.items()})


def _of(found: Mapping[str, Mapping[str, float]], key: str) -> list[float]:
    return [own.get(key, 0.0) for own in found.values()]


def onestep(shape: str, rank: int, turns: int) -> None:
    """AdaLoRA's step ("one") relative to the same with PEFT's forward pass ("two"), and to PEFT LoRA's; medians."""
    steps: dict[str, Callable[[], object]] = {}
    for name in ("peft-lora", "one", "two"):
        step = build("peft-lora" if name == "peft-lora" else "adalora", Setting(SHAPES[shape], rank))
        if isinstance(step, str):
            raise SystemExit(f"{name}: {step}")
        for module in step.model.modules() if name == "two" else ():
            vars(module).pop("forward", None)
        steps[name] = step.step
    times = interleave(steps, turns)
    ratios = {f"{a} / {b}": times.ratio(a, b, "processor") for a, b in (("one", "two"), ("one", "peft-lora"))}
    show(f"{shape}, r {rank}", {name: spread.median for name, spread in ratios.items()}, digits=3)


def layer(turns: int, layers: int = 200) -> None:
    """Forward and backward of a 16 × 16 layer, in µs a layer; PEFT's and ours over the same base."""
    for dtype, adapter in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        x = torch.randn(2, 8, 16, dtype=getattr(torch, dtype))
        whole: dict[str, Callable[[], object]] = {}
        for name in ("PEFT LoRA", "AdaLoRA"):
            base = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(layers)]).to(x.dtype)
            model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.data = parameter.data.to(getattr(torch, adapter))
            if name == "AdaLoRA":
                attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=100)
            outputs: list[Tensor] = []

            def forward(x: Tensor = x, model: nn.Module = model, outputs: list[Tensor] = outputs) -> None:
                outputs.append(model(x).float().sum())

            whole[f"{name} forward"] = forward
            whole[f"{name} backward"] = lambda outputs=outputs: outputs.pop().backward()
        found = interleaved(whole, turns)
        show(f"base {dtype}, adapter {adapter}, µs", {name: 1000 * ms / layers for name, ms in found.items()})


LAYERS = ((16, 16, 50), (128, 16, 50), (128, 512, 20), (384, 1024, 8), (512, 512, 8), (1024, 512, 4))
"""Width, tokens, and number of layers."""


def ways(turns: int) -> None:
    """Forward and backward of layers of one width, as shares of PEFT LoRA's: as the kernel chooses, and by hand."""
    for width, tokens, layers in LAYERS:
        x = torch.randn(2, tokens // 2, width)
        steps: dict[str, Callable[[], object]] = {}
        for name in ("PEFT LoRA", "as chosen", "by hand"):
            base = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
            model = get_peft_model(base, LoraConfig(r=12, target_modules="all-linear"))
            if name != "PEFT LoRA":
                attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=100)

            def step(x: Tensor = x, model: nn.Module = model, chosen: bool = name != "by hand") -> None:
                with patch.object(kernel, "_composes", kernel._composes if chosen else lambda *_: False):
                    model(x).sum().backward()

            steps[name] = step
        times, alive = interleave(steps, turns), bytes_alive("cpu")
        peaks = {name: peak_memory(step, "cpu") - alive for name, step in steps.items()}
        found = {name: times.ratio(name, "PEFT LoRA", "processor").median for name in steps if name != "PEFT LoRA"}
        found |= {f"{name}, memory": peaks[name] / peaks["PEFT LoRA"] for name in ("as chosen", "by hand")}
        show(f"{layers} layers of {width}, {tokens} tokens", found, digits=3)


MIXED = {
    "bf16, adapter bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16, adapter fp32": (torch.bfloat16, torch.float32, False),
    "bf16, adapter fp32, autocast": (torch.bfloat16, torch.float32, True),
}
"""Dtypes of a base and its adapter, and whether autocast is on."""


def mixed(turns: int, repeats: int = 20) -> None:
    """Forward and backward of a layer as shares of plain LoRA's: by hand, and as operations with the gates in fp32."""
    for width, tokens in ((128, 16), (512, 512)):
        for title, (dtype, adapter, cast) in MIXED.items():
            x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
            W, s = torch.randn(width, width, dtype=dtype), torch.ones(12)
            A, B = (torch.randn(shape, dtype=adapter, requires_grad=True) for shape in ((12, width), (width, 12)))
            g = torch.ones(12, requires_grad=True)

            def plain(x=x, W=W, A=A, B=B) -> Tensor:
                return linear(x, W) + (linear(linear(x.to(A.dtype), A), B) * 2.0).to(x.dtype)

            def composed(x=x, W=W, A=A, g=g, B=B, s=s) -> Tensor:
                h = linear(x[0].to(A.dtype), A)
                return torch.addmm(linear(x[0], W).to(h.dtype), (h.float() * (g * s)).to(h.dtype), B.t()).to(x.dtype)

            ways = {
                "plain": plain,
                "by hand": lambda x=x, W=W, A=A, g=g, B=B, s=s: kernel.gated_linear(x, W, None, A, g, B, s),
                "composed": composed,
            }

            def both(way: Callable[[], Tensor], cast: bool = cast) -> None:
                for _ in range(repeats):
                    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                        y = way()
                    y.sum().backward()

            times = interleave({name: partial(both, way) for name, way in ways.items()}, turns)
            found = {name: times.ratio(name, "plain", "processor").median for name in ways if name != "plain"}
            show(f"{width} wide, {tokens} tokens, {title}", found, digits=3)


@torch.no_grad()
def products(turns: int) -> None:
    """A layer's products that are as narrow as its rank: h = x Aᵀ, t = dy B, dB = dyᵀ h, straight and turned around."""
    for tokens, inputs, outputs in ((512, 512, 512), (512, 512, 1376), (1024, 384, 1536)):
        for rank in (8, 12, 16, 64):
            x, dy, h = torch.randn(tokens, inputs), torch.randn(tokens, outputs), torch.randn(tokens, rank)
            A, B = torch.randn(rank, inputs), torch.randn(outputs, rank)
            pairs = {"h": (x, A.t()), "t": (dy, B), "dB": (dy.t(), h)}
            whole: dict[str, Callable[[], object]] = {}
            for name, (a, b) in pairs.items():
                whole[name] = lambda a=a, b=b: a @ b
                whole[f"{name} turned"] = lambda a=a, b=b: (b.t() @ a.t()).t()
            found = interleaved(whole, turns)
            title = f"{tokens} tokens, {inputs} to {outputs}, r {rank}, µs"
            show(title, {name: 1000 * value for name, value in found.items()})


@torch.no_grad()
def repeats(shape: str, turns: int) -> None:
    """A forward pass of a batch that is repeated, in ms a copy."""
    model, inputs = SHAPES[shape].build("cpu"), SHAPES[shape].inputs("cpu")
    whole: dict[str, Callable[[], object]] = {}
    for copies in (1, 2, 4, 8, 16, 32):
        repeated = {key: value.repeat(copies, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        whole[str(copies)] = lambda repeated=repeated: model(**repeated)
    found = interleaved(whole, turns)
    title = f"{shape}, {inputs['input_ids'].numel()} tokens a copy, copies and ms a copy"
    show(title, {copies: value / int(copies) for copies, value in found.items()})


@torch.no_grad()
def averages(turns: int) -> None:
    """One update of both averages for factors of equal shape."""
    for sites, rank, width in ((28, 12, 512), (112, 12, 128), (112, 12, 2048)):
        weights, gradients = ([torch.randn(rank, width) for _ in range(sites)] for _ in range(2))
        mean, uncertainty = torch.zeros(sites, rank, width), torch.zeros(sites, rank, width)
        means, uncertainties = list(mean.unbind()), list(uncertainty.unbind())

        def stacked(weights=weights, gradients=gradients, mean=mean, uncertainty=uncertainty) -> None:
            current = (torch.stack(weights) * torch.stack(gradients)).abs_()
            mean.lerp_(current, 0.15)
            uncertainty.lerp_(current.sub_(mean).abs_(), 0.15)

        def lists(weights=weights, gradients=gradients, means=means, uncertainties=uncertainties) -> None:
            current = torch._foreach_mul(weights, gradients)
            torch._foreach_abs_(current)
            torch._foreach_lerp_(means, current, 0.15)
            torch._foreach_sub_(current, means)
            torch._foreach_abs_(current)
            torch._foreach_lerp_(uncertainties, current, 0.15)

        show(f"{sites} x {rank} x {width}, ms", interleaved({"stacked": stacked, "lists": lists}, turns))


OF_A_STEP = {"parts": parts, "operators": operators, "onestep": onestep}


def show(title: str, found: Mapping[str, float], digits: int = 2) -> None:
    """Print one line."""
    print(f"{title}: " + ", ".join(f"{name} {value:.{digits}f}" for name, value in found.items()), flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*OF_A_STEP, "layer", "ways", "mixed", "products", "repeats", "averages"))
    parser.add_argument("--shape", choices=SHAPES, default="llama-512")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what in OF_A_STEP:
        OF_A_STEP[options.what](options.shape, options.rank, options.turns)
    elif options.what == "repeats":
        repeats(options.shape, options.turns)
    else:
        found = {"layer": layer, "ways": ways, "mixed": mixed, "products": products, "averages": averages}
        found[options.what](options.turns)


if __name__ == "__main__":
    main()
