"LDMLR as released: sizes, formulas, the symmetry, resumption, and the flaws on purpose."

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st
from ltnb import latent, ldmlr_published
from ltnb.augment import Augment
from ltnb.core import DataError, LtnbError, UsageError, read_jsonl
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.data import LongTail
from ltnb.heads import Features, Head
from ltnb.ldmlr import LDMLRConfig
from ltnb.latent import planned_counts
from ltnb.ldmlr_published import (
    Attention,
    PublishedModel,
    PublishedUNet,
    ancestral_times,
    cosine_alpha_bar,
    encode_as_coded,
    posterior,
    published_head,
    published_loss,
    sample_published,
    snr,
    train_published,
    x0_error,
)
from ltnb.models import build_model
from ltnb.classifier import Classifier, encode, pixel_stats
from ltnb.jobs import make_plan
from ltnb.synthetic import make_synthetic
from ltnb.training import fit

ALPHA_BAR = cosine_alpha_bar()
SMALL = dict(n_steps=8, diff_bs=16, dim=16, mults=(1, 2))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


@pytest.fixture(scope="module")
def features():
    "Forty features of 12 entries in three classes"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(torch.tensor([25, 10, 5]))
    return torch.rand(40, 12, generator=g) + y[:, None] / 3, y


@pytest.fixture(scope="module")
def model(features):
    Progress.quiet, before = True, Progress.quiet
    trained = train_published(*features, 3, **SMALL)
    Progress.quiet = before
    return trained


def size(*args):
    with torch.device("meta"):
        return sum(p.numel() for p in PublishedUNet(*args).parameters())


def test_sizes_are_the_released_ones():
    assert size(64, 10) == 7_781_761 and size(64, 100) - size(64, 10) == 90 * 256
    assert round(size(512, 1000, 512, (1, 2, 4)) / 1e6) == 151
    big = PublishedUNet(2048, 3, 16, (1, 2))
    assert (
        big.squeeze.weight.shape == (512, 2048)
        and big.stretch.weight.shape == (2048, 512)
        and big(torch.rand(2, 2048), torch.tensor([0, 9]), torch.tensor([0, 2])).shape == (2, 2048)
    )
    with torch.device("meta"):
        assert PublishedUNet(2048, 3, 2048, (1, 2)).enter.out_channels == 512


def test_blind_to_blocks_of_eight():
    "Any permutation of the 8 contiguous blocks passes through the network; an arbitrary one does not"
    torch.manual_seed(0)
    net, x, t, y = PublishedUNet(64, 10), torch.randn(4, 64), torch.tensor([0, 100, 500, 999]), torch.arange(4)

    def moved(p):
        return (net(x[:, p], t, y) - net(x, t, y)[:, p]).abs().max()

    with torch.no_grad():
        for _ in range(3):
            assert moved(torch.arange(64).view(8, 8)[torch.randperm(8)].flatten()) < 1e-5
        assert moved(torch.arange(64).view(8, 8)[:, torch.randperm(8)].flatten()) > 1e-2, (
            "within a block, places are told apart"
        )
        assert moved(torch.randperm(64)) > 1e-2
        assert (net(x, t, y) - net(x, t, (y + 1) % 10)).abs().max() > 1e-3, "the class is heard"
        assert torch.allclose(net(x, t, y)[:2], net(x[:2], t[:2], y[:2]), atol=1e-5)


def test_linear_attention_against_its_sum():
    "The fast form against the formula, item by item"
    torch.manual_seed(0)
    layer, x = Attention(16, linear=True), torch.randn(2, 16, 5)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 4, 32, 5).unbind(1)
    q, k, h = q.softmax(2) / 32**0.5, k.softmax(3), torch.zeros(2, 4, 32, 5)
    for n in range(5):
        for m in range(5):
            h[..., n] += (q[..., n] * k[..., m]).sum(-1, keepdim=True) * v[..., m]
    assert torch.allclose(x + layer.out(h.reshape(2, 128, 5)), layer(x), atol=1e-5)


