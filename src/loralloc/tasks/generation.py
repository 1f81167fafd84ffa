"""Generate answers to held-out prompts, and score them.

For a causal language model, prompts and references come from tokenized examples: the prompt is what stands before the
first learned token, the reference what is learned up to the next context. For an encoder with a decoder, they are its
sources and targets, and its trainer generates. Examples with the same prompt are joined to one with several references.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.tasks.pretrained import positions
from loralloc.tasks.spec import WRITTEN

LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
"""The libraries that compute a metric; they come with the extra `generation`."""

SHOWN = 5
"""Answers that metrics.json keeps."""


class GenerateSection(Protocol):
    """The part of a recipe that says how to generate, and what to compute."""

    @property
    def max_new_tokens(self) -> int: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def top_p(self) -> float: ...  # noqa: D102
    @property
    def num_beams(self) -> int: ...  # noqa: D102
    @property
    def length_penalty(self) -> float: ...  # noqa: D102
    @property
    def min_new_tokens(self) -> int: ...  # noqa: D102
    @property
    def no_repeat_ngram_size(self) -> int: ...  # noqa: D102
    @property
    def metrics(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def after(self) -> str | None: ...  # noqa: D102
    @property
    def samples(self) -> int | None: ...  # noqa: D102


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt.

    Attributes:
        ids: Its tokens.
        text: Its text, special tokens left out.
        references: The accepted answers, at least one.
    """

    ids: tuple[int, ...]
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """What a model has written.

    Attributes:
        prompts: What it was asked.
        answers: What it has answered.
        metrics: Their scores, by name.
    """

    prompts: list[Prompt]
    answers: list[str]
    metrics: dict[str, float]

    def record(self, before: Generation | None) -> dict[str, Any]:
        """Return the entry of metrics.json: the metrics, and the first few answers.

        Args:
            before: What the untrained model has written, if it was asked.
        """
        records = [
            {"prompt": prompt.text, "reference": prompt.references[0], "after": answer}
            for prompt, answer in zip(self.prompts[:SHOWN], self.answers, strict=False)
        ]
        found: dict[str, Any] = {"prompts": len(self.prompts), "trained": self.metrics, "samples": records}
        if before is not None:
            found["untrained"] = before.metrics
            for one, answer in zip(records, before.answers, strict=False):
                one["before"] = answer
        return found


def read_prompts(
    examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int | None, max_length: int
) -> list[Prompt]:
    """Take prompts and references out of tokenized examples.

    Args:
        examples: Mappings with `input_ids` and `labels`.
        tokenizer: The model's tokenizer.
        count: Prompts to take, the first ones; None for all.
        max_length: The length that examples are cut to; an example that may have lost its answer's end is left out.

    Returns:
        The prompts, each once, in the order of the examples.

    Raises:
        UserError: There is no prompt, because all tokens are learned; or every example may have been cut.
    """
    references: dict[tuple[int, ...], list[str]] = {}
    for example in examples:
        learned = [label != IGNORED for label in example["labels"]]
        if len(learned) >= max_length and learned[-1]:
            continue
        start = learned.index(True)
        if start == 0:
            raise UserError(
                "evaluate.generate needs prompts, and in plain text everything is learned: use data.prompt with "
                "data.completion, or chats, or take evaluate.generate out"
            )
        stop = next((at for at in range(start, len(learned)) if not learned[at]), len(learned))
        answer = references.setdefault(tuple(example["input_ids"][:start]), [])
        answer.append(decode(tokenizer, example["input_ids"][start:stop]))
    if not references:
        raise UserError(
            f"evaluate.generate: every held-out answer is cut by data.max_length, which is {max_length}; raise it"
        )
    chosen = list(references.items())[:count]
    return [Prompt(ids, decode(tokenizer, ids), tuple(answers)) for ids, answers in chosen]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones and without white space around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerateSection,
    batch_size: int,
    told: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Answer prompts.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: What to answer.
        settings: How to generate; a temperature of 0 takes the likeliest token.
        batch_size: Prompts at a time; prompts of similar length share a batch.
        told: Called after each batch with the number of answers so far.

    Returns:
        One answer a prompt, in their order.
    """
    pad: Any = tokenizer.pad_token_id
    config = generation_config(model, tokenizer, settings, max(len(prompt.ids) for prompt in prompts))
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        batch = _left_padded([prompts[index].ids for index in chosen], pad, model.device)
        written = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        for index, ids in zip(chosen, written.tolist(), strict=True):
            answers[index] = decode(tokenizer, ids)
        told(at + len(chosen))
    return answers


def generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: GenerateSection, prompt: int
) -> GenerationConfig:
    """Make the generation settings; those not set here are the model's own, such as the decoder's start token.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        settings: The recipe's section.
        prompt: Tokens of the longest prompt.
    """
    most = min(settings.max_new_tokens, room(model, prompt))
    return GenerationConfig(
        max_new_tokens=most,
        min_new_tokens=min(settings.min_new_tokens, most) or None,
        min_length=0,  # BART models for summaries set one themselves
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        top_p=settings.top_p if settings.temperature else None,
        top_k=0 if settings.temperature else None,  # all tokens: transformers keeps 50 unless told
        eos_token_id=ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )


def room(model: Any, prompt: int) -> int:
    """The most tokens of an answer that a model has positions for.

    A decoder alone spends positions on the prompt; a decoder with an encoder spends one, on its start token.

    Raises:
        UserError: No position is left for an answer.
    """
    there = positions(model.config, "decoder")
    before = 1 if model.config.is_encoder_decoder else prompt
    if there is not None and before >= there:
        raise UserError(f"the model has {there} positions, and a prompt of {prompt} tokens leaves none for an answer")
    return 10**9 if there is None else there - before


def ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer: the tokenizer's, and the model's own; None for none."""
    found = {*_as_list(tokenizer.eos_token_id), *_as_list(model.generation_config.eos_token_id)} - {None}
    return sorted(found) or None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def check_metrics(names: Iterable[str]) -> None:
    """Refuse metrics whose library is not installed.

    Raises:
        UserError: With the line that installs it.
    """
    for name in names:
        library = LIBRARIES.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            raise UserError(
                f'evaluate.generate.metrics: {name} comes with an extra: pip install "loralloc[generation]"'
            )


