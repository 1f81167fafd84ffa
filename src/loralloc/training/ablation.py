"""Losses of one scoring batch under many settings of all gates, for methods that score ranks by switching them off.

Four things make it fast, none of which changes a loss beyond rounding (except with bitsandbytes' int8 layers, which
choose their outlier columns from all rows of a pass):

* Many settings per forward pass: the batch is repeated, and each copy has its own gates (per sample, [n, 1, r]).
* Prefix reuse: if a setting equals a *reference* (the gates as trained, or all of them zero) up to some adapted layer,
  its pass starts from the hidden state that the reference had before this layer's block, and the block's frozen layers
  up to this one return what they returned for the reference. On average a rank's two ablations then cost (L + 1) / L
  passes through the blocks instead of two, or less, as the first block of each is computed only in part. For models
  that cannot be walked like that (see `prefix_reuse`; `check_walk` compares), every pass goes through the whole model.
* Adapters whose gates are all zero are skipped: nearly all of them, if only one rank is on.
* The head only computes positions that have a label, if the model takes `logits_to_keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.errors import UserError
from loralloc.gating import Site, gates_replaced
from loralloc.methods.validation import NO_LABELS, check_loss, loss_of
from loralloc.outputs import logits_of
from loralloc.peft_layers import evaluating
from loralloc.training.losses import SampleLoss
from loralloc.training.precision import prepared_dtype
from loralloc.training.prefix_reuse import States, Watcher, computing, find_blocks, frozen, skipped

TOKENS = 16_384
"""Tokens in one forward pass: enough copies to fill a GPU, few enough for activations to fit."""

CPU_TOKENS = 2_048
"""The same on a CPU: the system takes back tensors above some 32 MB, and new pages cost as much as the products."""

LOGITS = 2**28
"""Logits in one forward pass: 1 GB in fp32."""

KEPT_BYTES = 2**30
"""Most bytes that are kept of what the references have computed. If products of frozen layers are too large, each row
starts at the beginning of its block; if hidden states are too large, each call computes them again."""


@dataclass(frozen=True)
class _Part:
    """A part of the scoring batch that fits into one forward pass."""

    inputs: Mapping[str, Any]
    labels: Tensor
    samples: int
    tokens: int
    logits: int
    choices: int = 1
    """Rows of one sample in the model: those of multiple choice have one for each choice."""

    def repeated(self, copies: int) -> _Part:
        """The samples again and again, copy after copy."""
        inputs = {
            key: value.repeat(copies, *[1] * (value.dim() - 1)) if self._per_sample(key, value) else value
            for key, value in self.inputs.items()
        }
        labels = self.labels.repeat(copies, *[1] * (self.labels.dim() - 1))
        return replace(self, inputs=inputs, labels=labels, samples=copies * self.samples)

    def sample(self, index: int) -> _Part:
        """One sample."""
        inputs = {k: v[index : index + 1] if self._per_sample(k, v) else v for k, v in self.inputs.items()}
        tokens, logits = self.tokens // self.samples, self.logits // self.samples
        return _Part(inputs, self.labels[index : index + 1], 1, tokens, logits, self.choices)

    def _per_sample(self, key: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.samples and key != "logits_to_keep"


@dataclass(frozen=True)
class _Pass:
    """One forward pass: the rows it computes, from which block on, and what is known before it computes anything.

    Attributes:
        rows: Which rows, int64 [G].
        start: The first block.
        hidden: What the block before it returns; None for the first block.
        products: What some frozen layers return, by site.
    """

    rows: Tensor
    start: int = 0
    hidden: Tensor | None = None
    products: Mapping[int, Tensor] = field(default_factory=dict)


class AblationScorer:
    """The loss of one scoring batch as a function of all gates. Implements `methods.base.Ablations`.

    Args:
        model: The model.
        sites: Its gated layers.
        batches: The scoring batch, in one part or several: mappings of what the model takes, labels included.
        looking: Makes a context in which the model may be called without leaving a trace.
        tokens: Most tokens in one forward pass; one copy of a part is the least. None for what suits the device.
        walk: Whether to reuse prefixes where the model's blocks allow it.

    Attributes:
        samples: Samples in the scoring batch.
        labels: Labels in it; losses are means over them.
        block_samples: Evaluations of one block for one sample so far. A gradient pass counts twice: it goes back
            through the activations only.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[Mapping[str, Any]],
        looking: Callable[[], AbstractContextManager[None]],
        tokens: int | None = None,
        walk: bool = True,
    ) -> None:
        self._model, self._sites, self._looking = model, sites, looking
        self._ranks = [site.rank for site in sites]
        self._loss = SampleLoss.of(model)
        self._parts = [self._part(batch) for batch in batches]
        self.samples = sum(part.samples for part in self._parts)
        self.labels = sum(self._loss.count(part.labels) for part in self._parts)
        if self.labels == 0:
            raise UserError(NO_LABELS)
        self._blocks = find_blocks(model, sites) if walk else ()
        self._depth = max(1, len(self._blocks))
        self._kept: dict[tuple[int, int], States | None] = {}
        self.block_samples = 0
        device = sites[0].gate.device
        self._tokens = tokens if tokens is not None else CPU_TOKENS if device.type == "cpu" else TOKENS
        self._open = torch.cat([(site.scale != 0).to(device) for site in sites])
        trained = self._masked(torch.cat([site.gate.detach().to(device) for site in sites]))
        self._references = torch.stack([trained, torch.zeros_like(trained)])

    @property
    def forwards(self) -> float:
        """What has been computed so far, in forward passes over the scoring batch."""
        return self.block_samples / (self._depth * self.samples)

    def ablate(self, gates: Tensor) -> Tensor:
        """Return the loss, mean over the labels of the scoring batch, for each setting of all gates.

        Args:
            gates: [K, R]: the gates of all sites, one site after the other. Those of closed ranks do not matter.

        Returns:
            [K], float64.
        """
        rows = self._masked(gates)
        with torch.no_grad(), self._scoring():
            return torch.stack([self._sums(index, rows) for index in range(len(self._parts))]).sum(0) / self.labels

    def gate_gradients(self, gates: Tensor) -> tuple[Tensor, int]:
        """Return what each sample contributes to the gradient of the loss with respect to the gates.

        Args:
            gates: [R], where the gradient is taken.

        Returns:
            The contributions, [n, R] (their sum over samples is the gradient), and the number of labels in the batch.
        """
        row = self._masked(gates)
        same = [which for which in (0, 1) if torch.equal(row, self._references[which])]
        contributions = []
        with torch.enable_grad(), self._scoring(), frozen(self._model):
            for index, part in enumerate(self._parts):
                watching = same and self._blocks and not self._memory_is_short
                # Gradient checkpointing is off in evaluation mode: a pass keeps all activations of its samples.
                pieces = map(part.sample, range(part.samples)) if self._memory_is_short else [part]
                for piece in pieces:
                    own = row.repeat(piece.samples, 1).requires_grad_()
                    with self._watched(index, same[0]) if watching else nullcontext():
                        loss = self._losses(piece, own).sum() / self.labels
                    contributions.append(torch.autograd.grad(loss, own)[0])
                self.block_samples += 2 * part.samples * self._depth
        return torch.cat(contributions), self.labels

    def check_loss(self, batch: Mapping[str, Any]) -> None:
        """Check that the losses per sample agree with the model's own loss.

        Args:
            batch: The first part of the scoring batch.

        Raises:
            UserError: The model's own loss is missing, is not finite, or differs from the one computed per sample.
        """
        part = self._parts[0]
        with torch.no_grad(), self._scoring():
            sums = self._losses(part, self._references[:1].expand(part.samples, -1))
            mine = float(sums.sum()) / max(1, self._loss.count(part.labels))
            found = loss_of(self._model(**batch))
        check_loss(found)
        own = float(found)
        if not abs(own - mine) <= 1e-3 + 0.02 * abs(mine):
            raise UserError(
                f"{type(self._loss.model).__name__} computes the loss {own:.4g} where that of a "
                f'"{self._loss.kind(part.labels)}" is {mine:.4g}: scoring by ablation needs the loss of each sample, '
                "and knows those of language models, classifiers, regression and answers in a text"
            )

    def check_walk(self) -> bool:
        """Whether passes that start in the middle give the losses of whole passes, tested on the first part.

        This detects what `prefix_reuse` cannot see between blocks, such as keys that later blocks share.
        """
        part, rows = self._parts[0], self._exchanged()
        with torch.no_grad(), self._scoring():
            dtype = prepared_dtype(self._model) or _compute_dtype(self._loss.model, self._open.device.type)
            whole = torch.stack([self._losses(part, row.expand(part.samples, -1)).sum() for row in rows])
            try:
                walked = self._sums(0, rows).to(whole)
            except Exception:  # skipped blocks have not done something that the model needs
                walked = torch.full_like(whole, torch.nan)
        close = torch.finfo(dtype).eps ** 0.5 * (whole.abs() + self._loss.count(part.labels))
        return bool(((walked - whole).abs() <= close).all())

    def _exchanged(self) -> Tensor:
        """Each reference with the other's gates at one site: the last with open ranks, or one halfway."""
        used = [index for index, part in enumerate(self._open.split(self._ranks)) if part.any()]
        owner = torch.arange(len(self._ranks)).repeat_interleave(torch.tensor(self._ranks)).to(self._open.device)
        trained, nothing = self._references
        without, alone = owner == used[-1], owner == used[len(used) // 2]
        return torch.stack([torch.where(without, nothing, trained), torch.where(alone, trained, nothing)])

    @property
    def _memory_is_short(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules())

    def _masked(self, gates: Tensor) -> Tensor:
        """Gates, 0 for closed ranks so that they do not count as different."""
        return torch.where(self._open, gates.to(self._open.device), 0.0)

    def _part(self, batch: Mapping[str, Any]) -> _Part:
        inputs, labels = self._loss.split(batch)
        _check_rows(inputs)
        choices = _choices(inputs)
        lengths = [value.shape[1] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1]
        length = max(lengths) if choices == 1 else choices * inputs["input_ids"].shape[2]
        return _Part(inputs, labels, len(labels), len(labels) * length, self._loss.logits(labels), choices)

    def _reference(self, index: int, which: int) -> States | None:
        """The hidden states of a reference on a part, kept or computed; None where the model cannot be walked."""
        if (index, which) in self._kept:
            return self._kept[index, which]
        part = self._parts[index]
        with self._watched(index, which) as found:
            self._losses(part, self._references[which].expand(part.samples, -1))
        self.block_samples += part.samples * self._depth
        return found[0]

    @contextmanager
    def _watched(self, index: int, which: int) -> Iterator[list[States | None]]:
        """Note the hidden states of the pass inside, and keep them where they are not too large."""
        found: list[States | None] = []
        room = KEPT_BYTES // (2 * len(self._parts))
        watcher = Watcher(self._blocks, self._sites, room // 2)
        with watcher.watching():
            yield found
        states = watcher.states()
        found.append(states)
        if states is None or states.nbytes <= room:
            self._kept[index, which] = states

    def _sums(self, index: int, rows: Tensor) -> Tensor:
        """Losses of a part, the sum over its labels, for each row: [K], float64."""
        part, sums = self._parts[index], torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        references = [self._reference(index, which) for which in (0, 1)] if self._blocks else [None]
        for plan in self._passes(part, rows, references):
            sums.index_add_(0, plan.rows, self._run(part, rows[plan.rows], plan, references[0]).to(sums))
        return sums

    def _passes(self, part: _Part, rows: Tensor, references: Sequence[States | None]) -> Iterator[_Pass]:
        """Cut the rows into forward passes, those together that start at the same place."""
        copies = max(1, min(self._tokens // part.tokens, LOGITS // max(1, part.logits)))
        walked = [states for states in references if states is not None]
        if len(walked) < 2:
            yield from map(_Pass, torch.arange(len(rows), device=rows.device).split(copies))
            return
        order = torch.tensor(walked[0].order)
        starts, nearest = self._starts(rows, order)
        for start, which in sorted(set(zip(starts.tolist(), nearest.tolist(), strict=True))):
            site = int((order == start).nonzero())
            together = ((starts == start) & (nearest == which)).nonzero()[:, 0]
            for chosen in together.tensor_split(-(-len(together) // copies)):
                yield _pass(chosen, site, walked[which])

    def _starts(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """For each row, the position of the first layer in which it differs from its reference, and which reference.

        Its reference is the one with which it agrees for longer. A row that equals a reference starts at the beginning,
        like rows that differ in the first layer: their passes have the same shape, so that rounding is alike.
        """
        position = order.repeat_interleave(torch.tensor(self._ranks)).to(rows.device)
        beyond = len(order)
        first = [
            torch.cat([torch.where(some != reference, position, beyond).amin(1) for some in rows.split(256)])
            for reference in self._references
        ]
        starts, nearest = torch.stack(first).max(0)
        return torch.where(starts == beyond, 0, starts), nearest

    def _run(self, part: _Part, rows: Tensor, plan: _Pass, like: States | None) -> Tensor:
        """Sums of the losses of a part's samples, [G], for G rows."""
        with ExitStack() as stack:
            if plan.hidden is not None and like is not None:
                hidden = plan.hidden.repeat(len(rows), *[1] * (plan.hidden.dim() - 1))
                stack.enter_context(skipped(self._blocks[: plan.start], hidden, like))
            for site, product in plan.products.items():
                output = product.repeat(len(rows), *[1] * (product.dim() - 1))
                stack.enter_context(
                    computing(self._sites[site].layer.base_layer, lambda *_, output=output, **__: output)
                )
            losses = self._losses(part.repeated(len(rows)), rows.repeat_interleave(part.samples, 0))
        self.block_samples += len(losses) * (self._depth - plan.start)
        return losses.view(len(rows), -1).sum(1)

    def _losses(self, part: _Part, gates: Tensor) -> Tensor:
        """Losses of a part's samples, each the sum over its labels, [n]; `gates` is [n, R]."""
        of_sites = gates.split(self._ranks, 1)
        idle = [False] * len(of_sites) if gates.requires_grad else self._idle(of_sites)
        replaced = [
            None if off else own[:, None].repeat_interleave(part.choices, 0).to(site.gate.device)
            for site, own, off in zip(self._sites, of_sites, idle, strict=True)
        ]
        with gates_replaced(self._sites, replaced):
            return self._loss(logits_of(self._model(**part.inputs)), part.labels)

    @staticmethod
    def _idle(of_sites: Sequence[Tensor]) -> list[bool]:
        """Whether all gates of a site are zero, for every site."""
        return (~torch.stack([own.any() for own in of_sites])).tolist()

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Evaluation mode, and no trace."""
        with self._looking(), evaluating(self._model):
            yield


def _pass(rows: Tensor, site: int, reference: States) -> _Pass:
    """A pass for rows whose gates first differ from the reference's at this site."""
    start = reference.block(site)
    products = {other: reference.products[other] for other in reference.unchanged(site)} if reference.products else {}
    return _Pass(rows, start, reference.hidden[start - 1] if start else None, products)


def _choices(inputs: Mapping[str, Any]) -> int:
    """Rows that a model makes of one sample: inputs of multiple choice are [n, choices, length]."""
    ids = inputs.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 3 else 1


def _check_rows(inputs: Mapping[str, Any]) -> None:
    """Refuse batches with several examples in one row."""
    positions = inputs.get("position_ids")
    restart = isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions.diff(dim=1) < 0).any())
    if any(key.startswith("cu_seq_len") for key in inputs) or (restart and "attention_mask" not in inputs):
        raise UserError(
            "the validation batches are packed, several examples in a row, which cannot be scored apart; give batches "
            "of one example a row (in TRL's SFTConfig: padding_free=False, packing=False)"
        )


def _compute_dtype(model: Any, device: str) -> torch.dtype:
    """The dtype in which a model computes."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
