"""What is released: the same bytes from the same files, whole, and typed for those who use it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "loralloc"
BUILT = ("src", "tests", "examples", "docs", "drills", "benchmarks")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "runs", "*.pyc", ".*")

USER = """\
from loralloc import AdaLoRA, Budget, RankAllocation, RankPlan, attach, export_adapter

allocation = RankAllocation(AdaLoRA(Budget(average_rank=8)))
plan: RankPlan | None = allocation.plan
reveal_type(Budget(average_rank=8))
reveal_type(RankPlan.load("ranks.json").ranks)
Budget(average_rank="eight")
"""


ELSEWHERE = """\
import signal, sys, warnings
warnings.simplefilter("ignore")
import datasets, peft, transformers, trl  # whatever these need where they are
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
del signal.SIGUSR1
sys.modules.update(fcntl=None, resource=None)
import loralloc
print([getattr(loralloc, name).__name__ for name in loralloc.__all__ if name != "__version__"])
"""
"""A Python without what POSIX alone has."""


def build(folder: Path) -> tuple[Path, Path]:
    """Copy the project, as a checkout somewhere else would be, and build it; returns wheel and sdist."""
    project = folder / "project"
    project.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, project)
    for name in BUILT:
        shutil.copytree(ROOT / name, project / name, ignore=LEFT_OUT, symlinks=True)
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder / "dist"]
    subprocess.run(command, cwd=project, capture_output=True, check=True, timeout=600)
    (wheel,), (sdist,) = ((folder / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("one"))


@pytest.mark.slow
class TestBuilds:
    def test_two_builds_are_equal(self, built: tuple[Path, Path], tmp_path: Path) -> None:
        again = build(tmp_path / "elsewhere")
        assert [path.name for path in again] == [path.name for path in built]
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in built]

    def test_the_wheel_carries_every_file_of_the_package(self, built: tuple[Path, Path]) -> None:
        carried = {name for name in zipfile.ZipFile(built[0]).namelist() if name.startswith("loralloc/")}
        files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert carried == {path.relative_to(PACKAGE.parent).as_posix() for path in files}
        assert "loralloc/py.typed" in carried

    def test_the_sdist_carries_what_its_tests_need(self, built: tuple[Path, Path]) -> None:
        with tarfile.open(built[1]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"} <= names
        assert {"tests/conftest.py", "docs/reference.md", "examples/quickstart.py", "drills/__main__.py"} <= names

    def test_users_of_the_wheel_are_told_types(self, built: tuple[Path, Path], tmp_path: Path) -> None:
        """py.typed, seen from outside: pyright reads the package as it is installed, and knows what it is given."""
        with zipfile.ZipFile(built[0]) as wheel:
            wheel.extractall(tmp_path / "site")
        (tmp_path / "user.py").write_text(USER, encoding="utf-8")
        settings = '{"extraPaths": ["site"], "include": ["user.py"], "reportMissingModuleSource": false}'
        (tmp_path / "pyrightconfig.json").write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", tmp_path]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600).stdout
        assert 'Type of "Budget(average_rank=8)" is "Budget"' in said
        assert 'is "dict[str, int]"' in said or 'is "Mapping[str, int]"' in said
        assert "1 error" in said, said
        assert "\"Literal['eight']\" is not assignable to" in said


@pytest.mark.slow
def test_the_public_names_need_no_posix() -> None:
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "'RankAllocation'" in done.stdout
