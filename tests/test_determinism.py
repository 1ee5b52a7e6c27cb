"The same seed gives the same bytes: dropout, moving averages, normalisation, and what older files hold."

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import everywhere
from ltnb import diffusion, team
from ltnb.baseline import BaselineConfig
from ltnb.core import generator, load_tensors, seeded
from ltnb.runs import Run
from ltnb.data import LongTail
from ltnb.diffusion import train_diffusion
from ltnb.latent import train_latent
from ltnb.models import build_model
from ltnb.classifier import Classifier, pixel_stats
from ltnb.team import dropout_seeded
from ltnb.checkpoint import Averages, ramped
from ltnb.training import fit
from ltnb.together import fit_seeds
from torch import nn

DATA = LongTail.digits(10.0)


class Stop(Exception):
    pass


def dropping(seed=0, p=0.5):
    "A classifier with dropout before its last layer"
    net = build_model("convnet", 10, 1, seed)
    net.fc = nn.Sequential(nn.Dropout(p), net.fc)
    return Classifier(net, DATA.class_names, (1, 8, 8), *pixel_stats(DATA.train.images), "convnet")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def train(p=0.5, run=None, seed=0, **more):
    how = dict(n_epochs=3, bs=100, seed=seed, run=run, save_every=0.0)
    return fit(dropping(p=p), DATA.train.images, DATA.train.labels, **how, **more).net


# dropout
def test_dropout_follows_the_seed():
    torch.manual_seed(1)
    before, one = torch.random.get_rng_state(), train()
    assert torch.equal(before, torch.random.get_rng_state()), "torch's own generator stays as it was"
    torch.manual_seed(2)
    assert same(one, train())
    assert not same(one, train(p=0.0)) and not same(one, train(seed=1))


def test_every_step_drops_other_units():
    "One mask a step: that of the first step is not that of the second, nor that of another stage or process"

    def mask(*key):
        with dropout_seeded(*key, device="cpu"):
            return nn.functional.dropout(torch.ones(64), 0.5)

    base = mask(0, "classifier", 0, 0, 0)
    assert torch.equal(base, mask(0, "classifier", 0, 0, 0))
    for other in (
        (1, "classifier", 0, 0, 0),
        (0, "judge", 0, 0, 0),
        (0, "classifier", 1, 0, 0),
        (0, "classifier", 0, 1, 0),
        (0, "classifier", 0, 0, 1),
    ):
        assert not torch.equal(base, mask(*other))


def cut(tmp_path, monkeypatch, act, at, where="dropout_seeded"):
    "Do it once, then again with a stop at the `at`-th step, then to the end: both results"

    def run(name, stop=None):
        steps, real = [0], getattr(team, where)

        def counted(*key, **how):
            steps[0] += 1
            if steps[0] == stop:
                raise Stop
            return real(*key, **how)

        everywhere(monkeypatch, where, counted)
        try:
            with Run(BaselineConfig(out=str(tmp_path / name))) as r:
                r.start(BaselineConfig(), "cpu", "fp32")
                return act(r)
        finally:
            everywhere(monkeypatch, where, real)

    whole = run("whole")
    with pytest.raises(Stop):
        run("cut", at)
    return whole, run("cut")


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_training_with_dropout_goes_on_bit_for_bit(tmp_path, monkeypatch, at):
    assert same(*cut(tmp_path, monkeypatch, lambda run: train(run=run, ema=0.8), at))


def side_by_side(run=None):
    clfs = [dropping(s) for s in (0, 1)]
    fit_seeds(clfs, DATA.train.images, DATA.train.labels, [0, 1], n_epochs=3, bs=100, run=run, save_every=0.0)
    return nn.ModuleList(c.net for c in clfs)


def test_seeds_side_by_side_drop_by_key(tmp_path, monkeypatch):
    torch.manual_seed(1)
    one = side_by_side()
    torch.manual_seed(2)
    assert same(one, side_by_side()) and not same(one[0], one[1])
    assert same(*cut(tmp_path, monkeypatch, side_by_side, 11))


def test_a_generator_of_features_knows_no_global_state(tmp_path):
    z, y = torch.randn(60, 4, generator=generator("z")), torch.arange(60) % 3
    torch.manual_seed(1)
    one = train_latent(z, y, 3, n_steps=4, diff_bs=8, width=16)
    torch.manual_seed(2)
    assert same(one.net, train_latent(z, y, 3, n_steps=4, diff_bs=8, width=16).net)


def test_seeded_is_the_same_for_layers_and_for_dropout():
    with seeded(0, "a", "dropout"):
        first = torch.rand(3)
    with dropout_seeded(0, "a", device="cpu"):
        assert torch.equal(first, torch.rand(3))


