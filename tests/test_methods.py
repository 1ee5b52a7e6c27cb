"Networks, heads, diffusion and recipe: numbers against references and against what they must mean."

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cifar, shared
from hypothesis import given
from hypothesis import strategies as st
from ltnb.augment import Augment
from ltnb.core import DataError, UsageError
from ltnb.progress import Progress
from ltnb.data import LongTail
from ltnb.heads import Features, Head, fit_head
from ltnb.latent import (
    Neighbourhood,
    alpha_sigma,
    class_means,
    ddim,
    draw_neighbours,
    draw_pull,
    gaussian_features,
    memorised,
    mixed_features,
    neighbour_classes,
    pooled_covariance,
    sample_features,
    shrink_strength,
    train_latent,
)
from ltnb.latent import planned_counts
from ltnb.ldmlr import LDMLR, LDMLRConfig, encoded, run
from ltnb.ldmlr_settings import LDMLR_ABLATIONS, ablation_settings
from ltnb.losses import effective_counts, label_shift
from ltnb.models import ResNet, build_model
from ltnb.classifier import Classifier, encode, pixel_stats
from ltnb.jobs import make_plan
from ltnb.recipe import Stage
from ltnb.refit import CONTROLS, METHODS
from ltnb.runs import Run
from ltnb.team import Where
from ltnb.training import fit


QUICK = dict(n_steps=30, diff_bs=64, width=32)
SHORT = dict(head_steps=5, scratch_steps=5)  # where nobody asks how good a head is


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


def of_images(counts, side):
    "What is asked of a set of images before anything is run on it"
    images = np.broadcast_to(np.uint8(0), (sum(counts), 3, side, side))
    return SimpleNamespace(counts=np.array(counts), train=SimpleNamespace(images=images))


def of_features(counts, width, head=True):
    "The same of frozen features, with or without a head"
    train = torch.zeros(1, 1).expand(sum(counts), width)
    return SimpleNamespace(counts=np.array(counts), train=train, head="a head" if head else None)


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=20), st.floats(0, 3))
def test_label_shift_formula(counts, tau):
    z = torch.randn(3, len(counts))
    want = z.double() - tau * torch.tensor(counts, dtype=torch.float64).div(sum(counts)).log()
    assert torch.allclose(label_shift(z, counts, tau).double(), want, atol=1e-5)
    assert torch.allclose(label_shift(z, [7 * c for c in counts], tau), label_shift(z, counts, tau), atol=1e-5), (
        "only shares matter"
    )


def test_reference_weights_give_the_published_features():
    "The authors' ResNet-32 in our network, on the CIFAR test images: the reference features, and their accuracy"
    net, ref = ResNet(10), np.load(shared("ldmlr_cifar10_if100_features.npz"))
    from safetensors.torch import load_file

    net.load_state_dict(load_file(shared("ldmlr_cifar10_if100_resnet32.safetensors")))
    images, _, names = cifar("cifar10", "test", lambda labels: np.flatnonzero(labels == 3)[:200])
    clf = Classifier(
        net,
        names,
        (3, 32, 32),
        np.array([125.3, 123.0, 113.9]) / 255,
        np.array([63.0, 62.1, 66.7]) / 255,
        "resnet32",
    )
    bgr = np.ascontiguousarray(images.transpose(0, 3, 1, 2)[:, ::-1])  # those weights were trained on blue-green-red
    nearest = (
        torch.cdist(encode(clf, bgr), torch.from_numpy(ref["test_features"][ref["test_labels"] == 3])).min(1).values
    )  # the reference is in another order
    assert nearest.max() < 1e-2


@pytest.mark.parametrize("name, argmax, shifted", [("cifar10", 72.49, 80.86), ("cifar100", 41.28, 48.59)])
def test_reference_features(name, argmax, shifted, tmp_path):
    "Rows `cross-entropy` and `label shift` of a run from the authors' features; the corrected form holds its level"
    path = shared(f"ldmlr_{name}_if100_features.npz")
    r = run(
        LDMLRConfig(
            features=str(path),
            out=str(tmp_path),
            n_steps=200,
            per_class=1000 if name == "cifar10" else 100,
            device="cpu",
        )
    )
    rows = {row["method"]: row for row in r.scores()}
    assert list(rows) == list(METHODS)
    assert [round(rows[m]["all"] * 100, 2) for m in ("cross-entropy", "label shift")] == [argmax, shifted]
    assert rows["ldmlr + label shift"]["all"] * 100 > shifted - 0.5
    assert rows["ldmlr + label shift"]["scratch_all"] - rows["garbage"]["scratch_all"] > 0.08, (
        "from scratch, the generator is told from garbage"
    )
    assert rows["label shift"]["few"] is None or name == "cifar100"
    model = Classifier.load(tmp_path / "model")
    f = Features.npz(path)
    with torch.no_grad():
        got = (model(f.test).argmax(1) == f.test_labels).float().mean().item()
    assert abs(got - rows["ldmlr + label shift"]["all"]) < 1e-4, "the saved classifier is the one that was scored"


