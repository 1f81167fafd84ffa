"""`loralloc chat`: talk to what a run has trained."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralloc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loralloc.recipe.sections import DataConfig

NOT_UNICODE = "must be Unicode text; in a shell of another encoding, set LC_ALL=C.UTF-8"
HELP = "/reset forgets what was said, /exit or Ctrl-D ends"


def chat(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once, and end.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Answer with the adapter switched off, to compare.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above 0, tokens are sampled.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the likeliest tokens to choose from.")] = 1.0,
) -> None:
    """Talk to the adapter of a finished run, as stock PEFT loads it; without a chat template, texts are continued.

    An encoder with a decoder answers every line by itself.
    """
    from loralloc.recipe.run_folder import RunFolder
    from loralloc.tasks.locations import model_folder
    from loralloc.tasks.spec import TASKS

    if prompt is not None and not _is_unicode(prompt):
        raise UserError(f"--prompt: {NOT_UNICODE}")
    folder = RunFolder.finished(run)
    recipe = folder.peek_recipe()
    model_folder(recipe.model.name)
    both = TASKS[recipe.task].peft_type == "SEQ_2_SEQ_LM"
    if not both and TASKS[recipe.task].peft_type != "CAUSAL_LM":
        raise UserError(f"{run} is a run of task {recipe.task}, which generates no text; use loralloc evaluate")
    from loralloc.cli import terminal
    from loralloc.recipe.from_recipe import load_for_export

    terminal.quiet_libraries()
    model, tokenizer = load_for_export(folder, "loralloc chat")
    settings = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    model.eval()

    def answer(messages: list[dict[str, str]]) -> str:
        with model.disable_adapter() if base else nullcontext():
            return write(model, tokenizer, messages, settings, templated=templated)

    chats = not both and recipe.data.chat is not False and not _learned_texts(recipe.data)
    templated = tokenizer.chat_template is not None and chats
    fill = _prompt_of(recipe.data.source if both else recipe.data.prompt)
    if prompt is not None:
        answer([{"role": "user", "content": fill(prompt)}])
    else:
        typer.echo(HELP)
        converse(answer, fill, remembers=templated)


def _learned_texts(data: DataConfig) -> bool:
    """Return whether a model has learned plain texts: its recipe names their column, or its data have no other form."""
    from loralloc.tasks.data import first_pieces
    from loralloc.tasks.forms import Texts, read_form

    if data.text or data.prompt or data.messages:
        return data.text is not None
    try:
        return all(isinstance(read_form(rows, data), Texts) for rows in first_pieces(data))
    except UserError:  # the data have gone since
        return False


def _prompt_of(words: str | None) -> Callable[[str], str]:
    """Return what makes a prompt of a line: the recipe's template if it has exactly one column, else the line stays."""
    from loralloc.tasks.templates import columns_of, fill, is_template

    columns = columns_of(words, "data.prompt") if words is not None and is_template(words) else []
    if words is None or len(columns) != 1:
        return lambda line: line
    return lambda line: fill(words, {columns[0]: line})


def _is_unicode(text: str) -> bool:
    """Whether a text from outside is Unicode: bytes that are not become halves of characters, which have no code."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def converse(
    answer: Callable[[list[dict[str, str]]], str], fill: Callable[[str], str] = str, *, remembers: bool
) -> None:
    """Read lines and answer them until there are no more; one that is no Unicode text is passed over with a message.

    Args:
        answer: Writes the answer to a chat, and returns it.
        fill: Makes a prompt of a line.
        remembers: Whether each line goes on with the chat; else it is a text of its own.
    """
    messages: list[dict[str, str]] = []
    if isinstance(sys.stdin, io.TextIOWrapper):  # one bad line would end the reading, and lose those behind it
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if not _is_unicode(line):
            typer.echo(f"this line is not answered: it {NOT_UNICODE}", err=True)
            continue
        if line == "/reset" or not remembers:
            messages = []
        if line and line != "/reset":
            messages.append({"role": "user", "content": fill(line)})
            messages.append({"role": "assistant", "content": answer(messages)})


def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    settings: dict[str, Any],
    *,
    templated: bool,
) -> str:
    """Print the answer to a chat token by token, and return it; without a template, only the last message counts.

    Raises:
        UserError: The chat has no tokens, or the model no position left for an answer.
    """
    import torch
    from transformers import TextStreamer

    from loralloc.tasks.generation import ends, room

    if not templated:
        inputs: Any = tokenizer(messages[-1]["content"])
    else:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids = inputs["input_ids"] or _first_token(tokenizer)
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    longest = room(model, inputs["input_ids"].shape[1])
    settings = {**settings, "max_new_tokens": min(settings["max_new_tokens"], longest)}
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends(model, tokenizer)}
    written = model.generate(**inputs, streamer=streamer, **marks, **settings)
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return str(tokenizer.decode(written[0, prompt:], skip_special_tokens=True))


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text without tokens begins with: the token that begins every text.

    Raises:
        UserError: The tokenizer has none.
    """
    start: Any = tokenizer.bos_token_id
    if start is None:
        raise UserError("the prompt has no tokens, and the tokenizer none that begins a text; write a word at least")
    return [start]
