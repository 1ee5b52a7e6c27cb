"Networks, heads, diffusion and recipe: numbers against references and against what they must mean."
import json

import numpy as np
import pytest
import torch
from conftest import cifar_pack, shared
from hypothesis import given
from hypothesis import strategies as st
from ltnb.augment import Augment
from ltnb.core import DataError, Progress, UsageError
from ltnb.data import LongTail
from ltnb.heads import Features, Head, fit_head
from ltnb.latent import alpha_sigma, ddim, sample_features, shrink_strength, train_latent
from ltnb.ldmlr import METHODS, LDMLRConfig, resolve, run, stage_encode
from ltnb.losses import effective_counts, label_shift
from ltnb.models import Classifier, ResNet, build_model, encode, pixel_stats
from ltnb.synthetic import make_plan
from ltnb.training import fit


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setattr(Progress, "quiet", True)


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=20), st.floats(0, 3))
def test_label_shift_formula(counts, tau):
    z = torch.randn(3, len(counts))
    want = z.double() - tau * torch.tensor(counts, dtype=torch.float64).div(sum(counts)).log()
    assert torch.allclose(label_shift(z, counts, tau).double(), want, atol=1e-5)
    assert torch.allclose(label_shift(z, [7 * c for c in counts], tau), label_shift(z, counts, tau), atol=1e-5), "only shares matter"


def test_reference_weights_give_the_published_features():
    "The authors' ResNet-32 in our network, on the CIFAR test images: the reference features, and their accuracy"
    net, ref = ResNet(10), np.load(shared("ldmlr_cifar10_if100_features.npz"))
    from safetensors.torch import load_file
    net.load_state_dict(load_file(shared("ldmlr_cifar10_if100_resnet32.safetensors")))
    pack = cifar_pack()
    clf = Classifier(net, pack["class_names"], (3, 32, 32), np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255, "resnet32")
    some = np.flatnonzero(pack["test_labels"].ravel() == 3)[:200]
    bgr = np.ascontiguousarray(pack["test_images"][some].transpose(0, 3, 1, 2)[:, ::-1]) # those weights were trained on blue-green-red images
    nearest = torch.cdist(encode(clf, bgr), torch.from_numpy(ref["test_features"][ref["test_labels"] == 3])).min(1).values # the reference is in another order
    assert nearest.max() < 1e-2


@pytest.mark.parametrize("name, argmax, shifted", [("cifar10", 72.49, 80.86), ("cifar100", 41.28, 48.59)])
def test_reference_features(name, argmax, shifted, tmp_path):
    "Rows `cross-entropy` and `label shift` of a run from the authors' features; the corrected form holds its level"
    path = shared(f"ldmlr_{name}_if100_features.npz")
    r = run(LDMLRConfig(features=str(path), out=str(tmp_path), n_steps=200, device="cpu"))
    rows = {row["method"]: row for row in r.scores()}
    assert list(rows) == list(METHODS)
    assert [round(rows[m]["all"] * 100, 2) for m in ("cross-entropy", "label shift")] == [argmax, shifted]
    assert rows["ldmlr + label shift"]["all"] * 100 > shifted - .5
    assert rows["ldmlr + label shift"]["scratch_all"] - rows["garbage"]["scratch_all"] > .08, "from scratch, the generator is told from garbage"
    assert rows["label shift"]["few"] is None or name == "cifar100"
    model = Classifier.load(tmp_path / "model")
    f = Features.npz(path)
    with torch.no_grad(): got = (model(f.test).argmax(1) == f.test_labels).float().mean().item()
    assert abs(got - rows["ldmlr + label shift"]["all"]) < 1e-4, "the saved classifier is the one that was scored"


