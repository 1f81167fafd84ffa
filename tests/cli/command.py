"""The command line in this process, and what it needs on disk: tiny models, small data, recipes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import encoder_decoders
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralloc.cli.main import main

GOOD, BAD = ["fine", "great", "lovely", "warm"], ["dull", "poor", "weak", "cold"]
WORDS = [*GOOD, *BAD, "the", "film", "was", "user", "assistant", ":", "yes", "no", "one", "two"]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
TIMING = ("_runtime", "_per_second", "_preparation_time", "memory_mib", "processor_seconds")
"""How the figures of a log end that differ from run to run."""


RECIPE = """\
task: sequence-classification
model:
  name: {encoder}
data:
  train: {data}/train.jsonl
  validation: {data}/validation.jsonl
  text: text
  label: label
  max_length: 16
method:
  name: adalora
  budget:
    average_rank: 2
lora:
  r: 4
  alpha: 8
training:
  steps: 16
  batch_size: 8
  learning_rate: 1e-2
  log_every: 4
output: run
"""
LANGUAGE = RECIPE.replace("sequence-classification", "causal-lm").replace("  label: label\n", "")
SEQ2SEQ = LANGUAGE.replace("causal-lm", "seq2seq").replace(
    "  text: text\n", "  source: text\n  target: completion\n  target_length: 8\n"
)
PLAIN = RECIPE.replace("name: adalora\n  budget:\n    average_rank: 2", "name: lora")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def loralloc(*words: object) -> Result:
    """Run a command in this process; what it raises beyond an exit comes through, and fails the test."""
    out, err, code = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", ["loralloc", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """Run a command that succeeds; what it printed."""
    result = loralloc(*words)
    assert result.code == 0, result.err
    return result.out


def refused(*words: object) -> str:
    """Run a command that a mistake in the input ends: exit code 2 and one message, which is returned."""
    result = loralloc(*words)
    assert result.code == 2, (result.code, result.out, result.err)
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    return result.err.removeprefix("error: ").strip()


def build_tokenizer(single: str, pair: str | None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of `WORDS`, and the special tokens by role."""
    tokens = list(dict.fromkeys(special.values()))
    vocabulary = {token: i for i, token in enumerate([*tokens, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(token, vocabulary[token]) for token in tokens if token in f"{single} {pair}".split()]
    tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_encoder(folder: Path) -> Path:
    """A BERT of two layers without a head, with its usual dropout; weights wide enough to matter."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = build_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_decoder(folder: Path, width: int = 16, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama of two layers, with a chat template."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = build_tokenizer("<s> $A", None, **special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.8 / width**0.5,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A T5 of two layers each way."""
    tokenizer = build_tokenizer(encoder_decoders.TEMPLATES["t5"], None, **encoder_decoders.SPECIAL)
    return encoder_decoders.save("t5", folder, tokenizer)


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that every task can read: the words of a text tell its label, its score and its continuation."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        label = ("good", "bad", "good")[index % 3]  # two thirds are good
        words = generator.choices(GOOD if label == "good" else BAD, k=3)
        text, answer = f"the film was {' '.join(words)}", "yes one" if label == "good" else "no two"
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        score = len(set(words)) * (1.0 if label == "good" else -1.0)
        pair = {"text": text, "second": generator.choice(WORDS), "label": label, "score": score}
        rows.append({**pair, "prompt": f"user : {text}", "completion": answer, "messages": messages})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Write JSON lines; a row given as text is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's log without the figures that measure time."""
    return [{k: v for k, v in row.items() if not k.endswith(TIMING)} for row in read_rows(run / "log.jsonl")]


def ranks(run: Path) -> dict[str, int]:
    """The plan of a run."""
    return {name: module["rank"] for name, module in read_json(run / "ranks.json")["modules"].items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name relative to it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
