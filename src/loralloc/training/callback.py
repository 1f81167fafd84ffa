"""Rank allocation in a transformers Trainer, as one callback. Also works with TRL's trainers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from loralloc import trace
from loralloc.errors import UserError
from loralloc.files import sha256_of, write_atomically
from loralloc.methods.base import Method
from loralloc.naming import sorted_names
from loralloc.peft_layers import peft_model, unwrapped
from loralloc.plan import RankPlan
from loralloc.training.checkpoint import checkpoint_of
from loralloc.training.engines import keep_adapter_whole, refuse_engines
from loralloc.training.history import LOG, TRACE, free_folder, write_run
from loralloc.training.log_file import LogFile
from loralloc.training.manifest import MANIFEST, read_manifest, sealed, unsealed, write_manifest
from loralloc.training.rewriting import complete_rewriting, rewritten
from loralloc.training.run import AllocationRun
from loralloc.training.step_data import random_state_kept
from loralloc.training.trainer_batches import validation_batches

TENSORS, MARKER = "loralloc.safetensors", "loralloc.json"
"""Files beside each checkpoint: the allocation's state. The marker says whether the run had finished."""

LISTED = (".safetensors", ".pt", "rng_state.pth")
"""Endings of the files whose checksums the marker has: what one process writes. Several write their own generators."""
UNUSABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""What reading a checkpoint's state raises where it is not there, or damaged."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_Sender = TypeVar("_Sender")

HEADING = "## Rank allocation"
UNFINISHED = """\
Written after step {step} of {steps} by loralloc. `adapter_model.safetensors` is plain LoRA: the adapter as it would be
if the run ended here, its ranks not final. To go on, resume the run: the factors and gates that are trained are in
`gated_factors.safetensors`, the allocation's state is in `loralloc.safetensors` and `loralloc.json`.
"""
FINISHED = """\
The end of a run, written by loralloc: `adapter_model.safetensors` is plain LoRA at its final ranks, which are in
`ranks.json`. The other files are the training state before that.
"""


