"""The reference of the plan file: its schema's keys, records and candidates as tables."""

from __future__ import annotations

from typing import Any

from attnopt.plan.schema import plan_schema
from attnopt.units import number_text

RECORDS = ("model", "budget", "constraints", "lengths", "predicted", "measured")
SHORT = {"integer": "whole number", "object": "record", "array": "list"}


def tables(_: str) -> str:
    """The keys of the file, one table for each record in it, and the candidates with their parameters."""
    keys = plan_schema()["properties"]
    rows = [(f"[`{k}`](#{k})" if k in RECORDS else f"`{k}`", kind(v), v["description"]) for k, v in keys.items()]
    parts = [table("key", rows)]
    for name in RECORDS:
        fields = flat(keys[name])
        parts.append(f"### {name}\n\n" + table("key", [(f"`{k}`", kind(v), meaning(v)) for k, v in fields.items()]))
    choices = keys["sites"]["additionalProperties"]["properties"]["choices"]["additionalProperties"]["oneOf"]
    parts.append("### sites\n\n" + candidates(choices))
    return "\n".join(parts)


def flat(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record, of a list's records, or of all that a record may be; inner ones by their path."""
    found: dict[str, Any] = {}
    for one in schema.get("oneOf", [schema.get("items", schema)]):
        for name, value in one["properties"].items():
            inner = {f"{name}.{k}": v for k, v in flat(value).items()} if "properties" in value else {}
            for key, said in {name: value, **inner}.items():
                if "const" in said:
                    said = {"enum": found.get(key, {"enum": []})["enum"] + [said["const"]]}
                found[key] = said
    return found


def kind(schema: dict[str, Any]) -> str:
    """The type in words."""
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    if "oneOf" in schema:
        return "record"
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    told = " or ".join(SHORT.get(name, name) for name in names)
    if schema["type"] == "array":
        told = f"list of {SHORT.get(schema['items']['type'], schema['items']['type'])}s"
    return told


def meaning(schema: dict[str, Any]) -> str:
    return str(schema.get("description", ""))


def candidates(choices: list[dict[str, Any]]) -> str:
    rows = []
    for one in choices:
        name, *parameters = one["properties"].items()
        told = "<br>".join(f"`{k}`: {span(v)}" for k, v in parameters)
        rows.append((f"`{name[1]['const']}`", one["description"], told or "none"))
    return table("candidate", rows, ("the head", "parameters"))


def span(schema: dict[str, Any]) -> str:
    """The range of a parameter. Bounds that only keep numbers sane are left out."""
    if "enum" in schema:
        return kind(schema)
    least, most = schema["minimum"], schema["maximum"]
    bounds = [f"at least {number_text(least)}"] * (least > -(2**30))
    bounds += [f"at most {number_text(most)}"] * (most < 2**30)
    step = [f"a multiple of {number_text(schema['multipleOf'])}"] if "multipleOf" in schema else []
    return ", ".join([SHORT.get(schema["type"], schema["type"]), *bounds, *step])


def table(first: str, rows: list[tuple[str, str, str]], rest: tuple[str, str] = ("type", "meaning")) -> str:
    head = f"| {first} | {rest[0]} | {rest[1]} |\n|---|---|---|\n"
    return head + "".join("| " + " | ".join(row) + " |\n" for row in rows)
