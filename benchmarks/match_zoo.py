"""Coverage of the matcher over every class of transformers that builds from a small random configuration.

    python -m benchmarks.match_zoo                      # every class, base cells and one of the grid: about an hour
    python -m benchmarks.match_zoo --subset fast        # the twenty classes of the tests
    python -m benchmarks.match_zoo --classes LlamaForCausalLM,GPT2LMHeadModel --cells "eager,sdpa padded"
    python -m benchmarks.match_zoo --inductor           # compiled by inductor: hours
    python -m benchmarks.match_zoo --inductor-count     # also how many sites inductor's own patterns fuse
    python -m benchmarks.match_zoo --keep               # also write benchmarks/results and docs/coverage.md

Every cell runs a model eagerly and through attnopt, whose rewritten graphs run as they are. The eager run's own calls,
and the values of their masks, are the truth. Finished cells are kept: the same command goes on where it was
interrupted, `--fresh` starts again. Exit status 1 where anything was wrong: a mask that is not the model's, another
output, a graph more than plain torch.compile makes, or an exception.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.zoo import summary
from benchmarks.zoo.cells import CELLS, COUNT, cells_of
from benchmarks.zoo.classes import FAST, FULL, Entry, entries
from benchmarks.zoo.pool import run_all
from benchmarks.zoo.store import Record, Store, versions

TAKES = "1 h"
QUICK = ("--classes", "LlamaForCausalLM", "--jobs", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", help="names of classes, or of kinds such as 'causal LM', separated by commas")
    parser.add_argument("--subset", choices=("fast", "full", "all"), default="all")
    parser.add_argument("--cells", help=f"of {', '.join(CELLS)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each")
    parser.add_argument("--timeout", type=int, default=120, help="seconds of processor time a cell may take")
    parser.add_argument("--fresh", action="store_true", help="forget what was finished before")
    parser.add_argument("--older", action="store_true", help="count cells that ran under other sources of the matcher")
    parser.add_argument("--inductor", action="store_true", help='run backend="attnopt" with inductor behind it')
    parser.add_argument("--inductor-count", action="store_true", help="count what inductor's own patterns fuse")
    parser.add_argument("--store", type=Path, help="the file of finished cells (runs/match_zoo.jsonl)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--out", type=Path, help="write the summary and the records there, with a table and a figure")
    parser.add_argument("--keep", action="store_true", help="write them to benchmarks/results, and docs/coverage.md")
    args = parser.parse_args(argv)
    unknown = [c for c in (args.cells or "").split(",") if c and c not in CELLS]
    if unknown:
        parser.error(f"no cell is called {', '.join(unknown)}; there are {', '.join(CELLS)}")
    return args


def chosen(args: argparse.Namespace) -> list[Entry]:
    """The classes asked for; an unknown name is an error."""
    found = entries()
    subset = {"fast": set(FAST), "full": set(FULL)}.get(args.subset)
    if args.classes:
        asked = {name.strip() for name in args.classes.split(",")}
        missing = asked - {e.name for e in found} - {e.kind for e in found}
        if missing:
            raise SystemExit(f"transformers has no class or kind {', '.join(sorted(missing))} in its auto mappings.")
        return [e for e in found if e.name in asked or e.kind in asked]
    return [e for e in found if subset is None or e.name in subset]


def requests(args: argparse.Namespace, classes: list[Entry]) -> list[Record]:
    """What is to be run, the first cell of every class before the second of any."""
    only = [c for c in (args.cells or "").split(",") if c]
    table: list[tuple[int, Record]] = []
    for position, entry in enumerate(classes):
        cells = [CELLS[c] for c in only] or cells_of(entry.name, set(FULL), position, args.inductor_count)
        for rank, cell in enumerate(cells):
            request = {"class": entry.name, "cell": cell.name, "inductor": args.inductor and cell != COUNT}
            table.append((rank, {**request, "timeout": args.timeout * (5 if args.inductor else 1)}))
    return [request for _, request in sorted(table, key=lambda row: row[0])]


def run(args: argparse.Namespace, asked: list[Record], store: Store, kinds: dict[str, Entry], console: Console) -> None:
    """Run what is missing; every finished cell is stored at once."""
    todo = [r for r in asked if (r["class"], r["cell"], r["inductor"]) not in store]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(asked), completed=len(asked) - len(todo))
        inductor = args.inductor
        for record in run_all(todo, min(args.jobs, max(1, len(todo)))):
            entry = kinds[record["class"]]
            record.update(
                kind=entry.kind, model_type=entry.model_type, inductor=inductor and record["cell"] != COUNT.name
            )
            store.add(record)
            bar.advance(task)
            if record["status"] in ("wrong", "broken", "timed out"):
                said = record.get("wrong") or record.get("broken") or [record.get("reason", "")]
                bar.console.print(f"{record['status']}: {record['class']} {record['cell']}: {said[:1]}", markup=False)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console(stderr=True)
    classes = chosen(args)
    asked = requests(args, classes)
    store = Store(args.store or ROOT / "runs" / "match_zoo.jsonl", versions(), args.fresh, args.older)
    try:
        run(args, asked, store, {e.name: e for e in classes}, console)
    except KeyboardInterrupt:
        console.print("interrupted: the finished cells are kept, the same command goes on")
        return 130
    records = [store.records[k] for r in asked if (k := (r["class"], r["cell"], r["inductor"])) in store]
    result = summary.summarise(records, store.versions)
    if args.json:
        json.dump(result, sys.stdout, indent=1)
    else:
        summary.show(result, Console())
    for folder in [f for f in (args.out, RESULTS if args.keep else None) if f is not None]:
        summary.write(folder, result, records)
    if args.keep:
        (ROOT / "docs" / "coverage.md").write_text(summary.document(result), encoding="utf-8")
    return 1 if result["total"]["wrong"] or result["total"]["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
