"""What attnopt found out, as plain JSON data: the source of --json, of the terminal's tables and of the page alike.

graphs_json(reports)    every site of every graph, what was done to it or why it was left alone; equal rows folded
examined_json(found)    the same of a model that was examined, with phases, savings, graph breaks and recompiles
plan_json(plan)         every head's span at the planned length, distinct spans, density, figures
profile_json(profile)   where every head's mass lies and what dropping keys costs it, in nats per token
records_json(records)   the verify search, predicted against measured
candidates_json(plan, profile)    what every head could have been replaced by, and what that was predicted to lose
front_json(plan, posed)           the Pareto front, the plan's point on it, predicted against measured
head_json(plan, profile, posed, site, head)   why one head has its choice
plans_json(a, b, names), profiles_json(a, b, names)   what two of them do not have in common
visits_json(sites)      what heads whose keys are selected visited so far
environment()           versions, hardware and variables; cached(): the folders of kernels and times
launched_sources()      the kernels that ran in this process
page_data(title, found)  all of these, as a page takes them
"""

from __future__ import annotations

from attnopt.report.data.candidates import candidates_json
from attnopt.report.data.difference import plans_json, profiles_json
from attnopt.report.data.explained import head_json
from attnopt.report.data.front import front_json
from attnopt.report.data.graphs import examined_json, graphs_json
from attnopt.report.data.kernels import launched_sources
from attnopt.report.data.machine import cached, environment
from attnopt.report.data.page import of_graphs, page_data
from attnopt.report.data.plans import (
    constraint_texts,
    finite,
    kept_text,
    plan_facts,
    plan_json,
    records_json,
    window_text,
)
from attnopt.report.data.visits import visits_json, visits_lines
from attnopt.report.profile_map import profile_json

__all__ = [
    "cached", "candidates_json", "constraint_texts", "environment", "examined_json", "finite", "front_json",
    "graphs_json", "head_json", "kept_text", "launched_sources", "of_graphs", "page_data", "plan_facts", "plan_json",
    "plans_json", "profile_json", "profiles_json", "records_json", "visits_json", "visits_lines", "window_text",
]  # fmt: skip
