"Any optimizer, any order of the images, a start from trained weights."

from functools import partial

import numpy as np
import pytest
import torch
from conftest import everywhere
from torch import nn

from ltnb import team
from ltnb.baseline import BaselineConfig
from ltnb.checkpoint import optimizer_state, put_together, taken_apart
from ltnb.classifier import Classifier, pixel_stats
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.data import LongTail
from ltnb.losses import build_loss
from ltnb.models import build_model
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.team import Where
from ltnb.together import fit_seeds
from ltnb.training import Fitting, fit, lr_factor


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


DATA = LongTail.digits()
X, Y, N = DATA.train.images, DATA.train.labels, len(DATA.train)


def fresh(seed=0):
    net = build_model("convnet", 10, 1, seed)
    return Classifier(net, DATA.class_names, (1, 8, 8), *pixel_stats(X), "convnet")


def weights(clf):
    return {k: v.clone() for k, v in clf.net.state_dict().items()}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def shuffled(epoch, g):
    return torch.randperm(N, generator=g)


def growing(epoch, g):
    "More images in each epoch, some of them twice"
    return torch.cat([torch.randperm(N, generator=g)[: 90 + 70 * epoch], torch.randint(N, (7,), generator=g)])


# Records


def test_settings_by_keyword_and_in_records_are_the_same():
    how = Fitting(n_epochs=1, bs=100, lr=0.01)
    nets = [fit(fresh(), X, Y, how), fit(fresh(), X, Y, n_epochs=1, bs=100, lr=0.01), fit(fresh(), X, Y, how, Where())]
    assert all(equal(weights(nets[0]), weights(net)) for net in nets[1:])
    assert not equal(weights(nets[0]), weights(fit(fresh(), X, Y, how, lr=0.02))), "a keyword overrides its record"
    with pytest.raises(UsageError, match="n_epoch'.*n_epochs"):
        fit(fresh(), X, Y, n_epoch=1)


# Orders


def test_an_order_that_is_the_usual_one_trains_the_same():
    how = Fitting(n_epochs=2, bs=64, lr=0.01)
    assert equal(weights(fit(fresh(), X, Y, how)), weights(fit(fresh(), X, Y, how, order=shuffled)))


@pytest.mark.parametrize("kind", [list, np.array, np.int32, "reversed"])
def test_positions_may_be_a_tensor_an_array_or_a_list(kind):
    def order(epoch, g):
        at = torch.arange(120).flip(0)
        if kind == "reversed":
            return np.arange(120)[::-1]
        return at.numpy().astype(np.int32) if kind is np.int32 else kind(at.tolist())

    how = Fitting(n_epochs=1, bs=50, lr=0.01)
    want = fit(fresh(), X, Y, how, order=lambda epoch, g: torch.arange(120).flip(0))
    assert equal(weights(want), weights(fit(fresh(), X, Y, how, order=order)))


def test_an_order_shows_what_it_says(monkeypatch):
    seen, step = [], team.train_step

    def watched(net, optimizer, loss, shown, y, *more):
        seen.append(len(y))
        return step(net, optimizer, loss, shown, y, *more)

    everywhere(monkeypatch, "train_step", watched)
    asked = []

    def order(epoch, g):
        asked.append(epoch)
        return growing(epoch, g)

    fit(fresh(), X, Y, n_epochs=3, bs=100, lr=0.01, order=order)
    assert seen == [97, 100, 67, 100, 100, 37] and asked == [0, 1, 2]
    order = [0] * 300  # more than there are, and one image alone
    fit(fresh(), X, Y, n_epochs=1, bs=300, lr=0.01, order=lambda epoch, g: order)
    assert seen[-1] == 300


