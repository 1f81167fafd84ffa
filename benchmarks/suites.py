"""The suites: which settings are measured, and what is measured in each. Every suite yields records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import betty_search
import conversion
import rounds
import startup as command_line
import torch
from compiling import build_compiled
from contenders import CONTENDERS, INTERVAL, REFERENCE, SEARCH, TRAINING, Setting, Step, build
from counting import count, device_waits
from record import Record, record
from shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, Shape
from timing import Spread, Times, bytes_alive, interleave, peak_memory

CONTENDERS["betty"] = betty_search.build

Make = Callable[[str, Setting], Step | str]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        device: `cpu` or `cuda`.
        turns: Turns of each comparison.
        quick: Fewer settings.
        shapes: Names from the command line; none for the suite's own.
        rank: Starting rank where the suite does not vary it.
    """

    device: str = "cpu"
    turns: int = 20
    quick: bool = False
    shapes: tuple[str, ...] = ()
    rank: int = 12

    def chosen(self, default: tuple[str, ...]) -> list[Shape]:
        """The shapes to measure."""
        return [SHAPES[name] for name in self.shapes or default]

    def settings(self, shape: Shape, rank: int | None = None) -> list[Setting]:
        """A shape with fp32 adapters and, if the base is in half precision, also with bf16 adapters."""
        kinds = ("fp32",) if shape.dtype == torch.float32 else ("fp32", "bf16")
        return [Setting(shape, rank or self.rank, self.device, kind) for kind in kinds]


def steps(plan: Plan) -> Iterator[Record]:
    """Time of a training step against PEFT's LoRA at the same rank."""
    for shape in plan.chosen(CUDA_SHAPES if plan.device == "cuda" else CPU_SHAPES):
        for setting in plan.settings(shape):
            yield timed("steps", setting, TRAINING, plan)


def compiled(plan: Plan) -> Iterator[Record]:
    """Time of a training step with every block compiled."""
    names = (REFERENCE, "adalora", "allora", "ablora")
    for shape in plan.chosen(CUDA_SHAPES if plan.device == "cuda" else ("llama-128",)):
        for setting in plan.settings(shape):
            yield timed("compiled", setting, names, plan, build_compiled)


def rank(plan: Plan) -> Iterator[Record]:
    """Time of a training step at several ranks."""
    for shape in plan.chosen(CUDA_SHAPES[:1] if plan.device == "cuda" else ("llama-512",)):
        for r in (8, 64) if plan.quick else (8, 16, 32, 64, 128, 256):
            for setting in plan.settings(shape, r):
                yield timed("rank", setting, ("frozen", REFERENCE, "peft-adalora", "adalora"), plan)


def modules(plan: Plan) -> Iterator[Record]:
    """Time of a training step by the number of adapted modules, in models with hardly any arithmetic."""
    small = SHAPES["llama-128"]
    sizes: list[Shape] = [small.with_(layers=6, targets=("q_proj", "v_proj"))]
    sizes += [small.with_(layers=layers) for layers in ((16,) if plan.quick else (4, 16, 32, 64))]
    for shape in sizes:
        ours = ("adalora", "allora", "ablora")
        names = (REFERENCE, "peft-adalora", *ours, *(f"{name}-cpp" for name in ours))
        yield timed("modules", Setting(shape, plan.rank, plan.device), names, plan)


def tokens(plan: Plan) -> Iterator[Record]:
    """Time of a training step by its number of tokens."""
    for shape in plan.chosen(CUDA_SHAPES[:1] if plan.device == "cuda" else ("llama-512",)):
        for batch in (1, 4) if plan.quick else (1, 2, 4, 8, 16):
            for setting in plan.settings(shape.with_(batch=batch)):
                yield timed("tokens", setting, ("frozen", REFERENCE, "peft-adalora", "adalora"), plan)


