"Every loss against its formula, written plainly, and at its edges."

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.core import DataError, UsageError
from ltnb.losses import (
    DRW,
    LDAM,
    LOSSES,
    WCDAS,
    BalancedSoftmax,
    ClassBalanced,
    CrossEntropy,
    Focal,
    LabelAwareSmoothing,
    LogitAdjustment,
    build_loss,
    class_balanced_weights,
    effective_counts,
    label_shift,
)

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # CIFAR-10-LT, imbalance 100
few = settings(max_examples=25, deadline=None)


@st.composite
def batches(draw, extreme=1e6):
    "(logits, labels, item weights, counts), as numpy float64"
    rng, k, b = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(2, 7)), draw(st.integers(1, 6))
    counts = draw(st.lists(st.floats(0.5, extreme), min_size=k, max_size=k))
    return (
        rng.normal(size=(b, k)) * draw(st.sampled_from([0.3, 3.0, 30.0])),
        rng.integers(0, k, b),
        rng.random(b) + 0.1,
        np.array(counts),
    )


def nll(z, y):  # one row, without any trick but the maximum
    top = max(z)
    return math.log(sum(math.exp(v - top) for v in z)) + top - z[y]


def cb(n, beta=0.9999):
    w = [(1 - beta) / (1 - math.exp(c * math.log(beta))) for c in n]
    return [len(n) * v / sum(w) for v in w]


def ldam_logits(z, y, n, s=30, top=0.5):
    c = top * min(n) ** 0.25
    return [s * (v - (c / n[k] ** 0.25 if k == y else 0)) for k, v in enumerate(z)]


def smoothed(z, y, n, head, tail, shape):
    lo, hi = min(n), max(n)
    u = (n[y] - lo) / (hi - lo) if hi > lo else 1
    eps = {
        "concave": tail + (head - tail) * math.sin(math.pi * u / 2),
        "linear": tail + (head - tail) * u,
        "convex": head + (head - tail) * math.sin(1.5 * math.pi + math.pi * u / 2),
    }[shape]
    return sum(((1 - eps) * (k == y) + eps / len(z)) * nll(z, k) for k in range(len(z)))


def focal(z, y, gamma):
    top = max(z)
    others = sum(math.exp(v - top) for k, v in enumerate(z) if k != y) / sum(math.exp(v - top) for v in z)
    return others**gamma * nll(z, y)


PLAIN = {  # name, options -> the loss of one item, and its class weights
    ("cross_entropy",): (lambda z, y, n: nll(z, y), None),
    ("wcdas",): (lambda z, y, n: nll(z, y), None),
    ("focal",): (lambda z, y, n: focal(z, y, 1), None),
    ("focal", ("gamma", 2.0)): (lambda z, y, n: focal(z, y, 2), None),
    ("focal", ("gamma", 0.5)): (lambda z, y, n: focal(z, y, 0.5), None),
    ("class_balanced",): (lambda z, y, n: nll(z, y), cb),
    ("class_balanced", ("beta", 0.9)): (lambda z, y, n: nll(z, y), lambda n: cb(n, 0.9)),
    ("class_balanced_focal", ("gamma", 2.0)): (lambda z, y, n: focal(z, y, 2), cb),
    ("balanced_softmax",): (lambda z, y, n: nll([v + math.log(c) for v, c in zip(z, n, strict=True)], y), None),
    ("logit_adjustment",): (
        lambda z, y, n: nll([v + math.log(c / sum(n)) for v, c in zip(z, n, strict=True)], y),
        None,
    ),
    ("logit_adjustment", ("tau", 1.7)): (
        lambda z, y, n: nll([v + 1.7 * math.log(c / sum(n)) for v, c in zip(z, n, strict=True)], y),
        None,
    ),
    ("ldam",): (lambda z, y, n: nll(ldam_logits(z, y, n), y), None),
    ("ldam", ("s", 10.0), ("max_margin", 0.3)): (lambda z, y, n: nll(ldam_logits(z, y, n, 10, 0.3), y), None),
    **{
        ("label_aware_smoothing", ("smooth_head", 0.4), ("smooth_tail", 0.1), ("shape", s)): (
            lambda z, y, n, s=s: smoothed(z, y, n, 0.4, 0.1, s),
            None,
        )
        for s in ("concave", "linear", "convex")
    },
}


