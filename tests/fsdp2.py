"""What `accelerate launch` with an FSDP2 config file sets up for a Trainer, on CPUs too.

accelerate sets FSDP2 up on GPUs alone; on a CPU it trains unsharded without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer


@contextmanager
def launched_with_fsdp2() -> Iterator[None]:
    """Trainers that are built inside are under FSDP2."""
    create = Trainer.create_accelerator_and_postprocess

    def with_plugin(trainer: Trainer) -> None:
        create(trainer)
        options: Any = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True

    with patch.object(Trainer, "create_accelerator_and_postprocess", with_plugin):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
