"""log.jsonl: what a Trainer logs, a row a line."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.files import finite, read_jsonl, write_atomically


class LogFile(TrainerCallback):
    """Write every log row of a training to a file; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file, or take back what a resumed run does again."""
        if args.should_save:
            rows = read_jsonl(self._path) if state.global_step else []
            training = takewhile(lambda row: "train_loss" not in row, rows)  # which ends with the row that has it
            kept = [json.dumps(row) + "\n" for row in training if row["step"] <= state.global_step]
            write_atomically(self._path, "".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row."""
        if args.should_save and logs and state.global_step:
            row = finite({"step": state.global_step, **logs})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
