"""Labels and weights: the gradient of each loss, what is masked, and text that the model writes itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT, build, tokens

from attnopt.errors import OptionError, ProfileError, TextError
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from attnopt.supervision import ROWS, Sample, check_labels, continued, disposable, loss_and_gradient


def drawn(logits: torch.Tensor, sample: Sample, seed: int = 0) -> tuple[float, torch.Tensor]:
    return loss_and_gradient(logits, sample, "model", torch.Generator().manual_seed(seed))


def test_labels_come_from_the_model_itself() -> None:
    """A distribution that is certain gives its own token and no loss, whatever the text says."""
    sample, n = Sample(tokens(1, 2500)), 2500
    certain = torch.full((1, n, 5), -50.0)
    certain[..., 3] = 50.0
    loss, gradient = drawn(certain, sample)
    assert loss == 0.0 and float(gradient.abs().max()) < 1e-30
    assert drawn(torch.zeros(1, n, 5), sample)[0] == pytest.approx(n * torch.tensor(5.0).log().item(), rel=1e-4)


def test_the_gradient_of_real_labels_is_that_of_cross_entropy() -> None:
    torch.manual_seed(0)
    n = ROWS + 40  # two blocks of rows
    logits, ids = torch.randn(1, n, 61, requires_grad=True), tokens(1, n)
    weights = torch.rand(n) * (torch.rand(n) < 0.5)
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    (losses * weights[1:]).sum().backward()
    loss, gradient = loss_and_gradient(logits, Sample(ids, weights), "data", torch.Generator())
    assert loss == pytest.approx(float((losses.detach() * weights[1:]).sum()), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad)


def test_drawn_labels_have_the_fisher_information_as_their_mean() -> None:
    """E[g g^T] of one row is diag(p) - p p^T, times the weight."""
    torch.manual_seed(1)
    n = 4000
    row, weight = torch.randn(4), 2.0
    ids = torch.zeros(1, n, dtype=torch.long)
    _, g = drawn(row.expand(1, n, 4).contiguous(), Sample(ids, torch.full((n,), weight)))
    p = row.softmax(-1)
    expected = weight * (p.diag() - p[:, None] * p)
    torch.testing.assert_close(g[0].mT @ g[0] / (n - 1), expected, rtol=0.15, atol=0.02)


def test_softened_labels_keep_the_gradient_of_what_the_model_is_sure_of() -> None:
    """E[g g^T] is that of the softened distribution; of a certain answer it would be nothing without."""
    torch.manual_seed(1)
    n, row = 4000, torch.tensor([12.0, 4.0, 0.0, -3.0])
    ids, weights = torch.zeros(1, n, dtype=torch.long), torch.ones(n)
    logits = row.expand(1, n, 4).contiguous()
    _, g = drawn(logits, Sample(ids, weights, "probe", 4.0))
    p = (row / 4).softmax(-1)
    torch.testing.assert_close(g[0].mT @ g[0] / (n - 1), p.diag() - p[:, None] * p, rtol=0.15, atol=0.02)
    _, hard = drawn(logits, Sample(ids, weights, "probe"))
    assert float(hard.square().sum()) < 0.02 * float(g.square().sum())
    # They are drawn also where other text has labels of its own, and the text is another one for the profile.
    _, own = loss_and_gradient(logits, Sample(ids, weights, "probe", 4.0), "data", torch.Generator().manual_seed(0))
    assert torch.equal(own, g)
    assert Sample(ids, weights, "probe", 4.0).mark != Sample(ids, weights, "probe").mark


def test_overwriting_the_logits_gives_the_same_gradients() -> None:
    torch.manual_seed(2)
    x, w, sample = torch.randn(1, 300, 8), torch.randn(61, 8), Sample(tokens(1, 300))
    found = []
    for overwrite in (False, True):
        leaf = x.clone().requires_grad_()
        logits = F.linear(leaf, w)
        assert disposable(logits)
        _, gradient = loss_and_gradient(logits, sample, "model", torch.Generator().manual_seed(0), overwrite)
        assert (gradient.data_ptr() == logits.data_ptr()) is overwrite
        logits.backward(gradient)
        found.append(leaf.grad)
    assert torch.equal(*found)
    # A soft cap's derivative is made from its result.
    assert not disposable(torch.tanh(F.linear(x.requires_grad_(), w))) and not disposable(x)


@pytest.mark.parametrize("weights", [torch.zeros(24), torch.eye(24)[0]], ids=["none", "the first token only"])
def test_a_sequence_whose_labels_are_all_masked_is_refused(weights: torch.Tensor) -> None:
    with pytest.raises(TextError, match="Every label of a sequence of 24 tokens is masked"):
        Sample(tokens(1, 24), weights)


@pytest.mark.parametrize("bad", [torch.ones(23), -torch.ones(24), torch.full((24,), float("nan"))])
def test_weights_that_are_none(bad: torch.Tensor) -> None:
    with pytest.raises(TextError, match="weights of a sequence"):
        Sample(tokens(1, 24), bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("labels", ["model", "data"])
def test_a_loss_that_is_not_finite_is_an_error(value: float, labels: str) -> None:
    logits = torch.zeros(1, 600, 5)
    logits[0, 400, 2] = value
    with pytest.raises(ProfileError, match="not finite, at token 256"):
        loss_and_gradient(logits, Sample(tokens(1, 600) % 5), labels, torch.Generator())


def test_a_label_that_the_model_rules_out_is_an_error_and_an_impossible_token_is_none() -> None:
    logits = torch.zeros(1, 10, 5)
    logits[..., 4] = float("-inf")
    ids = torch.zeros(1, 10, dtype=torch.long)
    assert loss_and_gradient(logits, Sample(ids), "model", torch.Generator())[0] > 0
    assert loss_and_gradient(logits, Sample(ids), "data", torch.Generator())[0] > 0
    with pytest.raises(ProfileError, match="not finite"):
        loss_and_gradient(logits, Sample(ids + 4), "data", torch.Generator())


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", ["llama", "nanogpt"])
def test_a_model_continues_a_prompt(name: str, greedy: bool) -> None:
    """Through `generate` and its cache, or by running the whole text for every token: the same most likely tokens."""
    model = NanoGPT(True).eval() if name == "nanogpt" else build(name)
    prompt, state = tokens(1, 10), torch.random.get_rng_state()
    sample = continued(model, prompt, 16, seed=3, greedy=greedy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(sample.ids[:, :10], prompt) and sample.length == 16
    assert sample.weights is not None and sample.weights.tolist() == [0.0] * 10 + [1.0] * 6
    again, other = (continued(model, prompt, 16, seed=s, greedy=greedy) for s in (3, 4))
    assert torch.equal(again.ids, sample.ids) and torch.equal(other.ids, sample.ids) is greedy
    if greedy:
        with torch.no_grad():
            out = model(sample.ids)
        logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", out[0])
        assert torch.equal(logits[0, 9:-1].argmax(-1), sample.ids[0, 10:])
    made = profile_model(model, [sample], Grid((0,), (4,)))
    kind = "greedy" if greedy else "sampled"
    assert made.header.supervision == (f"model labels on its own {kind} continuation",)
    assert all(o.tokens == 6 for o in made.observations.values())


def test_a_prompt_that_leaves_no_room() -> None:
    with pytest.raises(TextError, match="leaves nothing"):
        continued(build("llama"), tokens(1, 16), 16, 0)


def test_labels_that_do_not_exist() -> None:
    for labels, draws, message in (("some", 1, "'some'"), ("model", 0, "0 draws"), ("data", 2, "not drawn")):
        with pytest.raises(OptionError, match=message):
            check_labels(labels, draws)
