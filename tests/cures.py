"""Reading cures out of messages, so that a test applies what a user would read, letter by letter."""

from __future__ import annotations

import ast
import re
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn


def config_in(message: str) -> dict[str, Any]:
    """The arguments of the first `LoraConfig(...)` in a message that has any."""
    for found in re.finditer(r"LoraConfig\(", message):
        for end in (match.end() for match in re.finditer(r"\)", message)):
            try:
                call = ast.parse(message[found.start() : end], mode="eval").body
            except SyntaxError:
                continue
            assert isinstance(call, ast.Call)
            settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            if settings:
                return settings
    raise AssertionError(f"no LoraConfig(...) in: {message}")


def run_line(message: str, model: nn.Module) -> Any:
    """Run the line `model... = get_peft_model(...)` of a message; return what `model` is afterwards."""
    (line,) = re.findall(r"model\S* = get_peft_model\(.*\)$", message)
    scope = {"model": model, "get_peft_model": get_peft_model, "LoraConfig": LoraConfig}
    exec(line, scope)
    return scope["model"]


def expression_in(message: str, model: nn.Module) -> Any:
    """What the last `model.x[0].y` of a message stands for."""
    found = re.findall(r"model(?:\[\d+\]|\.[a-zA-Z_]\w*)+", message)
    return eval(found[-1], {"model": model})