@pytest.mark.parametrize(
    "given, word",
    [
        ([], "shape"),
        ([[1, 2]], "one row"),
        ([0.5], "whole numbers"),
        (np.ones(N, bool), "whole numbers"),
        ("ab", "whole numbers"),
        (None, "whole numbers"),
        ([0, N], f"position {N} in epoch 1"),
        ([-1], "position -1"),
    ],
)
def test_what_is_no_order_is_refused(given, word):
    with pytest.raises(UsageError, match=word):
        fit(fresh(), X, Y, n_epochs=1, order=lambda epoch, g: given)


def test_two_ways_of_choosing_are_refused_before_work():
    calls = []
    order = lambda epoch, g: calls.append(epoch) or [0]  # noqa: E731 - one line beside its use
    for more, word in (
        (dict(order=order, power=0.0), "power=0 and order"),
        (dict(order=[1, 2]), "must be a function"),
        (dict(optimizer="adam"), "optimizer must be"),
        (dict(optimizer=lambda p: 3), "no torch.optim.Optimizer"),
        (dict(optimizer=torch.optim.LBFGS), "LBFGS"),
        (dict(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)), "2 of the optimizer's tensors"),
        (dict(optimizer=torch.optim.SGD(fresh().net.parameters(), lr=0.1), lr=0.3), "leave out lr=0.3"),
    ):
        with pytest.raises(UsageError, match=word):
            fit(fresh(), X, Y, n_epochs=1, bs=32, **more)
    for more, word in (
        (dict(order=order), "order"),
        (dict(optimizer=torch.optim.AdamW), "optimizer"),
        (dict(clip=1.0), "clip"),
    ):
        with pytest.raises(UsageError, match=f"cannot have {word}"):
            fit_seeds([fresh(s) for s in (0, 1)], X, Y, [0, 1], n_epochs=1, bs=32, **more)
    assert not calls


# Losses state their counts


def easy_first(epoch, g):
    "Frequent classes first, all of them later"
    at = torch.randperm(N, generator=g)
    return at[torch.from_numpy(Y)[at] < 4 + 3 * epoch]


def balanced(epoch, g):
    k = torch.randint(10, (400,), generator=g)
    return [int(np.flatnonzero(Y == c)[0]) for c in k]


def stating(order, counts):
    def stated(epoch, g):
        return order(epoch, g)

    stated.counts = counts
    return stated


SHOWN = np.sum([np.bincount(Y[easy_first(e, torch.Generator())], minlength=10) for e in range(3)], 0)


@pytest.mark.parametrize(
    "order, counts",
    [
        (shuffled, DATA.counts),
        (growing, DATA.counts),  # as often, up to chance
        (easy_first, SHOWN),  # the mean of all epochs
        (easy_first, DATA.counts),  # the last one
        (balanced, np.ones(10)),
        (stating(shuffled, np.arange(1, 11)), np.arange(1, 11)),
    ],
)
def test_counts_that_fit_an_order_train(order, counts):
    fit(fresh(), X, Y, n_epochs=3, bs=100, lr=0.01, order=order, loss=build_loss("balanced_softmax", counts))


@pytest.mark.parametrize(
    "order, counts",
    [
        (shuffled, np.ones(10)),
        (balanced, DATA.counts),  # the prior would be taken out although no image shows it
        (easy_first, np.ones(10)),
        (stating(shuffled, np.arange(1, 11)), DATA.counts),
    ],
)
def test_counts_that_no_epoch_shows_are_refused(order, counts):
    with pytest.raises(DataError, match="other counts than those that its order shows"):
        fit(fresh(), X, Y, n_epochs=3, bs=100, order=order, loss=build_loss("balanced_softmax", counts))


def test_the_weights_of_items_count_under_an_order():
    w, loss = np.where(Y == 0, 0.5, 1).astype("float32"), partial(build_loss, "balanced_softmax")
    halved = np.bincount(Y, w)
    fit(fresh(), X, Y, n_epochs=1, bs=100, lr=0.01, order=shuffled, weights=w, loss=loss(halved))
    with pytest.raises(DataError, match="other counts"):
        fit(fresh(), X, Y, n_epochs=1, bs=100, order=shuffled, weights=w, loss=loss(DATA.counts))


