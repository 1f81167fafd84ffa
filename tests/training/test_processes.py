"""What several processes share, seen from one; for two, see test_distributed.py and cli/test_cli_processes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_peft
from torch import nn
from trainers import arguments, language_batch, sentences
from transformers import Trainer

from loralloc import UserError
from loralloc.training import processes
from loralloc.training.checkpoint import check_processes
from loralloc.training.manifest import Manifest, write_manifest
from loralloc.training.trainer import PlainTrainer


def build(kind: type[Trainer], folder: Path, **more: Any) -> Trainer:
    settings = arguments(folder, bf16=True)
    return kind(model=tiny_peft("llama"), args=settings, data_collator=language_batch, **more)


def marks(trainer: Trainer) -> set[str]:
    """What an evaluation leaves on a model."""
    model, rows = trainer.model, sentences(8)
    assert model is not None
    before = set(vars(model))
    trainer.evaluate(rows)  # type: ignore[arg-type]
    return set(vars(model)) - before


class TestEvaluation:
    def test_leaves_no_trace(self, tmp_path: Path) -> None:
        trainer = build(PlainTrainer, tmp_path, log=tmp_path / "log.jsonl")
        forward = trainer.model.forward  # type: ignore[union-attr]
        assert marks(trainer) == set()
        assert trainer.model.forward == forward  # type: ignore[union-attr]
        assert trainer.accelerator._models == []
        assert trainer.model_wrapped is trainer.model

    def test_leaves_a_trace_in_the_librarys_trainer(self, tmp_path: Path) -> None:
        """The positive partner: once this fails, `PlainTrainer.evaluate` is not needed any more."""
        assert {"_is_accelerate_prepared", "forward"} <= marks(build(Trainer, tmp_path))

    def test_is_the_same_twice(self, tmp_path: Path) -> None:
        """bf16 is on each time: accelerate finds the model as it was."""
        trainer = build(PlainTrainer, tmp_path, log=tmp_path / "log.jsonl")
        losses = [trainer.evaluate(sentences(8))["eval_loss"] for _ in range(2)]  # type: ignore[arg-type]
        plain = build(Trainer, tmp_path).evaluate(sentences(8))["eval_loss"]  # type: ignore[arg-type]
        assert losses == [plain, plain]


class TestAlone:
    def test_one_process_waits_for_nobody(self) -> None:
        assert (processes.world_size(), processes.rank(), processes.is_main()) == (1, 0, True)
        assert processes.gather(3.5) == [3.5]
        assert processes.on_main(max, 2, 5) == 5
        processes.refuse_several("loralloc export")

    @pytest.mark.parametrize("block", [processes.together, processes.one_voice])
    def test_an_error_stays_what_it_is(self, block: Any) -> None:
        with pytest.raises(UserError, match="no such file"), block():
            raise UserError("no such file")


class TestAgreement:
    def test_after_the_first_steps_now_and_then_and_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compared = []
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setattr(processes, "_checksum", lambda model: torch.tensor([1]))
        monkeypatch.setattr(processes.dist, "all_gather", lambda found, mine: [t.copy_(mine) for t in found])
        for step in range(1, 331):
            monkeypatch.setattr(processes, "_checksum", lambda model, step=step: compared.append(step) or torch.ones(1))
            processes.check_agreement(nn.Linear(1, 1), step, last=330)
        assert compared == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 330]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_checksum_sees_every_bit_of_what_is_trained(self, dtype: torch.dtype) -> None:
        model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)]).to(dtype)
        model.register_parameter("scalar", nn.Parameter(torch.ones((), dtype=dtype)))
        model[1].requires_grad_(False)
        before = processes._checksum(model)
        assert torch.equal(processes._checksum(model), before)
        with torch.no_grad():
            model[1].weight += 1
        assert torch.equal(processes._checksum(model), before), "frozen weights do not count"
        for parameter in (model[0].weight, model.scalar):
            with torch.no_grad():
                old = parameter.clone()
                parameter.view(-1)[-1:] *= 1 + torch.finfo(dtype).eps
            assert not torch.equal(processes._checksum(model), before)
            parameter.data.copy_(old)
        assert torch.equal(processes._checksum(model), before)


@pytest.mark.parametrize(("written", "here", "launcher"), [(2, 1, "torchrun --nproc-per-node=2 "), (1, 2, "")])
def test_a_run_goes_on_with_as_many_processes(written: int, here: int, launcher: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(step=4, processes=written))
    check_processes(tmp_path, written)
    with pytest.raises(UserError) as refusal:
        check_processes(tmp_path, here)
    no_python = "--no-python " if launcher else ""
    assert str(refusal.value) == (
        f"{tmp_path} was written by a run on {written} processes, and this one is on {here}; resume on as many: "
        f"{launcher}{no_python}loralloc train RECIPE --resume"
    )