@pytest.mark.parametrize("d", [1, 7, 9, 64])
def test_any_width_by_padding(d):
    net = PublishedUNet(d, 3, 16)
    assert net(torch.randn(2, d), torch.tensor([0, 999]), torch.tensor([0, 2])).shape == (2, d)
    assert (d + net.padding) % 8 == 0 and net.padding < 8


def test_schedule():
    beta = 1 - ALPHA_BAR / torch.cat([ALPHA_BAR.new_ones(1), ALPHA_BAR[:-1]])
    assert (
        len(ALPHA_BAR) == 1000
        and (beta > 0).all()
        and abs(beta.max() - 0.999) < 1e-9
        and (ALPHA_BAR[1:] < ALPHA_BAR[:-1]).all()
    )
    weight = snr(ALPHA_BAR)
    assert (
        [round(weight[t].item()) for t in (0, 1, 10, 100)] == [24221, 11437, 1386, 34]
        and weight[999] < 1e-8
        and round(weight.mean().item()) == 86
    )


@given(st.sets(st.integers(-1, 999), min_size=2, max_size=2))
def test_posterior_keeps_mean_and_variance(times):
    s, t = sorted(times)
    now, before = ALPHA_BAR[t], ALPHA_BAR[s] if s >= 0 else torch.ones((), dtype=torch.float64)
    a, b, variance = posterior(now, before)
    assert (
        abs(a + b * now.sqrt() - before.sqrt()) < 1e-9
        and abs(b**2 * (1 - now) + variance - (1 - before)) < 1e-9
        and variance >= 0
    )
    if s < 0:
        assert abs(a - 1) < 1e-12 and b == 0 and variance == 0, "the last step gives x0 itself"


@given(st.integers(1, 1000))
def test_times_fall_to_the_end(n):
    pairs = ancestral_times(n)
    assert (
        len(pairs) == n
        and pairs[0][0] == 999
        and pairs[-1][1] == -1
        and all(t > s for t, s in pairs)
        and [s for _, s in pairs[:-1]] == [t for t, _ in pairs[1:]]
    )
    if n == 1000:
        assert pairs == [(t, t - 1) for t in range(999, -1, -1)]


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_steps(n):
    with pytest.raises(UsageError, match="from 1 to 1000"):
        ancestral_times(n)


def test_loss_is_the_weighted_error(features):
    z, y = features
    net, bar = PublishedUNet(12, 3, 16, (1, 2)), ALPHA_BAR.float()
    with torch.no_grad():
        got = published_loss(net, z, y, bar, torch.Generator().manual_seed(1))
        g = torch.Generator().manual_seed(1)
        t = torch.randint(1000, (len(z),), generator=g)
        eps = torch.randn(z.shape, generator=g)
        share = bar[t][:, None]
        want = (
            snr(ALPHA_BAR)[t].float() * ((net(share.sqrt() * z + (1 - share).sqrt() * eps, t, y) - z) ** 2).mean(1)
        ).mean()
    assert torch.allclose(got, want, rtol=1e-3) and x0_error(net, z, y, t, bar, g).shape == (40,)


class Stop(Exception):
    "A stand-in for a power cut"


@contextmanager
def open_run(path, stop_at=None):
    "A run whose power fails right after the checkpoint of step `stop_at`"
    with Run(LDMLRConfig(out=str(path))) as r:
        r.start(LDMLRConfig(), "cpu", "fp32")
        original = r.save

        def save(name, tensors, **meta):
            original(name, tensors, **meta)
            if meta["step"] == stop_at:
                raise Stop

        r.save = save
        yield r