class RankAllocation(TrainerCallback):
    """Allocate LoRA ranks while a Trainer trains.

        allocation = RankAllocation(AdaLoRA(Budget(average_rank=8)))
        Trainer(model=model, args=args, train_dataset=data, callbacks=[allocation]).train()
        allocation.plan.ranks

    The model must be a `PeftModel` with a fresh LoRA adapter (or, for TRL, a `peft_config` that makes one). After
    `train()` it is plain LoRA. Each checkpoint carries the allocation's state; resuming restores it.

    Args:
        method: For example `AdaLoRA(Budget(average_rank=8))`. If it uses validation data, its `validation` has examples
            in the form of the training set (tokenized); the Trainer's collator makes batches of them.
        trace: File of allocation events, one JSON object a line, written anew unless the run is resumed; None for none.
        provenance: What to record in the plan beyond versions, settings and steps.
        compact: Take closed ranks out of the tensors once the ranks are final (see `attach`). One process only.
        folder: Folder to keep the run in, as `loralloc train` would: `trace.jsonl` and `log.jsonl` while it trains,
            `ranks.json`, `metrics.json` and `report.html` at the end of `train()`; None for none. `loralloc report
            FOLDER` writes the page again, during the run too.

    Raises:
        UserError: From the Trainer's constructor or from `train()`, before the first step: the model, the budget, the
            schedule or an argument of the Trainer does not allow the allocation. The message says what to change.
    """

    def __init__(
        self,
        method: Method,
        trace: str | Path | None = None,
        provenance: dict[str, Any] | None = None,
        *,
        compact: bool = False,
        folder: str | Path | None = None,
    ) -> None:
        if trace is not None and folder is not None:
            raise UserError("give RankAllocation a trace or a folder, not both: the folder holds the trace")
        self.method = method
        self.plan: RankPlan | None = None
        self._folder = None if folder is None else free_folder(folder)
        self._log = None if self._folder is None else LogFile(self._folder / LOG)
        self._trace = None if trace is None else Path(trace)
        if self._folder is not None:
            self._trace = self._folder / TRACE
        self._provenance = provenance
        self._compact = compact
        self._run: AllocationRun | None = None
        self._writes = False  # one process does, or one on each node with save_on_each_node

    @property
    def run(self) -> AllocationRun:
        """The attached run.

        Raises:
            UserError: No Trainer has attached it.
        """
        if self._run is None:
            raise UserError(
                "the allocation is not attached: pass it to the Trainer's constructor, callbacks=[allocation]"
            )
        return self._run

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach the gates: the optimizer, built later, must see them."""
        if self._run is not None:
            raise UserError("this RankAllocation belongs to a Trainer already; make a new one for each Trainer")
        _go_before_reports(self)
        self._writes = args.should_save
        if self._writes:  # before the Trainer looks for the checkpoint to go on from
            complete_rewriting(Path(args.output_dir or "."))
        self._run = AllocationRun(kwargs["model"], self.method, compact=self._compact)
        if self._trace is not None:
            self._run.on_event = self._append_event
        if (trainer := _sender(Trainer)) is not None:
            keep_adapter_whole(trainer)
            trainer.evaluate = self._without_a_trace(trainer.evaluate)
            trainer.predict = self._without_a_trace(trainer.predict)
            trainer.train = self._from_usable(trainer.train, Path(args.output_dir or "."))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fix the schedule, refuse what would go wrong, and restore a resumed run."""
        if self.plan is not None:
            raise UserError("this allocation has finished; to train on, use the plain LoRA model without it")
        run = self.run
        refuse_engines(args)
        if unwrapped(kwargs["model"]) is not run.model:
            raise UserError(
                "the Trainer trains another model than the one the allocation was attached to (model_init makes a new "
                "one for each run); pass model= instead"
            )
        if state.global_step == 0 and run.step > 0:
            if args.auto_find_batch_size:
                raise UserError(
                    f"memory ran out after {run.step} steps, and auto_find_batch_size begins anew with batches of "
                    f"{state.train_batch_size}, but ranks have been allocated by then; start over with a new model, "
                    f"callback and Trainer, with per_device_train_batch_size={state.train_batch_size} and "
                    "auto_find_batch_size=False"
                )
            raise UserError(
                f"this allocation stopped after {run.step} steps of an earlier train(); go on with "
                "resume_from_checkpoint=True, or start over with a new model, callback and Trainer"
            )
        run.begin(state.max_steps)
        run.max_grad_norm = args.max_grad_norm or None
        run.check_optimizer(kwargs["optimizer"])
        if run.data is not None:
            data = self.method.examples
            run.data.validation = validation_batches(data, kwargs["train_dataloader"], args, kwargs["model"])
        _refuse_ignored_accumulation(args, kwargs["model"])
        _refuse_early_best_model(args, state, run.schedule.steps_until_final)
        if state.global_step > 0:
            self._resume(checkpoint_of(args, state), state.global_step, kwargs["optimizer"])
        elif self._trace is not None and self._writes:
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            self._trace.write_text("", encoding="utf-8")
        if self._log is not None:
            self._log.on_train_begin(args, state, control)
        self._save_with(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped, weights still old."""
        self.run.before_step(kwargs["optimizer"], wait=False)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights are new, gradients still there."""
        self.run.after_step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End a settled run."""
        if self.run.settled:
            control.should_training_stop = True

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add rank statistics to the training logs."""
        if logs is not None and "loss" in logs and self.plan is None:
            statistics = self.run.statistics()
            logs.update(statistics)
            state.log_history[-1].update(statistics)  # the Trainer has appended a copy already
        if self._log is not None:
            self._log.on_log(args, state, control, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fold the gates: the model is plain LoRA from here on, and so is a checkpoint of the last step."""
        self.plan = self.run.finish(self._provenance)
        folder = checkpoint_of(args, state)
        best = Path(state.best_model_checkpoint or folder)
        another = args.load_best_model_at_end and best.name != folder.name  # the model holds that one's weights
        if self._writes and (folder / MARKER).is_file() and not another:
            with rewritten(folder) as copy:
                self._write_end(copy, kwargs["model"])
        if self._folder is not None and self._writes:
            write_run(self._folder, self.run, state.log_history)

    def _without_a_trace(self, evaluate: Callable[_P, _T]) -> Callable[_P, _T]:
        """Have an evaluation put the random state back, from which its data loader draws a seed, until the run is over.

        Dropout, and so the plan, must not depend on how often the model is evaluated, nor on who asks for it.
        """

        @functools.wraps(evaluate)
        def quiet(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if self.plan is not None:
                return evaluate(*args, **kwargs)
            with random_state_kept():
                return evaluate(*args, **kwargs)

        return quiet

    def _from_usable(self, train: Callable[..., _T], output: Path) -> Callable[..., _T]:
        """Have a training look first at the checkpoint to resume from: a Trainer fails at what was cut off."""

        @functools.wraps(train)
        def checked(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> _T:
            newest = resume_from_checkpoint is True
            folder = get_last_checkpoint(str(output)) if newest and output.is_dir() else resume_from_checkpoint
            if folder and folder is not True and self.plan is None:
                try:
                    _check_usable(Path(folder))
                except UNUSABLE as error:
                    raise _unusable(Path(folder), error) from error
            return train(resume_from_checkpoint, *args, **kwargs)

        return checked

    def _save_with(self, state: TrainerState) -> None:
        """Have the allocation's state written into each checkpoint right after the Trainer's own, which comes last.

        A Trainer then removes older checkpoints, and calls `on_save` only after that: with `save_total_limit=1` there
        would be nothing to go on from until that is over.
        """
        save_trainer = state.save_to_json

        def save_both(json_path: str) -> None:
            save_trainer(json_path)
            folder = Path(json_path).parent
            if self.plan is None and folder.name == f"checkpoint-{state.global_step}":
                self._write_state(folder, state)

        state.save_to_json = save_both  # pyright: ignore[reportAttributeAccessIssue]

    def _write_state(self, folder: Path, state: TrainerState) -> None:
        """Put the allocation's state into a checkpoint, the marker last."""
        _describe(folder, UNFINISHED.format(step=state.global_step, steps=state.max_steps))
        tensors, numbers = self.run.state_dict()
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)
        _mark(folder, {"finished": False, **numbers})

    def _write_end(self, folder: Path, model: nn.Module) -> None:
        """Rewrite a checkpoint of the last step as the finished run: plain LoRA at its final ranks."""
        assert self.plan is not None
        numbers = unsealed((folder / MARKER).read_bytes())
        peft = peft_model(model)
        with sorted_names(peft.peft_config[self.run.sites[0].adapter]):
            peft.save_pretrained(str(folder))
        self.plan.save(folder / "ranks.json")
        _describe(folder, FINISHED)
        _mark(folder, {**numbers, "finished": True})
        if (folder / MANIFEST).exists():
            write_manifest(folder, read_manifest(folder))

    def _resume(self, folder: Path, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.run.load_state_dict(*_read_state(folder, step), optimizer)
        if self._trace is None or not self._writes:
            return
        if not trace.rewind(self._trace, self.run.step):
            self.run.emit_start()

    def _append_event(self, event: trace.Event) -> None:
        assert self._trace is not None
        if self._writes:
            trace.append(self._trace, event)


def _mark(folder: Path, numbers: dict[str, Any]) -> None:
    """Write the marker, with the checksums of what else is there: a damaged checkpoint is not resumed from."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name.endswith(LISTED)}
    write_atomically(folder / MARKER, sealed({**numbers, "files": files}))


def _read_state(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, numbers) of the allocation from a checkpoint.

    Raises:
        ValueError: A file that the marker lists has changed, or the marker is of another step.
    """
    numbers = unsealed((folder / MARKER).read_bytes())
    for name, checksum in numbers["files"].items():
        if sha256_of(folder / name) != checksum:
            raise ValueError(f"{name} has other content than was written")
    if numbers["step"] != step:
        raise ValueError(f"{MARKER} is of step {numbers['step']}")
    return load_file(folder / TENSORS), numbers


def _check_usable(folder: Path) -> None:
    """Read what the Trainer and the allocation need to know of a checkpoint; raises one of `UNUSABLE`."""
    _read_state(folder, TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step)


def _unusable(folder: Path, error: Exception) -> UserError:
    """The refusal of a checkpoint, with the newest one in its output folder that is usable, if there is one."""
    cure = ""
    for path in map(Path, reversed(sort_checkpoints(str(folder.parent)))):
        with suppress(*UNUSABLE):
            _check_usable(path)
            cure = f"; the newest there is resume_from_checkpoint={str(path)!r}"
            break
    return UserError(
        f"{folder} has no usable rank-allocation state ({type(error).__name__}: {error}); resume from a checkpoint "
        f"that was written with this callback, in the same output_dir{cure}"
    )


def _describe(folder: Path, text: str) -> None:
    """Describe in a checkpoint's README.md what it holds, in place of an earlier description."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, f"{card.partition(HEADING)[0].rstrip()}\n\n{HEADING}\n\n{text}".lstrip())


def _go_before_reports(callback: TrainerCallback) -> None:
    """Move a callback in front of those that report to trackers, so that what it adds to a log reaches them.

    A Trainer puts its own callbacks first.
    """
    handler = _sender(CallbackHandler)
    if handler is None:
        return
    callbacks = handler.callbacks
    flow = next((i for i, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)), -1)
    callbacks.remove(callback)
    callbacks.insert(flow + 1, callback)  # it asks what the flow has decided


def _sender(kind: type[_Sender]) -> _Sender | None:
    """The object of this class that has sent the current event, found on the call stack; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _refuse_ignored_accumulation(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse accumulation, or several processes, where the Trainer trusts a loss that ignores them.

    A model whose forward takes **kwargs is passed `num_items_in_batch` and trusted to divide by it. Many losses do
    not, those of classifiers among them: gradients (and with them scores) would grow with the batches in a step.
    """
    processes = args.world_size if args.average_tokens_across_devices else 1
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if args.gradient_accumulation_steps * processes == 1 or not getattr(inner, "accepts_loss_kwargs", True):
        return
    parameters = inspect.signature(inner.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    if not _counts_items(inner):
        raise UserError(
            f"the loss of {type(inner).__name__} ignores the number of items in a step, so with "
            f"{args.gradient_accumulation_steps} accumulated batches on {args.world_size} processes gradients would be "
            f"{args.gradient_accumulation_steps * processes} times too large; set model.accepts_loss_kwargs = False on "
            "the base model before building the Trainer, which then takes the mean over batches itself"
        )


def _counts_items(model: nn.Module) -> bool:
    """Whether a model's loss divides by `num_items_in_batch`: its forward calls a loss function that takes it."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    loss_type = str(getattr(model, "loss_type", ""))
    loss = LOSS_MAPPING.get(loss_type)
    if code is None or "loss_function" not in code.co_names or loss is None:
        return False
    return "num_items_in_batch" in inspect.signature(loss).parameters or loss_type == "ForTokenClassification"


def _refuse_early_best_model(args: TrainingArguments, state: TrainerState, steps: int) -> None:
    """Refuse settings under which the best checkpoint may be from before the ranks were final."""
    if not args.load_best_model_at_end or steps == 0:  # fixed from the start
        return
    steps_per_unit = 1.0 if args.eval_strategy == "steps" else state.max_steps / max(state.num_train_epochs, 1)
    if steps > state.max_steps:
        raise UserError(
            "load_best_model_at_end would bring back a checkpoint from before the ranks are chosen, which is when the "
            "run ends; set load_best_model_at_end=False"
        )
    if args.eval_delay * steps_per_unit < steps:
        raise UserError(
            f"load_best_model_at_end could bring back a checkpoint from before step {steps}, when the ranks become "
            f"final; set eval_delay={steps} with eval_strategy=save_strategy='steps' (or its equivalent in "
            "epochs), or load_best_model_at_end=False"
        )
