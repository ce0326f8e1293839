"""The rules of this code base that a linter does not know. CONTRIBUTING.md says them in words."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from attnopt import settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnopt"
LINKS = ("passes", "patterns", "codegen")

# Floors, bottom up. A module imports from its own floor and from below; `attnopt` itself is `__init__`.
READING = ("strict_json", "arguments", "parsing")
FITS = ("fitted", "fitting")
PROFILING = ("ranks", "profiler", "supervision", "probe", "conversations")
FLOORS = {
    0: ("ir", "errors", "escapes", "reasons", "settings", "registry", "corpus", *READING, "progress", "units"),
    1: ("masks", "plan", "codegen", "feature_maps", "fingerprint", *FITS, "statistics", "profile_file", "selection"),
    2: ("patterns",),
    3: ("candidates", "ops", "capture", "board", "mixed"),
    4: ("passes", "instrument", "projection", "recompute", "measure", "cost", "cache", "distill", *PROFILING),
    5: ("planner", "backend", "benchmark", "text"),
    6: ("hf", "examine", "report", "commands", "demo"),
    7: ("options", "completion", "cli", "__main__", "__init__"),
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}

# One library, one home: the units that may import it.
HOMES = {
    "rich": {"report", "cli"},
    "networkx": {"passes", "report"},
    "transformers": {"hf"},
    "tokenizers": {"hf"},
    "huggingface_hub": {"hf"},
    "triton": {"codegen", "statistics"},
    "sympy": {"masks", "cost"},
    "matplotlib": {"report"},
    "pygments": {"report"},
    "shtab": {"completion"},
}

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_BUILTINS = {"eval", "exec", "compile"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)}"


def imports_of(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """The absolute name of everything that a file imports, at its top level or nested.

    ``from a import b`` yields ``a.b``: whether b is a module or a name in a makes no difference to the rules.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            parts = (*base, *([node.module] if node.module else []))
            yield from ((".".join((*parts, alias.name)), node) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((str(name.value), node) for name in node.args[:1] if isinstance(name, ast.Constant))


def unit_of(path: Path) -> str:
    """The part of the package that a file belongs to: its module or its folder."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def internal_imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """The units of attnopt that a file imports; names such as attnopt.__version__ are no units."""
    for name, node in imports_of(path):
        parts = name.split(".")
        if parts[0] != "attnopt":
            continue
        target = PACKAGE / parts[1] if len(parts) > 1 else PACKAGE
        if target.is_dir() or target.with_suffix(".py").exists():
            yield (parts[1] if len(parts) > 1 else "__init__"), node


def public_files() -> list[Path]:
    """Every file that is, or is about to be, part of the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        listed = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def public_texts(suffix: str = "") -> Iterator[tuple[Path, str]]:
    for path in public_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.name.endswith(suffix):
            yield path, text


def registers_something(path: Path) -> bool:
    """Whether a class or function in the file is registered with a decorator, as in @TARGETS.register("cpu")."""
    decorators = (d for node in ast.walk(tree_of(path)) for d in getattr(node, "decorator_list", ()))
    return any(isinstance(d, ast.Call) and ast.unparse(d.func).endswith(".register") for d in decorators)


def test_every_pattern_candidate_and_target_has_its_test() -> None:
    modules = [p for p in sources("attnopt/candidates") if not p.stem.startswith("_")]
    modules += [p for p in sources("attnopt/patterns", "attnopt/codegen") if registers_something(p)]
    twins = {p: ROOT / "tests" / p.parent.relative_to(PACKAGE) / f"test_{p.name}" for p in modules}
    missing = [f"{p.relative_to(ROOT)} needs {t.relative_to(ROOT)}" for p, t in twins.items() if not t.exists()]
    assert not missing, "\n".join(missing)


def test_every_module_says_what_it_is_for() -> None:
    silent = [p for p in sources("attnopt") if tree_of(p).body and not ast.get_docstring(tree_of(p))]
    assert not silent, "no docstring: " + ", ".join(str(p.relative_to(ROOT)) for p in silent)


def test_every_unit_has_a_floor() -> None:
    homeless = {unit_of(p) for p in sources("attnopt")} - set(FLOOR_OF)
    assert not homeless, f"add {', '.join(sorted(homeless))} to FLOORS"


def test_nothing_imports_upward() -> None:
    upward = [
        f"{where(path, node)}: floor {FLOOR_OF[unit_of(path)]} imports {unit} of floor {FLOOR_OF[unit]}"
        for path in sources("attnopt")
        for unit, node in internal_imports(path)
        if FLOOR_OF.get(unit, 0) > FLOOR_OF.get(unit_of(path), 99)
    ]
    assert not upward, "\n".join(upward)


def test_no_circle_among_the_units_of_a_floor() -> None:
    needs: dict[str, set[str]] = {}
    for path in sources("attnopt"):
        needs.setdefault(unit_of(path), set()).update(u for u, _ in internal_imports(path) if u != unit_of(path))
    while ready := [unit for unit in needs if not needs[unit] & set(needs)]:
        for unit in ready:
            del needs[unit]
    assert not needs, f"among these is a circle: {', '.join(sorted(needs))}"


def test_each_library_stays_in_its_home() -> None:
    strays = [
        f"{where(path, node)}: {name.split('.')[0]} belongs in {', '.join(sorted(HOMES[name.split('.')[0]]))}"
        for path in sources("attnopt")
        for name, node in imports_of(path)
        if unit_of(path) not in HOMES.get(name.split(".")[0], {unit_of(path)})
    ]
    assert not strays, "\n".join(strays)


def test_the_links_at_the_root_show_the_stage_folders() -> None:
    for name in LINKS:
        assert (ROOT / name).is_symlink() and os.readlink(ROOT / name) == f"attnopt/{name}"


def test_nothing_imports_through_the_links() -> None:
    through = [
        where(path, node)
        for path in sources("attnopt", "tests", "tools", "examples", "benchmarks")
        for name, node in imports_of(path)
        if name.split(".")[0] in LINKS
    ]
    assert not through, "\n".join(through)


def unsafe_calls(path: Path) -> Iterator[ast.AST]:
    """Whatever could run code that a file brings along."""
    for name, node in imports_of(path):
        if name.split(".")[0] in UNSAFE_MODULES or name == "torch.load":
            yield node
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS
            pickled = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
            if plain or pickled or ast.unparse(node.func) == "torch.load":
                yield node


def test_the_package_runs_no_code_from_files() -> None:
    found = [where(path, node) for path in sources("attnopt") for node in unsafe_calls(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("code", ["import pickle", "from torch import load", "torch.load(f)", "eval(x)", "exec(x)"])
def test_unsafe_code_is_seen(code: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(code)
    assert list(unsafe_calls(path))


def test_docs_list_every_environment_variable() -> None:
    rows = re.findall(r"^\| `(ATTNOPT_\w+)` \| `([^`]*)` \| (.+?) \|$", (ROOT / "docs/env.md").read_text(), re.M)
    assert {name: (default, meaning) for name, default, meaning in rows} == settings.VARIABLES


def test_every_environment_variable_is_a_setting() -> None:
    """Read in settings.py and listed there, so that `attnopt env` and docs/env.md know it."""
    unknown = [
        f"{where(path, node)}: {node.value}"
        for path in sources("attnopt")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"ATTNOPT_[A-Z_]+", node.value)
        and node.value not in settings.VARIABLES
    ]
    assert not unknown, "\n".join(unknown)


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path, text in public_texts(".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_the_project_speaks_of_itself_only() -> None:
    """No paths of one machine and no word of how the text came about. Spelled in parts, or this file would be found."""
    banned = ("/wor" + "k/", "/roo" + "t/", "/opt/" + "wheels", "sub" + "agent", "this " + "session", "issue " + "#")
    found = [
        f"{path.relative_to(ROOT)}: {word}" for path, text in public_texts() for word in banned if word in text.lower()
    ]
    assert not found, "\n".join(found)