def test_recipe_does_not_touch_its_own_baseline(tmp_path):
    "Rows of a run are those of its stages called by hand, and the saved model is the refitted one"
    few = dict(n_epochs=5, n_steps=60, per_class=30, head_steps=80, head_lr=0.1, scratch_steps=5)
    cfg = LDMLRConfig(**few, device="cpu", precision="fp32", out=str(tmp_path))
    rows = {r["method"]: r for r in run(cfg).scores()}
    data = LongTail.digits()
    again = LDMLR().resolve(replace(cfg, out=str(tmp_path / "again")), data)
    with Run(again) as by_itself:
        _, f = encoded(Stage(again, data, 0, Where("cpu", "fp32", run=by_itself)))
    by_hand = [
        (read(f.test).argmax(1) == f.test_labels).float().mean().item() for read in (f.head.logits, f.head.corrected)
    ]
    assert np.allclose(by_hand, [rows["cross-entropy"]["all"], rows["label shift"]["all"]], atol=1e-6)
    model = Classifier.load(tmp_path / "model")
    with torch.no_grad():
        got = (model(torch.from_numpy(data.test.images)).argmax(1) == f.test_labels).float().mean().item()
    assert abs(got - rows["ldmlr + label shift"]["all"]) < 0.005 < abs(got - rows["label shift"]["all"])


def test_effective_prior_is_removed_exactly_once():
    "On balanced real + generated counts the correction vanishes; with the real prior it does not"
    z, y = torch.randn(200, 4), torch.arange(200) % 2
    head = fit_head(z, y, [100, 100], steps=5)
    assert torch.allclose(head.logits(z).softmax(1), head.corrected(z).softmax(1), atol=1e-6)
    base = Head(torch.randn(3, 4), torch.randn(3), torch.tensor([90.0, 9.0, 1.0]))
    moved = fit_head(z[:5], y[:5], effective_counts([90, 9, 1], [10, 10, 10]), start=base, steps=1, lr=0.0)
    assert torch.allclose(moved.corrected(z), base.corrected(z), atol=1e-5), "a start keeps its corrected scores"
    same = fit_head(z[:5], y[:5], [90, 9, 1], start=base, steps=1, lr=0.0)
    assert torch.allclose(same.logits(z), base.logits(z), atol=1e-5)


def test_syn_weight_zero_is_no_generation():
    "Items of weight 0 change nothing, whatever they are; weight 2 moves the scale as two copies do"
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(200, 4, generator=g), torch.arange(200) % 2
    junk = 1000 * torch.randn(50, 4, generator=g)
    alone = fit_head(z, y, [100, 100], steps=20, lr=1e-2)
    weightless = fit_head(
        torch.cat([z, junk]),
        torch.cat([y, y[:50]]),
        [100, 100],
        torch.cat([torch.ones(200), torch.zeros(50)]),
        steps=20,
        lr=1e-2,
    )
    assert torch.equal(alone.weight, weightless.weight)
    shifted = torch.cat([z, z[:50] + 3])
    double = fit_head(
        shifted,
        torch.cat([y, y[:50]]),
        [150, 150],
        torch.cat([torch.ones(200), torch.full((50,), 2.0)]),
        steps=1,
        lr=0.0,
    )
    copies = fit_head(torch.cat([shifted, shifted[200:]]), torch.cat([y, y[:50], y[:50]]), [150, 150], steps=1, lr=0.0)
    assert torch.allclose(double.bias, copies.bias, atol=1e-6)


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(test_features=np.zeros((4, 5), "f4")), "width"),
        (dict(train_features=np.full((6, 3), np.nan, "f4")), "NaN"),
        (dict(train_labels=np.array([0, 0, 0, 2, 2, 2])), "no training feature"),
        (dict(train_labels=np.zeros(5, int)), "6 train_features need 6"),
        (dict(fc_weight=np.zeros((3, 3), "f4")), "only one of"),
        (dict(fc_weight=np.zeros((3, 4), "f4"), fc_bias=np.zeros(3, "f4")), "fc_weight must have"),
        (dict(fc_weight=np.zeros((2, 3), "f4"), fc_bias=np.zeros(3, "f4")), "fc_bias must have"),
        (
            dict(test_labels=np.array([0, 1, 2, 9]), fc_weight=np.zeros((3, 3), "f4"), fc_bias=np.zeros(3, "f4")),
            "0 to 2 for 3 classes",
        ),
        (dict(train_features=np.zeros(6, "f4")), "must be numbers of shape"),
        (dict(train_features=np.array([["a"] * 3] * 6)), "must be numbers"),
        (dict(train_features=None), "lacks train_features"),
    ],
)
def test_features_refuse(tmp_path, changes, word):
    d = dict(
        train_features=np.ones((6, 3), "f4"),
        train_labels=np.array([0, 0, 1, 1, 2, 2]),
        test_features=np.ones((4, 3), "f4"),
        test_labels=np.array([0, 1, 2, 2]),
    )
    np.savez(tmp_path / "f.npz", **{k: v for k, v in {**d, **changes}.items() if v is not None})
    with pytest.raises(DataError, match=word):
        Features.npz(tmp_path / "f.npz")


