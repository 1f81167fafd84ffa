"""The promises that the source tree itself makes.

The files: imports point downwards, the low layers stay light, nothing unpickles, no file outgrows a sitting.
The package: the command line starts without torch, and the wheel carries every file.
The pages around it: what the README shows exists and compiles; every dependency is pinned within its range.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from variants import CHECKED, FAST

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "loralloc"

LAYERS = (  # top to bottom; the units of one layer are siblings
    ("cli", "testing"),
    ("compare", "frontier"),
    ("recipe",),
    ("training",),
    ("report",),
    ("tasks",),
    ("adapter",),
    ("methods",),
    ("gating",),
    ("plain_lora", "sharding"),
    ("peft_layers",),
    ("trace",),
    ("kernel",),
    ("unpickling", "native", "budget", "schedule", "knapsack", "allocate", "quantized", "outputs"),
    ("setting_types",),
    ("plan", "recipes"),
    ("naming", "patterns", "plain_yaml"),
    ("files",),
    ("reading",),
    ("errors", "_version"),
)
DEPTH = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer}
MAY_IMPORT_FROM_SAME_LAYER = {"budget", "knapsack", "allocate"}  # pure functions share pieces

FOREIGN: dict[
    str, set[str]
] = {  # third-party packages that a unit or a file may import; units that are not listed may import any dependency
    "_version": set(),
    "errors": set(),
    "files": set(),
    "reading": set(),
    "patterns": set(),
    "plain_yaml": {"yaml"},
    "recipes": set(),
    "plan": set(),
    "trace": set(),
    "kernel": {"torch"},
    "native": {"torch"},
    "budget": {"pydantic"},
    "schedule": set(),
    "knapsack": {"numpy"},
    "allocate": {"torch"},
    "gating": {"torch", "peft"},
    "peft_layers": {"torch", "peft", "transformers"},
    "unpickling": {"torch"},
    "quantized": {"torch", "bitsandbytes"},
    "outputs": {"torch"},
    "plain_lora": {"torch", "peft"},
    "sharding": {"torch"},
    "naming": set(),
    "adapter.folders": set(),
    "adapter.from_plan": {"torch", "peft"},
    "methods": {"torch", "pydantic"},
    "compare.statistics": {"numpy", "mpmath"},
    "report": {"matplotlib", "numpy", "yaml", "jinja2"},
    "recipe.source": {"yaml"},
    "setting_types": {"pydantic", "pydantic_core"},
    "recipe.schema": {"pydantic", "pydantic_core", "yaml"},
    "recipe.sections": {"pydantic"},
    "recipe.rules": {"pydantic"},
}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LONGEST_FILE = 450


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def unit_of(path: Path) -> str:
    """The layer entry a file belongs to; the package's own __init__ is "loralloc"."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "loralloc" if first == "__init__" else first


