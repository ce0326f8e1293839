"""What attnopt says on a terminal. Reports go to standard output, progress and errors to standard error.

Everything printed comes from the data of report.data, so that a table, --json and the page never differ. Text of the
user's own (module names, reasons) is never read as markup.
"""

from __future__ import annotations

from attnopt.report.terminal.benchmarks import print_bench
from attnopt.report.terminal.console import WIDTH, console, print_error, progress
from attnopt.report.terminal.differences import print_difference
from attnopt.report.terminal.graphs import print_graphs
from attnopt.report.terminal.plans import print_head, print_plan, print_records
from attnopt.report.terminal.profiles import print_profile

__all__ = [
    "WIDTH",
    "console",
    "print_bench",
    "print_difference",
    "print_error",
    "print_graphs",
    "print_head",
    "print_plan",
    "print_profile",
    "print_records",
    "progress",
]
