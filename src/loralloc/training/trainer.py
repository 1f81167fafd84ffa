"""What `loralloc train` adds to a Trainer: checkpoints that hold no pickle and are whole or not there, and a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.sharding import is_sharded
from loralloc.tasks.base import Evaluated
from loralloc.tasks.generation import Generation
from loralloc.training import checkpoint as saved
from loralloc.training import processes
from loralloc.training.bad_steps import StepChecks, can_skip, forget
from loralloc.training.engines import keep_adapter_whole, shard_now
from loralloc.training.log_file import LogFile
from loralloc.training.manifest import Manifest, begin_writing, damage, read_manifest, write_manifest
from loralloc.training.meter import Meter
from loralloc.training.shared_gradients import SharedGradients
from loralloc.training.signals import StopOnSignal, spare_workers
from loralloc.training.step_data import random_state_kept
from loralloc.unpickling import nothing_unpickled

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class RunTrainer(Base):
    """What a run adds to any Trainer: checkpoints that are safetensors and JSON, and whole or not there; a log.

    A mixin: list it before the Trainer among the bases of a class.

    Attributes:
        begun: When training began, on `time.perf_counter`'s clock; earlier by the time before a run was resumed.
        guard: Skips bad steps, and counts them; None if an allocation does so.
        evaluated: Predictions, targets and examples of the last evaluation; None before the first.
        over: Whether a resumed run has nothing left to train, because its checkpoint is the last one.
        written: The answers that the last evaluation generated, with their metrics; None if evaluations generate none.
        depends_on: Says what a run that resumes from a checkpoint must have in common with it.
        meter: Counts what is trained on; rows of the log with a loss say how fast, and how much memory it takes.
        processor_seconds: What the training has cost, see `meter.processor_time`; known once it has ended.
    """

    begun: float = 0.0
    processor_seconds: float = 0.0
    evaluated: Evaluated | None = None
    _examples: Any = None
    written: Generation | None = None
    over: bool = False
    depends_on: Callable[[], Mapping[str, Any]] = dict
    counts: Literal["tokens", "examples"] = "examples"

    def __init__(
        self,
        *args: Any,
        log: Path,
        guard: SkipBadSteps | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        compute_metrics: Callable[[Evaluated], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.guard, self._metrics_of = guard, compute_metrics
        self.meter = Meter(self.counts)
        first = [] if guard is None else [guard]
        # The last callbacks: when a checkpoint is declared whole, all others have written, and then the run may end.
        last = [LogFile(log), _Completion(self), StopOnSignal()]
        super().__init__(*args, callbacks=[*first, *callbacks, *last], **kwargs)
        self.remove_callback(PrinterCallback)
        keep_adapter_whole(self)
        if guard is not None:  # an allocation has its own
            SharedGradients(cast(torch.nn.Module, self.model))
        if compute_metrics is not None:
            self.compute_metrics = self._judge

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the card of a run tells of the adapter that is exported."""

    @property
    def train_seconds(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self.begun

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a trace: the next training finds the model as if it had not been evaluated."""
        self._examples = self.eval_dataset if eval_dataset is None else eval_dataset
        shard_now(self)
        with random_state_kept(), self._left_as_it_is(), self._trackers_wait(), self.meter.paused():
            return super().evaluate(eval_dataset, *args, **kwargs)  # a data loader draws a seed

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with workers that a signal does not end before the run is saved."""
        return spare_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """The Trainer's, likewise; `dataloader_drop_last` is for training, and every example is evaluated."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return spare_workers(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drops

    def without_answers(self) -> AbstractContextManager[None]:
        """A context in which evaluations generate no answers; those of this class never do."""
        return nullcontext()

    def window(self) -> dict[str, Any]:
        """Running figures since the last row of the log, JSON-able, to be saved in checkpoints."""
        return {}

    def restore_window(self, state: Mapping[str, Any]) -> None:
        """Restore what `window` returned."""

    def _run_epoch(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> None:
        """Train for an epoch, unless the run is over: a Trainer notices that only after one more step."""
        if self.over:
            self._load_rng_state(resume_from_checkpoint)
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch, and count it."""
        self.meter.see(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, beside every loss, how fast the training is, how much memory it takes, and what it has cost so far."""
        if "loss" in logs:
            logs |= self.meter.read()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and keep what was predicted."""
        output = super().evaluation_loop(*args, **kwargs)
        if output.predictions is not None and output.label_ids is not None:
            self.evaluated = Evaluated(output.predictions, output.label_ids, self._examples)
        return output

    def _judge(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute metrics from the predictions, and from the examples, which a Trainer does not pass on."""
        assert self._metrics_of is not None
        return self._metrics_of(Evaluated(prediction.predictions, prediction.label_ids, self._examples))

    @contextmanager
    def _trackers_wait(self) -> Iterator[None]:
        """Hide evaluations outside training from trackers, which would open further files for them."""
        handler, trackers = self.callback_handler, tuple(get_reporting_integration_callbacks(self.args.report_to))
        callbacks = handler.callbacks
        if not self.is_in_train:
            handler.callbacks = [callback for callback in callbacks if not isinstance(callback, trackers)]
        try:
            yield
        finally:
            handler.callbacks = callbacks

    @contextmanager
    def _left_as_it_is(self) -> Iterator[None]:
        """Undo what accelerate changes in a model that is evaluated before it is trained.

        It wraps `forward` and marks the model as prepared. Training would then leave out DistributedDataParallel, and
        every process would train an adapter of its own.
        """
        model, prepared = self.model, self.accelerator._models
        assert model is not None
        attributes, models, wrapped = dict(vars(model)), list(prepared), self.model_wrapped
        if is_sharded(model) and not prepared:  # else accelerate would move all of it
            prepared.append(model)
        try:
            yield
        finally:
            attributes["training"] = model.training
            vars(model).clear()
            vars(model).update(attributes)
            prepared[:], self.model_wrapped = models, wrapped

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Keep the examples in order, even if training groups them by length: metrics need them beside predictions."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Make sampling by length depend on the seed and the epoch alone, so that a resumed run draws the same."""
        sampler, seed = super()._get_train_sampler(*args, **kwargs), self.args.data_seed or self.args.seed
        if isinstance(sampler, LengthGroupedSampler):

            def set_epoch(epoch: int) -> None:
                sampler.generator = torch.Generator().manual_seed(seed + epoch)

            sampler.set_epoch = set_epoch  # pyright: ignore[reportAttributeAccessIssue]
        return sampler

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; older ones are removed only once it is whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            begin_writing(saved.checkpoint_of(self.args, self.state))
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        """Bring the best state back.

        Raises:
            UserError: Its checkpoint is damaged, and would be exported as if it were not.
        """
        best = Path(self.state.best_model_checkpoint or "")
        if (reason := damage(best)) is not None:
            last = saved.checkpoint_of(self.args, self.state)
            raise UserError(
                f"the best state is in {best}, which is not whole any more: {reason}. Start over with --replace; the "
                f"last state is a plain adapter in {last}, where the run has saved it"
            )
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert isinstance(self.model, PeftModel)
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(folder), state_dict=state_dict)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with nothing_unpickled("take that checkpoint away, and resume from an earlier one"):
            super()._load_from_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            saved.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)  # type: ignore[arg-type]

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            saved.save_scaler(Path(output_dir), self.accelerator.scaler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            saved.load_scaler(Path(checkpoint), self.accelerator.scaler)

    def _save_rng_state(self, output_dir: str) -> None:
        saved.save_random_state(self._random_state(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved.load_random_state(self._random_state(checkpoint))

    def _random_state(self, folder: str) -> Path:
        return Path(folder) / f"random-{self.args.process_index}.json"


class PlainTrainer(RunTrainer, Trainer):
    """transformers' own."""


class SkipBadSteps(TrainerCallback):
    """The guard of a run without allocation: a step with a gradient that is not finite moves nothing, and is counted.

    Attributes:
        steps: The skipped steps, as far as known.
        checks: The verdicts; known once the Trainer is built.
    """

    FILE = "bad_steps.json"

    checks: StepChecks

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the gradients of the Trainer's model."""
        self.checks = StepChecks(kwargs["model"], self.steps.append)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count of a resumed run."""
        if state.global_step:
            path = saved.checkpoint_of(args, state) / self.FILE
            record = json.loads(path.read_text(encoding="utf-8"))
            self.steps[:] = record["steps"]
            self.checks.bad, self.checks.bad_in_a_row = len(self.steps), record["in_a_row"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are complete and clipped."""
        optimizer = kwargs["optimizer"]
        if can_skip(optimizer, None, args.device):
            self.checks.skip_if_bad(state.global_step, optimizer)
        else:
            self.checks.is_sound(state.global_step, optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the verdict back from the optimizer: it was for this step only."""
        forget(kwargs["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the count beside the checkpoint."""
        self.checks.settle()
        if args.should_save:
            record = {"steps": self.steps, "in_a_row": self.checks.bad_in_a_row}
            folder = saved.checkpoint_of(args, state)
            write_atomically(folder / self.FILE, json.dumps(record) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what is still on its way."""
        self.checks.conclude(state.global_step)


class _Completion(TrainerCallback):
    """Save the running loss of the current logging window, and write the manifest that makes the checkpoint whole."""

    FILE = "window.json"

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = saved.checkpoint_of(args, state)
        trainer = self._trainer
        losses = processes.gather(trainer._tr_loss.item())  # once it is there, every process has written
        if not args.should_save:
            return
        record = {
            "seconds": trainer.train_seconds,
            "processor_seconds": trainer.meter.processor_seconds,
            "losses": losses,
            "total": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "figures": trainer.window(),
        }
        write_atomically(folder / self.FILE, json.dumps(record) + "\n")
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        facts = Manifest(
            step=state.global_step,
            processes=len(losses),
            ended=control.should_training_stop and state.global_step < state.max_steps,
            best=None if best is None else Path(best).name,
            depends_on=trainer.depends_on(),
        )
        write_manifest(folder, facts)
        rotate_checkpoints(str(folder.parent), args.save_total_limit, state.best_model_checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begun = time.perf_counter()
        self._trainer.meter.start()
        self._trainer.meter.processor_seconds = 0.0
        self._trainer.over = False
        if state.global_step == 0:
            return
        folder = saved.checkpoint_of(args, state)
        manifest = read_manifest(folder)
        self._trainer.over = state.global_step >= state.max_steps or manifest.ended
        if manifest.best is not None:  # the state has a full path, and the folder may have been moved
            state.best_model_checkpoint = str(folder.parent / manifest.best)
        record = json.loads((folder / self.FILE).read_text(encoding="utf-8"))
        self._trainer.begun -= record["seconds"]
        self._trainer.meter.processor_seconds = record["processor_seconds"]
        loss = record["losses"][processes.rank()]
        self._trainer._tr_loss += torch.tensor(loss, device=self._trainer._tr_loss.device)
        self._trainer._total_loss_scalar = record["total"]
        self._trainer._globalstep_last_logged = record["logged"]
        self._trainer.restore_window(record["figures"])
        self._trainer._initial_global_step = 0  # the total loss is of the whole run, so is its number of steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.processor_seconds = self._trainer.meter.processor_seconds


class Agreement(TrainerCallback):
    """Compare the processes' weights in a run without an allocation, which does so itself."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, on all processes, where they train apart."""
        processes.check_agreement(kwargs["model"], state.global_step, state.max_steps)
