"""Charts of a page, as SVG to be put into it. matplotlib draws them; where it is missing, a page goes without.

Axes and text take the page's own colour, so that one figure serves a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's text colour while drawing
# A picture of its own cannot know what page it stands on: this grey has a contrast of 4.2 to white and of 4.5 to black.
NEUTRAL = "#767c85"
SERIES = ("#1f83a6", "#c2632f", "#4f9a53", "#a45fb5", "#b0892a", "#c4507a")
HOLDS, MISSES = SERIES[0], SERIES[1]  # told apart by their marks too
MOST_LAYERS = 8  # layers with a chart of their own; each takes some 20 kB
MARKED = 8  # curves of one chart up to which their points are marked: marks are most of its bytes
Curve = tuple[str, Sequence[float], Sequence[float]]


def available() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def damage_figures(profile: Mapping[str, Any]) -> dict[str, str]:
    """Caption -> SVG: damage over window at the largest sink, all layers in one chart, then the heads of the most
    damaged layers. Of the data of `profile_json`, at each site's longest length."""
    windows, sinks = profile["grid"]["windows"], profile["grid"]["sinks"]
    curves: dict[str, list[Curve]] = {}
    for site, by_length in profile["sites"].items():
        length = max(by_length, key=int)
        kept = [n for n, window in enumerate(windows) if window < int(length)]
        rows = [(head["head"], [(head["damage"] or head["moved"])[-1][n] for n in kept]) for head in by_length[length]]
        curves[site] = [(f"head {head}", [windows[n] for n in kept], values) for head, values in rows]
    curves = {site: heads for site, heads in curves.items() if any(v > 0 for _, _, values in heads for v in values)}
    if not curves:
        return {}
    layers = [(site, heads[0][1], [sum(v) for v in zip(*(h[2] for h in heads), strict=True)])
              for site, heads in curves.items()]  # fmt: skip
    rest = f" beside a sink of {sinks[-1]}" if sinks[-1] else ""
    made = {f"Damage over window{rest}, sum of each layer's heads": _lines(layers, (7.0, 3.2), legend=len(layers) <= 8)}
    worst = sorted(layers, key=lambda layer: -max(layer[2]))[:MOST_LAYERS]
    shown = {site for site, _, _ in worst}
    for site, heads in curves.items():
        if site in shown:
            made[f"{site}, each head"] = _lines(heads, (3.4, 2.2), legend=False)
    return made


def search_figure(records: Sequence[Mapping[str, Any]], limit: float | None, unit: str) -> str:
    """Predicted damage against the measured increase; the bar reaches up to its bound. Empty if there is no point."""
    points = [r for r in records if r.get("predicted") and r.get("increase") is not None]
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        for holds, colour, mark, label in ((True, HOLDS, "o", "holds"), (False, MISSES, "X", "misses")):
            of = [p for p in points if bool(p.get("holds")) == holds]
            for point in of:
                if point.get("upper_95") is not None:
                    axes.plot([point["predicted"]] * 2, [point["increase"], point["upper_95"]], color=colour, lw=1)
            if of:
                axes.plot([p["predicted"] for p in of], [p["increase"] for p in of], mark, color=colour, markersize=4.5,
                          label=f"{label}, up to its 95 % bound")  # fmt: skip
        if limit is not None:
            axes.axhline(limit, color=INK, linewidth=0.8, linestyle="--", label=f"budget {limit:g}")
        axes.set_xscale("log")
        _label_within_decades(axes)
        axes.set_xlabel("predicted, nats per token")
        axes.set_ylabel("measured increase" + (f", {unit}" if unit else ""))
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _draw(draw, (7.0, 3.2))


