"""Every usual spelling of a mask or bias and the one record it has to give, each probed at every position as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from masks.recovering import SK, SQ, B, H, meaning_of

from attnopt.ir import Load, Mask
from attnopt.masks.recover import recover

MIN = torch.finfo(torch.float32).min
INF = float("-inf")


def rows():
    return torch.arange(SQ)[:, None]


def columns():
    return torch.arange(SK)[None, :]


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def booleans(*shape, seed=0):
    return random(*shape, seed=seed) > 0.4


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


CLOSED = {
    "causal": (lambda: columns() <= rows(), Mask(causal=True)),
    "causal by tril": (lambda: torch.ones(SQ, SK).tril() == 1, Mask(causal=True)),
    "causal, aligned to the end": (lambda: torch.ones(SQ, SK).tril(SK - SQ).bool(), Mask(causal=True, offset=2)),
    "causal, added": (lambda: torch.full((SQ, SK), INF).triu(1), Mask(causal=True)),
    "causal, added, of a half type": (
        lambda: torch.triu(torch.full((SQ, SK), MIN), 1).to(torch.float16),
        Mask(causal=True),
    ),
    "causal, finite": (lambda: torch.where(columns() > rows(), -1e9, 0.0), Mask(causal=True, fill="finite")),
    "causal, product": (lambda: (1.0 - torch.ones(SQ, SK).tril()) * -10000.0, Mask(causal=True, fill="finite")),
    "sliding": (lambda: (columns() <= rows()) & (rows() - columns() < 3), Mask(causal=True, window=3)),
    "sliding, added twice": (
        lambda: torch.full((SQ, SK), INF).triu(1) + torch.full((SQ, SK), INF).tril(-3),
        Mask(causal=True, window=3),
    ),
    "sliding, nested": (
        lambda: torch.where(columns() > rows(), MIN, torch.where(rows() - columns() >= 3, MIN, 0.0)),
        Mask(causal=True, window=3, fill="finite"),
    ),
    "sliding by absolute value": (
        lambda: ((rows() - columns()).abs() < 3) & ~(columns() > rows()),
        Mask(causal=True, window=3),
    ),
    "both sides": (lambda: (rows() - columns()).abs() <= 3, Mask(window=4, symmetric=True)),
    "both sides, two bounds": (
        lambda: torch.logical_and(rows() - columns() < 4, columns() - rows() < 4),
        Mask(window=4, symmetric=True),
    ),
    "unequal sides": (
        lambda: (columns() <= rows() + 1) & (columns() > rows() - 4),
        Mask(causal=True, offset=1, window=5),
    ),
    "behind only": (lambda: rows() - columns() < 3, Mask(window=3)),
    "chunked": (
        lambda: (columns() // 3 == rows() // 3) & (columns() <= rows()),
        Mask(causal=True, chunk=3),
    ),
    "chunked by rounding": (
        lambda: torch.div(columns(), 4, rounding_mode="floor").eq(torch.div(rows(), 4, rounding_mode="floor")),
        Mask(chunk=4),
    ),
    "chunk beyond the length": (lambda: rows() // 64 == columns() // 64, Mask()),
    "window beyond the length": (lambda: rows() - columns() < 64, Mask()),
    "xor": (lambda: (columns() > rows()) ^ torch.ones(SQ, SK, dtype=torch.bool), Mask(causal=True)),
    "cat of blocks": (
        lambda: torch.cat([torch.zeros(SQ, SQ - 7 + 2), torch.full((SQ, SQ), INF).triu(1)], -1),
        Mask(causal=True, offset=2),
    ),
    "padded": (lambda: F.pad(torch.ones(SQ, SQ).tril(), (0, 2)) > 0, Mask(causal=True)),
    "merged and split": (
        lambda: torch.arange(SQ * SK).view(SQ, SK) % SK <= torch.arange(SQ * SK).view(SQ, SK) // SK,
        Mask(causal=True),
    ),
    "flattened": (lambda: (columns() <= rows()).reshape(-1).view(1, 1, SQ, SK), Mask(causal=True)),
    "diagonal": (lambda: rows() == columns(), Mask(causal=True, window=1)),
    "nothing": (lambda: torch.zeros(SQ, SK), Mask()),
    "selected, sliced from the end": (
        lambda: torch.ones(2, 12, 12).tril(3).bool()[-1, -SQ:, -SK:],
        Mask(causal=True, offset=5),
    ),
    "strictly before": (lambda: columns() < rows(), Mask(causal=True, offset=-1)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    build, expected = CLOSED[name]
    meaning = meaning_of(lambda _: build(), torch.zeros(1))
    assert meaning.mask == expected and meaning.bias is None and not meaning.assumptions


PAD = Mask(loads=(Load("m_1", ("b", "j")),))
FINITE = Mask(loads=(Load("m_1", ("b", "j")),), fill="finite")
PADDING = {
    "bool": (lambda m: m[:, None, None, :], booleans(B, SK), "keep", PAD),
    "bool, expanded": (lambda m: m[:, None, None, :].expand(B, H, SQ, SK), booleans(B, SK), "keep", PAD),
    "bool, dropped": (lambda m: m[:, None, None, :], booleans(B, SK), "drop", PAD),
    "bool, dropped twice": (lambda m: ~m[:, None, None, :], booleans(B, SK), "drop", PAD),
    "int, as bool": (lambda m: m[:, None, None, :].to(torch.bool), integers(2, B, SK), "keep", PAD),
    "int, not zero": (lambda m: m[:, None, None, :] != 0, integers(2, B, SK), "keep", PAD),
    "int, one": (lambda m: m[:, None, None, :] == 1, integers(2, B, SK), "keep", PAD),
    "int, zero dropped": (lambda m: m[:, None, None, :] == 0, integers(2, B, SK), "drop", PAD),
    "int, longer": (lambda m: (m[:, 1 : SK + 1] > 0)[:, None, None, :], integers(2, B, SK + 4), "keep", PAD),
    "int, looked up": (
        lambda m: (m != 0)[torch.arange(B)[:, None, None, None], torch.arange(SK)[None, None, None, :]],
        integers(2, B, SK), "keep", PAD,
    ),
    "int, product": (lambda m: (1.0 - m[:, None, None, :].float()) * MIN, integers(2, B, SK), "add", FINITE),
    "bool, product": (lambda m: (1.0 - m[:, None, None, :].float()) * MIN, booleans(B, SK), "add", FINITE),
    "bool, where": (lambda m: torch.where(m[:, None, None, :], 0.0, INF), booleans(B, SK), "add", PAD),
    "bool, filled": (
        lambda m: torch.zeros(B, 1, 1, SK).masked_fill(~m[:, None, None], INF),
        booleans(B, SK), "add", PAD,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDING)
def test_key_padding(name):
    build, m, kind, expected = PADDING[name]
    meaning = meaning_of(build, m, kind=kind)
    assert meaning.mask == expected and meaning.bias is None
    assert bool(meaning.assumptions) == (name == "int, product")


def test_a_product_of_any_number_is_a_bias():
    """(1 - m) * -1e4 of a float m: 0.9999 hides nothing, so only whole numbers are flags."""
    build = lambda m: (1.0 - m[:, None, None, :]) * -10000.0  # noqa: E731
    meaning = meaning_of(build, integers(2, B, SK).float(), kind="add")
    assert meaning.mask == Mask() and meaning.bias is not None and not meaning.assumptions


def test_padding_beside_raw_reads_of_the_same_tensor_has_a_name_of_its_own():
    meaning = meaning_of(
        lambda d: (d[:, None, :SQ, None] == d[:, None, None, :]) & (d[:, None, None] != 0), integers(3, B, SK)
    )
    assert len(meaning.mask.loads) == 1 and meaning.mask.loads[0].name not in {r.name for r in meaning.mask.reads}


LENGTH = torch.tensor(2)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: columns() <= rows() + n,
        lambda n: columns() <= torch.arange(SQ)[:, None] + n.view(1, 1),
        lambda n: ~(columns() - n > rows()),
        lambda n: torch.where(columns() <= rows() + n, 0.0, INF),
    ],
)
def test_a_cache_length_that_is_data(build):
    meaning = meaning_of(build, LENGTH)
    name = str(meaning.mask.offset)
    assert meaning.mask == Mask(causal=True, offset=name, reads=(Load(name, ()),)) and name in meaning.nodes


def test_sliding_with_a_cache_length_that_is_data():
    meaning = meaning_of(lambda n: (columns() <= rows() + n) & (columns() > rows() + n - 4), LENGTH)
    assert meaning.mask.causal and meaning.mask.window == 4 and isinstance(meaning.mask.offset, str)
    assert not meaning.mask.terms


def documents(d):
    return d[:, None, :SQ, None] == d[:, None, None, :]


def packed(position_ids):
    """As transformers finds packed documents: a new one starts wherever positions do not count on."""
    first = position_ids[:, :1] - 1
    number = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    return number[:, :SQ, None] == number[:, None, :]


def test_packed_documents():
    assert meaning_of(documents, integers(3, B, SK)).mask.terms == ("d_1[b, i] == d_1[b, j]",)
    other = meaning_of(lambda d: ~(d[:, None, None, :] - d[:, None, :SQ, None] != 0), integers(3, B, SK))
    assert other.mask == meaning_of(documents, integers(3, B, SK)).mask
    plain = meaning_of(lambda _: packed(torch.arange(SK)[None])[:, None] & (columns() <= rows()), torch.zeros(1))
    assert plain.mask == Mask(causal=True)
    ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    found = meaning_of(lambda p: packed(p)[:, None] & (columns() <= rows()), ids).mask
    assert found.causal and found.terms == ("cumsum[b, i] == cumsum[b, j]",)


def test_prefixes_and_blocks():
    prefix = meaning_of(lambda p: (columns() <= rows()) | (columns() < p[:, None, None, None]), torch.tensor([2, 5]))
    assert prefix.mask.terms == ("(j < p_1[b] or j <= i)",) and prefix.mask.kind == "other" and prefix.mask.closed
    same = meaning_of(lambda p: ~((columns() >= p[:, None, None, None]) & (columns() > rows())), torch.tensor([2, 5]))
    assert same.mask == prefix.mask
    block = meaning_of(lambda d: documents(d) | (columns() <= rows()), integers(3, B, SK))
    assert block.mask.terms == ("(d_1[b, i] == d_1[b, j] or j <= i)",)


def test_a_factor_common_to_two_sides_is_factored_out():
    def build(m, p):
        pad = m[:, None, None, :]
        return ((columns() <= rows()) & pad) | ((columns() < p[:, None, None, None]) & pad)

    meaning = meaning_of(build, booleans(B, SK), torch.tensor([2, 5]))
    assert [x.dims for x in meaning.mask.loads] == [("b", "j")] and len(meaning.mask.terms) == 1


def test_query_padding_is_a_term():
    meaning = meaning_of(lambda m: m[:, None, :SQ, None] & m[:, None, None, :], booleans(B, SK))
    assert meaning.mask.terms == ("m_1[b, i]",) and meaning.mask.loads == (Load("m_1", ("b", "j")),)


def test_data_over_pairs_is_opaque_and_the_rest_stays_closed():
    data = booleans(B, 1, SQ, SK)
    assert meaning_of(lambda m: m, data).mask == Mask(opaque=(Load("m_1", ("b", "i", "j")),))
    meaning = meaning_of(lambda m: m & (columns() <= rows()), data)
    assert meaning.mask == Mask(causal=True, opaque=(Load("m_1", ("b", "i", "j")),)) and meaning.mask.kind == "data"
    dropped = meaning_of(lambda m: m | (columns() > rows()), data, kind="drop")
    assert dropped.mask == meaning.mask and dropped.nodes["m_1"].target == torch.ops.aten.bitwise_not.default
    mixed = meaning_of(lambda m: (m | (columns() <= rows())) & (rows() - columns() < 3), data)
    assert mixed.mask.window == 3 and [x.dims for x in mixed.mask.opaque] == [("b", "i", "j")]


@pytest.mark.parametrize("build", [lambda m: m.flip(-1), lambda m: m.roll(1, -1), lambda m: m.gather(-1, m.long())])
def test_what_has_no_rule_is_data(build):
    meaning = meaning_of(lambda m: build(m) & (columns() <= rows()), booleans(B, 1, SQ, SK))
    assert meaning.mask.causal and len(meaning.mask.opaque) == 1


def test_a_mask_that_keeps_nothing():
    assert meaning_of(lambda _: columns() > rows() + SK, torch.zeros(1)).mask.terms == ("none",)


BUFFERS = {
    "tril": (torch.ones(20, 20, dtype=torch.bool).tril()[None, None], lambda b: b[:, :, 2 : 2 + SQ, :SK], 2),
    "tril, bytes": (torch.ones(20, 20, dtype=torch.uint8).tril(), lambda b: b[2 : 2 + SQ, :SK] == 1, 2),
    "tril, floats": (torch.ones(20, 20).tril()[None, None], lambda b: b[:, :, :SQ, :SK] != 0, 0),
    "triu, dropped": (~torch.ones(20, 20).triu(1).bool(), lambda b: b[:SQ, :SK], 0),
    "added": (torch.full((20, 20), INF).triu(1), lambda b: b[:SQ, :SK], 0),
    "positions": (torch.arange(20)[None], lambda b: b[0, None, :SK] <= b[0, :SQ, None], 0),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_constant_buffers(name):
    buffer, build, offset = BUFFERS[name]
    assert meaning_of(build, buffer, constants=[0]).mask == Mask(causal=True, offset=offset)
    assert meaning_of(build, buffer).mask != Mask(causal=True, offset=offset)


def test_a_buffer_that_differs_in_one_element_stays_data():
    buffer = torch.ones(20, 20, dtype=torch.bool).tril()
    buffer[3, 1] = False
    assert meaning_of(lambda b: b[:SQ, :SK], buffer, constants=[0]).mask.opaque


def test_local_attention_of_a_buffer():
    window = torch.ones(20, 20).tril().bool() ^ torch.ones(20, 20).tril(-4).bool()
    assert meaning_of(lambda b: b[:SQ, :SK], window, constants=[0]).mask == Mask(causal=True, window=4)


def test_scores_masked_by_a_product():
    """s * m - 1e4 * (1 - m): the score where it is kept, a constant elsewhere."""
    meaning = meaning_of(
        lambda s, m: s * m - 1e4 * (1 - m), random(B, H, SQ, SK), torch.ones(SQ, SK).tril(), constants=[1]
    )
    assert meaning.mask == Mask(causal=True, fill="finite") and str(meaning.bias) == "s_1[b, h, i, j]"


SLOPES = random(H)
ALIBI = {
    "distance": lambda s: s[:, None, None] * (columns() - rows()),
    "key alone": lambda s: s[:, None, None] * torch.arange(SK),
    "from the end": lambda s: (torch.arange(1 - SK, 1)[None, None] * s[:, None, None]).expand(H, SQ, SK),
    "as floats": lambda s: torch.arange(SK, dtype=torch.float32).view(1, 1, SK) * s.view(H, 1, 1),
    "positions from a mask": lambda s: ((torch.ones(B, SK).cumsum(-1) - 1) * 1)[:, None, None, :] * s.view(1, H, 1, 1),
}


@pytest.mark.parametrize("name", ALIBI)
def test_alibi(name):
    meaning = meaning_of(ALIBI[name], SLOPES)
    assert meaning.mask == Mask() and meaning.bias == meaning_of(ALIBI["distance"], SLOPES).bias
    assert meaning.bias.kind == "alibi" and meaning.bias.loads == (Load("s_1", ("h",)),)


def test_alibi_with_a_mask_in_one_operand():
    for build in (
        lambda s: s[:, None, None] * (columns() - rows()) + torch.full((SQ, SK), INF).triu(1),
        lambda s: torch.where(columns() > rows(), INF, s[:, None, None] * columns()),
        lambda s: (s[:, None, None] * columns()).masked_fill(columns() > rows(), INF),
    ):
        meaning = meaning_of(build, SLOPES)
        assert meaning.mask == Mask(causal=True) and meaning.bias == meaning_of(ALIBI["distance"], SLOPES).bias


def buckets(distance, count=8):
    """The relative position buckets of T5, one direction."""
    back = -torch.min(distance, torch.zeros_like(distance))
    exact = count // 2
    far = exact + (torch.log(back.float() / exact) / 3 * (count - exact)).to(torch.long)
    return torch.where(back < exact, back, torch.min(far, torch.full_like(far, count - 1)))


def test_tables():
    t5 = meaning_of(lambda t: F.embedding(buckets(columns() - rows()), t).permute(2, 0, 1)[None], random(8, H))
    assert t5.bias.kind == "table" and str(t5.bias) == "t_1[where(i - j), h]"
    swin = meaning_of(
        lambda t, x: t[x.view(-1)].view(SQ, SK, H).permute(2, 0, 1)[None], random(40, H), integers(40, SQ, SK)
    )
    assert swin.bias.kind == "table" and str(swin.bias) == "t_1[x_1[i, j], h]"
    toeplitz = meaning_of(lambda t: t[:, rows() - columns() + SK - 1], random(H, SQ + SK))
    assert toeplitz.bias.kind == "table" and str(toeplitz.bias) == "t_1[h, i - j + 8]"


def test_other_biases_are_data():
    meaning = meaning_of(lambda p: p * 2 + torch.full((SQ, SK), INF).triu(1), random(H, SQ, SK))
    assert meaning.mask == Mask(causal=True) and meaning.bias.kind == "data" and str(meaning.bias) == "2*p_1[h, i, j]"
    shift = meaning_of(lambda _: torch.where(columns() > rows(), -100.0, 0.0), torch.zeros(1))
    assert shift.mask == Mask() and shift.bias.kind == "data"
    row = meaning_of(lambda p: p[:, :, None], random(H, SQ))
    assert row.mask == Mask() and row.bias is None


def test_a_bias_before_the_scale_is_scaled():
    assert str(meaning_of(lambda p: p, random(H, SQ, SK), factor=0.5).bias) == "0.5*p_1[h, i, j]"


def test_flattened_heads():
    """A score laid out as (B·H, Sq, Sk) is read at h + H·b: a bias repeated over the batch is one of the head."""
    from masks.recovering import probe, values_of
    from torch.fx.experimental.proxy_tensor import make_fx

    from attnopt.masks.expressions import Affine
    from attnopt.masks.interpret import Interpreter
    from attnopt.masks.terms import Term

    def build(s):
        return (s[None, :, None, None] * torch.arange(SK)).expand(B, H, SQ, SK).reshape(B * H, SQ, SK)

    gm = make_fx(build, tracing_mode="fake", pre_dispatch=True)(SLOPES)
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    i, j = Affine.var("i"), Affine.var("j")
    terms = [Term("add", node, (Affine.of({"h": 1, "b": H}), i, j))]
    sizes = {"b": B, "h": H, "i": SQ, "j": SK}
    meaning = recover(terms, sizes, causal=True, interpreter=Interpreter())
    probe(meaning, terms, sizes, values_of(gm, [SLOPES]), causal=True)
    assert meaning.mask == Mask(causal=True) and meaning.bias == meaning_of(ALIBI["distance"], SLOPES).bias


def test_sites_that_share_a_mask_share_its_nodes():
    from masks.recovering import INDEX
    from torch.fx.experimental.proxy_tensor import make_fx

    from attnopt.masks.interpret import Interpreter
    from attnopt.masks.terms import Term

    gm = make_fx(lambda m: m[:, None, None, :] != 0, tracing_mode="fake", pre_dispatch=True)(integers(2, B, SK))
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    interpreter, sizes = Interpreter(), {"b": B, "h": H, "i": SQ, "j": SK}
    one, other = (recover([Term("keep", node, INDEX)], sizes, interpreter=interpreter) for _ in range(2))
    assert one.nodes == other.nodes and one.mask == other.mask
    gm.graph.lint()


def symbolic(fn, *inputs):
    from masks.recovering import INDEX
    from torch.fx.experimental.proxy_tensor import make_fx

    from attnopt.masks.interpret import Interpreter
    from attnopt.masks.terms import Term

    gm = make_fx(fn, tracing_mode="symbolic", pre_dispatch=True)(*inputs)
    node = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    shape = node.meta["val"].shape
    sizes = {"b": 2, "h": H, "i": shape[-2], "j": shape[-1]}
    return recover([Term("keep", node, INDEX)], sizes, interpreter=Interpreter()).mask


def test_symbolic_lengths():
    """An offset is a length; a window that no length bounds stays, and nothing is assumed of the sizes."""

    def build(window):
        def fn(q, k):
            i, j = torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0]), torch.arange(k.shape[0])[None]
            return (j <= i) & (i - j < window)

        return fn

    found = symbolic(build(4), random(SQ, 1), random(SK, 1))
    assert found.causal and found.window == 4 and isinstance(found.offset, str) and not found.terms
    plain = symbolic(lambda q: torch.arange(q.shape[0])[None] <= torch.arange(q.shape[0])[:, None], random(SQ, 1))
    assert plain == Mask(causal=True)
    # Sure of every length: j - i < length always holds.
    always = symbolic(
        lambda q: torch.arange(q.shape[0])[None] - torch.arange(q.shape[0])[:, None] < q.shape[0], random(SQ, 1)
    )
    assert always == Mask()