@pytest.mark.parametrize("which", PLAIN, ids=lambda w: " ".join(map(str, w)))
@few
@given(batch=batches())
def test_formula(which, batch):
    (z, y, w, n), (item, class_weights) = batch, PLAIN[which]
    loss = build_loss(which[0], n, **dict(which[1:]))
    t = torch.from_numpy
    for weights in (None, w):
        v = [
            (1 if weights is None else weights[i]) * (1 if class_weights is None else class_weights(n)[y[i]])
            for i in range(len(y))
        ]
        want = sum(v[i] * item(z[i], y[i], n) for i in range(len(y))) / sum(v)
        got = loss(t(z), t(y), None if weights is None else t(weights))
        assert got.dtype == torch.float64 and got.shape == ()
        assert math.isclose(got.item(), want, rel_tol=1e-9, abs_tol=1e-9)
        half = loss(t(z).float(), t(y), None if weights is None else t(weights))
        assert half.dtype == torch.float32 and math.isclose(
            half.item(), want, rel_tol=1e-4, abs_tol=1e-4 * max(1, abs(z).max())
        )


@few
@given(batch=batches())
def test_what_must_be_equal(batch):
    z, y, w, n = map(torch.from_numpy, batch)
    for v in (None, w):
        ce = CrossEntropy(n)(z, y, v)
        assert torch.allclose(BalancedSoftmax(n)(z, y, v), LogitAdjustment(n)(z, y, v))
        assert torch.allclose(BalancedSoftmax(n * 7)(z, y, v), BalancedSoftmax(n)(z, y, v)), "only shares matter"
        for same in (
            Focal(n, 0.0),
            LogitAdjustment(n, 0.0),
            ClassBalanced(n, beta=0.0),
            DRW(n),
            LabelAwareSmoothing(n, 0.0, 0.0),
            LDAM(n, 1.0, 0.0),
        ):
            assert torch.allclose(same(z, y, v), ce), same
        assert torch.allclose(
            ClassBalanced(n)(z, y, v), CrossEntropy(n)(z, y, class_balanced_weights(n)[y] * (1 if v is None else v))
        )
    assert torch.allclose(label_shift(z + LogitAdjustment(n).shift, n), z, atol=1e-4), (
        "the post-hoc form undoes the training form"
    )
    assert torch.allclose(CrossEntropy(n)(z, y, (y >= 0).double()), F.cross_entropy(z, y))
    assert torch.allclose(ClassBalanced(n)(z, y), F.cross_entropy(z, y, weight=class_balanced_weights(n)))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    g = torch.Generator().manual_seed(0)
    z, y, w = (
        torch.randn(4, 5, dtype=torch.float64, generator=g).requires_grad_(),
        torch.tensor([0, 4, 2, 4]),
        torch.rand(4, dtype=torch.float64, generator=g),
    )
    loss = build_loss(name, [900, 300, 100, 30, 3])
    loss.set_epoch(9, 10)
    if loss.head == "cosine":
        z = z.detach().tanh().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z) and torch.autograd.gradcheck(lambda z: loss(z, y, w), z)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_overflow(name, dtype):
    "A class of 1 and one of a million, logits of 10,000, right and wrong"
    loss = build_loss(name, [10**6, 1000, 1])
    loss.set_epoch(199, 200)
    for y in (0, 1, 2):
        for z in (
            torch.eye(3, dtype=dtype)[[0]] * 1e4,
            torch.eye(3, dtype=dtype)[[2]] * -1e4,
            torch.zeros(1, 3, dtype=dtype),
        ):
            value = loss(z.requires_grad_(), torch.tensor([y]))
            value.backward()
            assert math.isfinite(value.item()) and value >= 0 and torch.isfinite(z.grad).all()
    assert loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 2])).dtype == torch.float32
    assert loss(torch.randn(2, 3), torch.tensor([0, 1]), torch.zeros(2)).item() == 0, "a batch in which nothing counts"


def test_focal_is_smooth_where_the_answer_is_certain():
    for gamma in (0.0, 0.5, 1.0, 2.0):
        z = torch.tensor([[200.0, 0.0]]).requires_grad_()
        Focal([1, 1], gamma)(z, torch.tensor([0])).backward()
        assert torch.isfinite(z.grad).all()


def test_class_balanced_weights_at_their_ends():
    w = class_balanced_weights([10**6, 1])
    assert (
        w.dtype == torch.float64
        and math.isclose(w.sum().item(), 2)
        and math.isclose((w[1] / w[0]).item(), 1e4, rel_tol=1e-9)
    ), "a million are 1 / (1 - beta) effective ones"
    assert torch.allclose(
        class_balanced_weights(COUNTS, 1 - 1e-12), torch.tensor(cb_limit(COUNTS), dtype=torch.float64), rtol=1e-4
    ), "toward 1 / n"
    assert torch.equal(class_balanced_weights(COUNTS, 0.0), torch.ones(10, dtype=torch.float64))
    for beta in (1.0, -0.1, math.nan):
        with pytest.raises(UsageError, match="beta"):
            class_balanced_weights(COUNTS, beta)