def search(plan: Plan) -> Iterator[Record]:
    """Time of AutoLoRA's search step against a step of PEFT's LoRA; betty runs the published formulation."""
    for shape in plan.chosen(CUDA_SHAPES[:1] if plan.device == "cuda" else ("llama-512",)):
        yield timed("search", plan.settings(shape, 8)[0], (*SEARCH, "betty"), plan)


def calls(plan: Plan) -> Iterator[Record]:
    """Calls into the tensor library by the allocator, in a step that allocates and in one that does not."""
    for shape in plan.chosen(("llama-128",)):
        setting = Setting(shape, plan.rank, plan.device)
        counts, failures = allocator_figures(setting, ("peft-adalora", "adalora"))
        yield record("calls", setting, {"modules": modules_of(setting), "calls": counts}, failures)


def memory(plan: Plan) -> Iterator[Record]:
    """Peak memory of a step, one contender at a time."""
    shapes = plan.chosen(CUDA_SHAPES if plan.device == "cuda" else CPU_SHAPES[:2])
    if plan.device == "cpu":  # what is kept of a step depends on dtypes more than on the device
        shapes.append(shapes[-1].with_(dtype=torch.bfloat16))
    for shape in shapes:
        for setting in plan.settings(shape):
            found, failures = peaks(setting, TRAINING)
            yield record("memory", setting, {"peak_bytes": found}, failures)


def ablora(plan: Plan) -> Iterator[Record]:
    """A round of AB-LoRA against the naive loop, at about 200 ranks and at about 1,000."""
    ranks = {"llama-512": 6, "llama-128": 9, "minilm": 6}  # 168, 1,008 and 222 ranks
    for shape in plan.chosen(tuple(ranks)[:2] if plan.quick else tuple(ranks)):
        setting = Setting(shape, ranks.get(shape.name, plan.rank), plan.device)
        yield ablora_round(setting, ("fast", "exact"))


def compact(plan: Plan) -> Iterator[Record]:
    """Time of a step in AdaLoRA's last phase, at a quarter of the ranks, against PEFT's LoRA of that rank."""
    for shape in plan.chosen(CUDA_SHAPES[:1] if plan.device == "cuda" else ("llama-512",)):
        few = plan.settings(shape, 16)[0]
        many = plan.settings(shape, 4 * few.rank)[0]
        which = {REFERENCE: few, "adalora": many, "adalora-compact": many}
        yield timed("compact", few, which, plan)


def convert(plan: Plan) -> Iterator[Record]:
    """Halving the rank of a trained adapter, against PEFT's conversion."""
    for shape in plan.chosen(("minilm",)):
        setting = Setting(shape, plan.rank, plan.device)
        try:
            figures, failures = {"conversion": conversion.compare(setting)}, {}
        except Exception as error:
            figures, failures = {}, {"truncation": f"{type(error).__name__}: {error}"}
        yield record("convert", setting, figures, failures)


def startup(plan: Plan) -> Iterator[Record]:
    """Time of `loralloc --help` against importing typer and rich; no model is involved."""
    if plan.device == "cpu":
        yield record("startup", None, ratios(command_line.compare(plan.turns), command_line.REFERENCE), {})


SUITES: dict[str, Callable[[Plan], Iterator[Record]]] = {
    "startup": startup,
    "calls": calls,
    "steps": steps,
    "compiled": compiled,
    "memory": memory,
    "ablora": ablora,
    "search": search,
    "compact": compact,
    "convert": convert,
    "modules": modules,
    "rank": rank,
    "tokens": tokens,
}


def timed(suite: str, setting: Setting, names: Iterable[str], plan: Plan, make: Make = build) -> Record:
    """Interleave contenders; ratios are against `REFERENCE`.

    Args:
        suite: Name of the suite, for the record.
        setting: What is recorded as the setting.
        names: The contenders; a mapping gives each of them a setting of its own.
        plan: How much is measured.
        make: Builds and checks a contender.
    """
    built, failures = {}, {}
    for name in names:
        contender = make(name, names[name] if isinstance(names, Mapping) else setting)
        if isinstance(contender, str):
            failures[name] = contender
        else:
            built[name] = contender
    figures: dict[str, Any] = {"modules": modules_of(setting), "turns": plan.turns}
    if REFERENCE in built:
        block = INTERVAL if plan.device == "cuda" else 1
        times = interleave({name: step.step for name, step in built.items()}, plan.turns, plan.device, block)
        figures |= ratios(times, REFERENCE)
        figures["parameters"] = {name: step.parameters for name, step in built.items()}
        figures |= graphs_of(built)
    del built
    release(plan.device)
    return record(suite, setting, figures, failures)


