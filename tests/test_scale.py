"Many classes: blocks give what the plain formula gives, class-balanced draws have a budget, memory stays small."

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from ltnb import decoupled
from ltnb.core import DataError, generator
from ltnb.progress import Progress
from ltnb.data import bands, thirds
from ltnb.heads import Head, by_rows, fit_head
from ltnb.decoupled import MAX_DRAWS, DirectionHead, balanced_draws, choose_tau, crt, lws, nearest_mean, tau_norm
from ltnb.latent import Neighbourhood, class_means, draw_neighbours, memorised, neighbour_classes
from ltnb.losses import label_shift
from ltnb.metrics import calibration, confusion, log_softmax, read_logits, score, worst
from ltnb.pictures import confusion_flow
from ltnb.jobs import make_plan
from ltnb.batches import held_out


def cloud(n=400, k=12, d=6):
    "Features and labels, every class there, and a head"
    g = generator("cloud")
    y = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=g)])
    means = torch.randn(k, d, generator=g)
    z = means[y] + torch.randn(n, d, generator=g)
    return z, y, Head(means, torch.zeros(k), torch.bincount(y).double())


@pytest.mark.parametrize("with_logits", [True, False])
def test_score_is_what_the_confusion_matrix_says(with_logits):
    z, y, head = cloud()
    counts, logits, y = np.arange(300, 0, -25), head.logits(z).numpy(), y.numpy()
    s = score(None if with_logits else logits.argmax(1), y, counts, logits=logits if with_logits else None)
    m = confusion(logits.argmax(1), y, 12)
    per_class, groups = m.diagonal() / m.sum(1), {**bands(counts), **thirds(counts)}
    assert s.all == m.trace() / m.sum() and s.worst_tenth == worst(per_class, 2)
    assert np.array_equal(s.per_class, per_class)
    assert all(np.isclose(s.bands[b], per_class[k].mean()) for b, k in groups.items() if len(k))
    assert s.macro_f1 == pytest.approx((2 * m.diagonal() / (m.sum(0) + m.sum(1))).mean())
    last, top = groups["last_third"], groups["top_third"]
    assert s.tail_to_head == m[np.ix_(last, top)].sum() / m[last].sum()
    if not with_logits:
        return
    log_p = log_softmax(logits)
    assert s.nll == -log_p[np.arange(len(y)), y].mean() and s.ece == calibration(np.exp(log_p), y).ece


def test_logits_read_in_parts():
    z, y, head = cloud()
    logits, y = head.logits(z).numpy(), y.numpy()
    whole, parts = read_logits(logits, y), read_logits(logits, y, entries=100)
    assert all(map(np.array_equal, whole, parts)) and np.array_equal(whole[0], logits.argmax(1))
    with pytest.raises(DataError, match="shape"):
        read_logits(logits[:5], y)
    with pytest.raises(DataError, match="label 11"):
        read_logits(logits[:, :10], y)
    with pytest.raises(DataError, match="labels must be"):
        score(None, y + 1, np.ones(12), logits=logits)


def test_confusion_flow_is_what_the_matrix_says():
    z, y, head = cloud()
    counts, answers = np.arange(300, 0, -25), head.logits(z).argmax(1).numpy()
    m = confusion(answers, y.numpy(), 12).astype(float)
    total, groups = m.sum(1), list(thirds(counts).values())
    np.fill_diagonal(m, 0)
    want = [[m[np.ix_(a, b)].sum() / total[a].sum() for b in groups] for a in groups]
    assert np.array_equal(confusion_flow(answers, y.numpy(), counts), want)


def test_logits_made_in_parts():
    z, _, head = cloud()
    told = []
    for h in (head, DirectionHead(head.weight, head.bias, head.counts)):
        for say in (h.logits, h.corrected):
            assert torch.allclose(by_rows(say, z, 12, entries=100, progress=told.append), say(z), atol=1e-5)
    assert sum(told) == 4 * len(z)


def test_neighbours_row_by_row(monkeypatch):
    z, y, head = cloud()
    means = class_means(z, y, 12)
    want = (head.logits(means).double() / 0.5).fill_diagonal_(-torch.inf).softmax(1).float()
    assert torch.equal(neighbour_classes(head, means), want)
    p = label_shift(head.logits(z), head.counts).softmax(1)[torch.arange(len(y)), y]
    assert np.allclose(memorised(head, z, y, 12), [p[y == k].mean() for k in range(12)], atol=1e-6)
    around = Neighbourhood.find(head, z, y, 12)
    plan = make_plan([300] * 12)
    drawn = draw_neighbours(("a",), plan, around.toward)
    assert np.array_equal(drawn[600:900], draw_neighbours(("a",), plan[600:900], around.toward))
    assert (drawn != plan[:, 0]).all()