# Optimizers


class Remembers(torch.optim.Optimizer):
    "SGD whose memory is of every kind: whole numbers, 64-bit tensors, lists, and a number in its group"

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, distance=1.0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["distance"] *= 0.9
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s |= {
                        "step": 0,
                        "sum": torch.zeros_like(p, dtype=torch.float64),
                        "norms": [],
                        "deep": {"a": (1, None)},
                    }
                    s["count.dotted"] = torch.zeros((), dtype=torch.int64)
                s["step"] += 1
                s["count.dotted"] += 1
                s["sum"] += p.grad
                s["norms"] = [*s["norms"], p.grad.double().norm()][-2:]
                s["deep"] = {"a": (s["deep"]["a"][0] * 1.01, p.grad.mean())}
                rate = group["lr"] * group["distance"] * (1 - 0.9 ** s["step"]) * s["deep"]["a"][0]
                p.sub_(rate * (s["sum"] / (s["step"] + sum(s["norms"]) + s["count.dotted"])).float())


class Stop(Exception):
    "A stand-in for a power cut"


def train_in(path, stop=None, monkeypatch=None, **how):
    "A training in a run; the power fails before step `stop`"
    count, original = [0], team.train_step

    def step(*a):
        count[0] += 1
        if count[0] > stop:
            raise Stop
        return original(*a)

    with Run(BaselineConfig(out=str(path))) as run:
        run.start(BaselineConfig(), "cpu", "fp32")
        if stop is not None:
            everywhere(monkeypatch, "train_step", step)
        try:
            return weights(fit(fresh(), X, Y, bs=100, run=run, save_every=0.0, **how))
        except Stop:
            return None
        finally:
            everywhere(monkeypatch, "train_step", original) if stop is not None else None


def left(path):
    "The last checkpoint, and all metrics, as they lie on the disk"
    return (path / "checkpoints/classifier-seed-0.safetensors").read_bytes(), (path / "metrics.jsonl").read_bytes()


