"""Real tasks by `loralloc compare`, and what they have found: the tables of docs/how-to-choose.md.

    python benchmarks/studies.py e2e DATA --base MODEL --runs DIR       # one study; called again, it goes on
    python benchmarks/studies.py e2e DATA --base MODEL --runs DIR --budgets "[1, 4]" --seeds 5
    python benchmarks/studies.py --table                                # print the tables from the records

DATA is a folder with packed JSON lines of every set. A study is a recipe in benchmarks/studies. MODEL, a folder in
transformers' format, takes the place of BASE in it: stories260K, or for smollm2 SmolLM2-135M-Instruct. Anything else on
the command line goes to `loralloc compare`. Its compare.csv and compare.json are kept in benchmarks/results/studies,
with an archive of what the finished runs have measured: runs that DIR lacks are restored from it and not repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from language import read

HERE = Path(__file__).parent
STUDIES, RESULTS = HERE / "studies", HERE / "results" / "studies"
MEASURED = ("recipe.yaml", "metrics.json", "losses.json", "ranks.json", "log.jsonl", "trace.jsonl")
"""The files of a run that a comparison reads; of the weights it needs only the size of the file."""
WEIGHTS = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Rows:
    """Where the rows of a study come from, and how many are drawn.

    Attributes:
        train: A packed file of JSON lines, without its ending.
        test: Another, or None: the test rows are drawn from `train` first.
        train_rows: How many to train and to validate on, at most.
        test_rows: How many to test on, at most.
    """

    train: str
    test: str | None
    train_rows: int
    test_rows: int


ROWS: Mapping[str, Rows] = {
    "e2e": Rows("e2e_nlg/train", "e2e_nlg/test", 3000, 300),
    "e2e_rank2": Rows("e2e_nlg/train", "e2e_nlg/test", 3000, 300),
    "e2e_rank8": Rows("e2e_nlg/train", "e2e_nlg/test", 3000, 300),
    "e2e_options": Rows("e2e_nlg/train", "e2e_nlg/test", 3000, 300),
    "e2e_autolora": Rows("e2e_nlg/train", "e2e_nlg/test", 3000, 300),
    "rnnlg": Rows("rnnlg_tv/train", "rnnlg_tv/test", 3000, 300),
    "rnnlg_rank2": Rows("rnnlg_tv/train", "rnnlg_tv/test", 3000, 300),
    "rnnlg_rank8": Rows("rnnlg_tv/train", "rnnlg_tv/test", 3000, 300),
    "rnnlg_options": Rows("rnnlg_tv/train", "rnnlg_tv/test", 3000, 300),
    "qnli": Rows("qnli/dev", None, 3000, 1500),
    "qnli_rank4": Rows("qnli/dev", None, 3000, 1500),
    "smollm2": Rows("e2e_nlg/train", "e2e_nlg/test", 1000, 100),
    "bc5cdr": Rows("bc5cdr/train", "bc5cdr/test", 3000, 600),
    "bc5cdr_rank4": Rows("bc5cdr/train", "bc5cdr/test", 3000, 600),
}
"""Rows of the studies with data in files; the demo's task makes its own."""


