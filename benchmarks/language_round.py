"""A round of ABLoRA on a real language model: its cost compared with the paper's forward passes.

    python benchmarks/language_round.py MODEL DATA             # SmolLM2-135M-Instruct, E2E: ten minutes
    python benchmarks/language_round.py MODEL DATA --examples 64 --steps 40

MODEL is a folder in transformers' format, DATA one with e2e_nlg as packed JSON lines. Every linear layer has a capacity
of 16 and an average rank of 8. After some steps of training the round scores all open ranks. The paper makes one
forward pass of all examples without each rank, one with each rank alone, and one with all ranks. These take too long to
run here, so their time is estimated: their number times the time of one pass. How many ranks have to be ablated depends
on the examples: the method's own default is 256 of them. One record goes to benchmarks/results/speed-cpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from language import read
from peft import LoraConfig, get_peft_model
from record import RESULTS, append, record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralloc import ABLoRA, Budget, attach

AVERAGE, BATCH, LENGTH = 8, 8, 96


def main() -> None:
    """Parse the command line, train, time one round and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=16, help="examples that ranks are scored on")
    parser.add_argument("--steps", type=int, default=20, help="steps of training before the round")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = read(options.data / "e2e_nlg" / "train.jsonl.gz")[: BATCH * options.steps + options.examples]
    batches = batched([f"{row['mr']}\n{row['ref']}" for row in rows], options.model)
    train, held_out = batches[: options.steps], batches[options.steps :]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        LoraConfig(r=2 * AVERAGE, lora_alpha=4 * AVERAGE, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # The schedule is a formality: the round that is due after the last step is all that is timed.
    method = ABLoRA(
        Budget(average_rank=AVERAGE),
        held_out,
        warmup=options.steps,
        interval=1,
        rounds=1,
        samples=options.examples,
    )
    made = figures(model, method, train)
    print(json.dumps(made, indent=1))
    command = f"python benchmarks/language_round.py MODEL DATA --examples {options.examples} --steps {options.steps}"
    append({**record("language-round", None, made, {}), "command": command}, RESULTS / "speed-cpu.jsonl")


def batched(texts: list[str], model: Path) -> list[dict[str, Tensor]]:
    """Batches with labels, padding left out of the loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({**batch, "labels": labels})
    return batches


def figures(model: Any, method: ABLoRA, train: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Train, let the last step end with the round, and time it beside one forward pass of the same examples."""
    run = attach(model, method, total_steps=2 * len(train))
    events: list[dict[str, Any]] = []
    run.on_event = events.append
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for batch in train:
        model(**batch).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        before, started = peak_bytes(), time.perf_counter()
        run.after_step(optimizer)
        seconds = time.perf_counter() - started
        optimizer.zero_grad()
        if any("pruned" in event for event in events):
            break
    else:
        raise SystemExit("no round was due")
    (event,) = (event for event in events if "pruned" in event)
    ranks = sum(event["ranks"])
    forward = forward_seconds(model, method.validation)
    passes = 2 * ranks + 1
    return {
        "modules": len(event["ranks"]),
        "ranks": ranks,
        "examples": method.samples,
        "forwards": event["forwards"],
        "papers_forwards": passes,
        "share_of_forwards": event["forwards"] / passes,
        "seconds": seconds,
        "seconds_of_a_forward": forward,
        "share_of_seconds": seconds / (forward * passes),
        "held_before": before,
        "held": peak_bytes(),
    }


@torch.no_grad()
def forward_seconds(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Seconds of one forward pass of all examples."""
    started = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - started


def peak_bytes() -> int:
    """The most memory that the process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
