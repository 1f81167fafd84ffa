"""PEFT's verbs in the middle of a run: what lasts a moment passes, and what is left behind is refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import labelled_batch, logits, lora_config, lora_layers, tiny_bert, tiny_peft
from peft import EvaConfig, PeftModel, get_peft_model_state_dict, initialize_lora_eva_weights
from peft.helpers import rescale_adapter_scale
from safetensors.torch import save_file
from torch import Tensor

from loralloc import AdaLoRA, Budget, Uniform, UserError, attach
from loralloc.training.gated_files import FILE
from loralloc.training.run import AllocationRun

TWO_RANKS = AdaLoRA(Budget(average_rank=2))


class Training:
    """A run on BERT, whose head goes on learning whatever becomes of the adapter, after some steps."""

    def __init__(self, steps: int = 3) -> None:
        torch.manual_seed(0)
        self.model: Any = tiny_peft("bert").train()
        self.run: AllocationRun = attach(self.model, TWO_RANKS, total_steps=12)
        self.model.add_adapter("other", lora_config("bert"))
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=0.05)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model(**labelled_batch("bert", self.run.step)).loss.backward()
        self.run.before_step(self.optimizer)
        self.optimizer.step()
        self.run.after_step(self.optimizer)
        self.optimizer.zero_grad()

    def layers(self) -> list[Any]:
        return list(lora_layers(self.model).values())


def of_every_layer(verb: str, *arguments: Any) -> Callable[[Training], None]:
    def apply(training: Training) -> None:
        for layer in training.layers():
            getattr(layer, verb)(*arguments)

    return apply


def other(training: Training) -> None:
    training.model.set_adapter("other")


def merged(training: Training) -> None:
    training.model.merge_adapter()


LEFT_BEHIND: dict[Callable[[Training], None], tuple[str, str, Callable[[Any], None]]] = {
    merged: ("merged into the base weights", "unmerge_adapter()", lambda model: model.unmerge_adapter()),
    other: ("not active (active: other)", 'set_adapter("default")', lambda model: model.set_adapter("default")),
}


@pytest.mark.parametrize("verb", LEFT_BEHIND)
def test_a_step_that_does_not_train_the_adapter_is_refused(verb: Callable[[Training], None]) -> None:
    """It went on: the head learned, and the method judged ranks that stood still."""
    training = Training()
    words, said, cure = LEFT_BEHIND[verb]
    verb(training)
    text = (
        f'the adapter "default" of the rank allocation is {words}, so this step does not train it; call model.{said} '
        "before the forward pass"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        training.step()
    cure(training.model)
    training.optimizer.zero_grad()
    while training.run.step < 12:
        training.step()
    assert training.run.finish().total_rank == 2 * len(training.layers())


def test_an_adapter_that_is_disabled_is_refused() -> None:
    training = Training()
    training.model(**labelled_batch("bert")).loss.backward()
    training.model.base_model.disable_adapter_layers()
    with pytest.raises(UserError, match=r'"default" .* is disabled, .*; call model\.enable_adapter_layers\(\) before'):
        training.run.before_step(training.optimizer)
    training.model.enable_adapter_layers()
    training.run.before_step(training.optimizer)


SCALED: dict[str, Callable[[Training], None]] = {
    "set_scale": of_every_layer("set_scale", "default", 0.5),
    "scale_layer": of_every_layer("scale_layer", 0.5),
    "unscale_layer": of_every_layer("unscale_layer", 2),
}


@pytest.mark.parametrize("verb", SCALED)
def test_another_scale_is_refused(verb: str, tmp_path: Path) -> None:
    """The model computed as before, and what it wrote was twice as large."""
    training = Training()
    scaling = training.layers()[0].scaling["default"]
    SCALED[verb](training)
    text = (
        f"the scale of the adapter is {scaling / 2:g}, and was {scaling:g} when the rank allocation was attached: a "
        f'run has one scale; set that of its layers back, layer.scaling["default"] = {scaling!r}, or leave '
        "rescale_adapter_scale, and change it after finish()"
    )
    actions: list[Callable[[], Any]] = [
        training.step,
        lambda: training.run.before_step(training.optimizer),
        lambda: training.model.save_pretrained(str(tmp_path)),
        training.run.finish,
    ]
    for action in actions:
        with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
            action()
    assert not list(tmp_path.iterdir())
    for layer in training.layers():
        layer.scaling["default"] = scaling
    training.step()
    training.run.finish()


def test_a_scale_for_a_while_is_refused_for_that_while() -> None:
    """It had no effect, and evaluations in it were those of the adapter as it is."""
    training = Training()
    before = logits(training.model)
    words = r"^the scale of the adapter is .*, or leave rescale_adapter_scale,"
    with pytest.raises(UserError, match=words), rescale_adapter_scale(training.model, 0.5):
        logits(training.model)
    assert torch.equal(logits(training.model), before)
    training.step()
    training.run.finish()
    with rescale_adapter_scale(training.model, 0.5):
        assert not torch.equal(logits(training.model), before)


def test_an_adapter_that_was_deleted_is_missed_in_words(tmp_path: Path) -> None:
    training = Training()
    training.model.save_pretrained(str(tmp_path / "before"))
    training.model.set_adapter("other")
    training.model.delete_adapter("default")
    words = 'the adapter "default" has been deleted, and the gates of the rank allocation with it; add an adapter and'
    for action in (training.step, training.run.finish):
        with pytest.raises(UserError, match=f"^{re.escape(words)}"):
            action()


def test_what_is_left_of_a_model_is_pefts_own_once_the_adapter_is_deleted(tmp_path: Path) -> None:
    """Its own `save_pretrained` ended with a KeyError."""
    training = Training()
    plain = tiny_peft("bert", trained=True)
    plain.save_pretrained(str(tmp_path / "plain"))
    training.model.set_adapter("other")
    training.model.delete_adapter("default")
    training.model.save_pretrained(str(tmp_path))
    assert not list(tmp_path.rglob(FILE))
    training.model.load_adapter(str(tmp_path / "plain"), "default")
    training.model.set_adapter("default")
    assert torch.allclose(logits(training.model), logits(plain), atol=1e-6)


def switched(training: Training) -> None:
    training.model.set_adapter("other")
    logits(training.model)
    training.model.set_adapter("default")


def merged_and_back(training: Training) -> None:
    training.model.merge_adapter()
    training.model.unmerge_adapter()


def without(training: Training) -> None:
    with training.model.disable_adapter():
        logits(training.model)


@pytest.mark.parametrize("verb", [switched, merged_and_back, without])
def test_what_lasts_a_moment_passes(verb: Callable[[Training], None]) -> None:
    training = Training()
    before = logits(training.model)
    verb(training)
    assert torch.allclose(logits(training.model), before, atol=1e-6)
    training.step()
    training.run.finish()


# ---- get_peft_model_state_dict ----


def stock(folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(tiny_bert(), str(folder)))


def test_a_dictionary_of_the_factors_warns_that_it_is_no_adapter(tmp_path: Path) -> None:
    training = Training()
    before, function = dict(training.model.state_dict()), logits(training.model)  # no warning here
    words = "get_peft_model_state_dict returns the factors without the gates of the attached rank allocation"
    with pytest.warns(UserWarning, match=words) as told:
        tensors = get_peft_model_state_dict(training.model)
    assert told[0].filename == __file__
    training.model.peft_config["default"].save_pretrained(str(tmp_path / "by hand"))
    save_file(tensors, tmp_path / "by hand" / "adapter_model.safetensors")
    assert not torch.allclose(stock(tmp_path / "by hand"), function, atol=1e-3), "this is what the warning is for"
    training.model.save_pretrained(str(tmp_path / "as told"))  # the cure, and no warning
    assert torch.allclose(stock(tmp_path / "as told"), function, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.model.state_dict().items())
    training.run.finish()
    assert not any("gate" in name for name in get_peft_model_state_dict(training.model))


# ---- EVA ----


def eva() -> PeftModel:
    config = EvaConfig(rho=2.0)
    return tiny_peft("llama", init_lora_weights="eva", eva_config=config, target_modules="all-linear")


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_eva_after_attaching_is_refused_where_it_changes_ranks() -> None:
    """As with TRL's peft_config, under which the callback attaches as soon as there is an adapter: a TypeError."""
    batches = [{key: value for key, value in labelled_batch("llama", i).items() if key != "labels"} for i in range(4)]
    model = eva()
    attach(model, Uniform(Budget(average_rank=2)), total_steps=4)
    words = 'PEFT makes the adapter "default" anew under the gates of the attached rank allocation; load the model anew'
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    model = eva()  # as the message says
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    ranks = {layer.r["default"] for layer in lora_layers(model).values()}
    assert len(ranks) > 1
    assert attach(model, Uniform(Budget(average_rank=2)), total_steps=4).finish().total_rank == 2 * len(
        lora_layers(model)
    )
