"""One site before and after its rewrite, drawn side by side: what was computed, and what is left of it.

pictures_json(reports)   [{"site": "model.layers.0-31.self_attn", "caption": ..., "before": [...], "after": [...]}]
picture_svg(item)        the two graphs of one of them as an SVG in the page's colours
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from attnopt.ir import REST, GraphReport, Op, Rewrite
from attnopt.report import figures
from attnopt.report.cells import counted, fold_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attnopt.report.layered import Layout

# Operations that move no number: a chain of them is one box.
VIEWS = frozenset(
    ("view", "reshape", "expand", "clone", "permute", "transpose", "unsqueeze", "squeeze", "contiguous", "alias", "t",
     "flatten", "unflatten", "expand_as", "view_as", "detach", "lift_fresh_copy")
)  # fmt: skip
SHORT = {
    "scaled_dot_product_attention": "SDPA", "_to_copy": "cast", "bitwise_and": "and", "__and__": "and", "__or__": "or",
    "_unsafe_view": "view", "_softmax": "softmax",
}  # fmt: skip
CORE = frozenset(("matmul", "bmm", "mm", "einsum", "baddbmm", "softmax", "SDPA"))
OPERANDS = ("q", "k", "v")
WIDTH = 7.0  # inches, at 96 to an inch the 700 pixels of a narrow page
ROW = 0.5  # inches
TALL = 0.3  # of a row: from the middle of a box to its rim
NAME, SHAPE = 8.5, 7.0  # points
LETTER = {NAME: 0.58, SHAPE: 0.52}  # of a letter's height: its width, taken a little large
TITLE, MARGIN = 1.6, 0.15  # inches
LEAST = 0.85  # what two graphs beside each other are shrunk to at most
MEANINGS = {"operand": "q, k, v", "core": "products and soft-max", "mask": "mask, bias and tables"}
COLOURS = {"operand": figures.SERIES[0], "mask": figures.SERIES[1], "core": figures.SERIES[2], "": figures.INK}


def pictures_json(reports: Sequence[GraphReport]) -> list[dict[str, Any]]:
    """One item for each distinct rewrite, equal layers and equal graphs together, in the order they were made."""
    rewrites = [rewrite for report in reports for rewrite in report.rewrites if rewrite.before and rewrite.after]
    folded = fold_rows(rewrites, lambda r: r.path, lambda r: (r.lowering, renamed(r.before), renamed(r.after)))
    return [
        {
            "site": name,
            "caption": caption(members[0]),
            "before": [asdict(op) | {"inputs": list(op.inputs)} for op in members[0].before],
            "after": [asdict(op) | {"inputs": list(op.inputs)} for op in members[0].after],
        }
        for name, members in folded
    ]


def caption(rewrite: Rewrite) -> str:
    return f"{rewrite.lowering}: {operations(rewrite.before)} before, {operations(rewrite.after)} after"


def operations(ops: Sequence[Op]) -> str:
    """ "40 operations", and how many a record that was cut off does not hold."""
    made = sum(op.op != "input" and op.name != REST for op in ops)
    rest = "".join(f" {op.op}" for op in ops if op.name == REST)
    return counted(made, "operation") + rest


def renamed(ops: Sequence[Op]) -> tuple[tuple[Any, ...], ...]:
    """The same for equal sites of two layers or graphs, whose nodes have other names."""
    place = {op.name: n for n, op in enumerate(ops)}
    return tuple((op.op, tuple(place[name] for name in op.inputs), op.shape) for op in ops)


def picture_svg(item: Mapping[str, Any]) -> str:
    """An SVG of an item of `pictures_json`, 7 inches wide, in the colour of the text around it. Needs matplotlib.

    The graphs stand side by side; where they would have to be shrunk for it, one below the other.
    """
    sides = {side: [Op(**{**op, "inputs": tuple(op["inputs"])}) for op in item[side]] for side in ("before", "after")}
    panels = {side: panel(ops) for side, ops in sides.items()}
    wide = {side: max(layout.width, TITLE) for side, (_, layout) in panels.items()}
    tall = {side: len(layout.rows) for side, (_, layout) in panels.items()}
    beside = sum(wide.values()) + 3 * MARGIN <= WIDTH / LEAST
    # A width of 1 is one inch, until what stands beside each other is wider than the picture.
    scale = min(1.0, WIDTH / (sum(wide.values()) + 3 * MARGIN if beside else max(wide.values()) + 2 * MARGIN))
    across, rows = WIDTH / scale, max(tall.values()) if beside else sum(tall.values()) + 2

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        spare = (across - sum(wide.values())) / 3
        for side, (boxes, layout) in panels.items():
            first = side == "before"
            middle = across / 2 if not beside else spare + wide[side] / 2 if first else across - spare - wide[side] / 2
            title = 0.0 if beside or first else tall["before"] + 2.0
            top = title + ((rows - tall[side]) / 2 if beside else 0)
            _draw_panel(axes, boxes, layout, middle - layout.width / 2, top, scale)
            axes.text(middle, title - 0.9, f"{side}: {operations(sides[side])}", ha="center", va="center", fontsize=9)
        for n, (kind, text) in enumerate(MEANINGS.items()):
            at = across * (0.2 + 0.3 * n)
            axes.text(at, rows - 0.1, "■ " + text, color=COLOURS[kind], fontsize=NAME, ha="center", va="center")
        axes.set_xlim(0, across)
        axes.set_ylim(rows + 0.2, -1.3)

    return figures._draw(draw, (WIDTH, ROW * (rows + 1.5)))


def panel(ops: Sequence[Op]) -> tuple[dict[str, dict[str, Any]], Layout]:
    """Boxes by name, and where they go."""
    import networkx as nx

    from attnopt.report.layered import placed

    boxes = gathered(merged(ops))
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted(boxes, key=lambda name: OPERANDS.index(name) if name in OPERANDS else len(OPERANDS)))
    graph.add_edges_from((name, box["name"]) for box in boxes.values() for name in box["inputs"])
    operand = {name for name, box in boxes.items() if box["op"] == "input" and name in OPERANDS}
    reached = operand.union(*(nx.descendants(graph, name) for name in operand))
    for name, box in boxes.items():
        attends = box["label"] in CORE or box["op"].startswith("attnopt.")
        box["kind"] = "operand" if name in operand else "mask" if name not in reached else "core" if attends else ""
    for box in boxes.values():
        texts = (len(box["label"]) * NAME * LETTER[NAME], len(box["shape"]) * SHAPE * LETTER[SHAPE])
        box["width"] = (max(texts) + 8) / 72
    return boxes, placed(graph, {name: box["width"] for name, box in boxes.items()})


def merged(ops: Sequence[Op]) -> dict[str, dict[str, Any]]:
    """Boxes by the name of their last Op: a chain of views is one, the rest is as it was."""
    ops = [op for op in ops if op.name != REST]
    held = {op.name for op in ops}
    users = Counter(name for op in ops for name in set(op.inputs))
    boxes: dict[str, dict[str, Any]] = {}
    for op in ops:
        inputs = [name for name in dict.fromkeys(op.inputs) if name in held]
        label = label_of(op)
        box = {
            "name": op.name, "op": op.op, "label": label, "shape": op.shape, "inputs": inputs,
            "count": 1, "view": label in VIEWS and op.op != "input",
        }  # fmt: skip
        above = boxes.get(inputs[0]) if len(inputs) == 1 else None
        if above and above["view"] and box["view"] and users[above["name"]] == 1:
            del boxes[above["name"]]
            count = above["count"] + 1
            box |= {"inputs": above["inputs"], "count": count, "label": f"view ×{count}"}
        boxes[op.name] = box
    return boxes


def gathered(boxes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same with the inputs that one node alone reads as one box, where they are many: the tables of a kernel."""
    users = Counter(name for box in boxes.values() for name in box["inputs"])
    made = dict(boxes)
    for box in boxes.values():
        alone = [n for n in box["inputs"] if boxes[n]["op"] == "input" and n not in OPERANDS and users[n] == 1]
        if len(alone) > 2:
            first = alone[0]
            made[first] = boxes[first] | {"label": f"{len(alone)} tensors", "shape": ""}
            made[box["name"]] = box | {"inputs": [n for n in box["inputs"] if n not in alone[1:]]}
            for name in alone[1:]:
                del made[name]
    return made


