"Second stages and samplers: against plain references, and against what they must mean."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.core import DataError, UsageError, generator
from ltnb.data import LongTail
from ltnb.heads import Features, Head, fit_head
from ltnb.decoupled import DirectionHead, SecondStage, choose_tau, crt, lws, nearest_mean, sgd_steps, tau_norm
from ltnb.models import build_model
from ltnb.classifier import Classifier
from ltnb.batches import balanced_indices, held_out, power_indices, sqrt_indices

few = settings(max_examples=25, deadline=None)


def blobs(counts, d=6, seed=0, gap=1.2):
    "Overlapping Gaussian classes, the same means for every seed"
    g, n = torch.Generator().manual_seed(seed), torch.tensor(counts)
    y = torch.arange(len(n)).repeat_interleave(n)
    means = gap * torch.randn(len(n), d, generator=torch.Generator().manual_seed(99))
    return means[y] + torch.randn(len(y), d, generator=g), y


def macro(head, z, y, corrected=False):
    right = ((head.corrected if corrected else head.logits)(z).argmax(1) == y).double()
    return torch.stack([right[y == k].mean() for k in y.unique()]).mean().item()


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0, -1.0])
def test_power_indices_frequencies(power):
    counts, n = np.array([400, 90, 12, 0, 3]), 40_000
    y = torch.from_numpy(np.repeat(np.arange(5), counts))[
        torch.randperm(505, generator=torch.Generator().manual_seed(3))
    ]
    i = power_indices(y, n, power, torch.Generator().manual_seed(4))
    assert i.dtype == torch.int64 and i.shape == (n,)
    share = np.where(counts > 0, np.maximum(counts, 1.0) ** power, 0)
    share /= share.sum()
    seen = np.bincount(y[i].numpy(), minlength=5)
    assert (abs(seen - n * share) <= 5 * np.sqrt(n * share * (1 - share))).all() and seen[3] == 0
    p = share[y.numpy()] / counts[y.numpy()]  # of each item: uniform inside its class
    items = np.bincount(i.numpy(), minlength=505)
    assert (abs(items - n * p) <= 6 * np.sqrt(n * p)).all()


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.integers(0, 99))
def test_power_indices_any_labels(labels, power, seed):
    y = torch.tensor(labels)

    def draw():
        return power_indices(y, 64, power, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(), draw()) and 0 <= draw().min() and draw().max() < len(y)
    other = [power_indices(torch.arange(10), 64, power, torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert not torch.equal(*other)


def test_sampler_names():
    y, g = blobs([50, 5, 2])[1], lambda: torch.Generator().manual_seed(0)
    assert torch.equal(balanced_indices(y, 99, g()), power_indices(y, 99, 0.0, g())) and torch.equal(
        sqrt_indices(y, 99, g()), power_indices(y, 99, 0.5, g())
    )
    with pytest.raises(DataError, match="0 labels"):
        balanced_indices(y[:0], 1, g())


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 99))
def test_held_out(counts, share, seed):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    fit, held = held_out(y, torch.Generator().manual_seed(seed), share)
    assert torch.equal(torch.cat([fit, held]).sort()[0], torch.arange(len(y))) and torch.equal(
        torch.bincount(y[fit], minlength=len(counts)) > 0, torch.ones(len(counts)) > 0
    )
    for k, n in enumerate(counts):
        assert (y[held] == k).sum() == (max(int(n * share), 1) if n > 1 else 0)
    assert torch.equal(held, held_out(y, torch.Generator().manual_seed(seed), share)[1])


