"""What attnopt says on a terminal. Reports go to standard output, progress and errors to standard error.

Everything printed comes from the data of report.data, so that a table, --json and the page never differ. Text of the
user's own (module names, reasons) is never read as markup.
"""

from __future__ import annotations

from attnopt.report.terminal.benchmarks import print_bench
from attnopt.report.terminal.bisections import print_bisection
from attnopt.report.terminal.console import WIDTH, console
from attnopt.report.terminal.differences import print_difference
from attnopt.report.terminal.examined import print_examined
from attnopt.report.terminal.graphs import print_graphs
from attnopt.report.terminal.plans import print_head, print_plan, print_records
from attnopt.report.terminal.profiles import print_profile
from attnopt.report.terminal.progress import progress

__all__ = [
    "WIDTH",
    "Progress",
    "console",
    "print_bench",
    "print_bisection",
    "print_difference",
    "print_examined",
    "print_graphs",
    "print_head",
    "print_plan",
    "print_profile",
    "print_records",
    "progress",
]
