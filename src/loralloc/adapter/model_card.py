"""What was exported, how to load and serve it, and its model card with facts about its training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import nn
from transformers import BitsAndBytesConfig

from loralloc.files import in_shell

Profile = Literal["ragged", "uniform", "merged"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""

LOADING = """\
from peft import PeftModel
from transformers import {imports}

{quantization}base = {model}.from_pretrained({base}{options})
model = PeftModel.from_pretrained(base, ".")  # this folder
tokenizer = AutoTokenizer.from_pretrained({tokenizer})"""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The folder.
        profile: Its profile.
        ranks: Full module name to rank; 0 for modules left out.
        difference: Largest difference of a logit between the model and the reloaded files, on the checked batch.
        allowed: The largest difference that rounding explains, see `check.compare`.
        base: Folder or name of the base model, if it is known.
        revision: Revision of the base model, if one was named.
        has_head: Whether more is saved than the factors: whole modules, such as the head of a classifier, or trained
            embeddings of tokens.
        generates: Whether the model is a decoder that generates text, so that servers of language models take it.
    """

    path: Path
    profile: Profile
    ranks: Mapping[str, int]
    difference: float
    allowed: float
    base: str = "BASE_MODEL"
    revision: str | None = None
    has_head: bool = False
    generates: bool = True

    @property
    def max_rank(self) -> int:
        """The largest rank: what servers reserve for every module."""
        return max(self.ranks.values())

    @property
    def serving(self) -> list[str]:
        """Shell commands that serve the export; none if servers would refuse it because it is more than factors."""
        return self.serving_from(str(self.path))

    def serving_from(self, path: str) -> list[str]:
        """The same from another folder."""
        if not self.generates or (self.has_head and self.profile != "merged"):
            return []
        if self.profile == "merged":
            return [f"vllm serve {in_shell(path)}"]
        flag = next((rank for rank in VLLM_RANKS if rank >= self.max_rank), self.max_rank)
        need = "vLLM 0.32 or newer" if self.profile == "ragged" else "any vLLM"
        base = in_shell(self.base) + (f" --revision {in_shell(self.revision)}" if self.revision else "")
        adapter = in_shell(f"adapter={path}")
        return [f"vllm serve {base} --enable-lora --max-lora-rank {flag} --lora-modules {adapter}   # {need}"]


def model_card(base: nn.Module, export: Export, tokenizer: bool, facts: Mapping[str, Any] | None = None) -> str:
    """Return the text of README.md.

    Args:
        base: The base model.
        export: What was exported.
        tokenizer: Whether the folder holds a tokenizer.
        facts: What else to tell, by heading: mappings from a name to a value, such as {"Data": {"train": 800}}.
    """
    total, modules = sum(export.ranks.values()), len(export.ranks)
    sections = [
        f"---\nbase_model: {json.dumps(export.base)}\nlibrary_name: peft\ntags:\n- lora\n- loralloc\n---",
        "# LoRA adapter with allocated ranks",
        f"A plain LoRA adapter (profile `{export.profile}`): {total} ranks over {modules} modules, largest rank "
        f"{export.max_rank}. The rank of each module is in `loralloc_export.json`. After writing, stock PEFT loaded "
        "the files onto the base model; the largest difference of a logit to the trained model was "
        f"{export.difference:.1e}.",
        f"```python\n{_loading(base, export, tokenizer)}\n```",
    ]
    if quantized := _quantization(base):
        sections.append(
            f"It was trained over the base model in {4 if quantized.load_in_4bit else 8} bits; in the comparison, both "
            "computed with the numbers that these stand for. Over the base model in full precision it computes "
            "something a little different: evaluate it there before you serve it so."
        )
    if export.profile == "ragged":
        sections.append(
            "Modules have ranks of their own (`rank_pattern`). PEFT's hot-swapping and vLLM before 0.32 do not read "
            "it: export with the profile `uniform` for them."
        )
    if export.serving:
        serving = "\n".join(export.serving_from("path/to/this/folder"))
        sections.append(f"Serving (`--max-lora-rank` must be at least {export.max_rank}):\n\n```sh\n{serving}\n```")
    for heading, rows in (facts or {}).items():
        table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
        sections.append(f"## {heading}\n\n| | |\n|---|---|\n{table}")
    return "\n\n".join(sections) + "\n"


def _loading(base: nn.Module, export: Export, tokenizer: bool) -> str:
    """The lines that load the adapter, run in its folder."""
    kind, config = type(base).__name__, getattr(base, "config", None)
    if not hasattr(transformers, kind):
        return 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, ".")  # base: the model as it was'
    labels = getattr(config, "num_labels", 2)
    options = f", num_labels={labels}" if export.has_head and kind.endswith("Classification") else ""
    options += f", revision={json.dumps(export.revision)}" if export.revision else ""
    imports, written = [kind, "AutoTokenizer"], ""
    if quantized := _quantization(base):
        imports.append("BitsAndBytesConfig")
        written = f"quantization = {_call(quantized)}\n"
        options += ", quantization_config=quantization"
    name = json.dumps(export.base)
    return LOADING.format(
        model=kind,
        imports=", ".join(imports),
        quantization=written,
        base=name,
        options=options,
        tokenizer='"."' if tokenizer else name,
    )


def _quantization(base: nn.Module) -> BitsAndBytesConfig | None:
    """How bitsandbytes has quantised the base model at loading; None if it has not, or if it is stored quantised."""
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    config = quantizer.quantization_config
    return config if isinstance(config, BitsAndBytesConfig) else None


def _call(config: BitsAndBytesConfig) -> str:
    """Python code that makes a configuration."""
    settings = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    return "\n".join(["BitsAndBytesConfig(", *(f"    {name}={value!r}," for name, value in settings.items()), ")"])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
