"""transformers' Seq2SeqTrainer behind `loralloc train`: evaluations that count every token, and write answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq, GenerationConfig, PreTrainedTokenizerBase, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from loralloc.methods.validation import IGNORED
from loralloc.tasks.generation import (
    GenerateSection,
    Generation,
    check_metrics,
    decode,
    generation_config,
    score,
)
from loralloc.tasks.seq2seq import read_sources
from loralloc.training.step_data import random_state_kept
from loralloc.training.trainer import RunTrainer


class RunSeq2SeqTrainer(RunTrainer, Seq2SeqTrainer):
    """A Seq2SeqTrainer whose evaluations sum over the tokens of every target, and generate answers to some sources.

    Predictions are sums per example, [n, 3]; see `sums_of_targets`. Answers are generated and scored in a separate pass
    over the first distinct sources: `written` holds them, and their metrics are added to those of the evaluation.

    Args:
        model: The adapted model.
        processing_class: Its tokenizer.
        generate: The recipe's section on answers; None for none.
        kwargs: Further arguments of `RunTrainer`.
    """

    counts = "tokens"

    def __init__(
        self,
        model: Any,
        *,
        processing_class: PreTrainedTokenizerBase,
        generate: GenerateSection | None = None,
        **kwargs: Any,
    ) -> None:
        check_metrics(() if generate is None else generate.metrics)
        self._generate = generate
        self._writing: GenerationConfig | None = None
        collator = DataCollatorForSeq2Seq(processing_class, model=model.get_base_model())
        super().__init__(model, processing_class=processing_class, data_collator=collator, **kwargs)
        arguments: Any = self.args
        arguments.predict_with_generate = generate is not None

    @contextmanager
    def without_answers(self) -> Iterator[None]:
        """Evaluate without generating answers inside."""
        generate, self._generate = self._generate, None
        try:
            yield
        finally:
            self._generate = generate

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generating: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        """Evaluate a batch, or answer it; see the class."""
        if self._writing is not None:
            generating["generation_config"] = self._writing
            loss, answers, _ = super().prediction_step(model, inputs, False, ignore_keys, **generating)
            return loss, answers, None
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        sums = sums_of_targets(logits, inputs["labels"])
        loss = sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, sums, sums[:, 1])

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and let the model answer where the recipe asks for that."""
        # With several processes, Seq2SeqTrainer would keep the repeated examples that fill up the last batch.
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._generate is not None:
            self.written = self._answer(self._generate)
            found = {f"{metric_key_prefix}_{name}": value for name, value in self.written.metrics.items()}
            output = output._replace(metrics={**(output.metrics or {}), **found})
        return output

    def _answer(self, settings: GenerateSection) -> Generation:
        """Answer the first sources; random states are the same before and after."""
        examples: Any = self._examples
        sources = read_sources(examples, settings.samples)
        with random_state_kept(), self._writes(settings):
            loader = self.get_test_dataloader(examples.select([index for index, _ in sources]))
            torch.manual_seed(self.args.seed)
            found = super(RunTrainer, self).evaluation_loop(loader, "Generation", prediction_loss_only=False)
        tokenizer: Any = self.processing_class
        rows = np.where(np.asarray(found.predictions) == IGNORED, tokenizer.pad_token_id, found.predictions)
        prompts, answers = [prompt for _, prompt in sources], [decode(tokenizer, row) for row in rows.tolist()]
        return Generation(prompts, answers, score(answers, prompts, settings.metrics, settings.after))

    @contextmanager
    def _writes(self, settings: GenerateSection) -> Iterator[None]:
        """Let prediction steps generate inside, and restore the model's settings, which a Seq2SeqTrainer changes."""
        model: Any = self.model
        base, tokenizer = model.get_base_model(), self.processing_class
        own = base.generation_config
        try:
            base.generation_config = deepcopy(own)
            self._writing = generation_config(base, tokenizer, settings, 1)  # type: ignore[arg-type]
            yield
        finally:
            base.generation_config, self._writing = own, None


def sums_of_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Add up what a model predicts of the tokens of every target.

    Args:
        logits: [n, length, vocabulary].
        labels: [n, length], -100 where there is no token.

    Returns:
        Loss, tokens and hits (those that were the likeliest) of every example, [n, 3], float64.
    """
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    values = losses.view(labels.shape), labels != IGNORED, logits.argmax(-1) == labels
    return torch.stack([value.double() for value in values], dim=-1).sum(dim=1)