def test_crt_finds_the_tail():
    (z, y), (zt, yt) = blobs([400, 100, 25, 6], seed=10, gap=0.7), blobs([300] * 4, seed=11, gap=0.7)
    real, head, same = (crt(z, y, n_epochs=4, power=p) for p in (1.0, 0.0, 0.0))
    assert (
        torch.equal(head.weight, same.weight)
        and torch.equal(head.bias, same.bias)
        and not torch.equal(crt(z, y, n_epochs=0.1, key=(1,)).weight, crt(z, y, n_epochs=0.1).weight)
    )
    assert (
        head.weight.shape == (4, 6)
        and not head.weight.requires_grad
        and torch.equal(head.counts, torch.ones(4, dtype=torch.float64))
    )
    assert torch.equal(head.logits(zt).argmax(1), head.corrected(zt).argmax(1)), "nothing is left to remove"
    plain, right = macro(real, zt, yt), macro(real, zt, yt, corrected=True)
    assert real.counts.tolist() == [400, 100, 25, 6] and right > plain + 0.03, (
        "plain sampling leaves the prior in, and the counts say so"
    )
    assert macro(head, zt, yt) > plain + 0.05, "class-balanced sampling takes it out"


def test_sgd_steps_is_sgd():
    "One step from zero against the formula, with decay; and the last learning rates"
    x, y, w = (
        torch.randn(6, 3, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.full((3, 3), 0.1, dtype=torch.float64).requires_grad_(),
    )
    p = (x @ w.detach().T).softmax(1) - torch.eye(3, dtype=torch.float64)[y]
    want = w.detach() - 0.2 * (p.T @ x / 6 + 0.01 * w.detach())
    sgd_steps(lambda x: x @ w.T, [w], x, y, torch.arange(6), SecondStage(lr=0.2, wd=0.01, bs=6))
    assert torch.allclose(w, want)
    x, y, bad = torch.full((2, 3), 1e30), torch.tensor([0, 1]), torch.ones(3, requires_grad=True)
    with pytest.raises(DataError, match="lower lr"):  # equal scores of both classes: the first step leaves float32
        sgd_steps(lambda x: x * bad, [bad], x, y, torch.arange(2).repeat(9), SecondStage(lr=1e30, wd=0.0, bs=2))


def test_lws_only_scales():
    (z, y), (zt, yt) = blobs([400, 100, 25, 6]), blobs([300] * 4, seed=1)
    plain = fit_head(z, y, torch.bincount(y), steps=400)
    plain = Head(plain.weight, torch.zeros_like(plain.bias), plain.counts)  # so that scales have something to correct
    head = lws(plain, z, y)
    s = head.weight / plain.weight
    assert (
        torch.allclose(s, s[:, :1].expand_as(s), rtol=1e-4)
        and s[:, 0].std() > 0.01
        and torch.equal(head.counts, torch.ones(4, dtype=torch.float64))
    )
    assert torch.equal(head.weight, lws(plain, z, y).weight)

    def loss(h):
        return torch.nn.functional.cross_entropy(h.logits(zt), yt)

    assert loss(head) < loss(plain), "fits balanced data better"
    biased = Head(plain.weight, torch.arange(4.0), plain.counts)
    moved = lws(biased, z, y)
    assert torch.allclose(moved.bias, moved.weight[:, 0] / biased.weight[:, 0] * biased.bias, rtol=1e-4), (
        "the bias is scaled too"
    )


@few
@given(st.integers(0, 999), st.floats(0, 2))
def test_tau_norm_formula(seed, tau):
    g = torch.Generator().manual_seed(seed)
    head = Head(
        torch.randn(4, 5, dtype=torch.float64, generator=g),
        torch.randn(4, dtype=torch.float64, generator=g),
        torch.tensor([9.0, 4.0, 2.0, 1.0]),
    )
    z, got = torch.randn(3, 5, dtype=torch.float64, generator=g), tau_norm(head, tau)
    for k in range(4):
        assert np.allclose(
            got.weight[k], head.weight[k].numpy() / math.sqrt(sum(v**2 for v in head.weight[k].tolist())) ** tau
        )
    assert torch.allclose(tau_norm(head, 0).logits(z), z @ head.weight.T), "0: the head without bias"
    assert torch.allclose(tau_norm(head, 1).weight.norm(dim=1), torch.ones(4, dtype=torch.float64)), "1: equal lengths"
    assert torch.allclose(got.logits(z).softmax(1), got.corrected(z).double().softmax(1)), "nothing is left to remove"
    with pytest.raises(DataError, match="length 0"):
        tau_norm(Head(torch.zeros(2, 3), torch.zeros(2), torch.ones(2)), tau)


def test_choose_tau():
    z, y = blobs([600, 150, 40, 10], gap=1.0)
    fit, held = held_out(y, generator(0, "tau"))
    head = fit_head(z[fit], y[fit], torch.bincount(y[fit]), steps=300)
    tau = choose_tau(head, z[held], y[held])
    scores = [macro(tau_norm(head, t / 10), z[held], y[held]) for t in range(21)]
    assert (
        tau == min(t / 10 for t in range(21) if scores[t] > max(scores) - 1e-9) and scores[round(10 * tau)] >= scores[0]
    )
    assert choose_tau(Head(torch.eye(3), torch.zeros(3), torch.ones(3)), torch.eye(3), torch.arange(3)) == 0.0, (
        "a tie: the smallest"
    )
    for bad in (dict(features=z[:0], labels=y[:0]), dict(features=z, labels=y, taus=[])):
        with pytest.raises(UsageError, match="candidates"):
            choose_tau(head, **bad)


@few
@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 6))
def test_nearest_mean_is_sklearns(seed, k, d):
    from sklearn.neighbors import NearestCentroid

    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(k), rng.integers(0, k, 30)])
    z, zt = rng.normal(size=(len(y), d)) + y[:, None], rng.normal(size=(40, d)) * 3
    head = nearest_mean(torch.from_numpy(z), torch.from_numpy(y))
    assert (head.logits(torch.from_numpy(zt)).argmax(1).numpy() == NearestCentroid().fit(z, y).predict(zt)).all()
    means = np.stack([z[y == j].mean(0) for j in range(k)])
    distance = ((zt[:, None] - means) ** 2).sum(2)
    assert np.allclose(head.logits(torch.from_numpy(zt)).softmax(1), torch.from_numpy(-distance).softmax(1)), (
        "minus squared distance, up to a constant an item"
    )
    cosine = nearest_mean(torch.from_numpy(z), torch.from_numpy(y), "cosine")
    want = (zt / np.linalg.norm(zt, axis=1, keepdims=True)) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert (
        np.allclose(cosine.logits(torch.from_numpy(zt)), want)
        and isinstance(cosine, DirectionHead)
        and (cosine.counts == 1).all()
    )


