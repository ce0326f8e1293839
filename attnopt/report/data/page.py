"""The data of a page, put together in one place: a title, what there is, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.ir import GraphReport
from attnopt.report.data.graphs import graphs_json
from attnopt.report.data.machine import environment
from attnopt.report.data.plans import plan_facts
from attnopt.report.pictures import pictures_json


def page_data(title: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `report.page.write_page` takes. found: any of its keys; a plan's figures join the summary."""
    facts = plan_facts(found["plan"]) if "plan" in found else []
    summary = [*found.get("summary", ()), *facts]
    return {"title": title, **found, "summary": summary, "environment": environment()}


def of_graphs(reports: Sequence[GraphReport]) -> dict[str, Any]:
    """The sites of some graphs and what was done to them, as rows and as pictures; nothing where there are none."""
    return {"graphs": graphs_json(reports), "pictures": pictures_json(reports)} if reports else {}