def test_class_by_class_without_a_pass_a_class():
    z, y, _ = cloud()
    means = torch.stack([z[y == k].mean(0) for k in range(12)])
    assert torch.equal(nearest_mean(z, y).weight, 2 * means)
    fit, held = held_out(y, generator("held"), 0.3)
    g, want = generator("held"), torch.zeros(len(y), dtype=torch.bool)
    for k in range(12):
        i = (y == k).nonzero()[:, 0]
        want[i[torch.randperm(len(i), generator=g)[: int(len(i) * 0.3)]]] = True
    assert torch.equal(held, want.nonzero()[:, 0]) and torch.equal(fit, (~want).nonzero()[:, 0])


def test_lws_with_and_without_its_table(monkeypatch):
    z, y, head = cloud()
    kept = lws(head, z, y, n_epochs=2)
    monkeypatch.setattr(decoupled, "MAX_TABLE", 0)
    assert torch.allclose(lws(head, z, y, n_epochs=2).weight, kept.weight, atol=1e-5)


def test_tau_is_chosen_in_parts():
    z, y, head = cloud()
    long = Head(head.weight * torch.linspace(3, 0.3, 12)[:, None], head.bias, head.counts)
    said = [tau_norm(long, t / 10).logits(z).argmax(1) == y for t in range(21)]
    right = [np.mean([hit[y == k].double().mean().item() for k in range(12)]) for hit in said]
    assert choose_tau(long, z, y) == pytest.approx(int(np.round(right, 12).argmax()) / 10)


def test_the_budget_of_class_balanced_draws(capsys, monkeypatch):
    "It binds for none of the usual sets, and says so where it does"
    monkeypatch.setattr(Progress, "quiet", False)
    for k, most in ((10, 114), (10, 5000), (100, 500), (1000, 1280)):
        assert balanced_draws([most] + [1] * (k - 1), 10) == 10 * k * most
    assert not capsys.readouterr().err
    assert balanced_draws([1000] + [2] * 8141, 10) == MAX_DRAWS
    err = capsys.readouterr().err
    assert "8,142 classes" in err and "max_draws = 16,777,216" in err
    z, y, head = cloud()
    told = []
    crt(z, y, n_epochs=10, bs=10, max_draws=55, progress=told.append)
    lws(head, z, y, n_epochs=10, bs=10, max_draws=25, progress=told.append)
    fit_head(z, y, torch.bincount(y), steps=7, progress=told.append)
    assert sum(told) == 6 + 3 + 7
    monkeypatch.setattr(Progress, "quiet", True)
    assert balanced_draws([1000] + [2] * 8141, 10) == MAX_DRAWS and not capsys.readouterr().err.count("99")


PEAK = """
import json, resource, sys, numpy as np, torch
from ltnb.progress import Progress
from ltnb.heads import Head, by_rows
from ltnb.decoupled import lws, nearest_mean
from ltnb.latent import class_means, memorised
from ltnb.metrics import score
from ltnb.pictures import confusion_flow
Progress.quiet, k, n, grown = True, 4000, 40000, {}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
def watch(name, f):
    start = peak()
    out = f()
    grown[name] = peak() - start
    return out
y = torch.arange(n) % k
z, head = torch.randn(n, 8), Head(torch.randn(k, 8), torch.zeros(k), torch.full((k,), n / k).double())
torch.set_num_threads(1)
watch("nearest mean", lambda: nearest_mean(z, y))
watch("memorised", lambda: memorised(head, z[:4000], y[:4000], k))
watch("lws", lambda: lws(head, z, y, n_epochs=.02))
logits = watch("logits", lambda: by_rows(head.corrected, z[:4000], k)) # 64 MB
watch("flow", lambda: confusion_flow(y.numpy(), y.numpy(), np.full(k, 10)))
watch("score", lambda: score(None, y[:4000].numpy(), np.full(k, 10), logits=logits.numpy()))
print(json.dumps(grown))
"""


@pytest.mark.slow_process
def test_memory_with_many_classes():
    "40,000 features of 4,000 classes: a table of all logits has 640 MB, one of all pairs of classes 128 MB in int64"
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout)
    limits = {"nearest mean": 60, "memorised": 300, "lws": 150, "logits": 200, "flow": 60, "score": 150}  # MB
    assert all(grown[name] < mb for name, mb in limits.items()), grown