def test_what_cannot_be_fitted():
    z, y = blobs([5, 5])
    for fit in (crt, nearest_mean):
        with pytest.raises(DataError, match="class 1 of 3 has no training feature"):
            fit(z, 2 * y)
        with pytest.raises(DataError, match="class 2 of 3"):
            fit(z, y, n_classes=3)
        with pytest.raises(DataError, match="0 to 0 for 1 classes"):
            fit(z, y, n_classes=1)
        with pytest.raises(DataError, match="one label each"):
            fit(z, y[:3])
        with pytest.raises(DataError, match="finite"):
            fit(z / 0, y)
    with pytest.raises(UsageError, match="metric"):
        nearest_mean(z, y, "l1")
    with pytest.raises(UsageError, match="share"):
        held_out(y, generator(0), 1.0)


def test_encode_without_a_linear_head():
    "A head of cosines is no `Head`; a linear one without bias has a bias of 0"
    data = LongTail.digits()
    clf = Classifier(build_model("convnet", 10, 1), data.class_names, (1, 8, 8), arch="convnet")
    assert torch.equal(Features.encode(clf, data).head.weight, clf.net.fc.weight)

    class Cosine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(10, 64))

        def forward(self, x):
            return torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(self.weight).T

    clf.net.fc = Cosine()
    features = Features.encode(clf, data)
    assert features.head is None and features.train.shape == (len(data.train), 64) and features.fingerprint()
    clf.net.fc = torch.nn.Linear(64, 10, bias=False)
    assert torch.equal(Features.encode(clf, data).head.bias, torch.zeros(10))