def test_features_without_a_head_get_one(tmp_path):
    data = LongTail.digits(seed=3)
    z = [s.images.reshape(len(s), -1).astype("f4") for s in (data.train, data.test)]
    np.savez(
        tmp_path / "f.npz",
        train_features=z[0],
        train_labels=data.train.labels,
        test_features=z[1],
        test_labels=data.test.labels,
    )
    rows = {
        r["method"]: r
        for r in run(
            LDMLRConfig(
                features=str(tmp_path / "f.npz"), n_steps=10, per_class=5, head_steps=10, out=str(tmp_path / "run")
            )
        ).scores()
    }
    assert rows["cross-entropy"]["all"] > 0.6 and rows["label shift"]["all"] > rows["cross-entropy"]["all"]


def test_ddim_against_diffusers_formula():
    "With the exact velocity of a point mass, DDIM lands on that point from any noise, at any number of steps"

    class Exact(torch.nn.Module):
        n_classes = 1

        def forward(self, x, t, code):
            alpha, sigma = alpha_sigma(t)
            return (alpha * x - torch.full_like(x, 3.0)) / sigma.clamp_min(1e-6)

    for steps in (1, 5, 20):
        assert torch.allclose(
            ddim(Exact(), torch.randn(4, 2), torch.zeros(4, 8), None, steps), torch.full((4, 2), 3.0), atol=2e-2
        )


def digits_features():
    data = LongTail.digits()
    z, y = torch.from_numpy(data.train.images).flatten(1).float(), torch.from_numpy(data.train.labels)
    return z, y, fit_head(z, y, data.counts, steps=50, lr=1e-2)


@pytest.mark.parametrize("pull", ["neighbours", "any class", "none"])
def test_samples_do_not_depend_on_their_batch(pull):
    z, y, head = digits_features()
    model, around = train_latent(z, y, 10, **QUICK), Neighbourhood.find(head, z, y, 10)
    plan = make_plan([40] * 10)
    whole, rows = sample_features(model, plan, around, pull=pull)
    some = np.array([3, 57, 399, 120])
    few, few_rows = sample_features(model, plan[some], around, pull=pull)
    assert (whole[some] - few).abs().max() < 255 * 1e-5 and [rows[i] for i in some] == few_rows
    assert whole.min() >= 0, "features behind a ReLU stay so"
    other = sample_features(model, plan, Neighbourhood.find(head, z, y, 10, shrink_n0=5.0), pull=pull)[0]
    assert torch.equal(other, whole) == (pull == "none")
    centred = train_latent(z - 100, y, 10, **QUICK)
    assert sample_features(centred, plan, pull="none")[0].min() < 0, "features that can be negative are not clipped"