HOLD = X[::7], Y[::7]
CUTS = {
    "order": dict(order=growing, n_epochs=4, lr=0.02, mixup=0.3),
    "order, everything": dict(
        order=growing, n_epochs=4, lr=0.02, ema=0.9, clip=1.0, held_out=HOLD, patience=3, weights=np.linspace(0.5, 1, N)
    ),
    "stops early": dict(order=growing, n_epochs=5, lr=1e-7, held_out=HOLD, patience=1, optimizer=torch.optim.AdamW),
    "adamw": dict(optimizer=torch.optim.AdamW, n_epochs=2, lr=1e-3, schedule="cosine"),
    "a memory of every kind": dict(optimizer=Remembers, n_epochs=2, lr=0.05, order=shuffled),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts_end_byte_for_byte(name, tmp_path, monkeypatch):
    want = train_in(tmp_path / "whole", **CUTS[name])
    for stop in (1, 2, 1, 1):  # in the middle of an epoch and at its end
        train_in(tmp_path / "cut", stop, monkeypatch, **CUTS[name])
    assert equal(want, train_in(tmp_path / "cut", **CUTS[name]))
    assert left(tmp_path / "whole") == left(tmp_path / "cut")


def test_an_epoch_that_was_stopped_keeps_its_images(tmp_path, monkeypatch):
    "An order that would decide otherwise now does not change an epoch that was begun"
    train_in(tmp_path / "cut", 2, monkeypatch, order=shuffled, n_epochs=1, lr=0.01)
    again = train_in(tmp_path / "cut", order=lambda epoch, g: shuffled(epoch, g).flip(0), n_epochs=1, lr=0.01)
    assert equal(again, train_in(tmp_path / "whole", order=shuffled, n_epochs=1, lr=0.01))


@pytest.mark.parametrize(
    "begun, now, word",
    [
        ({}, dict(optimizer=torch.optim.AdamW), "not begun with AdamW"),
        (dict(optimizer=torch.optim.AdamW), {}, "begun with AdamW, not with SGD"),
        ({}, dict(order=shuffled), "without an order"),
        (dict(order=shuffled), {}, "with an order"),
    ],
)
def test_another_training_is_not_gone_on_with(begun, now, word, tmp_path, monkeypatch):
    train_in(tmp_path, 2, monkeypatch, n_epochs=1, **begun)
    with pytest.raises(LtnbError, match=word):
        train_in(tmp_path, n_epochs=1, **now)


def test_an_optimizer_may_be_a_class_a_function_or_built():
    how = dict(n_epochs=1, bs=100)
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    want = weights(fit(fresh(), X, Y, **how, lr=0.02, wd=1e-3))
    assert equal(want, weights(fit(fresh(), X, Y, **how, lr=0.02, wd=1e-3, optimizer=sgd)))
    bound = partial(sgd, lr=0.02, weight_decay=1e-3)
    assert equal(want, weights(fit(fresh(), X, Y, **how, lr=5.0, optimizer=bound))), "what is bound stays"
    assert equal(want, weights(fit(fresh(), X, Y, **how, optimizer=lambda p: bound(p)))), (
        "a function that takes no rate"
    )
    clf = fresh()
    assert equal(want, weights(fit(clf, X, Y, **how, optimizer=bound(clf.net.parameters()))))


def test_the_schedule_multiplies_the_rate_of_each_group():
    clf, seen = fresh(), []
    body = [p for k, p in clf.net.named_parameters() if not k.startswith("fc")]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-4}, {"params": clf.net.fc.parameters(), "lr": 1e-2}])

    def look(epoch):
        seen.append([g["lr"] for g in optimizer.param_groups])

    fit(clf, X, Y, n_epochs=3, bs=300 and N, schedule="cosine", optimizer=optimizer, after_epoch=look)
    assert seen == [[1e-4 * f, 1e-2 * f] for f in (lr_factor("cosine", e, 3) for e in range(3))]
    fit(clf, X, Y, n_epochs=1, bs=N, optimizer=optimizer, schedule="constant", after_epoch=look)
    assert seen[-1] == [1e-4, 1e-2], "a second training begins with the first rates"


def test_the_head_alone_goes_on_from_trained_weights():
    clf = fit(fresh(), X, Y, n_epochs=3, bs=64, lr=0.02)
    clf.log_prior = [0.0] * 9 + [1.0]
    before, parameters = weights(clf), dict(clf.net.named_parameters())
    clf.net.body[0][0].weight.requires_grad_(False)
    fit(clf, X, Y, n_epochs=2, bs=64, clip=1.0, optimizer=torch.optim.Adam(clf.net.fc.parameters(), lr=1e-2))
    after = weights(clf)
    moved = {k for k in parameters if not torch.equal(before[k], after[k])}
    assert moved == {"fc.weight", "fc.bias"}
    assert [k for k, p in parameters.items() if not p.requires_grad] == ["body.0.0.weight"], "as they were"
    assert clf.log_prior is None, "the correction belonged to the training before"


def test_a_memory_is_taken_apart_and_put_together():
    value = {"a": [1, 2.5, None, torch.arange(3)], "b": (torch.ones(2), {"c": "word", 4: True})}
    tensors = {}
    again = put_together(taken_apart(value, "here", tensors), tensors)
    assert str(again) == str(value) and len(tensors) == 2
    with pytest.raises(LtnbError, match="remembers a set"):
        taken_apart({1, 2}, "here", {})


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adam", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adamax"])
def test_what_usual_optimizers_remember_needs_no_more_than_tensors(kind):
    net = fresh().net
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.1)
    net(torch.randn(3, 1, 8, 8)).sum().backward()
    optimizer.step()
    assert not optimizer_state(optimizer)[1]