def label_of(op: Op) -> str:
    """ "aten.softmax.int" -> "softmax"; an input is called by its name."""
    if op.op == "input":
        return op.name
    parts = op.op.split(".")
    name = parts[1] if len(parts) > 2 else parts[0]
    return SHORT.get(name, name.strip("_") or name)


def _draw_panel(
    axes: Axes, boxes: Mapping[str, Mapping[str, Any]], layout: Layout, shift: float, top: float, scale: float
) -> None:
    from matplotlib.patches import FancyBboxPatch

    for way in layout.ways.values():
        line = [(x + shift, row + top) for x, row in way]
        xs, ys = zip(*rounded(line), strict=True)
        axes.plot(xs, ys, color=figures.INK, alpha=0.35, linewidth=0.8, zorder=1, solid_capstyle="round")
    for name, (x, row) in layout.place.items():
        box = boxes[str(name)]
        colour, width, x, y = COLOURS[box["kind"]], box["width"], x + shift, row + top
        tint = 0.18 if box["kind"] else 0.08
        corner = "round,pad=0,rounding_size=0.05"
        box_at = (x - width / 2, y - TALL)
        patch = FancyBboxPatch(box_at, width, 2 * TALL, corner, linewidth=0.7, zorder=2)
        patch.set(facecolor=(colour, tint), edgecolor=(colour, 4 * tint))
        axes.add_patch(patch)
        lift = 0.12 if box["shape"] else 0.0
        weight = "bold" if box["kind"] in ("operand", "core") else "normal"
        axes.text(x, y - lift, box["label"], ha="center", va="center", fontsize=NAME * scale, weight=weight, zorder=3)
        if box["shape"]:
            axes.text(x, y + 0.16, box["shape"], ha="center", va="center", fontsize=SHAPE * scale, alpha=0.75, zorder=3)


def rounded(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A smooth curve through the points of an edge, from the lower rim of a box to the upper rim of another; beside the
    boxes of the rows between it goes straight down."""
    ends = [(x, (row - TALL, row + TALL)) for x, row in line]
    out = [(line[0][0], line[0][1] + TALL)]
    for (x0, (_, low)), (x1, (high, _)) in pairwise(ends):
        for n in range(9):
            t = n / 8
            out.append((x0 + (x1 - x0) * t * t * (3 - 2 * t), low + (high - low) * t))
    return out