def test_a_cut_training_goes_on_bit_for_bit(features, tmp_path, monkeypatch):
    "Odd batches and a stop in the middle of a pass"
    settings = {**SMALL, "n_steps": 23, "save_every": 0.0}
    monkeypatch.setattr(latent, "LOOK_EVERY", 10)

    def train(path, stop_at=None):
        with open_run(path, stop_at) as r:
            return train_published(*features, 3, run=r, **settings), r.path

    whole, at = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "cut", 10)
    torch.rand(3)  # the global state has no say
    cut, there = train(tmp_path / "cut")
    assert cut.fingerprint == whole.fingerprint and read_jsonl(there / "metrics.jsonl") == read_jsonl(
        at / "metrics.jsonl"
    )
    assert [r["step"] for r in read_jsonl(at / "metrics.jsonl")] == [10, 20, 23] and all(
        np.isfinite(r["loss"]) for r in read_jsonl(at / "metrics.jsonl")
    )
    done, _ = train(tmp_path / "cut")
    assert done.fingerprint == whole.fingerprint, "a finished training is not trained again"


def test_training_is_plain_sgd_over_a_fixed_order(features, monkeypatch):
    "201 passes by default, each over the same batches; another seed is another model"
    seen = []

    def loss(net, x0, y, *more):
        seen.append((x0.clone(), y.clone()))
        return next(net.parameters()).sum() * 0 + 1.0

    monkeypatch.setattr(ldmlr_published, "published_loss", loss)
    z, y = features
    train_published(z, y, 3, diff_bs=16, dim=16, mults=(1, 2))
    assert len(seen) == 201 * 3 and [len(x) for x, _ in seen[:3]] == [16, 16, 8]
    for i in range(3, len(seen)):
        assert torch.equal(seen[i][0], seen[i - 3][0]) and torch.equal(seen[i][1], seen[i - 3][1])
    first = torch.cat([x for x, _ in seen[:3]])
    assert torch.allclose(first.sort(0).values, (2 * z - 1).sort(0).values) and torch.cat(
        [y for _, y in seen[:3]]
    ).bincount().tolist() == [25, 10, 5]
    assert len(set(seen[0][1].tolist())) > 1, "sorted features do not stay sorted"


def test_seeds(features, model):
    assert (
        train_published(*features, 3, **SMALL).fingerprint
        == model.fingerprint
        != train_published(*features, 3, seed=1, **SMALL).fingerprint
    )
    assert model.counts.tolist() == [25, 10, 5] and model.n_features == 12 and not model.net.training


def test_training_lowers_the_error(features):
    "At small t, where the weight is"
    z, y = features
    x0, t, bar = 2 * z - 1, torch.full((40,), 20), ALPHA_BAR.float()

    def error(n):
        net = train_published(z, y, 3, **{**SMALL, "n_steps": n, "diff_bs": 40}).net
        return x0_error(net, x0, y, t, bar, torch.Generator().manual_seed(0)).mean().item()

    with torch.no_grad():
        start = error(0)
    assert error(40) < 0.5 * start


def test_divergence_is_named(features):
    with pytest.raises(LtnbError, match="--diff-lr") as e:
        train_published(*features, 3, **{**SMALL, "diff_lr": 1e6})
    assert e.value.exit_code == 1
    with pytest.raises(UsageError, match="at least one"):
        train_published(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 3)


def test_samples(model):
    "In 0 to 1, the same alone, in any batch and in a longer plan, and in shards"
    plan = make_plan([6, 5, 100])
    some = np.array([0, 7, 8, 110])
    whole, rows = sample_published(model, plan, 10)
    assert (
        whole.shape == (111, 12)
        and whole.min() >= 0
        and whole.max() <= 1
        and whole.dtype == torch.float32
        and len(rows) == 111
    )
    for other in (sample_published(model, plan[some], 10)[0], sample_published(model, plan, 10, bs=50)[0][some]):
        assert (whole[some] - other).abs().max() < 1e-5
    assert (whole[:6] - sample_published(model, make_plan([7, 1, 1]), 10)[0][:6]).abs().max() < 1e-5
    assert not torch.allclose(sample_published(model, plan[:6], 11)[0], whole[:6]), "other settings, other noise"
    assert (whole[:, None] == whole[None]).all(2).sum() == 111, "no two items are the same"
    assert sample_published(model, make_plan([0, 0]), 5)[0].shape == (0, 12)


