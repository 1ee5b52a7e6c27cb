"Diffusion over images: the formulas, CBDM's terms, resume, determinism, and folders that diffusers opens."

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from ltnb import diffusion
from ltnb.core import DataError, LtnbError, UsageError, read_jsonl
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.data import LongTail
from ltnb.metrics import frechet_distance
from ltnb.noise import (
    NOISE_SCHEDULES,
    OBJECTIVES,
    NoiseModel,
    betas,
    build_objective,
    diffusion_loss,
    noise_ratios,
    noisy_batch,
)
from ltnb.diffusion import Denoising, DiffusionModel, build_unet, nudge, train_diffusion
from ltnb.samplers import SAMPLERS, Sampling, sample_batch, sample_images, sampler_spacing
from ltnb.cbdm import CB_SPACES, CBDM
from ltnb.ldmlr import LDMLRConfig
from ltnb.jobs import make_plan
from ltnb.team import Where
from warm import pair
from torch import nn

SMALL = dict(
    block_out_channels=(8, 16), layers_per_block=1, dropout=0.1, norm_num_groups=4, attention=False
)  # with dropout, which has to resume too


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setitem(diffusion.UNETS, "small", SMALL)


@pytest.fixture(scope="module")
def data():
    return LongTail.digits()


def train(data, n_steps=12, **more):
    return train_diffusion(
        data.train.images,
        data.train.labels,
        10,
        **{**dict(unet="small", n_steps=n_steps, diff_bs=16, diff_lr=1e-3, class_names=data.class_names), **more},
    )


@pytest.fixture(scope="module")
def model(data):
    Progress.quiet, diffusion.UNETS["small"] = True, SMALL
    return train(data)


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.unet.state_dict().values(), b.unet.state_dict().values(), strict=True)
    )


def g(seed=0):
    return torch.Generator().manual_seed(seed)


# the objectives
@pytest.mark.parametrize("schedule,name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_those_of_diffusers(schedule, name):
    from diffusers import DDPMScheduler

    theirs, r = DDPMScheduler(1000, beta_schedule=name).alphas_cumprod.double(), noise_ratios(schedule)
    assert (1 / (1 + r**2) - theirs).abs().max() < 1e-6
    assert np.abs(np.cumprod(1 - betas(r)) - theirs.numpy()).max() < 1e-6


def test_karras_levels():
    from diffusers import EDMEulerScheduler

    r = noise_ratios("karras")
    assert math.isclose(r[0], 0.002, rel_tol=1e-9) and math.isclose(r[-1], 80, rel_tol=1e-9)
    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, num_train_timesteps=1000)
    theirs.set_timesteps(1000)
    assert torch.allclose(theirs.sigmas[:-1].flip(0).double(), r, rtol=1e-4)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_exact_answers_lead_back(name, schedule):
    if name == "edm" and schedule != "karras":
        pytest.skip("EDM draws its own levels")
    o, x0, eps = (
        build_objective(name, schedule),
        torch.rand(4000, 1, 2, 2, generator=g()) * 2 - 1,
        torch.randn(4000, 1, 2, 2, generator=g(1)),
    )
    t = o.draw(torch.rand(4000, generator=g(2)))
    alpha, sigma = o.scales(t)
    x, p, r = alpha * x0 + sigma * eps, o.target(x0, eps, t), o.ratio(t)
    assert (o.x0(p, x, t) - x0)[r < 30].abs().max() < 1e-4
    assert (o.noise(p, x, t) - eps)[r > 0.03].abs().max() < 1e-4
    if name != "edm":
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(1), atol=1e-6)


def test_edm_inputs_and_targets_have_variance_one():
    o = build_objective("edm")
    x0, eps = 0.5 * torch.randn(40000, 1, 1, 1, generator=g()), torch.randn(40000, 1, 1, 1, generator=g(1))
    for sigma in (0.002, 0.05, 0.5, 3.0, 80.0):
        t = torch.full((40000,), math.log(sigma) / 4)
        assert (
            abs(o.target(x0, eps, t).var().item() - 1) < 0.03
            and abs(o.enter(x0 + sigma * eps, t).var().item() - 1) < 0.03
        )
    log_sigma = 4 * o.draw((torch.arange(40000) + 0.5) / 40000)
    assert abs(log_sigma.mean() + 1.2) < 0.01 and abs(log_sigma.std() - 1.2) < 0.01
    assert torch.allclose(o.share(log_sigma / 4), (torch.arange(40000) + 0.5) / 40000, atol=1e-4)


def test_min_snr_weights():
    for name in ("eps", "v"):
        o, free, t = build_objective(name, "linear", 5.0), build_objective(name, "linear"), torch.arange(0.0, 1000)
        snr = noise_ratios("linear").float() ** -2
        want = torch.minimum(snr, torch.tensor(5.0)) / (snr if name == "eps" else snr + 1)
        assert torch.allclose(o.weight(t), want, rtol=1e-4) and (free.weight(t) == 1).all()


