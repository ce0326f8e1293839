"""The lines of an emitted masked kernel that its form decides: what is read where, which keys are live, kept, and how
their scores change. `triton_masked.py` puts them in their places.
"""

from __future__ import annotations

import textwrap
from functools import cached_property

from attnopt.masks.expressions import Affine, Call, Read, atom_variables
from attnopt.masks.kernel_form import Form, Slot
from attnopt.masks.kernel_text import KernelText, nonnegative
from attnopt.masks.live_range import Bound, Live, document, documents, flags, live_range, names_of
from attnopt.masks.predicates import BoolLoad, literal_reads, literal_variables
from attnopt.masks.printing import sum_text
from attnopt.masks.values import monomial_reads, monomial_variables

LOG2E = 1.4426950408889634
BATCH = Affine.var("b")
WIDTH = 120
POINTERS = {
    "bool": "u8", "uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64",
}  # fmt: skip
# Narrow integers would wrap around in sums.
CASTS = {
    "bool": " != 0",
    **dict.fromkeys(("uint8", "int8", "int16"), ".to(tl.int32)"),
    **dict.fromkeys(("float16", "bfloat16", "float32", "float64"), ".to(tl.float32)"),
}


def indented(lines: list[str], by: int) -> str:
    return "".join(f"{' ' * by}{line}".rstrip() + "\n" for line in lines)


