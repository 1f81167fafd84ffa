"""A small T5 that writes about restaurants, trained from scratch: the base model of the runs in docs/tasks.md.

    python benchmarks/tiny_t5.py DATA FOLDER

DATA is a folder with e2e_nlg and rnnlg_tv as JSON lines. The tokenizer (byte-level BPE, 2,048 pieces) is trained on
both, the model (3.5 million parameters) on E2E alone, so that texts about televisions are new to it. One thread, about
ten minutes.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

PIECES, STEPS, BATCH = 2048, 600, 32
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def read(data: Path, name: str) -> list[dict[str, str]]:
    """The training rows of a data set: `mr`, attributes, and `ref`, a sentence."""
    with gzip.open(data / name / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with an end-of-sequence token after every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def main() -> None:
    """Make the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    restaurants = read(arguments.data, "e2e_nlg")
    tokenizer = train_tokenizer(restaurants + read(arguments.data, "rnnlg_tv"))
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=192,
        d_kv=32,
        d_ff=768,
        num_heads=6,
        num_layers=3,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    examples = Dataset.from_list(
        [
            {**tokenizer(row["mr"]), "labels": tokenizer(text_target=row["ref"])["input_ids"]}
            for row in restaurants[: STEPS * BATCH]
        ]
    )
    settings = Seq2SeqTrainingArguments(
        str(arguments.folder / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        warmup_steps=50,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    Seq2SeqTrainer(model, settings, collator, examples, processing_class=tokenizer).train()
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
