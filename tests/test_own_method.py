"""A method of another package: found by its entry point, taken in recipes, trained, and held to the contract.

The package is examples/own_method, as it stands there: what pip would write beside it is made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.methods import registry

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "own_method"


def install(folder: Path, entry: str, name: str = "loralloc-sora") -> Path:
    """Write what pip would: a package's name, and its entry point."""
    information = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[loralloc.methods]\n{entry}\n", encoding="utf-8")
    return folder


def declared() -> str:
    """The entry point that the example's pyproject.toml declares."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"][registry.GROUP].items()
    return f"{name} = {value}"


def run(*command: str, installed: Path) -> str:
    """What a command prints in an environment with the example installed."""
    path = os.pathsep.join(map(str, (installed, EXAMPLE, ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


USED = """
import sys
from pathlib import Path

import torch

from loralloc import UserError, attach
from loralloc.recipe.schema import load_recipe
from loralloc.methods.registry import make_method, methods
from loralloc.testing.models import TINY, adapted, labelled_batch

for path in map(Path, sys.argv[1:]):
    try:
        print(make_method(load_recipe(path).method))
    except UserError as error:
        print(error)

model = adapted(TINY["llama"])
run = attach(model, methods()["sora"](penalty=5.7), total_steps=18)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
for step in range(18):
    model(**labelled_batch("llama", step)).loss.backward()
    run.before_step(optimizer)
    optimizer.step()
    run.after_step(optimizer)
    optimizer.zero_grad()
plan = run.finish()
print(plan.method, plan.provenance["settings"], 0 < plan.total_rank < 24)
"""


def test_recipes_and_loops_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = (EXAMPLE / "recipe.yaml").read_text(encoding="utf-8")
    wrong = {"unknown": "penalti: 6.7", "range": "penalty: 0", "missing": "budget: {average_rank: 4}"}
    names = ["recipe.yaml", *(f"{name}.yaml" for name in wrong)]
    for name, method in zip(names, ("penalty: 6.7", *wrong.values()), strict=True):
        Path(name).write_text(recipe.replace("penalty: 6.7", method), encoding="utf-8")
    told = run("-c", USED, *names, installed=install(tmp_path, declared()))
    taken, unknown, instead, below, missing, trained = told.splitlines()
    assert taken == "SoRA(penalty=6.7, budget=None)"
    assert unknown.startswith('unknown.yaml:22: missing "penalty" in "method"')
    assert instead == 'unknown.yaml:24: unknown key "penalti" in "method". Did you mean "penalty"?'
    assert below == "range.yaml:24: method.penalty must be above 0, got 0"
    assert missing.startswith('missing.yaml:22: missing "penalty" in "method": λ, the weight of the gates')
    assert trained == "sora {'penalty': 5.7} True"


class TestRefusals:
    """A package that is installed wrongly is named, with what is wrong."""

    @staticmethod
    def found(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        registry.methods.__wrapped__()  # what is known to the tests stays as it is

    def test_one_that_cannot_be_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, "lost = nowhere_to_be_found:Lost", "lost-ranks")
        expected = (
            r'the method "lost" of lost-ranks \(nowhere_to_be_found:Lost\) cannot be imported: ModuleNotFoundError: '
            "No module named 'nowhere_to_be_found'"
        )
        with pytest.raises(UserError, match=expected):
            self.found(monkeypatch, tmp_path)

    def test_one_that_is_no_method(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, "path = pathlib:Path", "no-method")
        expected = (
            r'the method "path" of no-method \(pathlib:Path\) is no class derived from loralloc.methods.base.Method'
        )
        with pytest.raises(UserError, match=expected):
            self.found(monkeypatch, tmp_path)

    @pytest.mark.parametrize("taken", ["adalora", "lora"])
    def test_one_whose_id_is_taken(self, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path, "mine = loralloc_twice:Twice", "loralloc-twice")
        (tmp_path / "loralloc_twice.py").write_text(
            f"from loralloc import Truncate\n\n\nclass Twice(Truncate):\n    id = {taken!r}\n", encoding="utf-8"
        )
        monkeypatch.delitem(sys.modules, "loralloc_twice", raising=False)
        expected = (
            rf'the method "mine" of loralloc-twice \(loralloc_twice:Twice\): there is a method "{taken}" already; '
            "give this one another id"
        )
        with pytest.raises(UserError, match=expected):
            self.found(monkeypatch, tmp_path)


@pytest.mark.slow
def test_it_keeps_the_contract(tmp_path: Path) -> None:
    installed = install(tmp_path, declared())
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE), installed=installed)
    assert "passed" in told
