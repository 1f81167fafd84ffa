"""TRL's SFTTrainer and DPOTrainer behind `loralloc train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather
from peft import PeftModel
from torch import Tensor
from trl import DPOTrainer, SFTTrainer

from loralloc.training.trainer import RunTrainer


@contextmanager
def in_its_own_type(model: Any) -> Iterator[None]:
    """Keep the adapter of a quantised model as it is while a trainer of TRL is built inside.

    TRL casts it to bfloat16, in which most updates at the end of a training are too small to change a weight.
    """
    base = model.get_base_model()
    flags = {name: getattr(base, name) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if hasattr(base, name)}
    try:
        for name in flags:
            setattr(base, name, False)
        yield
    finally:
        for name, value in flags.items():
            setattr(base, name, value)


class RunTRLTrainer(RunTrainer):
    """A trainer of TRL whose running figures, which it averages between rows of the log, are saved in checkpoints."""

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    def _send_telemetry(self) -> None:
        """Send nothing. TRL would tell the Hub of every training, in a thread that looks up the Hub's address.

        That reads the environment, which accelerate empties for a moment where a second trainer is built in the same
        process, as after a search: the process could end with a segmentation fault.
        """

    def window(self) -> dict[str, Any]:
        """TRL's figures since the last row, and the tokens of the whole run."""
        return {"metrics": dict(self._metrics["train"]), "tokens": getattr(self, "_total_train_tokens", 0)}

    def restore_window(self, state: Mapping[str, Any]) -> None:
        """Take up what `window` returned."""
        self._metrics["train"].update(state["metrics"])
        self._total_train_tokens = state["tokens"]


class RunSFTTrainer(RunTRLTrainer, SFTTrainer):
    """An SFTTrainer that evaluates every example separately, even if several share a row.

    Predictions are sums per example, [n, 3]: the loss of the tokens with labels, their number, and how many of them had
    the highest probability. No tensor of the vocabulary's size is gathered.
    """

    counts = "tokens"

    def __init__(self, model: Any, **kwargs: Any) -> None:
        with in_its_own_type(model):
            super().__init__(model, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Evaluate a batch; see the class."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        sums = sums_of_examples(output, inputs.get("position_ids"))
        loss = sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, sums, sums[:, 1])


def sums_of_examples(output: Any, positions: Tensor | None) -> Tensor:
    """Add up what TRL's fused head tells of tokens.

    Args:
        output: Its `log_probs`, `label_mask` and `is_top1`, [n, length - 1] each.
        positions: Positions of the tokens, [1, length], where examples share one row: each begins at 0. None where
            every row is an example.

    Returns:
        Loss, learned tokens and hits of every example, [examples, 3].
    """
    values = torch.stack([-output.log_probs, output.label_mask, output.is_top1], dim=-1).double()
    if positions is None:
        return values.sum(dim=1)
    example = (positions[0] == 0).cumsum(0) - 1
    sums = values.new_zeros(int(example[-1]) + 1, 3)
    return sums.index_add_(0, example[1:], values[0])


class RunDPOTrainer(RunTRLTrainer, DPOTrainer):
    """A DPOTrainer whose reference is the base model, and whose evaluation says what can be compared.

    The rewards of an evaluation are means over its examples. TRL's are means of the means of batches, of which the last
    may be smaller, and with several processes holds some examples twice.
    """

    counts = "tokens"

    KEPT: Mapping[str, str] = {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}
    """TRL's figures that an evaluation reports besides the loss, and our names for them."""
    OF_EXAMPLES = ("rewards/", "logps/")
    """How the names of TRL's figures begin that are means over examples."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self._sizes: list[int] = []  # examples in each batch of the evaluation so far
        with in_its_own_type(model):
            super().__init__(model, **kwargs)
        # TRL keeps a copy of the adapter as its reference, and would save it too. Without one it switches the adapter
        # off, which is the same for a fresh adapter, and what an evaluation of a trained one should compare with.
        cast(PeftModel, self.model).delete_adapter("ref")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and keep what can be compared: loss, and how often and by how much the better answer wins."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._sizes.clear()
        self._metrics["eval"].clear()  # an evaluation that failed may have left some
        metrics = super().evaluate(*args, **kwargs)
        kept = {f"{prefix}_{name}": metrics[f"eval_{key}"] for key, name in self.KEPT.items()}  # whatever the prefix
        return {f"{prefix}_loss": metrics[f"{prefix}_loss"], **kept}

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, and count its examples."""
        with self._examples_once() as sizes:
            found = super().prediction_step(*args, **kwargs)
        self._sizes.append(sizes[-1])
        return found

    @contextmanager
    def _examples_once(self) -> Iterator[list[int]]:
        """Let TRL gather every example once; yield how many examples it has gathered, by call.

        To give each process as many, accelerate fills the last batch up with examples from the beginning.
        """
        accelerator: Any = self.accelerator
        state, sizes = accelerator.gradient_state, []

        def gather_once(values: Tensor) -> Tensor:
            found: Any = gather(values)
            if values.dim() == 0:  # a sum over the batch
                return found
            if state.end_of_dataloader and state.remainder > 0:
                found = found[: state.remainder]
            sizes.append(len(found))
            return found

        accelerator.gather = gather_once
        try:
            yield sizes
        finally:
            del accelerator.gather

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; in an evaluation, weight the mean of each batch by its examples."""
        figures = self._metrics["eval"]
        for key in [key for key in figures if key.startswith(self.OF_EXAMPLES)]:
            figures[key] = [float(np.average(figures[key], weights=self._sizes))]
        super().log(logs, *args, **kwargs)