def score(
    answers: Sequence[str], prompts: Sequence[Prompt], metrics: Iterable[str], after: str | None
) -> dict[str, float]:
    """Compare answers with references.

    Args:
        answers: One a prompt.
        prompts: The prompts.
        metrics: Of `exact_match` (share of answers equal to a reference), `bleu` and `chrf` (0 to 100, sacrebleu's
            defaults), `rouge` (mean F1 of rouge1, rouge2, rougeL and, line by line, rougeLsum, each with the best
            reference, 0 to 1).
        after: A marker, such as `####`: `exact_match` compares what follows the last one.

    Returns:
        The values by name.
    """
    references = [prompt.references for prompt in prompts]
    found: dict[str, float] = {}
    for name in metrics:
        found |= (
            _METRICS[name](answers, references) if name != "exact_match" else exact_match(answers, references, after)
        )
    return found


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]], after: str | None) -> dict[str, float]:
    """Share of the answers that equal a reference after the last marker; an answer without the marker is wrong.

    >>> exact_match(["6 * 7 = 42 #### 1,042", "42"], [["#### 1042"], ["#### 42"]], "####")
    {'exact_match': 0.5}
    """
    hits = [
        (ours := final_answer(answer, after)) is not None and ours in [final_answer(one, after) for one in accepted]
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}


def final_answer(text: str, after: str | None) -> str | None:
    """What follows the last marker, without white space around it and commas between digits; None without the marker.

    >>> final_answer("So she has 1,200. #### 1,200", "####"), final_answer("1,200", "####"), final_answer(" a, b", None)
    ('1200', None, 'a, b')
    """
    if after is not None and after not in text:
        return None
    answer = text if after is None else text.rpartition(after)[2]
    return re.sub(r"(?<=\d),(?=\d)", "", answer.strip())


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    import sacrebleu

    # Without `force`, it warns about texts that look tokenized, as some data do.
    return {"bleu": sacrebleu.corpus_bleu(answers, _streams(references), force=True).score}


def _chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    import sacrebleu

    return {"chrf": sacrebleu.corpus_chrf(answers, _streams(references)).score}


def _streams(references: Sequence[Sequence[str]]) -> Any:
    """The first reference of every prompt, the second, and so on; None where a prompt has no more."""
    most = max(map(len, references))
    return [[row[n] if n < len(row) else None for row in references] for n in range(most)]


def _rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = WRITTEN["rouge"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(accepted, answer) for accepted, answer in zip(references, answers, strict=True)]
    return {name: sum(one[name].fmeasure for one in scores) / len(scores) for name in names}


_METRICS: Mapping[str, Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
}