def test_no_pull_is_plain_sampling():
    "Strength 0 gives the items of the class alone, whatever the neighbours; 1 with one neighbour gives that class"
    z, y, head = digits_features()
    model, plan = train_latent(z, y, 10, **QUICK), make_plan([5] * 10)
    around = Neighbourhood.find(head, z, y, 10, shrink_n0=0.0)
    assert not around.strength.any() and all(r["pull"] == 0 for r in sample_features(model, plan, around)[1])
    always = Neighbourhood(torch.eye(10)[(torch.arange(10) + 1) % 10], np.ones(10))
    rows = sample_features(model, plan, always, kappa=1e6)[1]
    assert all(r["toward"] == (c + 1) % 10 and r["pull"] > 0.99 for r, (c, _) in zip(rows, plan, strict=True))


@given(st.integers(2, 12), st.floats(0.05, 5), st.integers(0, 5))
def test_neighbour_classes_are_a_distribution_over_others(k, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    head, means = (
        Head(torch.randn(k, 4, generator=g), torch.randn(k, generator=g), torch.ones(k)),
        torch.randn(k, 4, generator=g),
    )
    q = neighbour_classes(head, means, temperature)
    assert torch.allclose(q.sum(1), torch.ones(k), atol=1e-5) and not q.diagonal().any() and (q >= 0).all()
    logits = head.logits(means).fill_diagonal_(-torch.inf)
    assert torch.equal(q.argmax(1), logits.argmax(1)), "the class that is confused most"


def test_draws_follow_their_law():
    plan, a = make_plan([4000, 4000]), np.array([0.3, 0.8])
    u = draw_pull(("t",), plan, a, 4.0)
    for c in (0, 1):
        mine = u[plan[:, 0] == c]
        assert abs(mine.mean() - a[c]) < 0.02 and abs(mine.var() - a[c] * (1 - a[c]) / 5) < 0.01, (
            "Beta(kappa a, kappa (1 - a))"
        )
    toward = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    j = draw_neighbours(("t",), plan, toward)
    assert abs((j[:4000] == 2).mean() - 0.75) < 0.03 and (j[4000:] == 0).all()


def test_memorised_is_one_where_the_head_is_sure_and_low_where_it_guesses():
    z, y = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    rho = memorised(Head(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.zeros(2), torch.ones(2)), z, y, 2)
    assert rho[0] > 0.999 and abs(rho[1] - 0.5) < 1e-6


def test_mixed_features_lie_between_a_class_and_its_neighbour():
    z, y = (
        torch.cat([torch.zeros(50, 3), torch.ones(20, 3), torch.full((5, 3), 9.0)]),
        torch.repeat_interleave(torch.arange(3), torch.tensor([50, 20, 5])),
    )
    around = Neighbourhood(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([0.1, 0.5, 0.9]))
    plan = make_plan([300] * 3)
    made = mixed_features(z, y, plan, around, seed=1)
    for c, (own, other) in enumerate([(0, 1), (1, 0), (9, 1)]):
        mine = made[plan[:, 0] == c, 0]
        assert (
            min(own, other) <= mine.min()
            and mine.max() <= max(own, other)
            and abs(mine.mean() - (own + around.strength[c] * (other - own))) < 0.5
        )
    assert torch.equal(made[100:130], mixed_features(z, y, plan[100:130], around, seed=1)), (
        "an item depends on its row alone"
    )


def test_pooled_covariance_is_that_of_the_residuals():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat_interleave(7000)
    root = torch.tensor([[1.0, 0.0], [0.5, 0.2]])
    z = torch.randn(len(y), 2, generator=g) @ root.T + 10 * y[:, None]
    cov = pooled_covariance(z, y, class_means(z, y, 3), shrink=0)
    assert torch.allclose(cov.float(), root @ root.T, atol=0.03)
    made = gaussian_features(z, y, make_plan([5000] * 3))
    assert torch.allclose(
        torch.cov(made[:5000].T), 0.95 * root @ root.T + 0.05 * cov.diagonal().mean().float() * torch.eye(2), atol=0.05
    )


def test_shrink_strength():
    a = shrink_strength(np.array([1, 60, 5000]), 60.0)
    assert a[1] == 0.5 and a[0] > 0.85 and a[2] < 0.1 and (shrink_strength(np.array([1, 9]), 0.0) == 0).all()


def test_generator_learns_the_class_means():
    "Three far-apart clusters: plain samples lie at their class, garbage does not"
    means = torch.tensor([[8.0, 0.0], [0.0, 8.0], [-8.0, -8.0]])
    y = torch.arange(3).repeat_interleave(torch.tensor([300, 60, 12]))
    z = means[y] + torch.randn(len(y), 2, generator=torch.Generator().manual_seed(0))
    model = train_latent(z, y, 3, n_steps=400, diff_bs=128, width=64)
    plan = make_plan([50] * 3)
    made, _ = sample_features(model, plan, pull="none", temperature=1.0)
    nearest = torch.cdist(made, means).argmin(1)
    assert (nearest == torch.from_numpy(plan[:, 0])).float().mean() > 0.95
    assert 0.4 < (made[:50] - made[:50].mean(0)).std() < 1.6, "the spread is that of the data"


def test_training_is_a_function_of_its_seed():
    data = LongTail.digits()

    def once(seed):
        clf = Classifier(
            build_model("convnet", 10, 1), data.class_names, (1, 8, 8), *pixel_stats(data.train.images), "convnet"
        )
        torch.rand(5)
        return fit(
            clf, data.train.images, data.train.labels, n_epochs=1, mixup=0.5, augment=Augment("crop+flip"), seed=seed
        ).net.fc.weight

    assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))


