"""Fabricated run folders: what `loralloc train` writes, without the training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BERT_TYPES = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (384, 1536),
    "output.dense": (1536, 384),
}
LLAMA_TYPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
GPT2_TYPES = {
    "attn.c_attn": (768, 2304),
    "attn.c_proj": (768, 768),
    "mlp.c_fc": (768, 3072),
    "mlp.c_proj": (3072, 768),
}
Shapes = dict[str, tuple[int, int]]


def layered(prefix: str, layers: int, types: Shapes) -> Shapes:
    """Module names of a model, with their shapes."""
    return {f"{prefix}.{layer}.{kind}": shape for layer in range(layers) for kind, shape in types.items()}


def bert(layers: int = 6) -> Shapes:
    return layered("bert.encoder.layer", layers, BERT_TYPES)


def llama(layers: int = 4) -> Shapes:
    return layered("model.layers", layers, LLAMA_TYPES)


def gpt2(layers: int = 3) -> Shapes:
    return layered("transformer.h", layers, GPT2_TYPES)


def wanted(at: int, count: int) -> float:
    """A made-up importance of one module: later layers and some types matter more."""
    return at / count + 0.35 * ((at * 7919) % 13) / 13


LABELS = {"adalora": "AdaLoRA", "autolora": "AutoLoRA", "lora": "plain LoRA"}


@dataclass
class Fabricated:
    """One made-up AdaLoRA run; change any field before `write`."""

    modules: Shapes
    start: int = 12
    average: int = 8
    steps: int = 300
    method: str = "adalora"
    task: str = "sequence-classification"
    model: str = "demo:minilm"
    bad_steps: Sequence[int] = ()
    ranks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = self.at_budget(self.average * len(self.modules))

    def at_budget(self, budget: int) -> list[int]:
        """Close the least important ranks until the budget is met."""
        count = len(self.modules)
        scores = [
            (wanted(at, count) * (1 - rank / self.start / 1.4), at) for at in range(count) for rank in range(self.start)
        ]
        kept = [0] * count
        for _, at in sorted(scores, reverse=True)[:budget]:
            kept[at] += 1
        return kept

    def parameters(self, ranks: Sequence[int]) -> int:
        return sum(rank * (a + b) for rank, (a, b) in zip(ranks, self.modules.values(), strict=True))

    def plan(self) -> dict[str, Any]:
        modules = {
            name: {"rank": rank, "start": self.start, "in": a, "out": b, "scale": 2.0}
            for rank, (name, (a, b)) in zip(self.ranks, self.modules.items(), strict=True)
        }
        start = [self.start] * len(self.modules)
        cost = {
            "start": {"ranks": sum(start), "parameters": self.parameters(start)},
            "peak": {"ranks": sum(start)},
            "final": {"ranks": sum(self.ranks), "parameters": self.parameters(self.ranks)},
        }
        provenance = {
            "loralloc": "0.1.0",
            "label": LABELS.get(self.method, self.method),
            "base_model": self.model,
            "total_steps": self.steps,
            "bad_steps": len(self.bad_steps),
            "settings": {"warmup": 0.15, "cooldown": 0.45},
        }
        budget = {"average_rank": self.average} if self.method == "adalora" else {}
        return {
            "format": 1,
            "method": self.method,
            "modules": modules,
            "budget": budget,
            "cost": cost,
            "provenance": provenance,
        }

    def trace(self) -> list[dict[str, Any]]:
        start = [self.start] * len(self.modules)
        shapes = list(self.modules.values())
        opening: dict[str, Any] = {"event": "start", "step": 0, "total_steps": self.steps, "sites": list(self.modules)}
        opening |= {"label": LABELS.get(self.method, self.method)}
        opening |= {"in": [a for a, _ in shapes], "out": [b for _, b in shapes], "ranks": start}
        rows = [opening]
        if self.method != "lora":
            warmup, final = int(0.15 * self.steps), int(0.55 * self.steps)
            top, target = sum(start), self.average * len(start)
            schedule = {"warmup": warmup, "fallen": final, "interval": 5}
            phases = [["warm-up", 0, warmup], ["budget falls", warmup + 1, final]]
            phases.append(["final ranks", final + 1, self.steps - 1])
            opening |= {
                "schedule": schedule,
                "phases": phases,
                "unit": "ranks",
                "start_budget": top,
                "target_budget": target,
            }
            for step in range(warmup + 5, final + 1, 5):
                budget = int(target + (top - target) * (1 - (step - warmup) / (final - warmup)) ** 3)
                rows.append(self.event("allocate", step, self.at_budget(budget)) | {"budget": budget})
            rows.append(self.event("freeze", final, self.ranks) | {"budget": target})
        rows += [{"event": "bad_step", "step": step} for step in self.bad_steps]
        rows.append(self.event("finish", self.steps, self.ranks if self.method != "lora" else start))
        return sorted(rows, key=lambda row: row["step"])

    def event(self, kind: str, step: int, ranks: list[int]) -> dict[str, Any]:
        return {"event": kind, "step": step, "ranks": ranks, "parameters": self.parameters(ranks)}

    def log(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for step in range(5, self.steps + 1, 5):
            loss = 0.5 + 1.6 * 0.985**step + 0.12 * ((step * 104729) % 17 / 17 - 0.5)
            norm = 0.4 + 0.5 * ((step * 7919) % 13 / 13)
            row = {"step": step, "epoch": step / 100, "loss": loss, "grad_norm": norm}
            row["learning_rate"] = 1e-3 * min(step / 30, (self.steps - step) / (self.steps - 30))
            unit = "tokens" if self.task == "causal-lm" else "examples"
            rows.append(row | {f"{unit}_per_second": 180.0 + 40 * norm, "memory_mib": 900.0 + min(step, 60)})
            if step % 50 == 0:
                rows.append({"step": step, "eval_loss": 0.62 + 1.5 * 0.986**step, "eval_accuracy": 0.5})
        return rows

    def metrics(self) -> dict[str, Any]:
        causal = self.task == "causal-lm"
        metric, value = ("perplexity", 5.2) if causal else ("accuracy", 0.62)
        return {
            "task": self.task,
            "metric": metric,
            "validation": {metric: value, "loss": 1.13},
            "test": None,
            "reference": {"untrained": 31.5} if causal else {"majority": 0.125, "untrained": 0.12},
            "classes": {} if causal else {"neg": 80, "pos": 119, " pos": 1},
            "train_seconds": 192.4,
            "total_steps": self.steps,
            "final_ranks": sum(self.ranks),
            "final_parameters": self.parameters(self.ranks),
            "adapter_check": 3.1e-7,
            "adapter_check_allowed": 1e-5,
        }

    def generation(self) -> dict[str, Any]:
        """What metrics.json tells of answers; run by a model that has learnt markup."""
        sample = {"prompt": "Name: <b>Aromi</b>\nFood: Chinese", "reference": "Aromi serves Chinese food & more."}
        sample |= {"before": "", "after": "Aromi <script>document.title='owned'</script> serves Chinese food."}
        scores = {"untrained": {"bleu": 0.0, "exact_match": 0.0}, "trained": {"bleu": 31.2, "exact_match": 0.25}}
        return {"prompts": 1, **scores, "samples": [sample]}

    def recipe(self) -> str:
        return (
            f"task: {self.task}\nmodel:\n  name: {self.model}\ndata:\n  train: demo:docstrings\n"
            f"  labels: [a, b, c]\nmethod:\n  name: {self.method}\ntraining:\n  steps: {self.steps}\n"
        )

    def write(self, folder: Path, *, without: Sequence[str] = ()) -> Path:
        """Write the run folder, leaving out some of its files."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "ranks.json": json.dumps(self.plan()),
            "trace.jsonl": lines(self.trace()),
            "log.jsonl": lines(self.log()),
            "metrics.json": json.dumps(self.metrics()),
            "recipe.yaml": self.recipe(),
        }
        for name, text in contents.items():
            if name not in without:
                (folder / name).write_text(text, encoding="utf-8")
        (folder / "adapter").mkdir(exist_ok=True)
        return folder


def lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
