"""A process that runs cells: one JSON request a line on its input, one JSON record a line on its output.

{"class": "LlamaForCausalLM", "cell": "eager", "inductor": false, "timeout": 120}
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from typing import Any


class OutOfTime(BaseException):
    """Not an Exception, or the guards of torch and transformers would take it for a failure of theirs."""


def alarmed(*_: Any) -> None:
    raise OutOfTime


def main() -> None:
    # Whatever a library prints goes to the error stream; the records have the output for themselves.
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging

    import torch
    import transformers

    from benchmarks.zoo.build import summary
    from benchmarks.zoo.run_cell import run_cell

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGPROF, alarmed)
    for line in sys.stdin:
        asked = json.loads(line)
        base = {"class": asked["class"], "cell": asked["cell"]}
        # Processor time: on a machine that others use, a slow minute is no hang.
        signal.setitimer(signal.ITIMER_PROF, asked["timeout"])
        try:
            record = run_cell(asked["class"], asked["cell"], asked["inductor"])
        except OutOfTime:
            record = {**base, "status": "timed out", "seconds": asked["timeout"]}
        except Exception as error:
            record = {**base, "status": "broken", "reason": f"the zoo itself: {summary(error)}", "seconds": 0.0}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        records.write(json.dumps(record) + "\n")
        records.flush()


if __name__ == "__main__":
    main()