def test_garbage_in_the_config():
    with pytest.raises(UsageError, match="--data-root"):
        LDMLRConfig(features="f.npz", data_root="d")
    for more in (
        dict(arch="resnet32"),
        dict(n_epochs=3),
        dict(dataset="cifar10"),
        dict(download=True),
        dict(mixup=0.1),
    ):
        with pytest.raises(UsageError, match=f"{list(more)[0]} cannot be used with features"):
            LDMLRConfig(features="f.npz", **more)
    assert LDMLRConfig(dataset="cifar10", download=True).digest() == LDMLRConfig(dataset="cifar10").digest()
    assert LDMLR().resolve(LDMLRConfig(n_steps=7), of_images([1000, 10], 32)).n_steps == 7


def test_npz_images_run_to_the_end(tmp_path):
    "Real CIFAR photographs, one epoch of a small network, through every stage"
    images, labels, names = cifar(
        "cifar10", "train", lambda y: np.concatenate([np.flatnonzero(y == k)[:60] for k in range(10)])
    )
    test_images, test_labels, _ = cifar("cifar10", "test", lambda y: slice(100))
    np.savez(
        tmp_path / "c.npz",
        train_images=images,
        train_labels=labels[:, None],
        test_images=test_images,
        test_labels=test_labels,
        class_names=names,
    )
    r = run(
        LDMLRConfig(
            dataset="npz",
            data_root=str(tmp_path / "c.npz"),
            imb_ratio=20,
            arch="resnet8",
            n_epochs=1,
            n_steps=10,
            per_class=5,
            **SHORT,
            out=str(tmp_path / "run"),
        )
    )
    assert len(r.scores()) == len(METHODS) and json.loads((r.path / "config.json").read_text())["mixup"] == 0.5
    assert json.loads((r.path / "model" / "model.json").read_text())["classes"][0] == "airplane"


def test_odd_but_valid_features(tmp_path):
    "One dimension, one test item, a dollar in the name: it runs to its report"
    d = dict(
        train_features=np.linspace(0, 1, 30, dtype="f4")[:, None],
        train_labels=np.repeat([0, 1, 2], [20, 8, 2]),
        test_features=np.ones((1, 1), "f4"),
        test_labels=np.array([2]),
    )
    np.savez(tmp_path / "cost_$5_vs_$6.npz", **d, class_names=np.array(["$a$", "b", "c_$"]))
    r = run(LDMLRConfig(features=str(tmp_path / "cost_$5_vs_$6.npz"), n_steps=10, **SHORT, out=str(tmp_path / "run")))
    assert (r.path / "report.html").exists() and len(r.scores()) == len(METHODS)


def test_divergence_is_named_and_not_a_usage_error(tmp_path):
    from ltnb.core import LtnbError

    data = LongTail.digits()
    z = torch.from_numpy(data.train.images).flatten(1).float()
    with pytest.raises(LtnbError, match="--diff-lr") as e:
        train_latent(z, torch.from_numpy(data.train.labels), 10, n_steps=100, width=16, diff_lr=1e30)
    assert e.value.exit_code == 1


def test_other_head_is_other_data(tmp_path):
    d = dict(
        train_features=np.ones((6, 3), "f4"),
        train_labels=np.array([0, 0, 1, 1, 2, 2]),
        test_features=np.ones((4, 3), "f4"),
        test_labels=np.array([0, 1, 2, 2]),
        fc_bias=np.zeros(3, "f4"),
    )
    prints = []
    for w in (0.0, 1.0):
        np.savez(tmp_path / "f.npz", **d, fc_weight=np.full((3, 3), w, "f4"))
        prints.append(Features.npz(tmp_path / "f.npz").fingerprint())
    assert prints[0] != prints[1]