def cb_limit(n):
    return [len(n) / c / sum(1 / v for v in n) for c in n]


@pytest.mark.parametrize(
    "n_epochs, first", [(200, 160), (300, 240), (10, 8), (15, 12), (35, 28), (3, 3), (7, 6), (1, 1)]
)
def test_drw_switches_once(n_epochs, first):
    loss = build_loss("ldam_drw", COUNTS)
    held, late = loss.class_weights, class_balanced_weights(COUNTS)
    for epoch in [*range(n_epochs), 0, n_epochs - 1]:
        loss.set_epoch(epoch, n_epochs)
        assert torch.equal(held, late if epoch >= first else torch.ones(10, dtype=torch.float64)), epoch
        assert loss.class_weights is held, "filled in place"


def test_drw_is_uniform_then_weighted():
    z, y = torch.rand(8, 10, dtype=torch.float64), torch.arange(8)
    loss, ldam = build_loss("ldam_drw", COUNTS), LDAM(COUNTS)
    loss.set_epoch(159, 200)
    assert torch.allclose(loss(z, y), ldam(z, y))
    loss.set_epoch(160, 200)
    assert torch.allclose(loss(z, y), F.cross_entropy(ldam.adjust(z, y), y, weight=class_balanced_weights(COUNTS)))


def test_drw_needs_no_second_compilation():
    from torch._dynamo.testing import CompileCounter

    count, loss = CompileCounter(), build_loss("ldam_drw", COUNTS)
    step, z, y = torch.compile(loss, backend=count, fullgraph=True), torch.rand(4, 10), torch.arange(4)
    for epoch in (0, 159, 160, 199):
        loss.set_epoch(epoch, 200)
        assert torch.allclose(step(z, y), loss(z, y))
    assert count.frame_count == 1


def test_counts_are_remembered_and_stated():
    assert repr(build_loss("balanced_softmax", COUNTS)) == "balanced_softmax(counts: 12406 items, 5000 to 50)"
    assert (
        repr(build_loss("ldam_drw", np.array(COUNTS)))
        == "ldam_drw(counts: 12406 items, 5000 to 50; s=30, max_margin=0.5, beta=0.9999, start=0.8)"
    )
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    loss = build_loss("logit_adjustment", counts, tau=1.5)
    counts[0] = 7
    assert loss.counts[0] == 5000 and not loss.state_dict(), "a copy, and nothing for a checkpoint"
    assert all(
        build_loss(n, COUNTS).name == n and build_loss(n, COUNTS).head in ("linear", "cosine", "wcdas") for n in LOSSES
    )
    assert {n for n in LOSSES if build_loss(n, COUNTS).head == "cosine"} == {"ldam", "ldam_drw"} and build_loss(
        "wcdas", COUNTS
    ).head == "wcdas"


def test_check_finds_the_counts_of_another_set():
    "Real counts after images were generated: the silent bug"
    real = torch.arange(10).repeat_interleave(torch.tensor(COUNTS))
    made = torch.arange(10).repeat_interleave(torch.tensor([0] * 5 + [400] * 5))
    both, weights = torch.cat([real, made]), torch.cat([torch.ones(len(real)), torch.full((len(made),), 0.5)])
    loss, right = BalancedSoftmax(COUNTS), BalancedSoftmax(effective_counts(COUNTS, [0] * 5 + [400] * 5, 0.5))
    loss.check(real)
    right.check(both, weights)
    with pytest.raises(DataError, match="other counts"):
        loss.check(both)
    with pytest.raises(DataError, match="other counts"):
        right.check(both)
    BalancedSoftmax(torch.ones(10)).check(
        real, (1 / torch.tensor(COUNTS))[real]
    )  # class-balanced sampling: equal counts
    for wrong, message in (
        (torch.tensor([0, 10]), "0 to 9.*got 10; 1 of 2"),
        (torch.tensor([-1, 3]), "got -1"),
        (torch.tensor([0.5]), "whole numbers"),
    ):
        with pytest.raises(DataError, match=message):
            loss.check(wrong)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("cross_entropy", "focal", "wcdas")])