def test_all_thousand_steps(features):
    shallow = train_published(*features, 3, **{**SMALL, "n_steps": 2, "mults": (1,)})
    made, _ = sample_published(shallow, make_plan([2, 1]))
    assert torch.isfinite(made).all() and made.min() >= 0 and made.max() <= 1


def test_sampler_finds_a_point(model):
    "With the exact x0, ancestral sampling ends at it, from any noise and with any stride"

    class Exact(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.full_like(x, 0.5) * y[:, None]

    for steps in (1, 7):
        assert torch.allclose(
            sample_published(PublishedModel(Exact(), np.ones(2), 3), make_plan([2, 2]), steps)[0][2:],
            torch.full((2, 3), 0.75),
            atol=1e-6,
        )

    class Far(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.full_like(x, 9.0)

    assert (sample_published(PublishedModel(Far(), np.ones(2), 3), make_plan([2, 2]), 7)[0] == 1).all(), "clamped"


def test_samples_follow_the_noise_of_the_schedule(monkeypatch):
    "A network that knows nothing but zero: halfway, the chain has the variance 1 - alpha_bar"

    class Zero(torch.nn.Module):
        def forward(self, x, t, y):
            if t[0] == 500:
                self.seen = x.clone()
            return torch.zeros_like(x)

    monkeypatch.setattr(ldmlr_published.copy, "deepcopy", lambda net: net)
    z = Zero()
    sample_published(PublishedModel(z, np.ones(1), 16), make_plan([256]))
    assert abs(z.seen.var().item() / (1 - ALPHA_BAR[500].item()) - 1) < 0.1 and abs(z.seen.mean()) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(features):
    trained = train_published(*features, 3, device="cuda", precision="bf16", **SMALL)
    assert next(trained.net.parameters()).device.type == "cpu"
    plan = make_plan([4, 3, 2])
    made, again = (sample_published(trained, plan, 5, device=d)[0] for d in ("cuda", "cpu"))
    assert made.device.type == "cpu" and (made - again).abs().max() < 1e-2


def test_generation_in_shards(model, tmp_path):
    plan = make_plan([3, 4, 2])
    made = make_synthetic(
        tmp_path, plan, lambda part: sample_published(model, part, 5), model.fingerprint, shard_size=4
    )
    assert (
        torch.allclose(made.items, sample_published(model, plan, 5)[0], atol=1e-5)
        and made.manifest[0]["sample_steps"] == 5
    )


def test_counts():
    profile = [int(5000 * 0.01 ** (i / 9)) for i in range(10)]
    assert (
        planned_counts(profile, ratio=0.2).tolist() == [1000, 599, 359, 215, 129, 77, 46, 28, 17, 10]
        and planned_counts(profile, ratio=0.2).sum() == 2480
    )
    assert planned_counts([int(500 * 0.01 ** (i / 99)) for i in range(100)], ratio=0.2).sum() == 2262
    assert planned_counts([25, 35, 15], ratio=0.5).tolist() == [12, 18, 8], "halves go to even"
    assert planned_counts(np.array([1, 24, 28]), ratio=0.2).tolist() == [5, 5, 6]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_counts_change_the_imbalance_little(counts):
    made = planned_counts(counts, ratio=0.2)
    assert (made >= 5).all() and all(abs(m - 0.2 * n) <= 0.5 for m, n in zip(made, counts, strict=True) if n > 27)


def test_head_goes_on_and_keeps_the_real_counts():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    z = torch.randn(200, 4, generator=g) + y[:, None]
    start = Head(torch.zeros(2, 4), torch.zeros(2), torch.tensor([90.0, 10.0]))
    same = published_head(z, y, start, n_epochs=0)
    assert torch.equal(same.weight, start.weight) and torch.equal(same.bias, start.bias)
    head = published_head(z, y, start, n_epochs=60, bs=64, lr=1e-2)
    assert torch.equal(head.counts, start.counts), "as released: not those of the fit"
    assert (head.logits(z).argmax(1) == y).float().mean() > 0.8 and torch.equal(start.weight, torch.zeros(2, 4))
    assert torch.equal(
        head.weight, published_head(z, y, start, n_epochs=60, bs=64, lr=1e-2).weight
    ) and not torch.equal(head.weight, published_head(z, y, start, n_epochs=60, bs=64, lr=1e-2, key=(1,)).weight)
    assert published_head(z, y, start, n_epochs=60, lr=1e-2, wd=10.0).weight.norm() < head.weight.norm()
    with pytest.raises(DataError, match="not finite"):
        published_head(z / 0, y, start)


@pytest.fixture(scope="module")
def classifier():
    data = LongTail.digits()
    clf = Classifier(
        build_model("resnet8", 10, 1), data.class_names, (1, 8, 8), *pixel_stats(data.train.images), "resnet8"
    )
    return fit(clf, data.train.images, data.train.labels, n_epochs=3), data


def test_encode_as_coded_leaves_the_classifier(classifier):
    clf, data = classifier
    before = {k: v.clone() for k, v in clf.state_dict().items()}
    true = encode(clf, data.train.images)
    seen = []
    coded = encode_as_coded(clf, data, augment=Augment("crop", pad=1), progress=seen.append)
    assert (
        all(torch.equal(v, before[k]) for k, v in clf.state_dict().items())
        and not clf.training
        and sum(seen) == len(data.train)
    )
    assert torch.equal(encode(clf, data.train.images), true) and coded.shape == true.shape
    assert ((coded - true).norm() / true.norm()) > 0.1
    assert torch.equal(coded, encode_as_coded(clf, data, augment=Augment("crop", pad=1))) and not torch.equal(
        coded, encode_as_coded(clf, data, augment=Augment("crop", pad=1), seed=1)
    )


def test_each_flaw_alone(classifier):
    clf, data = classifier
    off = dict(augment=None, batch_stats=False, drop_relu=False)
    true = encode(clf, data.train.images)
    assert torch.allclose(encode_as_coded(clf, data, **off), true, atol=1e-4), (
        "without them it is the true encoder, in the same order"
    )
    for one in (dict(augment=Augment("crop+flip")), dict(batch_stats=True), dict(drop_relu=True)):
        assert (encode_as_coded(clf, data, **{**off, **one}) - true).norm() > 0.01 * true.norm()
    other = Classifier(build_model("convnet", 10, 1), data.class_names, (1, 8, 8), clf.mean, clf.std, "convnet").eval()
    assert torch.allclose(
        encode_as_coded(other, data, **{**off, "drop_relu": True}), encode(other, data.train.images), atol=1e-4
    ), "its ReLU is a module, so it stays"


@pytest.mark.parametrize("name, above, shuffled", [("cifar10", 0.041, 0.195), ("cifar100", 0.338, 0.051)])
def test_flaws_on_the_authors_features(name, above, shuffled):
    "Share of entries above 1, and macro accuracy of their head once the 8 blocks are shuffled"
    f = Features.npz(shared(f"ldmlr_{name}_if100_features.npz"))
    assert abs((f.train > 1).float().mean().item() - above) < 0.005
    order = torch.rand(len(f.test), 8, generator=torch.Generator().manual_seed(0)).argsort(1)
    mixed = f.test.view(-1, 8, 8).gather(1, order[..., None].expand(-1, -1, 8)).flatten(1)
    right = (f.head.logits(mixed).argmax(1) == f.test_labels).float().mean().item()
    assert (
        right < shuffled + 0.03
        and right < 0.3 * (f.head.logits(f.test).argmax(1) == f.test_labels).float().mean().item()
    )
