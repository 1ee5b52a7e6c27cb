"Class-aware sampling without replacement, and heads whose BatchNorm statistics move while they are fitted."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.baseline import Baseline, BaselineConfig, run
from ltnb.core import UsageError, generator, read_json
from ltnb.progress import Progress
from ltnb.data import LongTail
from ltnb.heads import Features
from ltnb.decoupled import batch_norms, class_aware, class_rounds, crt, cycled, lws, shifted_heads
from ltnb.models import build_model
from ltnb.classifier import Classifier, encode, pixel_stats

few = settings(max_examples=30, deadline=None)


@few
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 99))
def test_nothing_comes_twice_before_all_came(counts, n, seed):
    "Classes take turns, and the items of a class: counts differ by one at most, at every moment"
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    i = class_aware(y, n, torch.Generator().manual_seed(seed))
    assert i.shape == (n,) and i.dtype == torch.int64
    for upto in {n, n // 2, n // 3}:
        seen = torch.bincount(y[i[:upto]], minlength=len(counts))
        assert seen.max() - seen.min() <= 1
        for k in range(len(counts)):
            own = torch.bincount(i[:upto], minlength=len(y))[y == k]
            assert own.max() - own.min() <= 1
    assert torch.equal(i, class_aware(y, n, torch.Generator().manual_seed(seed)))


def test_an_epoch_shows_every_image_of_the_largest_class():
    "60 of 60, where a draw with replacement shows about 38 of them"
    y = torch.arange(3).repeat_interleave(torch.tensor([60, 20, 3]))
    i = class_aware(y, 180, generator(0))
    assert torch.bincount(i, minlength=83).tolist() == [1] * 60 + [3] * 20 + [20] * 3
    rounds = class_rounds(5, 50, generator(1)).view(10, 5)
    assert (rounds.sort(1)[0] == torch.arange(5)).all() and len({tuple(r.tolist()) for r in rounds}) > 1
    again = i.view(-1)[y[i] == 2].view(20, 3)
    assert (again.sort(1)[0] == torch.tensor([80, 81, 82])).all() and len({tuple(r.tolist()) for r in again}) > 1


def test_other_powers_draw_classes_and_cycle_items():
    y = torch.arange(2).repeat_interleave(torch.tensor([900, 100]))
    i = class_aware(y, 1000, generator(0), power=1.0)
    share = (y[i] == 0).float().mean()
    assert 0.85 < share < 0.95 and torch.bincount(i, minlength=1000).max() <= 2
    one = cycled(torch.tensor([4, 4, 2]), torch.tensor([2, 2, 4, 4]), generator(0))
    assert one.tolist()[:2] == [2, 2] and sorted(one.tolist()[2:]) == [0, 1]


@pytest.mark.parametrize("fit", ["crt", "lws"])
def test_heads_see_each_image_of_the_largest_class_once_an_epoch(fit, monkeypatch):
    from ltnb import decoupled, heads

    y, seen = torch.arange(3).repeat_interleave(torch.tensor([40, 10, 2])), []
    z = torch.randn(52, 4, generator=generator(0)) + y[:, None]
    steps = decoupled.sgd_steps

    def record(logits, parameters, features, labels, order, *more):
        seen.append(torch.bincount(order, minlength=52))
        return steps(logits, parameters, features, labels, order, *more)

    monkeypatch.setattr(decoupled, "sgd_steps", record)
    if fit == "crt":
        crt(z, y, n_epochs=1)
    else:
        lws(heads.fit_head(z, y, [40, 10, 2], steps=5), z, y, n_epochs=1)
    assert seen[0].tolist() == [1] * 40 + [4] * 10 + [20] * 2


# BatchNorm statistics that move
@pytest.fixture(scope="module")
def encoder():
    data = LongTail.digits()
    stats = pixel_stats(data.train.images)
    clf = Classifier(build_model("convnet", 10, 1), data.class_names, (1, 8, 8), *stats, "convnet")
    return data, clf.eval(), Features.encode(clf, data)


def test_statistics_become_those_of_balanced_batches(encoder):
    "After the fit they are near the mean of class-balanced batches, and the network that was given is as it was"
    data, clf, f = encoder
    before = {k: v.clone() for k, v in clf.state_dict().items()}
    out = shifted_heads(clf, f.head, data.train.images, f.train_labels)
    assert all(torch.equal(v, before[k]) for k, v in clf.state_dict().items()) and not clf.training
    for name, (moved, head) in out.items():
        assert not moved.training and torch.equal(head.counts, torch.ones(10, dtype=torch.float64))
        weights = dict(clf.named_parameters())
        assert all(torch.equal(p, weights[k]) for k, p in moved.named_parameters()), "the weights stay frozen"
        first, was = batch_norms(moved)[0], batch_norms(clf)[0]
        assert not torch.equal(first.running_mean, was.running_mean)
        i = class_aware(f.train_labels, 1140, generator(5))
        x = clf.prepare(torch.from_numpy(data.train.images[i]))
        seen = {}
        hook = was.register_forward_hook(lambda m, a, b, seen=seen: seen.update(mean=a[0].mean((0, 2, 3))))
        with torch.no_grad():
            clf.net.features(x)
        hook.remove()
        off = [(m - seen["mean"]).norm() for m in (first.running_mean, was.running_mean)]
        assert off[0] < off[1] / 3, name
    crt_head, lws_head = out["crt"][1], out["lws"][1]
    ratio = lws_head.weight / f.head.weight
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert not torch.allclose(crt_head.weight, f.head.weight)
    again = shifted_heads(clf, f.head, data.train.images, f.train_labels)["crt"][1]
    assert torch.equal(again.weight, crt_head.weight), "keyed"


def test_files_give_what_arrays_give(tmp_path):
    "Photographs that are read on demand move the same statistics"
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 2)):
        for k in range(2):
            (tmp_path / part / str(k)).mkdir(parents=True)
            for i in range(n):
                x = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(x).save(tmp_path / part / str(k) / f"{i}.png")
    data = LongTail.folder(tmp_path, image_size=16)
    stats = pixel_stats(np.asarray(data.train.images))
    clf = Classifier(build_model("resnet8", 2), data.class_names, (3, 16, 16), *stats, "resnet8").eval()
    f = Features.encode(clf, data)
    a, b = (shifted_heads(clf, f.head, s.train.images, f.train_labels)["crt"] for s in (data, data.in_memory()))
    z = [encode(moved, data.in_memory().test.images) for moved, _ in (a, b)]
    assert torch.equal(a[1].weight, b[1].weight) and torch.equal(*z)


