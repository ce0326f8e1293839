"""Print the size of every file and of the longest functions of the package.

    python tools/sizes.py [FOLDER]

The aims are 400 lines a file and 60 a function; what is above is marked, nothing is enforced.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 400, 60
LONGEST = 15


def function_sizes(tree: ast.Module) -> list[tuple[int, str, int]]:
    """(lines, name, first line) of each function, methods included."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [((f.end_lineno or f.lineno) - f.lineno + 1, f.name, f.lineno) for f in functions]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "attnopt")
    functions: list[tuple[int, str]] = []
    total = 0
    print(f"{'lines':>6}  file")
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        where = path.relative_to(root.parent).as_posix()
        lines = len(source.splitlines())
        total += lines
        print(f"{lines:6}  {where}{'  > ' + str(FILE_LINES) if lines > FILE_LINES else ''}")
        functions += [(n, f"{where}:{line} {name}") for n, name, line in function_sizes(ast.parse(source))]
    print(f"{total:6}  in all\n\n{'lines':>6}  function ({LONGEST} longest of {len(functions)})")
    for lines, name in sorted(functions, reverse=True)[:LONGEST]:
        print(f"{lines:6}  {name}{'  > ' + str(FUNCTION_LINES) if lines > FUNCTION_LINES else ''}")


if __name__ == "__main__":
    main()
