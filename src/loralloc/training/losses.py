"""The losses of single samples, as transformers' models compute them for a whole batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.outputs import has_choices

Kind = Literal["next token", "token", "shifted token", "class", "regression", "several classes", "span"]
"""What is predicted; a shifted token is that of an encoder-decoder, whose decoder gets the labels shifted by one."""

TOKENS = ("next token", "token", "shifted token")

_KINDS: Mapping[str | None, Kind] = {
    "ForCausalLM": "next token",
    None: "next token",  # transformers' own fallback, GPT-2's for one
    "ForMaskedLM": "token",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
}

POSITIONS = ("start_positions", "end_positions")
"""The labels of an extractive question-answering model: the first and the last token of the answer."""

_CLASSES: Mapping[str | None, Kind] = {
    "regression": "regression",
    "single_label_classification": "class",
    "multi_label_classification": "several classes",
}


@dataclass(frozen=True)
class SampleLoss:
    """The loss of each sample, the sum over its labels, in fp32 or wider.

    Attributes:
        model: The transformers model.
        positions: Whether its head can be told which positions to compute (`logits_to_keep`).
    """

    model: Any
    positions: bool

    @classmethod
    def of(cls, model: nn.Module) -> SampleLoss:
        """Find out how a model computes its loss."""
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return cls(inner, "logits_to_keep" in inspect.signature(inner.forward).parameters)

    def kind(self, labels: Tensor) -> Kind:
        """Return what is predicted for labels of this type and shape.

        Raises:
            UserError: The model's loss is not known.
        """
        name = getattr(self.model, "loss_type", None)
        config = getattr(self.model, "config", None)
        if has_choices(self.model):
            return "class"
        if name == "ForSequenceClassification":
            count, known = config.num_labels, config.problem_type  # type: ignore[union-attr]
            found = "class" if labels.dtype in (torch.long, torch.int) else "several classes"
            return _CLASSES[known] if known is not None else "regression" if count == 1 else found
        if getattr(config, "is_encoder_decoder", False) and name in ("ForConditionalGeneration", None):
            return "shifted token"
        if name not in _KINDS or labels.dim() != 2:
            raise UserError(
                f"the loss of {type(self.model).__name__} cannot be taken sample by sample (its kind is {name}, its "
                f"labels have {labels.dim()} dimensions): scoring by ablation knows language models, token and "
                "sequence classifiers, regression, and answers in a text"
            )
        return _KINDS[name]

    def split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Return (inputs of the model, labels in the form that `__call__` takes).

        Raises:
            UserError: The batch has no labels.
        """
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        if all(isinstance(inputs.get(name), Tensor) for name in POSITIONS):
            labels = _ends([inputs.pop(name) for name in POSITIONS], inputs)
        if not isinstance(labels, Tensor):
            raise UserError(f"a validation batch must hold labels as a tensor; it has {', '.join(inputs) or 'nothing'}")
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs["use_cache"] = False
        if self.kind(labels) == "shifted token" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        if self.kind(labels) == "next token":
            labels = labels[:, 1:]
            where = (labels != IGNORED).any(0).nonzero()[:, 0]
            if self.positions and len(where):
                inputs["logits_to_keep"], labels = where, labels[:, where]
        return inputs, labels

    def count(self, labels: Tensor) -> int:
        """Number of labels that the mean is over."""
        in_text = self.kind(labels) in (*TOKENS, "span")
        return int((labels != IGNORED).sum()) if in_text else labels.numel()

    def logits(self, labels: Tensor) -> int:
        """About how many logits a batch with these labels has."""
        if self.kind(labels) not in TOKENS:
            return labels.numel()
        tagged = getattr(self.model, "loss_type", None) == "ForTokenClassification"
        return labels.numel() * int(getattr(self.model.config, "num_labels" if tagged else "vocab_size", 1))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return [n], the sum over each sample's labels."""
        kind = self.kind(labels)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.device)
        if kind in ("regression", "several classes"):
            logits, target = logits.reshape(len(labels), -1), labels.reshape(len(labels), -1).to(logits.dtype)
            loss = functional.mse_loss if kind == "regression" else functional.binary_cross_entropy_with_logits
            return loss(logits, target, reduction="none").sum(1)
        if kind == "class":
            return functional.cross_entropy(logits, labels.view(-1), reduction="none")
        if kind == "span":
            return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").sum(1)
        if kind == "next token":
            logits = logits[:, : labels.shape[1]]  # without `logits_to_keep`, the last position predicts nothing
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(labels.shape).sum(1)


def _ends(positions: Sequence[Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """The first and the last token of each answer, [n, 2], as transformers' loss takes them.

    Positions behind the last token are ignored; negative ones mean the first token.
    """
    length = max(value.shape[1] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 1)
    ends = torch.stack([position.reshape(len(position)) for position in positions], dim=1).clamp(min=0)
    return torch.where(ends < length, ends, IGNORED)


def next_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels after the first, [n, length - 1], in fp32 or wider; 0 where a label is ignored.

    Args:
        logits: [n, length, vocabulary].
        labels: [n, length].
    """
    targets = labels[:, 1:]
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen * (targets != IGNORED)
