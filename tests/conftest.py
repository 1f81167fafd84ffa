"""What every test may rely on: no network, no state of this machine, one thread, fixed seeds."""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

# The libraries read these when they are imported, so they come before the imports; subprocesses inherit them.
_HF_HOME = tempfile.TemporaryDirectory(prefix="loralloc-tests-")  # no cached data outlives the test run
os.environ.update(
    HF_HOME=_HF_HOME.name,
    XDG_CACHE_HOME=_HF_HOME.name,  # nor a kernel that somebody has built
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    MPLBACKEND="Agg",
    NO_COLOR="1",
    COLUMNS="120",
)
os.environ.pop("FORCE_COLOR", None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402
from variants import mark_variants  # noqa: E402

from loralloc import native  # noqa: E402

# A line for every product of a layer in 8 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# More threads would change the order of summation, and with it the last bits, from machine to machine.
torch.set_num_threads(1)

settings.register_profile("default", derandomize=True, deadline=None, max_examples=50, database=None)
settings.register_profile("thorough", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the methods' contract and test_kernel_device.py run: cuda")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m "not slow"` looks at the marks."""
    mark_variants(items)


def pytest_collection_finish() -> None:
    """Leave what has been imported out of every later search for garbage: each training begins with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as a function of its own everywhere, also where ordinary operations would do."""
    monkeypatch.setattr("loralloc.kernel._composes", lambda *_: False)


@pytest.fixture(params=["as chosen", "by hand", pytest.param("in C++", marks=pytest.mark.slow)])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as it chooses its way, as a function of its own, and as one in C++."""
    if request.param == "by hand":
        monkeypatch.setattr("loralloc.kernel._composes", lambda *_: False)
    elif request.param == "in C++":
        built = request.getfixturevalue("built_kernel")
        monkeypatch.setattr("loralloc.native.loaded", lambda: built)


@pytest.fixture(scope="session")
def built_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The kernel in C++, built for this run of the tests."""
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.build()
        built = native.loaded()
    native.loaded.cache_clear()
    assert built is not None
    return built