# moving averages
def test_averages_are_those_of_the_formula_to_the_bit():
    "Weights and BatchNorm's statistics, one tensor after the other, as `lerp_` has it"
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    averages, want = Averages(net, 0.9), {k: v.clone() for k, v in net.state_dict().items() if v.is_floating_point()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 4, generator=generator(step))).square().sum().backward()
        optimizer.step()
        averages.update(None if step % 2 else ramped(0.9, step))
        decay = 0.9 if step % 2 else min(0.9, (1 + step) / (10 + step))
        for k, v in want.items():
            v.lerp_(net.state_dict()[k].detach(), 1 - decay)
    assert averages.state.keys() == want.keys() and all(torch.equal(averages.state[k], want[k]) for k in want)
    own = copy.deepcopy(net.state_dict())
    with averages.used():
        assert torch.equal(net[0].weight, want["0.weight"]) and net[1].num_batches_tracked == 5
    assert all(torch.equal(own[k], v) for k, v in net.state_dict().items())
    assert same(averages.load(copy.deepcopy(net)), averages.load())
    assert torch.equal(net[1].running_var, want["1.running_var"])


def test_averages_go_on_from_a_checkpoint():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    averages = Averages(net, 0.9)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    averages.update()
    kept = {k: v.contiguous() for k, v in averages.tensors().items()}
    own = "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"
    assert set(kept) == {f"ema.{k}" for k in own}
    again = Averages(net, 0.9)
    again.take({k: v for k, v in kept.items() if "running" not in k})  # as older diffusion checkpoints: weights alone
    assert all(torch.equal(again.state[k], averages.state[k]) for k in averages.state)
    assert all(again.state[k].stride() == net.state_dict()[k].stride() for k in again.state), "in the weights' layout"
    assert not Averages(net, 0.0).state and not Averages(net, 0.0).tensors()


def test_checkpoints_name_averages_as_before(tmp_path, monkeypatch):
    "`ema.` and the weight's name, in all three kinds of training: older runs go on"

    def kept(name, act):
        with Run(BaselineConfig(out=str(tmp_path / name))) as run:
            run.start(BaselineConfig(), "cpu", "fp32")
            act(run)
            files = list((run.path / "checkpoints").glob("*.safetensors"))
            return set(load_tensors(files[0])[0])

    z, y = torch.randn(20, 4, generator=generator("z")), torch.arange(20) % 2
    small = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=0.0, norm_num_groups=4, attention=False)
    monkeypatch.setitem(diffusion.UNETS, "small", small)
    real = DATA.train.images, DATA.train.labels
    unet = kept("image", lambda run: train_diffusion(*real, 10, unet="small", n_steps=1, diff_bs=4, run=run))
    for names in (
        unet,
        kept("latent", lambda run: train_latent(z, y, 2, n_steps=1, diff_bs=4, width=16, run=run)),
        kept("fit", lambda run: train(run=run, ema=0.5)),
    ):
        weights = {k[4:] for k in names if k.startswith("net.")}
        averaged = {k[4:] for k in names if k.startswith("ema.")}
        assert averaged <= weights and {k for k in weights if k.endswith(("weight", "bias"))} <= averaged


def test_a_latent_training_goes_on_from_weights_alone(tmp_path, monkeypatch):
    "As older checkpoints have it: no averages of constant buffers"
    z, y = torch.randn(20, 4, generator=generator("z")), torch.arange(20) % 2

    def act(run):
        return train_latent(z, y, 2, n_steps=100, diff_bs=4, width=16, run=run, save_every=0.0)

    def stopping(step):
        def act_until(run):
            original = run.log
            run.log = lambda **row: (_ for _ in ()).throw(Stop()) if row["step"] == step else original(**row)
            return act(run)

        return act_until

    def go(name, act):
        with Run(BaselineConfig(out=str(tmp_path / name))) as run:
            run.start(BaselineConfig(), "cpu", "fp32")
            return act(run)

    whole = go("whole", act)
    with pytest.raises(Stop):
        go("cut", stopping(100))
    real = Run.load

    def lacking(self, name):
        tensors, meta = real(self, name)
        for k in ("ema.frequencies", "ema.class_means"):
            del tensors[k]
        return tensors, meta

    monkeypatch.setattr(Run, "load", lacking)
    assert same(whole.net, go("cut", act).net)


# normalisation
def test_normalisation_goes_with_the_classifier():
    "Constants of the formula on the network's device, in no state, file or fingerprint"
    clf = Classifier(
        build_model("convnet", 10, 3), DATA.class_names, (3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "convnet"
    )
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator("x"))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (clf.mean, clf.std))
    want = ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    copies = clf, copy.deepcopy(clf), pickle.loads(pickle.dumps(clf)), copy.deepcopy(clf).double().float()
    for c in copies:
        assert torch.equal(c.prepare(x), want) and c.prepare(x).stride() == want.stride()
    assert set(clf.state_dict()) == {f"net.{k}" for k in clf.net.state_dict()}
    assert {str(b.device) for b in copy.deepcopy(clf).to("meta").buffers()} == {"meta"}
    assert clf.to("cpu", memory_format=torch.channels_last).prepare(x).dtype == torch.float32


def test_normalisation_is_saved_as_before(tmp_path):
    clf = dropping()
    clf.net.fc = clf.net.fc[1]
    clf.save(tmp_path)
    assert set(load_tensors(tmp_path / "model.safetensors")[0]) == set(clf.net.state_dict())
    again, x = Classifier.load(tmp_path), torch.from_numpy(DATA.test.images[:5])
    assert torch.equal(again.prepare(x), clf.prepare(x)) and np.allclose(again.mean, clf.mean)