def test_no_control_carries_the_name_of_the_method():
    assert CONTROLS and all("ldmlr" not in c for c in CONTROLS) and set(CONTROLS) < set(METHODS)


def tiny_file(folder, head=True, d=6, k=4):
    g = torch.Generator().manual_seed(0)
    y = torch.repeat_interleave(torch.arange(k), torch.tensor([120, 60, 30, 6])[:k])
    test = torch.arange(k).repeat(40)
    centre = 3 * torch.randn(k, d, generator=g)
    parts = dict(
        train_features=(centre[y] + torch.randn(len(y), d, generator=g)).numpy(),
        train_labels=y.numpy(),
        test_features=(centre[test] + torch.randn(len(test), d, generator=g)).numpy(),
        test_labels=test.numpy(),
    )
    if head:
        h = fit_head(torch.from_numpy(parts["train_features"]), y, torch.bincount(y), steps=100, lr=1e-2)
        parts |= dict(fc_weight=h.weight.numpy(), fc_bias=h.bias.numpy())
    np.savez(folder / "f.npz", **parts)
    return str(folder / "f.npz")


def test_ablations_add_rows_and_change_none(tmp_path):
    "The main table is the same with and without ablations; each of them is one more row a seed, with its differences"
    base = dict(
        features=tiny_file(tmp_path),
        n_steps=8,
        diff_width=16,
        per_class=30,
        **SHORT,
        device="cpu",
        precision="fp32",
        seeds=2,
    )
    plain = run(LDMLRConfig(**base, out=str(tmp_path / "a"))).scores()
    r = run(LDMLRConfig(**base, ablate="count,bands,guidance,sample-steps,width", out=str(tmp_path / "b")))
    main, extra = LDMLR().split(r.scores())
    assert main == plain
    labels = [x["method"] for x in extra if "ablation" in x and x["seed"] == 0]
    assert labels == [
        label
        for label, _ in ablation_settings(
            LDMLR().resolve(LDMLRConfig(**base, ablate="all"), of_features([120, 60, 30, 6], 6)),
            np.array([120, 60, 30, 6]),
        )
    ]
    assert {x["ablation"] for x in extra if "ablation" in x} == set(LDMLR_ABLATIONS) - {"encoding"} and all(
        "label shift" in x["se"] for x in extra if "ablation" in x
    )
    assert "bands: few only" in labels and "What each setting is worth" in (r.path / "report.html").read_text()


def test_encoding_ablation_needs_images(tmp_path):
    with pytest.raises(UsageError, match="needs images"):
        LDMLRConfig(features=tiny_file(tmp_path), ablate="encoding")
    with pytest.raises(UsageError, match="Did you mean 'sample-steps'"):
        LDMLRConfig(ablate="sample-step")
    with pytest.raises(UsageError, match="Did you mean 'few'"):
        LDMLRConfig(bands="medium+fews")
    with pytest.raises(UsageError, match="give one of them"):
        LDMLRConfig(per_class=3, ratio=0.5)
    for wrong in ("medium,few", "all+few", ""):
        with pytest.raises(UsageError, match="is not a band"):
            LDMLRConfig(bands=wrong)
    for wrong in ("count+bands", "all,count"):
        with pytest.raises(UsageError, match="is not an ablation"):
            LDMLRConfig(ablate=wrong)
    with pytest.raises(UsageError, match="names no class of this set: its bands are many, medium"):
        LDMLR().resolve(LDMLRConfig(bands="few"), of_images([500, 50], 32))
    with pytest.raises(UsageError, match="multiple of 8"):
        LDMLRConfig(variant="published", diff_width=20)
    with pytest.raises(UsageError, match="at most 1000"):
        LDMLRConfig(variant="published", sample_steps=2000)
    data = dict(
        n_epochs=1,
        n_steps=8,
        diff_width=16,
        per_class=5,
        **SHORT,
        device="cpu",
        precision="fp32",
    )
    rows = run(LDMLRConfig(**data, arch="resnet8", ablate="encoding", out=str(tmp_path / "run"))).scores()
    assert [x["method"] for x in rows if "ablation" in x] == ["encoding: training features as coded"]