def test_recipe_does_not_touch_its_own_baseline(tmp_path):
    "Rows of a run are those of its stages called by hand, and the saved model is the refitted one"
    cfg = LDMLRConfig(n_epochs=20, n_steps=60, per_class=30, device="cpu", precision="fp32", out=str(tmp_path))
    rows = {r["method"]: r for r in run(cfg).scores()}
    data = LongTail.digits()
    _, f = stage_encode(resolve(cfg, data.counts, 8), data, 0)
    by_hand = [(read(f.test).argmax(1) == f.test_labels).float().mean().item() for read in (f.head.logits, f.head.corrected)]
    assert np.allclose(by_hand, [rows["cross-entropy"]["all"], rows["label shift"]["all"]], atol=1e-6)
    model = Classifier.load(tmp_path / "model")
    with torch.no_grad(): got = (model(torch.from_numpy(data.test.images)).argmax(1) == f.test_labels).float().mean().item()
    assert abs(got - rows["ldmlr + label shift"]["all"]) < .005


def test_effective_prior_is_removed_exactly_once():
    "On balanced real + generated counts the correction vanishes; with the real prior it does not"
    z, y = torch.randn(200, 4), torch.arange(200) % 2
    head = fit_head(z, y, [100, 100], steps=5)
    assert torch.allclose(head.logits(z).softmax(1), head.corrected(z).softmax(1), atol=1e-6)
    base = Head(torch.randn(3, 4), torch.randn(3), torch.tensor([90., 9., 1.]))
    moved = fit_head(z[:5], y[:5], effective_counts([90, 9, 1], [10, 10, 10]), start=base, steps=1, lr=0.)
    assert torch.allclose(moved.corrected(z), base.corrected(z), atol=1e-5), "a start keeps its corrected scores"
    same = fit_head(z[:5], y[:5], [90, 9, 1], start=base, steps=1, lr=0.)
    assert torch.allclose(same.logits(z), base.logits(z), atol=1e-5)


def test_syn_weight_zero_is_no_generation():
    "Items of weight 0 change nothing, whatever they are; weight 2 moves the scale as two copies do"
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(200, 4, generator=g), torch.arange(200) % 2
    junk = 1000 * torch.randn(50, 4, generator=g)
    alone = fit_head(z, y, [100, 100], steps=20, lr=1e-2)
    weightless = fit_head(torch.cat([z, junk]), torch.cat([y, y[:50]]), [100, 100], torch.cat([torch.ones(200), torch.zeros(50)]), steps=20, lr=1e-2)
    assert torch.equal(alone.weight, weightless.weight)
    shifted = torch.cat([z, z[:50] + 3])
    double = fit_head(shifted, torch.cat([y, y[:50]]), [150, 150], torch.cat([torch.ones(200), torch.full((50,), 2.)]), steps=1, lr=0.)
    copies = fit_head(torch.cat([shifted, shifted[200:]]), torch.cat([y, y[:50], y[:50]]), [150, 150], steps=1, lr=0.)
    assert torch.allclose(double.bias, copies.bias, atol=1e-6)


@pytest.mark.parametrize("changes, word", [
    (dict(test_features=np.zeros((4, 5), "f4")), "width"), (dict(train_features=np.full((6, 3), np.nan, "f4")), "NaN"), (dict(train_labels=np.array([0, 0, 0, 2, 2, 2])), "no training feature"),
    (dict(train_labels=np.zeros(5, int)), "6 train_features need 6"), (dict(fc_weight=np.zeros((3, 3), "f4")), "only one of"), (dict(fc_weight=np.zeros((3, 4), "f4"), fc_bias=np.zeros(3, "f4")), "fc_weight must have"),
    (dict(fc_weight=np.zeros((2, 3), "f4"), fc_bias=np.zeros(3, "f4")), "fc_bias must have"), (dict(test_labels=np.array([0, 1, 2, 9]), fc_weight=np.zeros((3, 3), "f4"), fc_bias=np.zeros(3, "f4")), "0 to 2 for 3 classes"),
    (dict(train_features=np.zeros(6, "f4")), "must be numbers of shape"), (dict(train_features=np.array([["a"] * 3] * 6)), "must be numbers"), (dict(train_features=None), "lacks train_features")])
