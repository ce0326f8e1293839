"""The plan file's schema, as JSON Schema 2020-12: ``python -m attnopt.plan.schema`` prints it.

It is made of the records of this package and of the registered candidates' parameters, and says what a plan looks like.
Reading (reading.py) is stricter, in what a schema cannot say: that each head of a site is chosen once, that the file
beside the plan is there and fits, that 5.0 is no whole number.
"""

from __future__ import annotations

import json
import sys
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from attnopt.plan import OBJECTIVES, SCHEMA, UNITS, Constraints, Lengths, Measured, Predicted
from attnopt.registry import CANDIDATES

Schema = dict[str, Any]

HEADS = "[0-9]{1,6}(-[0-9]{1,6})?"
TYPES = {str: "string", int: "integer", float: "number"}


def plan_schema() -> Schema:
    """The whole schema; the keys of a plan stand under "properties", in the order of the file."""
    length = {"type": "integer", "minimum": 1}
    lengths = record(Lengths)
    for key, value in lengths["properties"].items():
        value |= length if key == "planned" else {"items": length}
    keys = {
        "schema": {"const": SCHEMA, "description": "version of this format; another one is refused"},
        "versions": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "the tools that wrote it",
        },
        "model": closed(
            {
                "name": {"type": "string", "description": "what `attnopt plan` was given"},
                "fingerprint": closed(
                    {
                        "structure": {"type": "string", "description": "hash of the configuration and the sites"},
                        "samples": {
                            "type": "array",
                            "items": {"type": "number"},
                            "description": "of its weights",
                        },
                    },
                    "by which another model is refused. Dtype, device and compilation do not change it",
                ),
            },
            "what the plan was made for",
        ),
        "budget": budget(),
        "objective": {"enum": list(OBJECTIVES), "description": "what the costs weigh"},
        "constraints": record(Constraints, "what was asked for besides the budget; null where it was not"),
        "lengths": lengths | {"description": "total lengths N, in tokens"},
        "min_length": {
            "type": "integer",
            "minimum": 0,
            "description": "under this length every site runs dense, because no window saves time there; heads that "
            "are pruned stay pruned",
        },
        "predicted": record(Predicted, "what the planner expected at the planned length"),
        "measured": {
            "type": "array",
            "items": record(Measured),
            "description": "one record for each split of the text and each length; null where something was not "
            "measured",
        },
        "cost_table": {
            "type": "string",
            "description": "id of the table of costs that the prediction stands on; `density` if nothing was measured",
        },
        "calibration": {"type": "string", "description": "hash of the profiled text"},
        "fitted": {
            "type": ["string", "null"],
            "pattern": "^[0-9a-f]{64}$",
            "description": "sha256 of the file beside this one, or null where no head needs it",
        },
        "seed": {"type": "integer", "description": "of everything random"},
        "sites": sites(),
    }
    found = closed(keys)
    found["properties"]["visits"] = visits()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "attnopt plan", **found}


def closed(properties: Schema, description: str = "") -> Schema:
    """A record that has all of these keys and no others."""
    told = {"description": description} if description else {}
    keys = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", **told, "properties": properties, **keys}


def record(kind: type, description: str = "") -> Schema:
    """Of a flat dataclass whose fields are annotated with what they mean."""
    return closed({name: value(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}, description)


def value(hint: Any) -> Schema:
    """Of Annotated[type, meaning]: a plain type, one that may be None, or a tuple of one type."""
    plain, meaning = get_args(hint)
    assert get_origin(hint) is Annotated
    if get_origin(plain) is tuple:
        return {"type": "array", "items": {"type": TYPES[get_args(plain)[0]]}, "description": meaning}
    kinds = [TYPES[part] for part in get_args(plain) or (plain,) if part is not NoneType]
    return {"type": [*kinds, "null"] if NoneType in get_args(plain) else kinds[0], "description": meaning}


def budget() -> Schema:
    """Each kind of budget has its own unit."""
    limit = {"type": "number", "minimum": 0, "description": "in `unit`"}
    kinds = [closed({"kind": {"const": kind}, "limit": limit, "unit": {"const": unit}}) for kind, unit in UNITS.items()]
    return {
        "oneOf": kinds,
        "description": "what the plan may cost: kind `loss`, with a limit in percent of the dense loss, or `kl`, the "
        "divergence from the dense model, in nats per token",
    }


def sites() -> Schema:
    choices = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{HEADS}(,{HEADS})*$"},
        "additionalProperties": {"oneOf": [choice(candidate) for _, candidate in CANDIDATES]},
        "description": 'per heads, such as `"0-3,6"`, what replaces them. Every head stands in exactly one range',
    }
    heads = {"type": "integer", "minimum": 1, "description": "the number of query heads"}
    return {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": closed({"heads": heads, "choices": choices}),
        "description": "the attentions by their module path, each with its query heads and their choices",
    }


def visits() -> Schema:
    """The one key that a plan may lack: where no head's keys are selected."""
    share = {"type": "number", "minimum": 0, "maximum": 1}
    meanings = {
        "visited": "of the blocks of keys that it could visit; of a head that selects tokens while decoding, of the "
        "steps those that select anew, 0 where another layer does",
        "skipped": "of the blocks visited, by their scores",
        "recalled": "of the dense soft-max mass, mean over rows",
    }
    heads = closed({name: share | {"description": meaning} for name, meaning in meanings.items()})
    of_site = {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,6}$"}, "additionalProperties": heads}
    return {
        "type": "object",
        "additionalProperties": of_site,
        "description": "by site and head, what heads whose keys are selected while running did on the text tried, as "
        "expected at the planned length; missing where no head's are",
    }


def choice(candidate: Any) -> Schema:
    """The name and parameters of a Candidate; the description is the first line of its file."""
    told = (sys.modules[type(candidate).__module__].__doc__ or "").partition("\n")[0].partition(": ")[2]
    parameters = {p.name: parameter(p) for p in candidate.params}
    return closed({"candidate": {"const": candidate.name}, **parameters}, told.rstrip("."))


def parameter(param: Any) -> Schema:
    """The values of a Param, or its range and the step that it is a multiple of."""
    if param.among:
        return {"enum": list(param.among)}
    bounds = {"minimum": param.kind(param.least), "maximum": param.kind(param.most)}
    return {"type": TYPES[param.kind], **bounds, **({"multipleOf": param.step} if param.step else {})}


if __name__ == "__main__":
    print(json.dumps(plan_schema(), indent=2, ensure_ascii=False))