def test_baseline_prints_both_readings(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)
    quick = dict(n_max=40, imb_ratio=10.0, n_epochs=1, device="cpu", precision="fp32")
    plain = run(BaselineConfig(**quick, out=str(tmp_path / "a")))
    both = run(BaselineConfig(**quick, shifted_bn=True, out=str(tmp_path / "b")))
    names = [r["method"] for r in both.scores()]
    assert names == [
        "cross-entropy",
        "label shift",
        "crt",
        "lws",
        "crt, shifted bn",
        "lws, shifted bn",
        "tau-norm",
        "nearest mean",
    ]
    rows = {r["method"]: r for r in both.scores()}
    assert all(r == rows[r["method"]] for r in plain.scores()), "the other rows do not change"
    said = [(tmp_path / n / "report.html").read_text() for n in ("a", "b")]
    assert "--shifted-bn true prints that too" in said[0] and "beside them" in said[1]
    assert read_json(tmp_path / "b" / "config.json")["shifted_bn"] is True


@pytest.mark.parametrize(
    "more, why",
    [(dict(heads=False), "heads=False"), (dict(norm="group"), "norm='group'"), (dict(loss="ldam"), "no linear head")],
)
def test_shifted_bn_where_nothing_can_shift(more, why):
    with pytest.raises(UsageError, match=why):
        Baseline().check(BaselineConfig(shifted_bn=True, **more))


def test_network_without_batch_norm_is_refused_before_training():
    pytest.importorskip("timm")
    config = BaselineConfig(shifted_bn=True, arch="timm:test_vit")
    with pytest.raises(UsageError, match="no BatchNorm statistics"):
        Baseline().resolve(config, LongTail.digits())


def test_digests_of_runs_from_before_stay():
    a, b = BaselineConfig(n_epochs=3), BaselineConfig(n_epochs=3, shifted_bn=True)
    assert "shifted_bn" in a.unknown_to({}) and a.digest() != b.digest()
