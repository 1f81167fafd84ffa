"""Early stopping whose count a resumed run continues, and which only counts evaluations during training."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

COUNT = "early_stopping_patience_counter"


class EarlyStopping(EarlyStoppingCallback):
    """End the training after so many evaluations in a row of which none is better than the best before."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count of a resumed run."""
        if state.global_step:
            record: Any = state.stateful_callbacks
            self.early_stopping_patience_counter = record[type(self).__name__]["attributes"][COUNT]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Count an evaluation within the training; those around it have another prefix."""
        if any(name.startswith("eval_") for name in metrics or ()):
            super().on_evaluate(args, state, control, metrics, **kwargs)