def graphs_of(built: Mapping[str, Step]) -> dict[str, Any]:
    """The number of graphs of each contender that was compiled, as a record keeps it."""
    found = {name: getattr(step, "graphs", None) for name, step in built.items()}
    return {"graphs": found} if any(found.values()) else {}


def ratios(times: Times, reference: str) -> dict[str, Any]:
    """The ratios to a reference and the seconds, of both clocks, as a record keeps them."""
    figures = {}
    for clock in ("wall", "processor"):
        seconds = getattr(times, clock)
        figures[f"{clock}_ratio"] = {name: asdict(times.ratio(name, reference, clock)) for name in seconds}
        figures[f"{clock}_seconds"] = {name: asdict(Spread.of(seconds[name])) for name in seconds}
    return figures


def release(device: str) -> None:
    """Give memory back between settings."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peaks(setting: Setting, names: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Peak memory of a step of each contender, one at a time, and why some have none."""
    found: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name in names:
        release(setting.device)
        before = bytes_alive(setting.device)
        contender = build(name, setting)
        if isinstance(contender, str):
            failures[name] = contender
        else:
            found[name] = peak_memory(contender.step, setting.device) - before
        del contender
    return found, failures


def ablora_round(setting: Setting, modes: Sequence[str]) -> Record:
    """A round of AB-LoRA in some modes against the naive loop."""
    figures: dict[str, Any] = {}
    failures: dict[str, str] = {}
    try:
        naive, ours = rounds.compare(setting, modes)
    except Exception as error:
        failures["ablora"] = f"{type(error).__name__}: {error}"
    else:
        for mode, own in ours.items():
            same = own.pruned == naive.pruned
            figures[mode] = {"ours": asdict(own), "naive": asdict(naive), "same_pruned": same}
    return record("ablora", setting, {"modules": modules_of(setting), "rounds": figures}, failures)


def allocator_figures(setting: Setting, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The allocator's calls of each contender, and why some have none."""
    counts: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name in names:
        contender = build(name, setting)
        if isinstance(contender, str):
            failures[name] = contender
        else:
            counts[name] = allocator_calls(contender)
    return counts, failures


def allocator_calls(contender: Step) -> dict[str, dict[str, float]]:
    """Calls of a step that allocates (the most of an interval) and of one that does not (the least)."""
    for _ in range(INTERVAL):  # what happens once in a run is no part of a step
        contender.step()
    totals, waits = [], []
    for _ in range(INTERVAL):
        contender.loss().backward()
        before = count(contender.before_step)
        contender.optimizer.step()
        after = count(contender.after_step)
        contender.optimizer.zero_grad()
        totals.append(before.total + after.total)
        waits.append((before.waiting + after.waiting).total())
    found: dict[str, dict[str, float]] = {
        "plain": {"calls": min(totals), "waits": min(waits)},
        "allocating": {"calls": max(totals), "waits": max(waits)},
    }
    if contender.setting.device == "cuda":
        waits = []
        for _ in range(INTERVAL):
            with device_waits() as places:
                contender.step()
            waits.append(len(places))
        found["plain"]["device_waits"] = min(waits)
    return found


def modules_of(setting: Setting) -> int:
    """How many modules in the model's blocks have an adapter; BERT's pooler, which has one too, is not counted."""
    shape, everything = setting.shape, {"llama": 7, "bert": 6}
    return shape.layers * (everything[shape.family] if shape.targets == "all-linear" else len(shape.targets))