class FormText:
    """Names and lines for one form. ValueError where it reads what Triton has no type for."""

    def __init__(self, form: Form) -> None:
        self.form = form
        for slot in form.slots:
            if slot.dtype not in POINTERS:
                raise ValueError(f"the triton target reads no {slot.dtype}")
        self.live: Live = live_range(form)
        self.documents, self.padding = documents(form), flags(form)
        self.bounding: tuple[Read | BoolLoad, ...] = (*self.documents, *self.padding)
        if len({r.node for r in self.bounding}) < len(self.bounding):
            raise ValueError("one tensor says in two ways which keys are kept")
        self.numbers = self._numbers()
        self.names = self._named()
        self.print = KernelText(self.names)

    def _numbers(self) -> set[Read | Call]:
        """Reads of document numbers that are only compared: two are equal where the documents' first keys are."""
        found = {r for c in self.form.clauses if document(c) for x in c for r in literal_reads(x)}
        others = {r for c in self.form.clauses if not document(c) for x in c for r in literal_reads(x)}
        return found - others - {r for m, _ in self.form.added.terms for r in monomial_reads(m)}

    @property
    def read_slots(self) -> list[Slot]:
        """Tensors that are read themselves."""
        return sorted({r.node for r in self.form.reads if r not in self.numbers}, key=lambda slot: slot.number)

    def _named(self) -> dict[Read, str]:
        """``t0_bj`` for ``t0[b, j]``; a number where the index is more than variables."""
        names: dict[Read, str] = {}
        for read in self.form.reads:
            index = [e for e in read.index if e != Affine()]
            plain = all(len(e.terms) == 1 and e == Affine.var(e.terms[0][0]) for e in index)
            plain = plain and all(isinstance(e.terms[0][0], str) for e in index)
            tail = "".join(str(e) for e in index) if plain else "at"
            name = f"{read.node}_{tail}" if tail else f"{read.node}_all"
            taken = set(names.values())
            names[read] = name if name not in taken else next(
                f"{name}{n}" for n in range(2, len(names) + 3) if f"{name}{n}" not in taken
            )  # fmt: skip
        return names

    # What the kernel is given.

    @property
    def pointers(self) -> list[str]:
        sink = ["sink"] if self.form.sink in ("h", "bhi") else []
        return [*sink, *map(str, self.read_slots), *self.runs]

    @property
    def runs(self) -> list[str]:
        """Where documents and kept keys lie, one tensor for each tensor that numbers or keeps them."""
        return [f"{read.node}_runs" for read in self.bounding]

    @property
    def pointer_types(self) -> dict[str, str]:
        sink = {"sink": "*fp32"} if self.form.sink in ("h", "bhi") else {}
        slots = {str(s): f"*{POINTERS[s.dtype]}" for s in self.read_slots}
        return {**sink, **slots, **dict.fromkeys(self.runs, "*i32")}

    @property
    def dtypes(self) -> list[str]:
        return [*(slot.dtype for slot in self.form.slots), *("int32" for _ in self.runs)]

    @cached_property
    def steps(self) -> dict[str, str]:
        """Stride and size arguments and their values: those of the dimensions that are not read at 0 alone."""
        found: dict[str, str] = {}
        if self.form.sink == "bhi":
            found |= {f"sink_{name}": f"sink.stride({d})" for d, name in enumerate(("batch", "head", "row"))}
        for slot in self.read_slots:
            reads = [r for r in self.form.reads if r.node == slot and r not in self.numbers]
            for d in sorted({d for r in reads for d, e in enumerate(r.index) if e != Affine()}):
                found[f"{slot}_{d}"] = f"{slot}.stride({d})"
                if any(needs_size(r.index[d]) for r in reads):
                    found[f"{slot}_size{d}"] = f"{slot}.shape[{d}]"
        for read, name in zip(self.bounding, self.runs, strict=True):
            found[f"{name}_plane"] = f"{name}.stride(0)"
            if BATCH in read.index:
                found[f"{name}_batch"] = f"{name}.stride({1 + read.index.index(BATCH)})"
        return found | {f"s{n}": f"sizes[{n}]" for n in range(self.form.sizes)}

    @property
    def strides(self) -> list[str]:
        return list(self.steps)

    @property
    def stride_values(self) -> list[str]:
        return list(self.steps.values())

    @property
    def counted(self) -> list[str]:
        """Arguments whose value must not compile anew: sizes of data and of the graph."""
        return [n for n in self.steps if "_size" in n or (n.startswith("s") and n[1:].isdecimal())]

    @property
    def last_steps(self) -> set[str]:
        last = {slot: max((d for n in self.steps for d in dims_named(n, slot)), default=-1) for slot in self.form.slots}
        return {f"{slot}_{d}" for slot, d in last.items()}

    @property
    def unpacking(self) -> str:
        if not self.form.slots:
            return ""
        fixed = {(r.node, d, e.constant) for r in self.form.reads for d, e in enumerate(r.index) if not e.terms}
        checks = "".join(
            f"    if {slot}.shape[{d}] <= {c}:\n"
            f'        raise IndexError(f"{slot} is read at {c} of dimension {d}, and has {{{slot}.shape[{d}]}}")\n'
            for slot, d, c in sorted(fixed, key=str)
            if c > 0
        )
        given = [*(str(s) if s in self.read_slots else "_" for s in self.form.slots), *self.runs]
        names = f"({given[0]},)" if len(given) == 1 else ", ".join(given)
        return f"    {names} = map(_data, tensors)\n{checks}"

    @property
    def sink_line(self) -> str:
        if self.form.sink not in ("h", "bhi"):
            return ""
        return f"    sink = _data(sink{'.contiguous()' if self.form.sink == 'h' else ''})\n"

    @property
    def sink_shape(self) -> str:
        return {"": "None", "0": "None", "h": "(H,)", "bhi": "(B, H, Sq)"}[self.form.sink]

    @property
    def description(self) -> str:
        form = self.form
        said = f"Key j is kept by query i of batch entry b and head h where ``{form.kept or 'true'}``."
        if form.softcap:
            said += f" A score s becomes ``{form.softcap:g} * tanh(s / {form.softcap:g})``."
        if form.added.terms:
            said += f" What is added to a score is ``{sum_text(form.added)}``."
        if form.sink:
            logit = {"0": "a score of 0", "h": "a logit of each head", "bhi": "a logit of each row"}[form.sink]
            said += f" The soft-max has one more column, the sink: {logit}, and no value."
        return "\n".join(textwrap.wrap(said, WIDTH, break_long_words=False, break_on_hyphens=False))

    # What is read.

    @property
    def pairs(self) -> bool:
        """Whether data over both positions is read."""
        return any({"i", "j"} <= variables_of(read) for read in self.form.reads)

    def uses(self, name: str, masked: bool = True) -> bool:
        named = {v for m, _ in self.form.added.terms for v in monomial_variables(m)}
        if masked:
            named |= {v for x in self.form.keep.atoms for v in literal_variables(x)}
        return name in named

    @property
    def order(self) -> str:
        pairs = "pairs = tl.num_programs(0) // tiles\n    "
        if self.live.grows:
            return (
                "# Later tiles keep more keys: the last of every head come first, so that none is left over.\n    "
                + pairs
                + "tile = tiles - 1 - tl.program_id(0) // pairs\n    pair = tl.program_id(0) % pairs"
            )
        return "tile = tl.program_id(0) % tiles\n    pair = tl.program_id(0) // tiles"

    @cached_property
    def row_lines(self) -> list[str]:
        """What does not vary with the key is read once."""
        lines = [line for r in self.form.reads if "j" not in variables_of(r) for line in self.read_lines(r)]
        said = " Documents by their first keys, in 32 bits." if self.numbers else ""
        return ["", f"# Data of the rows.{said}", *lines] if lines else []

    def column_lines(self, masked: bool) -> list[str]:
        kept = {r for x in self.form.keep.atoms for r in literal_reads(x)}
        added = {r for m, _ in self.form.added.terms for r in monomial_reads(m)}
        wanted = kept | added if masked else added
        return [line for r in self.form.reads if r in wanted and "j" in variables_of(r) for line in self.read_lines(r)]

    def read_lines(self, read: Read) -> list[str]:
        slot, name = read.node, self.names[read]
        if read in self.numbers:
            row, end = ("j", "keys") if "j" in variables_of(read) else ("i", "queries")
            return [f"{name} = tl.load({self.run(read)} + {row}, mask={row} < {end}, other=0)"]
        at, conditions, lines = [str(slot)], [], []
        for d, position in enumerate(read.index):
            if position == Affine():
                continue
            text = self.print.expression(position)
            if needs_size(position) and not is_variable(position):
                lines.append(f"at{d} = {text}")
                text = f"at{d}"
                if not nonnegative(position):
                    # A negative index counts from the end, as it does in the graph.
                    lines.append(f"at{d} = tl.where(at{d} < 0, at{d} + {slot}_size{d}, at{d})")
                    conditions.append(f"(at{d} >= 0)")
            if needs_size(position):
                conditions.append(f"({text} < {slot}_size{d})")
            at.append(f"{self.offset(position, text)} * {slot}_{d}")
        return [*lines, *self.load_lines(slot, name, " + ".join(at), conditions)]

    def offset(self, position: Affine, text: str) -> str:
        """A position in 64 bits, which b and h have already: data over pairs has more than 32 bits count."""
        if position.variables <= {"b", "h"} and is_variable(position):
            return text
        return text if not position.terms else f"{text}.to(tl.int64)"

    def load_lines(self, slot: Slot, name: str, at: str, conditions: list[str]) -> list[str]:
        inside = conditions[0][1:-1] if len(conditions) == 1 else " & ".join(conditions)
        made = CASTS.get(slot.dtype, "")
        mask = f", mask={inside}, other=0" if inside else ""
        line = f"{name} = tl.load({at}{mask}){made}"
        if len(line) + 8 <= WIDTH:
            return [line]
        if not inside:
            return [f"at = {at}", f"{name} = tl.load(at){made}"]
        return [f"inside = {inside}", f"at = {at}", f"{name} = tl.load(at, mask=inside, other=0){made}"]

    # Which keys.

    @property
    def range_lines(self) -> list[str]:
        """Blocks of keys that are live, and of those the ones kept whole; the gap between them."""
        live, whole, gap = self.live.live, self.live.whole, self.live.gap
        lines = [*self.document_lines, "# Keys that some row may keep, as blocks."]
        lines += self.bound_lines("live_first", live.low, "0")
        lines += ["live_first = live_first // BLOCK_N"] * (live.low is not None)
        lines += self.bound_lines("live_end", live.high, "keys")
        lines.append("live_end = tl.maximum(tl.cdiv(live_end, BLOCK_N), live_first)")
        if whole is not None:
            lines.append("# Of those the ones that every row keeps whole.")
            if whole.low is None:
                lines.append("whole_first = live_first")
            else:
                lines += self.bound_lines("whole_first", whole.low, "0")
                lines.append(
                    "whole_first = tl.minimum(tl.maximum(tl.cdiv(whole_first, BLOCK_N), live_first), live_end)"
                )
            lines += self.bound_lines("whole_end", whole.high, "keys")
            lines.append("whole_end = tl.maximum(tl.minimum(whole_end // BLOCK_N, live_end), whole_first)")
        if gap is not None:
            end = "whole_first" if whole is not None else "live_end"
            lines.append("# Between the first keys and the last that are kept lies a gap.")
            lines += self.bound_lines("gap_first", gap.low, "0")
            lines.append(f"gap_first = tl.minimum(tl.maximum(tl.cdiv(gap_first, BLOCK_N), live_first), {end})")
            lines += self.bound_lines("gap_end", gap.high, "0")
            lines.append(f"gap_end = tl.maximum(tl.minimum(gap_end // BLOCK_N, {end}), gap_first)")
        return [*lines, ""]

    @property
    def document_lines(self) -> list[str]:
        """The outermost keys of the rows' documents and of the padding, and where all rows keep every key."""
        named, lines = self.bound_names, []
        for read in self.documents:
            name = f"{read.node}_runs"
            lines += ["# Where the documents of the rows lie."]
            lines += [f"at = {self.run(read)} + rows", "inside = rows < queries"]
            planes = (("first", "min", "keys"), ("last", "max", "0"), ("whole", "max", "0"))
            for plane, (word, reduce, other) in enumerate(planes):
                if f"{read.node}_{word}" in named:
                    step = " + " + (f"{plane} * " if plane > 1 else "") + f"{name}_plane" if plane else ""
                    load = f"tl.load(at{step}, mask=inside, other={other})"
                    lines.append(f"{read.node}_{word} = tl.{reduce}({load})")
        for flag in self.padding:
            lines += ["# Which keys the padding keeps."]
            for plane, word in enumerate(("first", "end", "whole_first", "whole_end")):
                if f"{flag.node}_{word}" in named:
                    step = f" + {plane} * {flag.node}_runs_plane" if plane else ""
                    lines.append(f"{flag.node}_{word} = tl.load({self.run(flag)}{step})")
        return lines

    def run(self, read: Read | BoolLoad) -> str:
        """The first keys, of documents or of all that are kept, of a batch entry; the other ends are planes behind."""
        return f"{read.node}_runs" + (f" + b * {read.node}_runs_batch" if BATCH in read.index else "")

    @cached_property
    def bound_names(self) -> set[str]:
        """The variables that bounds of keys are made of."""
        ends = (x for part in (self.live.live, self.live.gap, self.live.whole) if part for x in (part.low, part.high))
        return {name for bound in ends if bound is not None for name in names_of(bound)}

    def bound_lines(self, name: str, bound: Bound | None, otherwise: str) -> list[str]:
        """`name` set to a bound of keys, within 0 and their number; to `otherwise` where there is no bound."""
        if bound is None:
            return [f"{name} = {otherwise}"]
        if isinstance(bound, Affine) and not bound.terms:
            return [f"{name} = tl.minimum({max(bound.constant, 0)}, keys)"]
        lines = []
        if isinstance(bound, Affine):
            value = self.print.bound(bound)
        else:
            value, join = name, {"max": "tl.maximum", "min": "tl.minimum"}[bound.kind]
            lines = [f"{name} = {self.print.bound(bound.of[0])}"]
            lines += [f"{name} = {join}({name}, {self.print.bound(part)})" for part in bound.of[1:]]
        # Data and the batch entry are in 64 bits.
        narrow = "" if {n for n in names_of(bound) if "_" not in n} <= {"first", "last"} else ".to(tl.int32)"
        return [*lines, f"{name} = tl.minimum(tl.maximum({value}, 0), keys){narrow}"]

    @property
    def edge_lines(self) -> list[str]:
        """The head of the loop over the blocks that take a mask."""
        whole, gap = self.live.whole is not None, self.live.gap is not None
        left_out = [*(["(whole_end - whole_first)"] if whole else []), *(["(gap_end - gap_first)"] if gap else [])]
        count = " - ".join(["live_end", "live_first", *left_out])
        what = "# The edges, masked." if whole else "# Data may drop any key, so every live block is masked."
        lines = [what, f"for n in range(0, {count}):", "    block = live_first + n"]
        if gap:
            lines.append("    block += tl.where(block >= gap_first, gap_end - gap_first, 0)")
        if whole:
            lines.append("    block += tl.where(block >= whole_first, whole_end - whole_first, 0)")
        return [*lines, "    start = block * BLOCK_N"]

    # Scores.

    @property
    def keep_lines(self) -> list[str]:
        lines = ["keep = j < keys"]
        for clause in self.form.clauses:
            parts = self.print.clause(clause)
            joined = parts[0] if len(parts) == 1 else " | ".join(f"({p})" for p in parts)
            if len(joined) + 16 <= WIDTH:
                lines.append(f"keep &= {joined}")
            else:
                lines += [f"either = {parts[0]}", *(f"either |= {p}" for p in parts[1:]), "keep &= either"]
        return lines

    @property
    def score_lines(self) -> list[str]:
        cap = self.form.softcap
        lines = ["scores = scores * scale"]
        if cap:
            lines = [
                f"# {cap:g} * tanh(s / {cap:g}).",
                f"scores = LOG2E * {cap!r} * (1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0))",
            ]
        return lines + [f"scores {sign}= {text}" for sign, text in self.print.sum(self.form.added, "LOG2E")]

    @property
    def sink_lines(self) -> list[str]:
        sink = self.form.sink
        if not sink:
            return ['top = tl.full([BLOCK_M], float("-inf"), tl.float32)', "total = tl.zeros([BLOCK_M], tl.float32)"]
        lines = ["# The sink is there from the start: a weight without a value."]
        if sink == "0":
            return [*lines, "top = tl.zeros([BLOCK_M], tl.float32)", "total = tl.full([BLOCK_M], 1.0, tl.float32)"]
        if sink == "h":
            lines.append("logit = tl.load(sink + h).to(tl.float32)")
        else:
            lines.append("at = sink + b * sink_batch + h * sink_head + rows.to(tl.int64) * sink_row")
            lines.append("logit = tl.load(at, mask=rows < queries, other=0.0).to(tl.float32)")
        return [
            *lines,
            "top = tl.zeros([BLOCK_M], tl.float32) + LOG2E * logit",
            'total = tl.where(top == float("-inf"), 0.0, 1.0)',
        ]


def variables_of(read: Read) -> frozenset[str]:
    return atom_variables(read)


def is_variable(position: Affine) -> bool:
    return len(position.terms) == 1 and position == Affine.var(position.terms[0][0])


def needs_size(position: Affine) -> bool:
    """Whether an index may leave its tensor in a tile that reaches past the end, or by what it is computed from.

    Constants are checked by the launcher.
    """
    return bool(position.terms) and not (is_variable(position) and position.terms[0][0] in ("b", "h"))


def dims_named(name: str, slot: Slot) -> list[int]:
    head, _, tail = name.partition("_")
    return [int(tail)] if head == str(slot) and tail.isdecimal() else []
