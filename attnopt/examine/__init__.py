"""What would be done to a model, with nothing changed: every attention of every graph that Dynamo makes of it.

calls.py     which calls a model gets: a prompt, a step of generation, and what makes Dynamo compile anew
trace.py     the calls under Dynamo, each graph through the pipeline, none of it compiled
breaks.py    graph breaks and recompilations, with their causes, as Dynamo tells them
savings.py   what exact mode would not compute or store any more, counted
timing.py    an attention before and after its rewriting, timed
records.py   what is found out, as frozen records
"""

from attnopt.examine.records import Break, Counted, Examined, Graph, Recompile, Saving, Timing
from attnopt.examine.trace import examine, examine_model

__all__ = [
    "Break", "Counted", "Examined", "Graph", "Recompile", "Saving", "Timing", "examine", "examine_model",
]  # fmt: skip