@pytest.mark.parametrize("name", ["eps", "v"])
def test_velocity_weights_are_the_same_loss(name):
    "Hang et al. (2023): min(SNR, gamma) on the error of the image, whatever is predicted"
    o, x0, eps = (
        build_objective(name, "linear", 5.0),
        torch.randn(500, 1, 2, 2, generator=g()),
        torch.randn(500, 1, 2, 2, generator=g(1)),
    )
    t = torch.arange(100.0, 600)
    alpha, sigma = o.scales(t)
    p = o.target(x0, eps, t) + 0.1 * torch.randn(500, 1, 2, 2, generator=g(2))
    on_image = (o.x0(p, alpha * x0 + sigma * eps, t) - x0).square().mean((1, 2, 3)) * (o.ratio(t) ** -2).clamp(max=5)
    asked = o.weight(t) * (p - o.target(x0, eps, t)).square().mean((1, 2, 3))
    assert torch.allclose(on_image, asked, rtol=1e-2)


# networks
def test_cifar_has_the_published_layout():
    net = build_unet("cifar", 32, 3, 10)
    assert 35.7e6 < sum(p.numel() for p in net.parameters()) < 35.9e6
    assert (
        list(net.config.down_block_types) == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
        and net.config.dropout == 0.1
    )
    assert net.class_embedding.num_embeddings == 11
    assert list(build_unet("medium", 64, 3, 2).config.down_block_types)[2] == "AttnDownBlock2D"


