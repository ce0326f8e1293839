"""What attnopt adds to torch's structured log (`TORCH_TRACE=DIR`), which `tlparse` shows under each compile id.

    attnopt_report   what was done to the graph, site by site, and why not
    attnopt_graph    the graph that went to inductor

torch's own interface for this is private: where it is missing, or is another than expected, that is said once and
nothing else comes of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.fx import Graph

from attnopt.ir import GraphReport
from attnopt.passes.graph_text import graph_text

log = logging.getLogger("attnopt")
_said = False


def graph(given: Graph) -> None:
    """Add the graph to the log of the compilation under way; its text is made only if there is such a log."""
    artifact("attnopt_graph", lambda: graph_text(given))


def report(made: GraphReport) -> None:
    artifact("attnopt_report", lambda: "\n".join(made.lines()) or "no attention was found")


def artifact(name: str, text: Callable[[], str]) -> None:
    global _said
    try:
        from torch._logging import trace_structured

        about = {"name": name, "encoding": "string"}
        trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text)
    except Exception as error:
        if not _said:
            _said = True
            log.info("torch's structured log takes no artifacts of attnopt: %s: %s", type(error).__name__, error)
