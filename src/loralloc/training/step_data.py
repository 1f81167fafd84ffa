"""The data of a run, for methods that look at them: the step's own batches, and a stream of validation batches.

Looking leaves no trace: random states are restored, gradients are taken with `torch.autograd.grad` by the method and
never land in `.grad`, and frozen weights are only read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.base import any_process
from loralloc.methods.validation import IGNORED, check_batch, check_labels, check_loss, loss_of
from loralloc.sharding import compute_dtypes, is_sharded
from loralloc.training.ablation import AblationScorer
from loralloc.training.losses import SampleLoss, next_log_probs
from loralloc.training.order import has_gradients
from loralloc.training.precision import prepared_dtype
from loralloc.training.processes import is_main

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]

LINEAR = ("loss", "log_probs")
"""Model outputs of which a training loss is a weighted sum: the model's loss, or TRL's log-probabilities of labels."""

MOST_WEIGHT = 1024
"""A larger weight of the loss is taken for that of fp16's gradient scaler, which starts at 65,536."""


class CollatedBatches(Sequence[Batch]):
    """Batches of a data set, without end and without a state: a batch depends on its index and the seed alone.

    Args:
        dataset: Examples, by index.
        collate: Turns a list of examples into a batch.
        batch_size: Examples in a batch; the last batch of a pass may be smaller.
        seed: Every pass has an order of its own, drawn from it.
        columns: What `collate` is given of an example; None for all of it.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        batch_size: int,
        seed: int,
        columns: Collection[str] | None = None,
    ) -> None:
        self._dataset, self._collate, self._size, self._seed = dataset, collate, batch_size, seed
        self._columns = columns
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self._dataset) // self._size)

    def __getitem__(self, index: Any) -> Any:
        """Return a batch of the pass `index // len(self)`."""
        done, place = divmod(int(index), len(self))
        if self._order is None or self._order[0] != done:
            generator = torch.Generator().manual_seed(self._seed + done)
            self._order = done, torch.randperm(len(self._dataset), generator=generator).tolist()
        chosen = self._order[1][place * self._size : (place + 1) * self._size]
        rows = [self._dataset[i] for i in chosen]
        if self._columns is not None:
            rows = [{key: value for key, value in row.items() if key in self._columns} for row in rows]
        return self._collate(rows)


OWN_LOSS = (
    "that the model returns. This method computes it again, so train on model(**batch).loss, with labels in the batch, "
    'and with the model that the allocation is attached to; or use AutoLoRA(mode="first_order"), which does not'
)


@dataclass
class _Seen:
    """A forward pass of training: its inputs, what else its output depends on, and the gradients of its outputs.

    Attributes:
        args: Positional inputs.
        kwargs: Inputs by name.
        random: States of the generators when it began.
        autocast: Whether autocast was on around it, and its dtype.
        weights: ∂(the step's loss) / ∂(an output of this pass), as `backward()` delivered it: what the training loop
            scaled the loss by (accumulation, processes). Empty as long as no gradient has arrived.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: tuple[Tensor, list[Tensor]]
    autocast: tuple[bool, torch.dtype]
    weights: dict[str, Tensor] = field(default_factory=dict)

    def arrived(self, output: str, gradient: Tensor) -> None:
        """Note the gradient of an output."""
        before = self.weights.get(output)
        self.weights[output] = gradient.detach() if before is None else before + gradient.detach()


class ObservedData:
    """The `StepData` of a run.

    It keeps the inputs of every forward pass of a step (references, no copies) and the gradient that arrives at its
    loss. A pass whose loss is never differentiated, such as an evaluation, does not count for the step. Nor does one
    whose gradients were set to None before the next pass.

    Args:
        model: The model that is trained.
        sites: Its gated layers.
        validation: Batches by index, at least one.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], validation: Sequence[Batch]) -> None:
        self.model, self.sites, self.validation = model, sites, validation
        self._drawn = 0
        self._seen: list[_Seen] = []
        self._looking = False
        self._weights_checked = False
        self._loss_compared = False
        self._walk: bool | None = None  # whether ablations may start in the middle of the model; None: not known yet
        self._hooks = (
            model.register_forward_pre_hook(self._remember, with_kwargs=True),
            model.register_forward_hook(self._follow),
        )

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site], validation: Any) -> ObservedData | None:
        """Watch a model for a method that looks at validation data; None for one that does not."""
        return None if validation is None else cls(model, sites, validation)

    def weights(self) -> list[Tensor]:
        """Everything that the optimizer trains, gates left out."""
        gates = {id(site.gate) for site in self.sites}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in gates]

    def train_losses(self, twice: bool = False) -> Iterator[Tensor]:
        """Losses of the step's own batches, one at a time, each weighted as it was in the step.

        Args:
            twice: Whether they are differentiated twice.

        Raises:
            UserError: The step's loss was not the model's own, or is scaled as for fp16; or a sharded model is to be
                differentiated twice.
        """
        if twice and is_sharded(self.model):
            raise UserError(
                'mode="exact" differentiates the backward pass, and FSDP2 has let go of the base weights by then; use '
                'mode="paper", or "fast"'
            )
        seen = [pass_ for pass_ in self._seen if pass_.weights]
        if not seen:
            raise UserError(f"the batches of this step are not known: no gradient came through the loss {OWN_LOSS}")
        self._check_weights(seen[0].weights)
        for pass_ in seen:
            with self._replayed(pass_):
                output = self._again(pass_, twice)
            yield torch.stack([(getattr(output, key) * weight).sum() for key, weight in pass_.weights.items()]).sum()

    def _again(self, seen: _Seen, twice: bool) -> Any:
        """Recompute a forward pass; if `twice`, without TRL's fused head, which has no second derivative."""
        if not (twice and seen.kwargs.get("fused_lm_head")):
            return self.model(*seen.args, **seen.kwargs)
        plain = {key: value for key, value in seen.kwargs.items() if key not in ("fused_lm_head", "labels")}
        logits = self.model(*seen.args, **plain).logits
        return SimpleNamespace(log_probs=next_log_probs(logits, seen.kwargs["labels"]))

    def precision(self) -> torch.dtype:
        """The coarsest precision in which anything of the current step was computed: of weights, or of autocast."""
        used = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        used |= {pass_.autocast[1] for pass_ in self._seen if pass_.autocast[0]} | compute_dtypes(self.model)
        inside = prepared_dtype(self.model)
        used |= set() if inside is None else {inside}
        return max(used, key=lambda dtype: torch.finfo(dtype).eps)

    def validation_loss(self) -> Tensor:
        """Loss of the next validation batch, in the mode that the model is in.

        Raises:
            UserError: The model returns no loss, or the first loss is not finite, or the first batch has no labels.
        """
        first, batch = self._drawn == 0, self.next_batch()
        if first:
            check_labels(batch)
        with self._scoring():
            loss = loss_of(self.model(**batch))
        if first:
            check_loss(loss)
        return loss

    def next_batch(self) -> Batch:
        """The next validation batch, on the model's device."""
        if not len(self.validation):
            raise UserError("the validation data are empty; this method learns ranks from them")
        self._drawn += 1
        return self.batch(self._drawn - 1)

    def scoring(self, samples: int, draw: int) -> AblationScorer:
        """Losses of one scoring batch under any setting of the gates.

        Args:
            samples: Validation samples in it; all there are, where there are fewer.
            draw: Which batch: 0 for the first samples, 1 for the next ones, and so on.
        """
        count = min(len(self.validation), -(-samples // size_of(self.batch(0))))
        batches: list[Batch] = []
        for index in range(count):
            batch, left = self.batch(draw * count + index), samples - sum(map(size_of, batches))
            if left > 0:
                batches.append(samples_of(batch, slice(left)))
        if self._walk is None:  # `check_scoring` may not have run: in a resumed run, or if the first step was a bad one
            self._check_loss(batches[0])
            self._walk = self._can_walk(batches[0])
        return AblationScorer(self.model, self.sites, batches, self._scoring, walk=bool(self._walk))

    def check_scoring(self) -> None:
        """Refuse a model whose gates cannot be switched per sample, or whose loss of a sample is not known.

        Raises:
            UserError: With the layer, or with both losses.
        """
        self._check_loss(self.batch(0))

    def _check_loss(self, batch: Batch) -> None:
        check_labels(batch)
        AblationScorer(self.model, self.sites, [batch], self._scoring).check_loss(batch)
        self._compare_losses()

    def _compare_losses(self) -> None:
        """Tell once, in a step, that it was trained by another loss than the one that ranks are scored by."""
        told, self._loss_compared = self._loss_compared, True
        weights = [weight for pass_ in self._seen for weight in pass_.weights.values()]
        if told or not self._seen or (weights and not any(map(_uneven, weights))) or not is_main():
            return
        logger.warning(
            "the training has a loss of its own (compute_loss_func, label smoothing, weights of tokens, or a loop that "
            "does not use the model's), and ranks are scored by the loss that the model returns for validation data; "
            'ABLoRA with score="sensitivity" scores them by the gradients of the training\'s own'
        )

    def _can_walk(self, batch: Batch) -> bool:
        """Whether ablations may start in the middle of the model. One sample tells, once B has been trained."""
        _, labels = SampleLoss.of(self.model).split(batch)
        most = int((labels != IGNORED).reshape(len(labels), -1).sum(1).argmax())
        sample = samples_of(batch, slice(most, most + 1))
        walks = AblationScorer(self.model, self.sites, [sample], self._scoring).check_walk()
        return not any_process(torch.tensor(not walks, device=self.device))  # or processes would make other passes

    def batch(self, index: int) -> Batch:
        """A validation batch on the model's device; finite data start over at their end."""
        endless = isinstance(self.validation, CollatedBatches)
        found = self.validation[index if endless else index % len(self.validation)]
        check_batch(found)
        return on_device(found, self.device)

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return self.sites[0].A.device

    def forget(self) -> None:
        """The step is over: its batches are no longer needed."""
        self._seen.clear()

    def close(self) -> None:
        """Stop watching the model."""
        self.forget()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, int]:
        """How many validation batches have been drawn."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another run stopped."""
        self._drawn = int(state["drawn"])

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the model is called with while gradients are recorded."""
        if torch.is_grad_enabled() and not self._looking:
            if any(pass_.weights for pass_ in self._seen) and not has_gradients(self.model, self.sites):
                # The loop has dropped its gradients, as one does that has run out of memory.
                self._seen = [pass_ for pass_ in self._seen if not pass_.weights]
            self._seen.append(_Seen(args, dict(kwargs), random_state(), _autocast(self.device)))

    def _follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Record the gradient of the loss when it arrives."""
        if not self._seen or self._looking:
            return
        for key in LINEAR:
            tensor: Any = getattr(output, key, None)
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._seen[-1].arrived, key))

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse, in the first step, a loss that cannot be computed again from its weights."""
        if self._weights_checked:
            return
        self._weights_checked = True
        total = torch.stack([weight.abs().sum().float() for weight in weights.values()]).sum().item()
        if total > MOST_WEIGHT:  # gradients are unscaled later, which a method cannot know of
            raise UserError(
                f"the loss was multiplied by {total:g} before backward(), as fp16's gradient scaler does; this "
                "method needs the gradients themselves: use bf16, or no mixed precision"
            )
        if any(map(_uneven, weights.values())):
            raise UserError(
                f"the step's loss weights tokens by the model's own predictions; it is not the loss {OWN_LOSS}"
            )

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Compute in the precision of training, without side effects."""
        enabled, dtype = self._seen[-1].autocast if self._seen else _autocast(self.device)
        with self._looking_only(), torch.autocast(self.device.type, enabled=enabled, dtype=dtype):
            yield

    @contextmanager
    def _replayed(self, seen: _Seen) -> Iterator[None]:
        """The random numbers and the precision that a forward pass of training had."""
        enabled, dtype = seen.autocast
        with self._looking_only(), torch.autocast(self.device.type, enabled=enabled, dtype=dtype):
            set_random_state(seen.random)
            yield

    @contextmanager
    def _looking_only(self) -> Iterator[None]:
        """Restore the random generators afterwards, and record no pass inside as one of training."""
        self._looking = True
        try:
            with random_state_kept():
                yield
        finally:
            self._looking = False


def _uneven(weights: Tensor) -> bool:
    """Whether a loss gives some tokens another weight than others; those that it leaves out have 0."""
    used = weights[weights != 0]
    return bool(used.numel()) and bool((used.max() - used.min()).abs() > 1e-3 * used.abs().max())


def size_of(batch: Batch) -> int:
    """Samples in a batch."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), 0)


def samples_of(batch: Batch, which: slice) -> Batch:
    """Some samples of a batch; entries that do not have one value per sample stay as they are."""
    size = size_of(batch)
    return {
        key: value[which] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value
        for key, value in batch.items()
    }


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def random_state() -> tuple[Tensor, list[Tensor]]:
    """States of torch's generators: the CPU's, and those of the GPUs."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Draw inside as if nothing had been drawn: the generators are afterwards as they were before."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