def test_first_weights_follow_the_seed():
    a, b, c = (build_unet("small", 8, 1, 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["conv_in.weight"], c["conv_in.weight"])


@pytest.mark.parametrize(
    "name,size,advice",
    [("cifar", 28, "24 or 32"), ("tiny", 9, "8 or 10"), ("medium", 2, "8 or 16"), ("cifar", 20, "another of")],
)
def test_sizes_that_cannot_be_halved(name, size, advice):
    with pytest.raises(UsageError, match=advice):
        build_unet(name, size, 1, 10)


# the loss
class Table(nn.Module):
    "Predicts a number that depends on class (and time, where asked) alone"

    def __init__(self, slope=0.0):
        super().__init__()
        self.number, self.slope, self.calls = nn.Parameter(torch.linspace(-1, 1, 11)), slope, []

    def forward(self, x, t, class_labels, return_dict=False):
        self.calls.append((x.clone(), t.clone(), class_labels.clone()))
        return ((self.number[class_labels] * (1 + self.slope * t))[:, None, None, None].expand_as(x),)


def batch_of(o, n=400, drop=0.0, seed=0):
    return noisy_batch(
        o,
        torch.randint(0, 256, (n, 1, 2, 2), dtype=torch.uint8, generator=g(seed)),
        torch.arange(n) % 10,
        10,
        g(seed),
        drop,
    )


def test_labels_are_dropped_item_by_item():
    o = build_objective("eps")
    shares = [(batch_of(o, 50, 0.1, seed).seen == 10).float().mean().item() for seed in range(60)]
    assert abs(np.mean(shares) - 0.1) < 0.02 and 0 < np.std(shares) < 0.1 and sum(0 < s < 1 for s in shares) > 50
    b = batch_of(o, 50, 0.1)
    assert torch.equal(b.seen[b.seen < 10], b.labels[b.seen < 10])
    assert (batch_of(o, 50, 0.0).seen < 10).all() and (batch_of(o, 50, 1.0).seen == 10).all()


def test_times_are_spread_evenly():
    t = batch_of(build_objective("eps"), 100).t
    assert sorted((t // 10).int().tolist()) == list(range(100))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_against_the_formula(name):
    o = build_objective(name, min_snr=5.0 if name != "edm" else 0.0)
    m, b = NoiseModel(Table(), o, 10), batch_of(o, drop=0.1)
    seen = []

    def extra(model, batch, noise, prediction, t):
        return seen.append((model, batch, noise, prediction, t)) or prediction.mean()

    found = diffusion_loss(m, b, [extra, extra])
    p = m.net.number[b.seen][:, None, None, None].expand_as(b.x)
    want = (o.weight(b.t)[:, None, None, None] * (p - o.target(b.x0, b.noise, b.t)) ** 2).mean()
    assert torch.allclose(found[0], want, rtol=1e-4) and torch.equal(found[1], found[2]) and found.shape == (3,)
    assert seen[0][0] is m and seen[0][1] is b and seen[0][2] is b.noise and seen[0][4] is b.t
    assert torch.equal(m.net.calls[0][0], o.enter(b.x, b.t))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cb_label", ["frequency", "uniform", "null"])
@pytest.mark.parametrize("space", CB_SPACES)
def test_cbdm_against_the_formula(name, cb_label, space, data):
    o = build_objective(name)
    m, b, tau, gamma = NoiseModel(Table(0.001), o, 10), batch_of(o, drop=0.1), 1.5, 0.25
    p = m(b.x, b.t, b.seen)
    loss = CBDM(data.counts, cb_label, tau, gamma, space=space)(m, b, b.noise, p, b.t)
    other = m.net.calls[-1][2]

    def eps(y):
        said = (m.net.number[y] * (1 + 0.001 * b.t))[:, None, None, None].expand_as(b.x)
        return o.noise(said, b.x, b.t) if space == "noise" else said

    w = tau * (b.t / 1000 if name != "edm" else torch.special.ndtr((4 * b.t + 1.2) / 1.2)) * (b.seen < 10)
    one, two = (
        (w * (eps(b.seen) - eps(other).detach()).square().mean((1, 2, 3))).mean(),
        (w * (eps(b.seen).detach() - eps(other)).square().mean((1, 2, 3))).mean(),
    )
    assert torch.allclose(loss, one + gamma * two, rtol=1e-4, atol=1e-7)
    grads = [torch.autograd.grad(v, m.net.number, retain_graph=True)[0] for v in (loss, one, two)]
    assert torch.allclose(grads[0], grads[1] + gamma * grads[2], rtol=1e-3, atol=1e-6)
    if cb_label == "null":
        assert (other == 10).all() and abs(grads[1][10]) < 1e-6 < abs(grads[2][10])


def pull_by_fifths(o, space):
    "How hard CBDM pulls two predictions together, against how hard the main loss pulls each to its target, by fifths"
    b, both = batch_of(o, 5000), torch.zeros(5000, 1, 2, 2).requires_grad_()
    m = NoiseModel(Table(), o, 10)

    def answer(x, t, y):
        return torch.ones_like(x)  # what is said of the other class

    m.__class__ = type("Other", (NoiseModel,), {"__call__": lambda self, x, t, y: answer(x, t, y)})
    pull = torch.autograd.grad(CBDM(np.ones(10), "uniform", space=space)(m, b, b.noise, both, b.t), both)[0]
    main = (o.weight(b.t)[:, None, None, None] * (both - 1).square().mean((1, 2, 3), keepdim=True)).mean()
    relative = (pull / torch.autograd.grad(main, both)[0]).mean((1, 2, 3))
    fifth = (o.share(b.t) * 5).long().clamp(max=4)
    return [round(relative[fifth == k].mean().item(), 2) for k in range(5)]


@pytest.mark.parametrize(
    "o",
    [build_objective("eps"), build_objective("v"), build_objective("edm"), build_objective("v", min_snr=5.0)],
    ids=repr,
)
def test_cbdm_pulls_as_published_under_every_objective(o):
    assert pull_by_fifths(o, "prediction") == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.011)


@pytest.mark.parametrize(
    "name,want",
    [("eps", [0.1, 0.3, 0.5, 0.7, 0.9]), ("v", [0.09, 0.23, 0.24, 0.14, 0.03]), ("edm", [0.1, 0.27, 0.36, 0.3, 0.1])],
)
def test_cbdm_between_noises_is_weaker_where_something_else_is_predicted(name, want):
    assert pull_by_fifths(build_objective(name), "noise") == pytest.approx(want, abs=0.02)


def test_cbdm_draws_from_its_prior():
    counts = np.array([600, 300, 100, 0, 0, 0, 0, 0, 0, 0])
    o = build_objective("eps")
    m, b = NoiseModel(Table(), o, 10), batch_of(o, 20000)
    p = m(b.x, b.t, b.seen)
    for label, want in (("frequency", counts / 1000), ("uniform", np.full(10, 0.1))):
        CBDM(counts, label)(m, b, b.noise, p, b.t)
        assert np.abs(np.bincount(m.net.calls[-1][2], minlength=11)[:10] / 20000 - want).max() < 0.01


def test_cheap_cbdm_uses_a_part_of_the_batch(data):
    o = build_objective("v")
    m, b = NoiseModel(Table(), o, 10), batch_of(o, 4000)
    p = m(b.x, b.t, b.seen)
    whole, part = (CBDM(data.counts, share=s)(m, b, b.noise, p, b.t).item() for s in (1.0, 0.25))
    assert len(m.net.calls[-1][0]) == 1000 and abs(whole - part) < 0.1 * whole


# training
class Stop(Exception):
    "A stand-in for a power cut"


def logged(path, data, stop_at=None, **more):
    with Run(LDMLRConfig(out=str(path))) as run, pytest.MonkeyPatch.context() as m:
        run.start(LDMLRConfig(), "cpu", "fp32")
        original = run.save

        def save(name, tensors, **meta):
            original(name, tensors, **meta)
            if meta["step"] == stop_at:
                raise Stop

        run.save = save
        m.setattr(diffusion, "LOOK_EVERY", 10)
        return train(
            data,
            n_steps=22,
            diff_bs=8,
            run=run,
            save_every=0,
            power=0.5,
            flip=True,
            nudge=0.5,
            extra_losses=[CBDM(data.counts, share=0.5)],
            **more,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    "A training without a cut: (model, folder). Images are drawn 8 steps at a time: both cuts fall within a block"
    Progress.quiet, diffusion.UNETS["small"], diffusion._Training.block = True, SMALL, 8
    path = tmp_path_factory.mktemp("whole")
    yield logged(path, data), path
    diffusion._Training.block = 256


@pytest.mark.parametrize("cut", [10, 20])
def test_resume_bit_for_bit(tmp_path, data, whole, cut):
    with pytest.raises(Stop):
        logged(tmp_path, data, stop_at=cut)
    again = logged(tmp_path, data)
    assert same(whole[0], again) and whole[0].fingerprint == again.fingerprint
    assert (whole[1] / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert (
        [r["step"] for r in rows] == [10, 20, 22]
        and set(rows[0]) == {"stage", "seed", "step", "loss", "extra"}
        and len(rows[0]["extra"]) == 1
    )
    assert same(again, logged(tmp_path, data, stop_at=0)), "a finished training is not done again"


def test_resume_keeps_the_memory_format(tmp_path, data):
    "Fused optimizers want their averages laid out as the weights are"

    def training(run):
        net, how = build_unet("small", 8, 1, 10), Denoising(diff_bs=8, diff_lr=1e-3, ema=0.9, channels_last=True)
        return diffusion._Training(
            net, build_objective("v"), data.train.images, data.train.labels, 10, how, Where(run=run)
        )

    with Run(LDMLRConfig(out=str(tmp_path))) as run:
        run.start(LDMLRConfig(), "cpu", "fp32")
        t = training(run)
        t.step(0)
        t.checkpoint("s", 1)
        again = training(run)
        assert again.resumed("s") == 1
    for p, average in zip(again.weights, again.averages.state.values(), strict=True):
        assert p.stride() == average.stride() and all(
            v.stride() == p.stride() for v in again.optimizer.state[p].values() if v.shape == p.shape
        )
    assert any(p.ndim == 4 and p.shape[1] > 1 and not p.is_contiguous() for p in again.weights), (
        "the weights are channels_last"
    )


def test_training_leaves_the_global_generator_alone(data):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = train(data, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert same(a, train(data, 3)) and not same(a, train(data, 3, seed=1))


def test_average_is_ramped(data):
    "After s steps the oldest weights have the share prod (1 + i) / (10 + i)"
    one = train(data, 1, diff_lr=0.0)
    assert torch.equal(one.unet.conv_in.weight, build_unet("small", 8, 1, 10).conv_in.weight)
    assert not torch.equal(train(data, 1).unet.conv_in.weight, one.unet.conv_in.weight)


def test_natural_and_balanced_draws(data):
    seen = []
    for power in (1.0, 0.0):
        labels = []

        def spy(model, batch, noise, prediction, t, labels=labels):
            return labels.append(batch.labels) or prediction.sum() * 0

        train(data, 5, diff_bs=96, power=power, extra_losses=[spy])
        seen.append(np.bincount(torch.cat(labels), minlength=10) / 480)
    assert abs(seen[0][0] - data.counts[0] / data.counts.sum()) < 0.1 and np.abs(seen[1] - 0.1).max() < 0.06


def test_extra_losses_wait(data):
    "Until a loss's share of the steps is done every step is as without it; CBDM does not wait"

    def steps(**more):  # the weights after each of six steps
        found = []
        train(data, 6, on_sample=lambda step, m: found.append(m.fingerprint), sample_every=1, **more)
        return found

    calls = []

    def extra(after):
        def loss(model, batch, noise, prediction, t):
            calls.append(1)
            return prediction.square().mean()

        loss.after = after
        return loss

    plain, late = steps(), steps(extra_losses=[extra(0.5)])
    assert late[:3] == plain[:3] and not set(late[3:]) & set(plain) and len(calls) == 3
    assert steps(extra_losses=[extra(0.0)])[0] != plain[0] and len(calls) == 9
    assert steps(extra_losses=[extra(1.0)]) == plain and len(calls) == 9
    cbdm = CBDM(data.counts)
    assert steps(extra_losses=[extra(1.0), cbdm]) == steps(extra_losses=[cbdm]) != plain


def test_samples_on_the_way(data):
    steps = []
    train(data, 10, on_sample=lambda step, m: steps.append((step, m.fingerprint)), sample_every=4)
    assert [s for s, _ in steps] == [4, 8] and len({f for _, f in steps}) == 2


def test_a_class_with_one_image_or_none(data):
    keep = data.train.labels != 9
    m = train_diffusion(data.train.images[keep], data.train.labels[keep], 10, unet="small", n_steps=2, diff_bs=8)
    assert m.counts[9] == 0 and data.counts[8:].tolist() == [1, 1]
    images, rows = sample_images(m, make_plan([0] * 8 + [2, 2]), sample_steps=3)
    assert images.shape == (4, 1, 8, 8) and len(rows) == 4
    one = train_diffusion(
        data.train.images[:1], data.train.labels[:1], 10, unet="small", n_steps=2, diff_bs=4, power=0.0
    )
    assert len(sample_images(one, make_plan([1]), sample_steps=2)[0]) == 1


def test_a_nan_is_an_error_and_keeps_the_checkpoint(tmp_path, data, monkeypatch):
    monkeypatch.setattr(diffusion, "LOOK_EVERY", 10)
    with Run(LDMLRConfig(out=str(tmp_path))) as run:
        run.start(LDMLRConfig(), "cpu", "fp32")
        calls = []

        def bad(model, batch, noise, prediction, t):
            return calls.append(1) or prediction.sum() * (math.nan if len(calls) == 12 else 0.0)

        with pytest.raises(LtnbError, match="lower --diff-lr"):
            train(data, 40, extra_losses=[bad], run=run, save_every=0)
        assert run.load("diffusion-seed-0")[1]["step"] == 10


@pytest.mark.parametrize(
    "change,error,text",
    [
        (dict(unet="tinny"), UsageError, "Did you mean 'tiny'"),
        (dict(objective="epz"), UsageError, "Did you mean 'eps'"),
        (dict(schedule="cosin"), UsageError, "Did you mean 'cosine'"),
        (dict(n_steps=0), UsageError, "at least 1"),
        (dict(min_snr=-1.0), UsageError, "min_snr"),
        (dict(objective="edm", min_snr=5.0), UsageError, "own weights"),
        (dict(label_drop=10.0), UsageError, "label_drop is a share"),
        (dict(extra_losses=[SimpleNamespace(after=50.0)]), UsageError, "`after` of extra loss 0 is a share"),
        (dict(n_step=3), UsageError, "Did you mean 'n_steps'"),
    ],
)
def test_wrong_settings(data, change, error, text):
    with pytest.raises(error, match=text):
        train(data, **change)


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(label="nul"), "Did you mean 'null'"),
        (dict(share=-0.1), "cb_share"),
        (dict(space="noises"), "Did you mean 'noise'"),
    ],
)
def test_wrong_settings_of_cbdm(data, change, text):
    with pytest.raises(UsageError, match=text):
        CBDM(data.counts, **change)


def test_records_say_the_same_as_keywords(data):
    "How and where as records, as keywords over a record, or as keywords alone"
    how = Denoising(unet="small", n_steps=3, diff_bs=16, diff_lr=1e-3)
    real = data.train.images, data.train.labels, 10
    whole = train(data, 3)
    assert train_diffusion(*real, how, Where(), class_names=data.class_names).fingerprint == whole.fingerprint
    assert (
        train_diffusion(*real, Denoising(n_steps=3), unet="small", diff_bs=16, diff_lr=1e-3).fingerprint
        == whole.fingerprint
    )
    images = sample_images(whole, make_plan([2]), Sampling("ddim", 3, 1.5))[0]
    assert torch.equal(
        images, sample_images(whole, make_plan([2]), Sampling("ddim"), sample_steps=3, guidance_scale=1.5)[0]
    )


@pytest.mark.parametrize(
    "images,labels,error,text",
    [
        (np.zeros((0, 1, 8, 8), np.uint8), [], DataError, "0 images"),
        (np.zeros((2, 1, 8, 8), np.float32), [0, 1], DataError, "uint8"),
        (np.zeros((2, 8, 8), np.uint8), [0, 1], DataError, "shape"),
        (np.zeros((2, 1, 8, 6), np.uint8), [0, 1], UsageError, "square"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0], DataError, "2 labels"),
        (np.zeros((2, 1, 8, 8), np.uint8), [0, 10], DataError, "0 to 9"),
        (np.zeros((2, 1, 9, 9), np.uint8), [0, 1], UsageError, "8 or 10"),
    ],
)
def test_wrong_data(images, labels, error, text):
    with pytest.raises(error, match=text):
        train_diffusion(images, np.array(labels, dtype=np.int64), 10)


def test_nudges_stay_in_place():
    x = torch.full((64, 3, 16, 16), 90, dtype=torch.uint8)
    assert torch.equal(nudge(x, g(), 1.0), x), "edges are mirrored, not filled"
    noise = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=g())
    moved = (nudge(noise, g(), 0.25) != noise).flatten(1).any(1).float().mean()
    assert 0.1 < moved < 0.4