def _label_within_decades(axes: Axes) -> None:
    """Powers of ten are too few labels for a logarithmic axis that spans one or two."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_xlim()
    if high < 100 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def front_figure(front: Mapping[str, Any]) -> str:
    """Predicted damage over cost: the front as steps, the chosen point ringed, measured ones marked. Of `front_json`;
    empty if no point has a damage."""
    # A logarithmic axis has no zero: the dense plan, which predicts none, is left out.
    points = [p for p in front["points"] if (p["predicted"] or 0) > 0]
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        costs, values = [p["cost"] for p in points], [p["predicted"] for p in points]
        axes.plot(costs, values, color=INK, alpha=0.45, lw=1, drawstyle="steps-post", marker=".", markersize=3)
        for holds, mark, colour, label in ((True, "o", HOLDS, "measured, holds"), (False, "X", MISSES, "misses")):
            of = [m for m in front.get("measured") or () if m["holds"] == holds and (m["predicted"] or 0) > 0]
            if of:
                axes.plot([m["cost"] for m in of], [m["predicted"] for m in of], mark, color=colour, markersize=5,
                          label=label)  # fmt: skip
        chosen = [p for p in points if p["chosen"]]
        axes.plot([p["cost"] for p in chosen], [p["predicted"] for p in chosen], "o", color=HOLDS, markersize=11,
                  fillstyle="none", markeredgewidth=1.8, label="chosen")  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel(f"cost, {front['unit']}")
        axes.set_ylabel("predicted, nats per token")
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _draw(draw, (7.0, 3.2))


def _lines(curves: Sequence[Curve], size: tuple[float, float], legend: bool) -> str:
    def draw(axes: Axes) -> None:
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        mark = "." if len(curves) <= MARKED else ""
        for n, (name, xs, ys) in enumerate(curves):
            # A logarithmic axis has no zero: such points are left out.
            values = [y if y > 0 else math.nan for y in ys]
            # Neither end of the map is seen on every page: one is nearly black, one nearly white.
            shade = colours(0.25 + 0.6 * n / max(len(curves) - 1, 1))
            axes.plot(xs, values, color=shade, linewidth=1, marker=mark, markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("window")
        axes.set_ylabel("nats per token")
        if legend:
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)

    return _draw(draw, size)


def ratio_figure(
    labels: Sequence[str],
    marks: Mapping[str, Sequence[tuple[float | None, float | None]]],
    axis: str = "times as fast, up to its lower 95 % bound",
) -> str:
    """A picture of its own: a row for each label, in it each series' (value, lower bound); None is left out."""

    def draw(axes: Axes) -> None:
        for n, (name, values) in enumerate(marks.items()):
            colour = SERIES[n % len(SERIES)]
            shift = 0.6 * ((n + 0.5) / len(marks) - 0.5)
            points = [(at + shift, value, low) for at, (value, low) in enumerate(values) if value is not None]
            axes.hlines([p[0] for p in points], [p[2] or p[1] for p in points], [p[1] for p in points], color=colour)
            axes.plot([p[1] for p in points], [p[0] for p in points], "o", color=colour, markersize=3, label=name)
        axes.axvline(1.0, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(axis)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="best")

    return _draw(draw, (7.0, 0.9 + 0.17 * max(4, len(labels))), rows=labels).replace("currentColor", NEUTRAL)


def _draw(draw: Callable[[Axes], None], size: tuple[float, float], rows: Sequence[str] | None = None) -> str:
    """An SVG in the page's colour. rows: names of the places 0, 1, … of the y axis, where that is no number."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "attnopt", "font.size": 8, "text.parse_math": False,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.5)
        axes.patch.set_visible(False)
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_minor_formatter(lambda x, _: "")
        if rows is not None:
            axes.set_yticks(range(len(rows)), rows, fontsize=6)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue().replace(INK, "currentColor")


def maps(panels: Sequence[tuple[str, Sequence[Sequence[float]], str]], kind: str) -> bytes:
    """A picture, svg or png, of (title, rows of values, colours); rows are layers, from the top."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "attnopt", "font.size": 8}):
        figure = Figure(figsize=(10.0, 7.0), layout="constrained")
        for axes, (title, values, colours) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest")
            axes.set_title(title)
            axes.set_ylabel("layer")
            axes.set_xlabel("layer" if title.startswith("layers") else "head")
            for axis in (axes.xaxis, axes.yaxis):
                axis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axes)
        out = io.BytesIO()
        unstamped = {"Date": None, "Creator": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=150, metadata=unstamped)
    return out.getvalue()


def inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: no prologue, metadata or scripts, nothing from elsewhere.

    prefix: before its ids, which several figures of one page would else share. Empty if there is no svg element in it.
    """
    start, end = svg.find("<svg"), svg.rfind("</svg>")
    if start < 0 or end < start:
        return ""
    text = svg[start : end + len("</svg>")]
    for name in ("metadata", "script", "foreignObject", "style"):
        text = re.sub(rf"<{name}\b[^>]*/>|<{name}\b.*?</{name}\s*>|</?{name}\b[^>]*>", "", text, flags=re.S | re.I)
    text = re.sub(r"<(image|a|iframe|embed|object|link|meta)\b", "<g", text, flags=re.I)
    text = re.sub(r"</(image|a|iframe|embed|object|link|meta)\s*>", "</g>", text, flags=re.I)
    text = re.sub(r"""\s(xmlns(:\w+)?|on\w+|src)\s*=\s*("[^"]*"|'[^']*')""", "", text, flags=re.I)
    text = re.sub(r"""\s(xlink:)?href\s*=\s*(["'])(?!#)[^"']*\2""", "", text, flags=re.I)
    text = re.sub(r"\sxlink:href=", " href=", text)
    text = re.sub(r"""url\(\s*['"]?(?!#)[^)]*\)""", "none", text, flags=re.I)
    # The page's own typeface, at the size it was drawn for.
    text = re.sub(r"\bfont: ?([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'\sid="', f' id="{prefix}-', text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