@pytest.mark.parametrize("bad", [0, -3, math.nan, math.inf])
def test_a_missing_class_is_an_error(name, bad):
    with pytest.raises(DataError, match="class 2 of 3 has count"):
        build_loss(name, [100, 10, bad])


def test_wrong_names_and_options():
    with pytest.raises(UsageError, match="Did you mean 'balanced_softmax'"):
        build_loss("balance_softmax", COUNTS)
    with pytest.raises(UsageError, match="taau"):
        build_loss("logit_adjustment", COUNTS, taau=2)
    with pytest.raises(UsageError, match="Did you mean 'concave'"):
        build_loss("label_aware_smoothing", COUNTS, shape="concav")
    for name, options in (
        ("focal", {"gamma": -1}),
        ("ldam", {"s": 0}),
        ("label_aware_smoothing", {"smooth_head": 1.0}),
    ):
        with pytest.raises(UsageError):
            build_loss(name, COUNTS, **options)


def test_ldam_margins():
    m = LDAM(COUNTS).margins
    assert m.max() == 0.5 == m[-1] and torch.allclose(
        m / m[0], (torch.tensor(COUNTS, dtype=torch.float64) / 5000) ** -0.25
    )
    z, y = torch.rand(5, 10, dtype=torch.float64), torch.arange(5, 10)
    assert LDAM(COUNTS)(z, y) > CrossEntropy(COUNTS)(30 * z, y), "a margin makes it harder"


def test_smoothing_shapes():
    eps = {s: LabelAwareSmoothing(COUNTS, 0.4, 0.1, s).smooth for s in ("concave", "linear", "convex")}
    for e in eps.values():
        assert math.isclose(e[0], 0.4) and math.isclose(e[-1], 0.1) and (e.diff() <= 0).all()
    assert (eps["concave"][1:-1] > eps["linear"][1:-1]).all() and (eps["linear"][1:-1] > eps["convex"][1:-1]).all()
    assert (LabelAwareSmoothing([5, 5, 5], 0.3).smooth == 0.3).all()


@pytest.mark.parametrize("name", LOSSES)
@few
@given(batch=batches(), at=st.integers(0, 6), epoch=st.sampled_from([0, 9]))
def test_a_split_batch_has_the_same_mean(name, batch, at, epoch):
    "What several processes do: add both sums, then divide"
    z, y, w, n = map(torch.from_numpy, batch)
    loss = build_loss(name, n)
    loss.set_epoch(epoch, 10)
    for v in (None, w):
        parts = [loss.total(z[i], y[i], None if v is None else v[i]) for i in (slice(0, at), slice(at, None))]
        assert all(s.shape == () == c.shape and s.dtype == c.dtype == torch.float64 for s, c in parts)
        assert torch.allclose(sum(s for s, _ in parts) / sum(c for _, c in parts), loss(z, y, v)), (
            "an empty part adds nothing"
        )
    total, weight = loss.total(z.bfloat16(), y)
    assert total.dtype == weight.dtype == torch.float32


def test_the_sums_hold_the_class_weights():
    z, y, w = (
        torch.randn(4, 10, dtype=torch.float64),
        torch.tensor([0, 9, 9, 3]),
        torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64),
    )
    c = class_balanced_weights(COUNTS)
    assert math.isclose(ClassBalanced(COUNTS).total(z, y)[1], c[y].sum()) and math.isclose(
        ClassBalanced(COUNTS).total(z, y, w)[1], (w * c[y]).sum()
    )
    assert CrossEntropy(COUNTS).total(z, y)[1] == 4 and CrossEntropy(COUNTS).total(z, y, w)[1] == 3.5
    drw = DRW(COUNTS)
    assert drw.total(z, y)[1] == 4
    drw.set_epoch(8, 10)
    assert math.isclose(drw.total(z, y)[1], c[y].sum())


def test_prior():
    n, late = torch.tensor(COUNTS, dtype=torch.float64), class_balanced_weights(COUNTS)
    want = {
        "balanced_softmax": torch.ones(10, dtype=torch.float64),
        "logit_adjustment": torch.ones(10, dtype=torch.float64),
        **dict.fromkeys(("class_balanced", "class_balanced_focal", "cross_entropy_drw", "ldam_drw"), late * n),
    }
    for name in LOSSES:
        prior = build_loss(name, COUNTS).prior
        assert prior.dtype == torch.float64 and torch.allclose(prior, want.get(name, n)), name
    assert torch.allclose(LogitAdjustment(COUNTS, 0.3).prior, n**0.7) and torch.equal(
        LogitAdjustment(COUNTS, 0.0).prior, n
    )
    assert torch.equal(DRW(COUNTS, start=1.0).prior, n), "weights that never come"
    assert torch.allclose(ClassBalanced(COUNTS, BalancedSoftmax(COUNTS)).prior, late), "the weights alone are left"
    drw = DRW(COUNTS)
    for n_epochs, weighted in ((200, True), (3, False), (5, True), (1, False)):
        for epoch in (0, n_epochs - 1):
            drw.set_epoch(epoch, n_epochs)
            assert torch.allclose(drw.prior, late * n if weighted else n), n_epochs