WORKER = """
import sys; sys.path.insert(0, "tests")
import torch
from ltnb import diffusion
from ltnb.progress import Progress
from ltnb.data import LongTail
from ltnb.team import join_team
from ltnb.cbdm import CBDM
Progress.quiet = True; data = LongTail.digits()
small = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=0., norm_num_groups=4, attention=False)
diffusion.UNETS["small"] = small
with join_team("cpu") as team:
    how = dict(unet="small", n_steps=3, diff_bs=15, diff_lr=1e-3, extra_losses=[CBDM(data.counts)], team=team)
    m = diffusion.train_diffusion(data.train.images, data.train.labels, 10, **how)
    if team.writes: m.save(sys.argv[1])
"""


@pytest.mark.slow_process
def test_two_processes_train_the_same_model(tmp_path, monkeypatch, data):
    both = pair(tmp_path / "two", program=WORKER, cwd=ROOT)
    assert [p.returncode for p in both] == [0, 0], "".join(p.stderr[-2000:] for p in both)
    monkeypatch.setitem(diffusion.UNETS, "small", {**SMALL, "dropout": 0.0})
    one, two = train(data, 3, diff_bs=15, extra_losses=[CBDM(data.counts)]), DiffusionModel.load(tmp_path / "two")
    assert (
        max(
            (a - b).abs().max().item()
            for a, b in zip(one.unet.state_dict().values(), two.unet.state_dict().values(), strict=True)
        )
        < 1e-4
    )