def write_rows(rows: Rows, data: Path, name: str, folder: Path) -> None:
    """Draw rows to train and to test on, always the same ones."""
    train = shuffled(read(data / f"{rows.train}.jsonl.gz"))
    test = shuffled(read(data / f"{rows.test}.jsonl.gz")) if rows.test else train[: rows.test_rows]
    if rows.test is None:
        train = train[rows.test_rows :]
    folder.mkdir(parents=True, exist_ok=True)
    for split, drawn in (("train", train[: rows.train_rows]), ("test", test[: rows.test_rows])):
        text = "".join(json.dumps(row) + "\n" for row in drawn)
        (folder / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")


def shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in a random order, always the same one."""
    random.Random(0).shuffle(rows)
    return rows


def study(name: str, data: Path | None, base: Path | None, runs: Path, others: list[str]) -> None:
    """Run a study, or go on with it, and keep what it has found."""
    if data is not None and name in ROWS:
        write_rows(ROWS[name], data, name, runs)
    recipe = yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
    if recipe["model"]["name"] == "BASE":
        if base is None:
            raise SystemExit(f"{name} wants a base model: --base MODEL")
        recipe["model"]["name"] = link(base, runs / "base").name  # records are not to name folders of this machine
    path, output = runs / f"{name}.yaml", runs / recipe["output"]
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    restore(name, output)
    command = [str(Path(sys.executable).parent / "loralloc"), "compare", path.name, *others]
    try:
        subprocess.run(command, check=True, cwd=runs, env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        keep(name, output)
    for ending in ("csv", "json"):
        shutil.copy(output / f"compare.{ending}", RESULTS / f"{name}.{ending}")


def link(target: Path, path: Path) -> Path:
    """Make `path` a symbolic link to a folder.

    Raises:
        SystemExit: It is one to another folder, which a study that is running may need.
    """
    if path.is_symlink() and path.exists() and path.resolve() != target.resolve():
        raise SystemExit(f"{path} is another model, of other studies: name another folder with --runs")
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())
    return path


def keep(name: str, output: Path) -> None:
    """Pack what the finished runs of a study have measured; weights are replaced by zeros of the same size."""
    if not (output / "compare.yaml").is_file():  # it was refused
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept, half = RESULTS / f"{name}.tar.xz", RESULTS / f"{name}.half"
    with tarfile.open(half, "w:xz") as archive:
        archive.add(output / "compare.yaml", "compare.yaml", filter=nobodys)
        for run in sorted(path.parents[1] for path in output.glob(f"runs/*/{WEIGHTS}")):
            if not (run / "metrics.json").is_file():
                continue
            for path in (run / part for part in MEASURED if (run / part).is_file()):
                archive.add(path, str(path.relative_to(output)), filter=nobodys)
            weights = tarfile.TarInfo(str((run / WEIGHTS).relative_to(output)))
            weights.size = (run / WEIGHTS).stat().st_size
            archive.addfile(weights, io.BytesIO(bytes(weights.size)))
    os.replace(half, kept)


def nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove owner and time from an entry, so that an archive does not depend on who made it and when."""
    return entry.replace(mtime=0, uid=0, gid=0, uname="", gname="", deep=False)


def restore(name: str, output: Path) -> None:
    """Unpack the archived runs of a study, except those that `output` has already."""
    kept = RESULTS / f"{name}.tar.xz"
    if not kept.is_file():
        return
    there = {path.name for path in output.glob("runs/*")}
    with tarfile.open(kept) as archive:
        missing = [entry for entry in archive if entry.name.removeprefix("runs/").partition("/")[0] not in there]
        archive.extractall(output, missing, filter="data")


def table(found: Mapping[str, Any]) -> str:
    """What a comparison has found at a budget, as a table: a row for each contender."""
    lines = [
        "| | test loss | difference to plain LoRA (95 %) | p, corrected | learning rate | agreement of plans "
        "| processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["contenders"]:
        if one["loss"] is None:
            continue
        difference = one.get("difference")
        told = ("", "") if difference is None else told_difference(difference)
        edge = " (edge)" if one["at_edge"] else ""
        cells = (
            one["contender"], f"{one['loss']:.4f}", *told, f"{one['learning_rate']:g}{edge}",
            one["agreement_of_plans"], f"{one['processor_seconds']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def told_difference(difference: Mapping[str, Any]) -> tuple[str, str]:
    """Return a difference with its interval, and its p value, as text."""
    p = difference["adjusted"]
    span = "" if difference["low"] is None else f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
    return f"{difference['mean']:+.4f}{span}", "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def tables() -> str:
    """The tables of all studies."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        for found in json.loads(path.read_text(encoding="utf-8"))["budgets"]:
            seeds = max(one["seeds"] for one in found["contenders"])
            title = f"**{path.stem}, {found['budget']}** ({found['parameters']:,} parameters, {seeds} seeds)"
            parts.append(f"{title}\n\n{table(found)}\n\nThe verdict: {found['verdict']}.")
    return "\n\n".join(parts)


def main() -> None:
    """Run a study, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true")
    arguments, others = parser.parse_known_args()
    if arguments.table:
        print(tables())
    elif arguments.name is None or (arguments.data is None and arguments.name in ROWS):
        parser.error("a study and DATA, or --table")
    else:
        study(arguments.name, arguments.data, arguments.base, arguments.runs, others)


if __name__ == "__main__":
    main()
