"""One front for every benchmark: list, run, compare, draw.

    python -m benchmarks                                   # what there is, how long it takes, what it needs
    python -m benchmarks run cpu_prefill compile_cost      # each in a process of its own, one after the other
    python -m benchmarks run --all --quick                 # whether they all still run
    python -m benchmarks run exact_prefill -- --only Llama # what follows `--` goes to the benchmark
    python -m benchmarks compare old.json new.json         # exit status 1 where a case became slower
    python -m benchmarks figure results.json --out results.svg
    python -m benchmarks document                          # the tables of docs/performance.md, from benchmarks/results

A benchmark is a module of this folder with a docstring and `main()`. TAKES says how long, NEEDS what it cannot do
without, QUICK the arguments of a short run. None gives a speed-up of a result that its own check found wrong.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """What a module says of itself; read, not imported."""

    name: str
    line: str
    takes: str = ""
    needs: str = ""
    quick: tuple[str, ...] | None = None

    @property
    def can_run(self) -> bool:
        import torch

        return self.needs != "a GPU" or torch.cuda.is_available()


def described(path: Path) -> Benchmark | None:
    """The benchmark in a file or a folder's __main__.py; None where there is no `main()`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = ast.get_docstring(tree)
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if said is None or "main" not in names:
        return None
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            constants |= told(node.targets[0], node.value)
    quick = constants.get("QUICK")
    return Benchmark(
        path.parent.name if path.stem == "__main__" else path.stem,
        said.splitlines()[0],
        constants.get("TAKES", ""),
        constants.get("NEEDS", ""),
        tuple(quick) if quick is not None else None,
    )


def told(target: ast.expr, value: ast.expr) -> dict[str, object]:
    """Of TAKES, NEEDS and QUICK what an assignment gives, also one of several names at once."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return {k: v for pair in zip(target.elts, value.elts, strict=True) for k, v in told(*pair).items()}
    known = isinstance(target, ast.Name) and target.id in ("TAKES", "NEEDS", "QUICK")
    return {target.id: ast.literal_eval(value)} if known else {}


def benchmarks(folder: Path = FOLDER) -> dict[str, Benchmark]:
    """By name, in alphabetical order."""
    files = [p for p in folder.glob("*.py") if p.stem != "__main__"] + list(folder.glob("*/__main__.py"))
    found = [b for b in map(described, files) if b is not None]
    return {b.name: b for b in sorted(found, key=lambda b: b.name)}


def show() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("benchmark", "takes", "needs"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it measures")
    for found in benchmarks().values():
        table.add_row(found.name, found.takes, found.needs, found.line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def run(names: list[str], everything: bool, quick: bool, rest: list[str]) -> int:
    """The exit status: the number of benchmarks that failed, at most 100."""
    known = benchmarks()
    if unknown := [n for n in names if n not in known]:
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(known)}")
    if not names and not everything:
        raise SystemExit("name benchmarks, or give --all")
    failed = []
    for found in [known[n] for n in names] or list(known.values()):
        if not found.can_run and not names:
            print(f"--- {found.name}: left out, it needs {found.needs}", flush=True)
            continue
        if quick and found.quick is None:
            print(f"--- {found.name}: left out, it has no quick run", flush=True)
            continue
        given = [*(found.quick or () if quick else ()), *rest]
        print(f"--- {found.name} {' '.join(given)}".rstrip(), flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{found.name}", *given], cwd=FOLDER.parent).returncode:
            failed.append(found.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return min(len(failed), 100)


def compared(old: Path, new: Path, tolerance: float) -> int:
    from benchmarks.readers import read
    from benchmarks.record import compare

    before, after = read(old), read(new)
    if before.name != after.name:
        raise SystemExit(f"{old.name} is of {before.name}, {new.name} of {after.name}")
    changes, said = compare(before, after)
    for what in ("device", "cpu", "threads", "torch", "triton"):
        pair = before.environment.get(what), after.environment.get(what)
        if pair[0] != pair[1]:
            print(f"note: {what} was {pair[0]} and is {pair[1]}")
    for change in changes:
        print(("! " if change.slower(tolerance) else "  ") + str(change))
    for line in said:
        print(f"  {line}")
    worse = sum(change.slower(tolerance) for change in changes)
    wrong = [row.label for row in after.rows if row.wrong]
    print(f"{len(changes)} ratios compared, {worse} slower by more than {100 * tolerance:g} % and beyond noise")
    if not changes:
        print("nothing in common to compare", file=sys.stderr)
    for label in wrong:
        print(f"WRONG in the new run: {label}", file=sys.stderr)
    return int(worse > 0 or bool(wrong) or not changes)


def draw(path: Path, out: Path | None) -> int:
    from benchmarks.readers import read

    target = out or path.with_suffix(".svg")
    read(path).figure(target)
    print(f"wrote {target}")
    return 0


def document() -> int:
    from benchmarks.performance_document import write

    write()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list")
    one = commands.add_parser("run")
    one.add_argument("names", nargs="*")
    one.add_argument("--all", action="store_true")
    one.add_argument("--quick", action="store_true")
    two = commands.add_parser("compare")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    two.add_argument("--tolerance", type=float, default=0.05, help="share of a ratio that may be lost")
    three = commands.add_parser("figure")
    three.add_argument("file", type=Path)
    three.add_argument("--out", type=Path)
    commands.add_parser("document")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, rest = parser.parse_args(words[:cut]), words[cut + 1 :]
    if args.command == "run":
        sys.exit(run(args.names, args.all, args.quick, rest))
    if args.command == "compare":
        sys.exit(compared(args.old, args.new, args.tolerance))
    if args.command == "figure":
        sys.exit(draw(args.file, args.out))
    if args.command == "document":
        sys.exit(document())
    show()


if __name__ == "__main__":
    main()