def test_planned_counts_follow_bands():
    n = np.array([500, 101, 100, 20, 19, 1])
    assert planned_counts(n, 7).tolist() == [7] * 6
    assert planned_counts(n, 7, which="few").tolist() == [0, 0, 0, 0, 7, 7]
    assert planned_counts(n, ratio=0.2, which="many+few").tolist() == [100, 20, 0, 0, 5, 5]


def test_defaults_depend_on_who_trained_the_encoder(tmp_path):
    "No pull where the encoder has not been trained on these classes, or the set is known to be easy"
    n, resolve = [500, 5], LDMLR().resolve
    given = LDMLRConfig(features="f.npz")
    assert [resolve(given, of_features(n, 64, own)).shrink_n0 for own in (True, False)] == [60.0, 0.0]
    assert resolve(LDMLRConfig(), of_images(n, 8)).shrink_n0 == 0
    assert resolve(LDMLRConfig(dataset="cifar10"), of_images(n, 32)).shrink_n0 == 60
    assert resolve(given, of_features(n, 2048, False)).diff_width == 256
    config = json.loads(
        (
            run(
                LDMLRConfig(
                    features=tiny_file(tmp_path, head=False),
                    n_steps=5,
                    **SHORT,
                    device="cpu",
                    out=str(tmp_path / "run"),
                )
            ).path
            / "config.json"
        ).read_text()
    )
    assert config["shrink_n0"] == 0 and config["temperature"] == 1


def test_odd_heads_and_one_class(tmp_path):
    "A class whose weights are zero: rows that make no sense are left out, the rest is there; one class is refused"
    path = tiny_file(tmp_path)
    with np.load(path) as z:
        parts = dict(z)
    parts["fc_weight"][3] = 0
    np.savez(path, **parts)
    small = dict(n_steps=5, diff_width=16, per_class=10, **SHORT, device="cpu")
    rows = run(LDMLRConfig(features=path, **small, out=str(tmp_path / "a"))).scores()
    assert [r["method"] for r in rows] == [m for m in METHODS if m != "tau-norm"]
    one = {
        k: v[parts[f"{k.split('_')[0]}_labels"] == 0] for k, v in parts.items() if k.split("_")[0] in ("train", "test")
    }
    np.savez(tmp_path / "one.npz", **one)
    with pytest.raises(DataError, match="one class only"):
        run(LDMLRConfig(features=str(tmp_path / "one.npz"), **small, out=str(tmp_path / "b")))


def test_other_settings_keep_their_noise():
    "Two settings differ item by item through the setting alone"
    z, y, head = digits_features()
    model, plan, around = (
        train_latent(z, y, 10, **QUICK),
        make_plan([20] * 10),
        Neighbourhood.find(head, z, y, 10, shrink_n0=0.0),
    )
    assert torch.equal(sample_features(model, plan, around)[0], sample_features(model, plan, pull="none")[0])


def test_published_variant_runs_with_its_controls(tmp_path):
    "From features and from images; one start, real prior, counts of a fifth; kills have tests of their own"
    small = dict(
        variant="published", n_steps=4, diff_width=16, sample_steps=3, head_steps=5, device="cpu", precision="fp32"
    )
    r = run(LDMLRConfig(features=tiny_file(tmp_path), **small, out=str(tmp_path / "a")))
    rows = {x["method"]: x for x in r.scores()}
    assert list(rows) == list(METHODS) and "scratch_all" not in rows["ldmlr + label shift"]
    config = json.loads((r.path / "config.json").read_text())
    assert (
        config["ratio"] == 0.2
        and config["per_class"] is None
        and config["diff_lr"] == 1e-4
        and (r.path / "report.html").exists()
    )
    made = [json.loads(line) for line in (r.path / "synthetic" / "seed-0" / "manifest.jsonl").read_text().splitlines()]
    assert np.bincount([m["class"] for m in made]).tolist() == planned_counts([120, 60, 30, 6], ratio=0.2).tolist()
    config = json.loads(
        (
            run(LDMLRConfig(n_epochs=1, arch="resnet8", **small, out=str(tmp_path / "b"))).path / "config.json"
        ).read_text()
    )
    assert config["encoding"] == "as coded"
    for more in (dict(kappa=2.0), dict(syn_weight=0.5), dict(ablate="count")):
        with pytest.raises(UsageError, match="no meaning in the published variant"):
            LDMLRConfig(variant="published", **more)