# folders
def test_folder_is_one_of_diffusers(tmp_path, model):
    from diffusers import DDIMScheduler, UNet2DModel

    model.save(tmp_path / "m", note="kept")
    plain, scheduler = UNet2DModel.from_pretrained(tmp_path / "m").eval(), DDIMScheduler.from_pretrained(tmp_path / "m")
    again = DiffusionModel.load(tmp_path / "m")
    assert (
        same(model, again) and again.fingerprint == model.fingerprint and repr(again.objective) == repr(model.objective)
    )
    assert (
        again.class_names == model.class_names
        and again.image_shape == (1, 8, 8)
        and again.counts.tolist() == model.counts.tolist()
    )
    plan = make_plan([0, 0, 0, 4])
    ours = sample_images(again, plan, sampler="ddim", sample_steps=10)[0]
    assert torch.equal(ours, sample_images(model, plan, sampler="ddim", sample_steps=10)[0])
    from ltnb.jobs import item_noise

    x = item_noise(("diffusion", model.fingerprint, 0, 0), plan, (1, 8, 8))
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(
                plain(x, t, class_labels=torch.full((4,), 3)).sample, t, x, use_clipped_model_output=True
            ).prev_sample
    theirs = ((x + 1) * 127.5).round().clamp(0, 255)
    assert (theirs - ours.float()).abs().max() <= 1, "plain diffusers makes the same images"