@pytest.mark.parametrize(
    "name, options",
    [
        ("cross_entropy", {}),
        ("class_balanced", {"beta": 0.9}),
        ("balanced_softmax", {}),
        ("logit_adjustment", {"tau": 0.4}),
        ("cross_entropy_drw", {}),
    ],
)
def test_prior_is_what_the_optimum_holds(name, options):
    "Constant inputs: the fitted softmax is the loss's prior, and equal for all classes once that is removed"
    n, b = [60, 30, 10], torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss, y = build_loss(name, n, **options), torch.arange(3).repeat_interleave(torch.tensor(n))
    loss.set_epoch(9, 10)
    optimizer = torch.optim.LBFGS([b], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(b.expand(100, 3), y)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    assert torch.allclose(b.softmax(0), loss.prior / loss.prior.sum(), atol=1e-4)
    assert torch.allclose(label_shift(b, loss.prior).softmax(0), torch.ones(3, dtype=torch.float64) / 3, atol=1e-4)


def test_scale_and_title():
    assert {n: build_loss(n, COUNTS).title for n in LOSSES} == {
        "cross_entropy": "cross-entropy",
        "focal": "focal",
        "class_balanced": "class-balanced",
        "class_balanced_focal": "class-balanced focal",
        "ldam": "ldam",
        "cross_entropy_drw": "drw",
        "ldam_drw": "ldam-drw",
        "balanced_softmax": "balanced softmax",
        "logit_adjustment": "logit adjustment",
        "wcdas": "wcdas",
        "label_aware_smoothing": "label-aware smoothing",
    }
    for name in LOSSES:
        scale = build_loss(name, COUNTS).scale
        assert type(scale) is float and scale == (30 if "ldam" in name else 1), name
    assert build_loss("ldam_drw", COUNTS, s=10).scale == 10 == ClassBalanced(COUNTS, LDAM(COUNTS, 10)).scale
    cos, y = torch.rand(3, 10, dtype=torch.float64), torch.arange(3)
    assert torch.allclose(LDAM(COUNTS, max_margin=0.0)(cos, y), F.cross_entropy(30.0 * cos, y)), (
        "the scale that training used"
    )
    assert torch.equal(WCDAS(COUNTS)(cos, y), CrossEntropy(COUNTS)(cos, y))


def test_a_tail_class_is_found_again():
    "Overlapping classes of 500 and 5: cross-entropy gives the tail away, its balanced forms do not"
    g = torch.Generator().manual_seed(1)
    y = torch.cat([torch.zeros(500), torch.ones(5)]).long()
    x = torch.randn(505, 2, generator=g) + 1.5 * y[:, None]
    fair = torch.randn(2000, 2, generator=g) + 1.5 * (torch.arange(2000) % 2)[:, None]
    recall = {}
    for name in (
        "cross_entropy",
        "focal",
        "class_balanced",
        "balanced_softmax",
        "logit_adjustment",
        "cross_entropy_drw",
    ):
        w, b, loss = (
            torch.zeros(2, 2, requires_grad=True),
            torch.zeros(2, requires_grad=True),
            build_loss(name, [500, 5]),
        )
        loss.check(y)
        optimizer = torch.optim.LBFGS([w, b], max_iter=50)
        for epoch in range(5):
            loss.set_epoch(epoch, 5)

            def closure(optimizer=optimizer, loss=loss, w=w, b=b):
                optimizer.zero_grad()
                value = loss(x @ w.T + b, y)
                value.backward()
                return value

            optimizer.step(closure)
        recall[name] = ((fair @ w.T + b).argmax(1) == 1)[1::2].double().mean().item()
    assert (
        recall["cross_entropy"]
        < 0.5
        < 0.7
        < min(recall[n] for n in ("class_balanced", "balanced_softmax", "logit_adjustment", "cross_entropy_drw"))
    ), recall
