"""The command line: parse, run one command, turn every known mistake into one message and an exit code.

Exit codes: 0 done; 1 the task could not be done (no plan keeps the budget, a missing package, an interruption); 2 what
was given is at fault (the command line, a model, text, profile or plan).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from attnopt.options import EXAMPLES, HELP, build_parser

__all__ = ["EXAMPLES", "HELP", "build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.command == "demo":
        # The model is here; nothing is to be looked up.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from attnopt import commands
    from attnopt.backend import bypass
    from attnopt.errors import AttnoptError

    bypass.keep_quiet()
    try:
        if args.command == "demo":
            from attnopt import demo

            demo.command(args)
        else:
            commands.run(args)
    except AttnoptError as error:
        return fail(error, error.exit_code)
    except KeyboardInterrupt:
        from attnopt.commands import INTERRUPTED

        return fail(AttnoptError("Interrupted.", INTERRUPTED.get(args.command, "Nothing was written.")), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(
            AttnoptError(f"{where}{error.strerror or error}.", "Choose a place that exists and can be written."), 1
        )
    return 0


def fail(error: Exception, code: int) -> int:
    from attnopt.report.terminal import print_error

    print_error(error)  # type: ignore[arg-type]
    return code


if __name__ == "__main__":
    sys.exit(main())