def test_edm_folder_is_one_of_diffusers(tmp_path, data):
    from diffusers import EDMEulerScheduler, UNet2DModel

    m = train(data, 30, objective="edm")
    m.save(tmp_path)
    plain, scheduler = UNet2DModel.from_pretrained(tmp_path).eval(), EDMEulerScheduler.from_pretrained(tmp_path)
    x0, eps = torch.from_numpy(data.train.images[:4]).float() / 127.5 - 1, torch.randn(4, 1, 8, 8, generator=g())
    scheduler.set_timesteps(1000)
    i, y = 400, torch.zeros(4, dtype=torch.int64)
    sigma, t = scheduler.sigmas[i], scheduler.timesteps[i]
    x = x0 + sigma * eps
    with torch.no_grad():
        p = plain(scheduler.precondition_inputs(x, sigma), t, class_labels=y).sample
        ours = NoiseModel(m.unet, m.objective, 10)(x, t.expand(4), y)
    assert torch.allclose(p, ours, atol=1e-4) and torch.allclose(
        scheduler.precondition_outputs(x, p, sigma), m.objective.x0(ours, x, t.expand(4)), atol=1e-4
    )


def test_bad_folders(tmp_path, model):
    with pytest.raises(DataError):
        DiffusionModel.load(tmp_path)
    model.save(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(DataError):
        DiffusionModel.load(tmp_path / "m")
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError):
        DiffusionModel.load(tmp_path / "m")
    path.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(DataError, match="damaged"):
        DiffusionModel.load(tmp_path / "m")
    path.write_bytes(whole)
    assert same(model, DiffusionModel.load(tmp_path / "m"))
    (tmp_path / "m" / "ltnb.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="an ltnb of unknown version in format 2, .*upgrade ltnb"):
        DiffusionModel.load(tmp_path / "m")


def test_a_kill_while_saving_leaves_no_half_model(tmp_path, model, data, monkeypatch):
    model.save(tmp_path)
    other = train(data, 2)
    monkeypatch.setattr(diffusion, "write_json", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        other.save(tmp_path)
    with pytest.raises(DataError):
        DiffusionModel.load(tmp_path)


# sampling
class Knows(nn.Module):
    "The exact network for data that are one point a class"

    def __init__(self, objective, points):
        super().__init__()
        self.objective, self.points = objective, points

    def forward(self, x, t, class_labels, return_dict=False):
        o, x0 = self.objective, self.points[class_labels]
        alpha, sigma = o.scales(t)
        if o.name == "edm":
            x = x / o.constants(t)[2]  # back from what enters
        return (o.target(x0, (x - alpha * x0) / sigma, t),)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_sampler_lands_on_the_point(name, sampler):
    o, points = build_objective(name), torch.rand(4, 1, 4, 4, generator=g()) * 2 - 1
    m = DiffusionModel(Knows(o, points), o, ("a", "b", "c"), (1, 4, 4), np.ones(3))
    plan = make_plan([3, 2, 1])
    for steps in (1, 7, 20):
        images, rows = sample_images(m, plan, Sampling(sampler, steps))
        want = ((points[plan[:, 0]] + 1) * 127.5).round()
        assert (images.float() - want).abs().max() <= 1 and rows[0] == dict(
            sampler=sampler, sample_steps=steps, guidance_scale=1.0, spacing=sampler_spacing(sampler)
        )


class KnowsGauss(nn.Module):
    "The exact network for pixels from N(0, sd^2)"

    def __init__(self, objective, sd):
        super().__init__()
        self.objective, self.sd = objective, sd

    def forward(self, x, t, class_labels, return_dict=False):
        o = self.objective
        alpha, sigma = o.scales(t)
        if o.name == "edm":
            x = x / o.constants(t)[2]
        x0 = alpha * self.sd**2 / (alpha**2 * self.sd**2 + sigma**2) * x
        return (o.target(x0, (x - alpha * x0) / sigma, t),)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_samplers_find_a_whole_distribution(name, sampler):
    "The deterministic ones map the start noise to sd x noise; the ancestral one gives the right spread"
    from ltnb.jobs import item_noise

    o, plan = build_objective(name), make_plan([100])
    m = DiffusionModel(KnowsGauss(o, 0.25), o, ("a",), (1, 4, 4), np.ones(1))
    x, start = (
        sample_images(m, plan, Sampling(sampler, 100))[0].float() / 127.5 - 1,
        item_noise(("diffusion", m.fingerprint, 0, 0), plan, (1, 4, 4)),
    )
    assert abs(x.std() - 0.25) < (
        0.015 if sampler != "ddpm" else 0.03
    )  # the smaller of the two usual variances falls a little short
    if sampler != "ddpm":
        assert (x - 0.25 * start).abs().mean() < 0.015


class KnowsTwo(nn.Module):
    "The exact network for pixels that lie around -0.5 or 0.5, with a spread of 0.1"

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x, t, class_labels, return_dict=False):
        o = self.objective
        alpha, sigma = o.scales(t)
        if o.name == "edm":
            x = x / o.constants(t)[2]
        total = alpha**2 * 0.01 + sigma**2
        own = torch.stack([mode + alpha * 0.01 / total * (x - alpha * mode) for mode in (-0.5, 0.5)])
        near = torch.stack([-((x - alpha * mode) ** 2) / (2 * total) for mode in (-0.5, 0.5)]).softmax(0)
        x0 = (near * own).sum(0)
        return (o.target(x0, (x - alpha * x0) / sigma, t),)


def spread_within(o, sampler, steps, spacing):  # within a mode; the truth is 0.1
    noise = torch.randn(2000, 1, 1, 1, generator=g())
    own = [g(i) for i in range(len(noise))] if sampler == "ddpm" else None
    x = sample_batch(
        NoiseModel(KnowsTwo(o), o, 1),
        noise,
        torch.zeros(len(noise), dtype=torch.long),
        Sampling(sampler, steps, 1.0, spacing),
        own,
    ).flatten()
    assert abs((x > 0).float().mean() - 0.5) < 0.06
    return (x - 0.5 * x.sign()).std().item()


@pytest.mark.parametrize("sampler,most", [("dpm++", 0.01), ("heun", 0.01), ("ddim", 0.02), ("ddpm", 0.03)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_few_steps_keep_the_spread_within_a_mode(name, sampler, most):
    found = spread_within(build_objective(name), sampler, 20, None)
    assert found == pytest.approx(0.1, abs=most)


def test_equal_steps_in_time_jump_to_the_mean_at_the_end():
    assert spread_within(build_objective("v"), "dpm++", 20, "trailing") == pytest.approx(0.071, abs=0.005)


@pytest.mark.parametrize("name", ["eps", "v"])
def test_no_time_reaches_the_end_of_the_schedule(name):
    o = build_objective(name)
    assert o.draw(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 500, 999], (
        "a uniform number below 1 can be rounded to it"
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_item_does_not_depend_on_its_batch(model, sampler):
    plan = make_plan([4, 3, 0, 2])
    images = sample_images(model, plan, Sampling(sampler, 5, 1.5))[0]
    assert torch.equal(images, sample_images(model, plan, Sampling(sampler, 5, 1.5))[0])
    for bs in (1, 2, 5):
        assert (images.int() - sample_images(model, plan, Sampling(sampler, 5, 1.5), bs=bs)[0].int()).abs().max() <= 1
    assert (
        images[[6, 1]].int() - sample_images(model, plan[[6, 1]], Sampling(sampler, 5, 1.5))[0].int()
    ).abs().max() <= 1
    for change in (dict(seed=1), dict(attempt=1)):
        assert (
            images.int() - sample_images(model, plan, Sampling(sampler, 5, 1.5), **change)[0].int()
        ).abs().max() > 20


def test_guidance_as_in_diffusers(model):
    calls = []

    class Spy(nn.Module):
        def forward(self, x, t, class_labels, return_dict=False):
            calls.append(class_labels)
            return (model.unet(x, t, class_labels=class_labels).sample,)

    m = NoiseModel(Spy(), model.objective, 10)
    x, t, y = torch.randn(3, 1, 8, 8, generator=g()), torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        p, p_any = m(x, t, y), m(x, t, torch.full((3,), 10))
        assert torch.equal(m.guided(x, t, y, 1), p) and len(calls[-1]) == 3
        assert torch.allclose(m.guided(x, t, y, 2.5), p_any + 2.5 * (p - p_any), atol=1e-5) and calls[-1].tolist() == [
            10
        ] * 3 + [0, 4, 9]
        assert torch.allclose(m.guided(x, t, y, 0.0), p_any, atol=1e-6)


def test_broken_samples_are_black(model):
    class Broken(nn.Module):
        def forward(self, x, t, class_labels, return_dict=False):
            return (
                torch.where(
                    (class_labels == 1)[:, None, None, None],
                    math.nan,
                    model.unet(x, t, class_labels=class_labels).sample,
                ),
            )

    m = DiffusionModel(Broken(), model.objective, model.class_names, model.image_shape, model.counts)
    images, _ = sample_images(m, make_plan([2, 2]), sample_steps=3)
    assert (images[2:] == 0).all() and (images[:2].flatten(1).float().std(1) > 0).all()


def test_wrong_plans_and_samplers(model):
    with pytest.raises(UsageError, match="Did you mean 'ddim'"):
        sample_images(model, make_plan([1]), sampler="dim")
    with pytest.raises(UsageError, match="class 11"):
        sample_images(model, np.array([[11, 0]]))
    with pytest.raises(UsageError, match="at least 1"):
        sample_images(model, make_plan([1]), sample_steps=0)
    images, rows = sample_images(model, make_plan([0]))
    assert images.shape == (0, 1, 8, 8) and rows == []


def test_frechet_distance():
    a, b = (
        torch.randn(4000, 5, generator=g()),
        torch.randn(4000, 5, generator=g(1)) * torch.tensor([1.0, 2, 3, 1, 1]) + torch.tensor([1.0, 0, 0, 0, 0]),
    )
    assert (
        abs(frechet_distance(a, b) - (1 + 1 + 4)) < 0.4
        and frechet_distance(a, a) < 1e-6
        and math.isclose(frechet_distance(a, b), frechet_distance(b, a), rel_tol=1e-6)
    )
    from scipy.linalg import sqrtm

    x, y = a.double().numpy(), b.double().numpy()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        np.cov(x.T) + np.cov(y.T) - 2 * sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    )
    assert math.isclose(frechet_distance(a, b), want, rel_tol=1e-6)
    with pytest.raises(UsageError, match="at least 2"):
        frechet_distance(a[:1], b)


def test_tiny_learns_digits(data):
    "An untrained velocity costs about 1"

    class Log:
        rows, path = [], None

        def cut_back(self, *a, **k):
            pass

        def log(self, **row):
            self.rows.append(row)

        def load(self, name):
            return None, {}

        def save(self, *a, **k):
            pass

    train_diffusion(data.train.images, data.train.labels, 10, n_steps=60, diff_bs=32, run=Log())
    assert Log.rows[0]["loss"] < 0.7 and Log.rows[1]["loss"] < 0.5
