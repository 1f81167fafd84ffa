"""What a training costs while it runs: tokens or examples a second, and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.utils import find_batch_size

from loralloc.methods.validation import IGNORED
from loralloc.training import processes

MIB = 2**20


class Meter:
    """Counts what goes through the model between two rows of the log, those of all processes together.

    Counting waits for no device: where a mask says which tokens are padding, the count stays where the mask is until
    it is read.

    Args:
        unit: What is counted: tokens without padding, or examples.
    """

    def __init__(self, unit: Literal["tokens", "examples"]) -> None:
        self.unit = unit
        self.start()
        self.processor_seconds = 0.0

    def start(self) -> None:
        """Count from here on."""
        self._count: Any = 0
        self._began = time.perf_counter()

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch, as the model's forward takes it."""
        if self.unit == "examples":
            self._count += find_batch_size(inputs) or 0
        elif (mask := inputs.get("attention_mask")) is not None:
            self._count += mask.sum()
            if "decoder_input_ids" in inputs:  # the decoder's tokens come to the encoder's
                self._count += (inputs["labels"] != IGNORED).sum()
        else:  # rows without padding
            self._count += inputs["input_ids"].numel()

    @property
    def processor_seconds(self) -> float:
        """What the training has cost so far, see `processor_time`; a resumed run sets what went before."""
        return processor_time() - self._processor

    @processor_seconds.setter
    def processor_seconds(self, seconds: float) -> None:
        self._processor = processor_time() - seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that something else takes."""
        paused, processor = time.perf_counter(), processor_time()
        try:
            yield
        finally:
            self._began += time.perf_counter() - paused
            self._processor += processor_time() - processor

    def read(self) -> dict[str, float]:
        """Return what a row of the log says, and start again.

        Returns:
            `tokens_per_second` or `examples_per_second`, `memory_mib`, see `peak_memory`, and `processor_seconds`.
        """
        count, seconds = sum(processes.gather(float(self._count))), time.perf_counter() - self._began
        self.start()
        return {
            f"{self.unit}_per_second": round(count / seconds, 1),
            "memory_mib": round(peak_memory()[0] / MIB, 1),
            "processor_seconds": round(self.processor_seconds, 2),
        }


def processor_time() -> float:
    """Return seconds of CPU time of this process, with all its threads.

    With a GPU it is wall-clock time instead, since the CPU only waits for the GPU.
    """
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def peak_memory() -> tuple[int, str]:
    """Return the most bytes of memory so far, and what is counted: what is allocated on the GPU, or else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "of the whole process"