def allowed_packages(path: Path) -> set[str] | None:
    """What FOREIGN says of a file, or of the folder it lies in."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return FOREIGN.get(module, FOREIGN.get(unit_of(path)))


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", dotted name) for every import, those in functions and under TYPE_CHECKING too."""
    package = ("loralloc", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((f"{place(path)}:{node.lineno}", name) for name in names)


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", unit) per import of the package itself; a name of its __init__ is "loralloc"."""
    for where, name in imports(path):
        top, *rest = name.split(".")
        if top == "loralloc":
            yield where, rest[0] if rest and rest[0] in DEPTH else "loralloc"


def circle(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """The first way found that leads back to where it began; none in a graph without circles."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(edges[node]):
            if found := walk(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next(filter(None, (walk(node, []) for node in sorted(edges))), [])


class TestSource:
    def test_every_file_has_a_layer(self) -> None:
        unknown = {unit_of(path) for path in sources()} - set(DEPTH) - {"loralloc"}
        assert not unknown, f"add {sorted(unknown)} to LAYERS"

    def test_imports_point_downwards(self) -> None:
        wrong = []
        for path in sources():
            unit = unit_of(path)
            for where, target in own_imports(path):
                if unit == "loralloc":  # the public interface stands above all but the command line
                    allowed = target not in ("cli", "loralloc")
                elif target == "loralloc":  # back through the top: a cycle
                    allowed = False
                else:
                    sideways = DEPTH[target] == DEPTH[unit] and unit in MAY_IMPORT_FROM_SAME_LAYER
                    allowed = target == unit or DEPTH[target] > DEPTH[unit] or sideways
                if not allowed:
                    wrong.append(f"{where}: {unit} imports {target}")
        assert not wrong, "\n".join(wrong)

    def test_no_file_imports_itself_through_others(self) -> None:
        """Also inside folders, and for types alone: what is below never looks up."""
        named = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sources()}
        modules = {name.removesuffix(".__init__"): path for name, path in named.items()}
        edges: dict[str, set[str]] = {}
        for module, path in modules.items():
            edges[module] = set()
            for _, name in imports(path):
                parts = name.split(".")
                targets = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
                edges[module] |= {next((t for t in targets if t in modules), "")} - {"", module}
        assert sum(map(len, edges.values())) > 300
        assert circle(edges) == []

    def test_a_circle_is_found(self) -> None:
        assert circle({"a": {"b", "c"}, "b": {"d"}, "c": set(), "d": {"a"}}) == ["a", "b", "d", "a"]

    def test_low_layers_import_only_what_they_need(self) -> None:
        wrong = []
        for path in sources():
            packages = allowed_packages(path)
            if packages is None:
                continue
            allowed = sys.stdlib_module_names | packages | {"loralloc"}
            wrong += [f"{where}: {name}" for where, name in imports(path) if name.split(".")[0] not in allowed]
        assert not wrong, "\n".join(wrong)

    def test_only_two_files_know_the_internals_of_peft(self) -> None:
        wrong = []
        for path in sources():
            if unit_of(path) in ("gating", "peft_layers"):
                continue
            wrong += [f"{where}: {name}" for where, name in imports(path) if name.startswith("peft.tuners")]
            wrong += [
                f"{place(path)}:{node.lineno}: peft.tuners"
                for node in ast.walk(syntax(path))
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "peft.tuners"
            ]
        assert not wrong, "\n".join(wrong)

    def test_nothing_unpickles(self) -> None:
        wrong = []
        for path in sources():
            wrong += [f"{where}: {name}" for where, name in imports(path) if name.split(".")[0] in UNPICKLERS]
            wrong += [f"{where}: {name}" for where, name in imports(path) if name == "torch.load"]
            # `unpickling` takes the place of torch.load, so that no library finds it.
            loaders = () if unit_of(path) == "unpickling" else ("torch.load", "torch.jit.load")
            for node in ast.walk(syntax(path)):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in loaders:
                    wrong.append(f"{place(path)}:{node.lineno}: {ast.unparse(node)}")
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    wrong.append(f"{place(path)}:{node.value.lineno}: allow_pickle")
        assert not wrong, "\n".join(wrong)

    def test_only_the_command_line_prints(self) -> None:
        wrong = [
            f"{place(path)}:{node.lineno}"
            for path in sources()
            if unit_of(path) != "cli"
            for node in ast.walk(syntax(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not wrong, "\n".join(wrong)

    def test_files_are_short(self) -> None:
        folders = (ROOT / name for name in ("src", "tests", "benchmarks", "examples"))
        lengths = {
            place(path): path.read_text(encoding="utf-8").count("\n")
            for folder in folders
            for path in folder.rglob("*.py")
        }
        assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}


def inherited(tree: ast.AST, name: str) -> list[ast.AST]:
    """Tests of this name that a class has from the contract of methods."""
    if not isinstance(tree, ast.ClassDef) or "MethodContract" not in map(ast.unparse, tree.bases):
        return []
    nodes = ast.walk(syntax(PACKAGE / "testing" / "contract.py"))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]


def test_tests_with_few_fast_variants_are_there() -> None:
    for name in {*FAST, *CHECKED}:
        path, *inner = name.split("::")
        tree: ast.AST = syntax(ROOT / "tests" / path)
        for part in inner:
            found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part]
            found = found or inherited(tree, part)
            assert len(found) == 1, name
            (tree,) = found


class TestStartUp:
    HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib")

    @staticmethod
    def modules_after(code: str) -> set[str]:
        """Top-level modules that are loaded in a new interpreter once it has run `code`."""
        last = "import sys; sys.stderr.write('\\n'.join({name.split('.')[0] for name in sys.modules}))"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{last}"], capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return set(done.stderr.split())

    @pytest.mark.parametrize(
        "unit",
        ["errors", "plan", "recipes", "recipe.schema", "recipe.passthrough", "report", "cli.main", "cli.completion"],
    )
    def test_light_units_load_without_torch(self, unit: str) -> None:
        modules = [f"loralloc.{unit}"]
        if unit == "report":
            modules += [f"loralloc.report.{path.stem}" for path in (PACKAGE / "report").glob("[!_]*.py")]
        assert "torch" not in self.modules_after(f"import {', '.join(modules)}")

    @staticmethod
    def commands(lines: Iterable[str], code: int) -> str:
        """Code that runs commands, each of which ends with the same exit code."""
        return (
            "import sys\nfrom loralloc.cli.main import main\n"
            f"for line in {list(lines)}:\n"
            "    sys.argv = ['loralloc', *line.split()]\n"
            "    try:\n        main()\n"
            f"    except SystemExit as stop:\n        assert (stop.code or 0) == {code}, line\n"
        )

    def test_help_loads_nothing_heavy(self) -> None:
        assert not self.modules_after(self.commands(["--help"], 0)) & {*self.HEAVY, "pydantic", "yaml"}

    def test_wrong_paths_are_refused_before_anything_heavy_loads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("run/recipe.yaml", "done/recipe.yaml"):
            Path(name).parent.mkdir()
            shutil.copy(PACKAGE / "recipes/demo/lora.yaml", name)
        for name in ("model/config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
            (Path("done") / name).parent.mkdir(exist_ok=True)
            (Path("done") / name).touch()
        lines = [f"{verb} {run}" for verb in ("evaluate", "export") for run in ("nowhere", "run")]
        lines += ["evaluate done --data none.jsonl", "export done --to done/adapter", "export done --to done/file"]
        lines += ["truncate done/adapter --output done/file --total_rank 1", "demo --output done"]
        (Path("done") / "lora").touch()
        (Path("done") / "file").touch()
        assert not self.modules_after(self.commands(lines, 2)) & set(self.HEAVY)

    def test_what_is_heavy_is_seen(self) -> None:
        assert set(self.HEAVY) & self.modules_after("import matplotlib") == {"matplotlib"}


class TestPackaging:
    @staticmethod
    def pins() -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
        return {canonicalize_name(name): version for name, version in found}

    def test_every_dependency_is_pinned_within_its_range(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        lines = [
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *(line for extra in project["project"]["optional-dependencies"].values() for line in extra),
            *(line for group in project["dependency-groups"].values() for line in group),
        ]
        pins = self.pins()
        for requirement in map(Requirement, lines):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin, f"constraints.txt has no pin for {requirement.name}"
            assert requirement.specifier.contains(pin), f"{requirement} in pyproject.toml, but {pin} in constraints.txt"


FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
BRANCHES = re.compile(r"[│├└─]")


def tree_paths(text: str) -> list[str]:
    """Paths of the file tree: the fenced block that names src/, one entry a line, nested by indentation."""
    bodies = [body for _, body in FENCE.findall(text) if re.search(r"^\W*src/", body, re.M)]
    assert len(bodies) == 1, f"expected one fenced file tree with a line for src/, found {len(bodies)}"
    paths, parents = [], []
    for line in BRANCHES.sub(" ", bodies[0]).splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if not entry or (not paths and entry[2] in (".", "loralloc/")):  # the root is the repository itself
            continue
        while parents and parents[-1][0] >= len(entry[1]):
            parents.pop()
        path = (parents[-1][1] if parents else "") + entry[2]
        parents.append((len(entry[1]), path if path.endswith("/") else path + "/"))
        paths.append(path)
    return paths


class TestDocumentation:
    README = ROOT / "README.md"

    def test_python_examples_compile(self) -> None:
        found = 0
        for page in [self.README, *(ROOT / "docs").rglob("*.md")]:
            for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
                if language == "python":
                    compile(code, place(page), "exec")
                    found += page == self.README
        assert found, "README.md shows no ```python example"

    def test_the_file_tree_of_the_architecture_is_the_real_one(self) -> None:
        paths = tree_paths((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
        assert [path for path in paths if not (ROOT / path).exists()] == []
        named = {path.rstrip("/") for path in paths}
        units = {p for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.*"))}
        assert [place(p) for p in sorted(units) if not p.name.startswith("_") and place(p) not in named] == []

    def test_the_tree_reader_follows_indentation(self) -> None:
        rows = (
            "loralloc/",
            "├── src/loralloc/",
            "│   ├── plan.py   a file",
            "│   └── cli/",
            "└── tests/   its mirror",
        )
        drawn = "\n".join(("```text", *rows, "```", ""))
        assert tree_paths(drawn) == ["src/loralloc/", "src/loralloc/plan.py", "src/loralloc/cli/", "tests/"]