def test_features_refuse(tmp_path, changes, word):
    d = dict(train_features=np.ones((6, 3), "f4"), train_labels=np.array([0, 0, 1, 1, 2, 2]), test_features=np.ones((4, 3), "f4"), test_labels=np.array([0, 1, 2, 2]))
    np.savez(tmp_path / "f.npz", **{k: v for k, v in {**d, **changes}.items() if v is not None})
    with pytest.raises(DataError, match=word): Features.npz(tmp_path / "f.npz")


def test_features_without_a_head_get_one(tmp_path):
    data = LongTail.digits(seed=3)
    z = [s.images.reshape(len(s), -1).astype("f4") for s in (data.train, data.test)]
    np.savez(tmp_path / "f.npz", train_features=z[0], train_labels=data.train.labels, test_features=z[1], test_labels=data.test.labels)
    rows = {r["method"]: r for r in run(LDMLRConfig(features=str(tmp_path / "f.npz"), n_steps=100, out=str(tmp_path / "run"))).scores()}
    assert rows["cross-entropy"]["all"] > .6 and rows["label shift"]["all"] > rows["cross-entropy"]["all"]


def test_ddim_against_diffusers_formula():
    "With the exact velocity of a point mass, DDIM lands on that point from any noise, at any number of steps"
    class Exact(torch.nn.Module):
        n_classes = 1
        def forward(self, x, t, y):
            alpha, sigma = alpha_sigma(t)
            return (alpha * x - torch.full_like(x, 3.)) / sigma.clamp_min(1e-6)
    for steps in (1, 5, 20): assert torch.allclose(ddim(Exact(), torch.randn(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(4), steps), torch.full((4, 2), 3.), atol=2e-2)


def test_samples_do_not_depend_on_their_batch():
    data = LongTail.digits()
    z = torch.from_numpy(data.train.images).flatten(1).float()
    model = train_latent(z, torch.from_numpy(data.train.labels), 10, n_steps=60, width=32)
    plan = make_plan([40] * 10)
    whole, rows = sample_features(model, plan)
    some = np.array([3, 57, 399, 120])
    few, few_rows = sample_features(model, plan[some])
    assert (whole[some] - few).abs().max() < 255 * 1e-5 and [rows[i] for i in some] == few_rows
    assert whole.min() >= 0, "features behind a ReLU stay so"
    assert not torch.equal(sample_features(model, plan, shrink_n0=5.)[0], whole)
    centred = train_latent(z - 100, torch.from_numpy(data.train.labels), 10, n_steps=60, width=32)
    assert sample_features(centred, plan)[0].min() < 0, "features that can be negative are not clipped"


def test_shrink_strength():
    a = shrink_strength(np.array([1, 60, 5000]), 60.)
    assert a[1] == .5 and a[0] > .85 and a[2] < .1 and (shrink_strength(np.array([1, 9]), 0.) == 0).all()


def test_generator_learns_the_class_means():
    "Three far-apart clusters: plain samples lie at their class, garbage does not"
    means = torch.tensor([[8., 0.], [0., 8.], [-8., -8.]])
    y = torch.arange(3).repeat_interleave(torch.tensor([300, 60, 12]))
    z = means[y] + torch.randn(len(y), 2, generator=torch.Generator().manual_seed(0))
    model = train_latent(z, y, 3, n_steps=400, width=64)
    plan = make_plan([50] * 3)
    made, _ = sample_features(model, plan, shrink_n0=0., temperature=1.)
    nearest = torch.cdist(made, means).argmin(1)
    assert (nearest == torch.from_numpy(plan[:, 0])).float().mean() > .95
    assert .4 < (made[:50] - made[:50].mean(0)).std() < 1.6, "the spread is that of the data"


def test_training_is_a_function_of_its_seed():
    data = LongTail.digits()
    def once(seed):
        clf = Classifier(build_model("convnet", 10, 1), data.class_names, (1, 8, 8), *pixel_stats(data.train.images), "convnet")
        torch.rand(5)
        return fit(clf, data.train.images, data.train.labels, n_epochs=1, mixup=.5, augment=Augment("crop+flip"), seed=seed).net.fc.weight
    assert torch.equal(once(0), once(0)) and not torch.equal(once(0), once(1))


def test_garbage_in_the_config():
    with pytest.raises(UsageError, match="--data-root"): LDMLRConfig(features="f.npz", data_root="d")
    for more in (dict(arch="resnet32"), dict(n_epochs=3), dict(dataset="cifar10"), dict(download=True), dict(mixup=.1)):
        with pytest.raises(UsageError, match=f"{list(more)[0]} cannot be used with features"): LDMLRConfig(features="f.npz", **more)
    assert LDMLRConfig(dataset="cifar10", download=True).digest() == LDMLRConfig(dataset="cifar10").digest()
    assert resolve(LDMLRConfig(n_steps=7), np.array([1000, 10]), 32).n_steps == 7


def test_npz_images_run_to_the_end(tmp_path):
    "Real CIFAR photographs, one epoch of a small network, through every stage"
    pack = cifar_pack()
    keep = np.concatenate([np.flatnonzero(pack["train_labels"] == k)[:60] for k in range(10)])
    np.savez(tmp_path / "c.npz", train_images=pack["train_images"][keep], train_labels=pack["train_labels"][keep][:, None], test_images=pack["test_images"][:300], test_labels=pack["test_labels"][:300], class_names=pack["class_names"])
    r = run(LDMLRConfig(dataset="npz", data_root=str(tmp_path / "c.npz"), imb_ratio=20, arch="resnet8", n_epochs=1, n_steps=50, out=str(tmp_path / "run")))
    assert len(r.scores()) == 7 and json.loads((r.path / "config.json").read_text())["mixup"] == .5
    assert json.loads((r.path / "model" / "model.json").read_text())["classes"][0] == "airplane"


def test_odd_but_valid_features(tmp_path):
    "One dimension, one test item, a dollar in the name: it runs to its report"
    d = dict(train_features=np.linspace(0, 1, 30, dtype="f4")[:, None], train_labels=np.repeat([0, 1, 2], [20, 8, 2]), test_features=np.ones((1, 1), "f4"), test_labels=np.array([2]))
    np.savez(tmp_path / "cost_$5_vs_$6.npz", **d, class_names=np.array(["$a$", "b", "c_$"]))
    r = run(LDMLRConfig(features=str(tmp_path / "cost_$5_vs_$6.npz"), n_steps=60, out=str(tmp_path / "run")))
    assert (r.path / "report.html").exists() and len(r.scores()) == 7


def test_divergence_is_named_and_not_a_usage_error(tmp_path):
    from ltnb.core import LtnbError
    data = LongTail.digits()
    z = torch.from_numpy(data.train.images).flatten(1).float()
    with pytest.raises(LtnbError, match="--diff-lr") as e: train_latent(z, torch.from_numpy(data.train.labels), 10, n_steps=100, width=16, diff_lr=1e30)
    assert e.value.exit_code == 1


def test_other_head_is_other_data(tmp_path):
    d = dict(train_features=np.ones((6, 3), "f4"), train_labels=np.array([0, 0, 1, 1, 2, 2]), test_features=np.ones((4, 3), "f4"), test_labels=np.array([0, 1, 2, 2]), fc_bias=np.zeros(3, "f4"))
    prints = []
    for w in (0., 1.):
        np.savez(tmp_path / "f.npz", **d, fc_weight=np.full((3, 3), w, "f4"))
        prints.append(Features.npz(tmp_path / "f.npz").fingerprint())
    assert prints[0] != prints[1]
