"Bands, the AID-biased loss and the filter: the formulas again in plain words, gradients, and a job that is killed."

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from ltnb import diffusion, draw
from ltnb.aid import (
    ZONES,
    Extractor,
    aid_ratios,
    zone_of,
    zone_shares,
    check_extractor,
    class_geometry,
    diameter,
    draw_filtered,
    score_zones,
    shrunken,
)
from ltnb.aid_loss import (
    FORMS,
    AIDLoss,
    Balance,
    AIDScale,
    aid_penalty,
    at_share,
    balanced_alpha,
    calibrate,
    class_draw,
    feature_shift,
    gradient_balance,
    huber,
    mean_strength,
    noise_strength,
    usual_shift,
)
from ltnb.core import LtnbError, UsageError, generator
from ltnb.progress import Progress
from ltnb.data import ImageSet, LongTail
from ltnb.noise import OBJECTIVES, NoiseModel, NoisyBatch, build_objective, diffusion_loss, noisy_batch
from ltnb.diffusion import train_diffusion
from ltnb.samplers import sample_images
from ltnb.cbdm import CBDM
from ltnb.models import build_model
from ltnb.classifier import Classifier, encode, pixel_stats
from ltnb.jobs import make_plan
from ltnb.synthetic import Synthetic, add_scores, made_rows, make_synthetic
from ltnb.copies import flag_copies
from ltnb.draw import draws_needed
from ltnb.training import fit
from warm import pair

SMALL = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=0.0, norm_num_groups=4, attention=False)


def g(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setitem(diffusion.UNETS, "small", SMALL)


@pytest.fixture(scope="module")
def data():
    return LongTail.digits()


def classifier(data, n_epochs=0, seed=0):
    clf = Classifier(
        build_model("convnet", 10, 1, seed=seed),
        data.class_names,
        (1, 8, 8),
        *pixel_stats(data.train.images),
        "convnet",
    )
    return fit(clf, data.train.images, data.train.labels, n_epochs=n_epochs, bs=32) if n_epochs else clf


@pytest.fixture(scope="module")
def phi(data):
    Progress.quiet = True
    return Extractor(classifier(data, 6))


@pytest.fixture(scope="module")
def geo(data, phi):
    return class_geometry(phi, data.train)


@pytest.fixture(scope="module")
def model(data):
    Progress.quiet, diffusion.UNETS["small"] = True, SMALL
    return train_diffusion(
        data.train.images, data.train.labels, 10, unet="small", n_steps=20, diff_bs=16, class_names=data.class_names
    )


def batch_of(o, data, n=60, drop=0.1, seed=0):
    i = torch.from_numpy(np.linspace(0, len(data.train) - 1, n).astype(int))
    return noisy_batch(
        o, torch.from_numpy(data.train.images)[i], torch.from_numpy(data.train.labels)[i], 10, g(seed), drop
    )


class Near(torch.nn.Module):
    "Answers with the target, and an error of a size that is its only weight"

    def __init__(self, objective, x0, noise, size=0.3):
        super().__init__()
        self.o, self.x0, self.eps, self.size = objective, x0, noise, torch.nn.Parameter(torch.tensor(size))
        self.wrong = torch.randn(x0.shape, generator=g(7))

    def forward(self, x, t, class_labels, return_dict=False):
        return (self.o.target(self.x0, self.eps, t) + self.size * self.wrong,)


def near(o, data, **more):
    b = batch_of(o, data, **more)
    m = NoiseModel(Near(o, b.x0, b.noise), o, 10)
    return m, b, m(b.x, b.t, b.seen)


# phi_0
def test_one_normalisation_in_both_uses(data, phi):
    x = torch.from_numpy(data.test.images[:50])
    a, b = phi(x.float() / 127.5 - 1), phi.encode(x)
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(b, encode(phi.clf, data.test.images[:50]), atol=1e-6)
    assert torch.allclose(phi.encode(data.test.images[:50], bs=7), b, atol=1e-5)
    assert not torch.allclose(phi(x.float() / 255), b, atol=0.1), "a wrong range is seen"


def test_colour_images_too(data):
    clf = Classifier(build_model("resnet8", 3), "abc", (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "resnet8")
    x, e = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=g()), Extractor(clf)
    assert torch.allclose(e(x.float() / 127.5 - 1), e.encode(x), atol=1e-5)


def test_phi_is_a_frozen_copy(data):
    clf = classifier(data).train()
    e = Extractor(clf)
    before = e.fingerprint
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    e(x).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in e.clf.parameters())
    assert clf.training and all(p.requires_grad for p in clf.parameters()), "the classifier itself is left alone"
    with torch.no_grad():
        clf.net.fc.weight += 1
        clf.net.body[0][0].weight += 1
    assert Extractor(clf).fingerprint != before == Extractor(e.clf).fingerprint
    assert (
        Extractor(Classifier(e.clf.net, data.class_names, (1, 8, 8), (0.1,), (0.2,), "convnet")).fingerprint != before
    ), "the normalisation counts"


def test_phi_refuses_what_it_cannot_see(data, phi):
    with pytest.raises(UsageError, match="encode"):
        phi(torch.from_numpy(data.test.images[:2]))
    with pytest.raises(UsageError, match=r"\(1, 8, 8\).*\(3, 8, 8\)"):
        phi(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UsageError, match="features of length 5"):
        Extractor(Classifier(build_model("convnet", 2, 1), "ab", (5,)))
    assert phi.encode(data.test.images[:0]).shape == (0, 64)


def test_guard_against_an_untrained_phi(data, phi):
    good, bad = (
        check_extractor(phi, data.train, strict=False),
        check_extractor(Extractor(classifier(data)), data.train, data.test, strict=False),
    )
    assert good.measured_on == "training" and good.tail_images == 5 and good.chance == 0.1
    assert (
        bad.measured_on == "held-out"
        and bad.tail_images == 180
        and not bad.ok
        and "180 held-out images of the tail" in bad.message
        and bad.tail == pytest.approx(bad.false, abs=0.02)
    )
    with pytest.raises(LtnbError, match="no more than chance"):
        check_extractor(Extractor(classifier(data)), data.train, data.test)
    tail = np.argsort(-data.counts, kind="stable")[-3:]
    right = phi.clf.logits(data.train.images).argmax(1).numpy() == data.train.labels
    assert good.tail == pytest.approx(np.mean([right[data.train.labels == c].mean() for c in tail]))
    head = data.test.take(data.test.labels == data.counts.argmax())
    with pytest.raises(UsageError, match="none of the tail"):
        check_extractor(phi, data.train, head)


# geometry
@pytest.mark.parametrize("block", [1, 3, 7, 64])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_diameter_is_the_greatest_distance(n, block):
    z = torch.randn(n, 5, generator=g(n)) + 100
    assert diameter(z, block) == pytest.approx(
        max(((a - b) ** 2).sum().item() for a in z.double() for b in z.double()) ** 0.5, rel=1e-6
    )


def test_geometry_against_plain_words(data, phi, geo):
    z, y = encode(phi.clf, data.train.images), data.train.labels
    for c in range(10):
        own = z[y == c].double()
        assert torch.allclose(geo.centres[c].double(), own.mean(0), atol=1e-4)
        assert geo.measured[c].item() == pytest.approx(max((a - b).norm().item() for a in own for b in own), rel=1e-5)
    r = geo.ratios(z, y)
    assert r[5] == pytest.approx(((z[5] - geo.centres[y[5]]).norm() / geo.diameters[y[5]]).item(), rel=1e-6)
    assert r.max() <= 1, "real training images are in distribution by construction"


def test_classes_of_one_image_and_shrinking(data, phi, geo):
    some = geo.measured[geo.measured > 0].median()
    assert (
        (geo.measured[8:] == 0).all()
        and torch.allclose(geo.diameters[8:], 5 / 6 * some)
        and torch.equal(geo.diameters[:8], geo.measured[:8])
    )
    n, five = torch.tensor(data.counts).float(), class_geometry(phi, data.train, shrink=5)
    assert (
        torch.allclose(five.diameters, (n * geo.measured + 5 * some) / (n + 5)) and five.fingerprint != geo.fingerprint
    )
    assert shrunken(torch.tensor([4.0, 2.0, 0.0]), np.array([9, 3, 1]), 1.0).tolist() == pytest.approx(
        [(36 + 2) / 10, (6 + 2) / 4, 5 * 2 / 6]
    )
    with pytest.raises(UsageError, match="two different real images"):
        shrunken(torch.zeros(2), np.array([1, 1]))
    with pytest.raises(UsageError, match="shrink"):
        class_geometry(phi, data.train, shrink=-1)


def test_a_class_without_images_has_no_band(data, phi):
    part = data.train.take(data.train.labels != 3)
    geo = class_geometry(phi, part)
    z = phi.encode(data.test.images)
    r = geo.ratios(z, data.test.labels)
    assert np.isnan(r[data.test.labels == 3]).all() and np.isfinite(r[data.test.labels != 3]).all()
    assert set(zone_of(r[data.test.labels == 3])) == {"ood"}
    with pytest.raises(UsageError, match="0 to 9"):
        geo.ratios(z[:1], [10])
    z[0] = math.nan
    assert np.isnan(geo.ratios(z, data.test.labels)[0])


def test_fingerprint_of_the_geometry(data, phi, geo):
    assert class_geometry(phi, data.train, bs=5).fingerprint == geo.fingerprint
    assert class_geometry(phi, data.train.take(np.arange(277))).fingerprint != geo.fingerprint
    assert class_geometry(Extractor(classifier(data)), data.train).fingerprint != geo.fingerprint


# bands
def test_bands_at_their_edges():
    assert zone_of([0, 1, np.nextafter(1, 2), 2, np.nextafter(2, 3), math.inf, math.nan]).tolist() == [
        "id",
        "id",
        "aid",
        "aid",
        "ood",
        "ood",
        "ood",
    ]
    assert [zone_of(r) for r in (1.0, 2.0, 2.1, None)] == ["id", "aid", "ood", "ood"] and list(ZONES) == [
        "id",
        "aid",
        "ood",
    ]


def test_shares_by_class():
    s = zone_shares([0.5, 1.5, 3, 4], [0, 0, 0, 2], 3)
    assert (
        s["id"][0] == s["aid"][0] == s["ood"][0] == pytest.approx(1 / 3)
        and s["ood"][2] == 1
        and all(np.isnan(v[1]) for v in s.values())
    )


# the loss
USUAL = AIDScale(2.0, 0.8, 0.4, tuple(np.linspace(0.2, 0.6, 65)))  # as if the shift rose with time


def by_hand(loss, m, b, p):
    "Equations 5 and 6, image by image"
    o, total, form, phi, geo = m.objective, 0.0, loss.form, loss.extractor, loss.geometry
    kappa, alpha, floor, delta = loss.kappa, loss.alpha, loss.floor, loss.delta

    def square(u):
        return u * u if abs(u) <= delta else delta * (2 * abs(u) - delta)

    for i in range(len(b)):
        ratio = o.ratio(b.t[i : i + 1]).item()
        alpha_t, sigma_t = (1.0, ratio) if o.name == "edm" else ((1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5)
        x0_hat = o.x0(p[i : i + 1], b.x[i : i + 1], b.t[i : i + 1])
        eps = (b.x[i : i + 1] - alpha_t * x0_hat) / sigma_t
        shift = (phi(b.x0[i : i + 1]) - phi(b.x0[i : i + 1] + b.noise[i : i + 1] - eps)).norm().item()
        s, d_f, n = ratio / (1 + ratio**2) ** 0.5, geo.diameters[b.labels[i]].item(), mean_strength(o)
        if form == "x0-band":
            far = (phi(x0_hat.clamp(-1, 1))[0] - geo.centres[b.labels[i]]).norm().item() / d_f
            each = max(far - 2, 0) ** 2
        elif form == "per-time":
            each = square(0.8 * shift / d_f / (0.2 + 0.4 * o.share(b.t[i : i + 1]).item()) - 1.5)
        elif form == "literal":
            each = (n / s * 1000 * shift - 1.5 * d_f) ** 2
        else:
            r = kappa * n / max(s, floor) * shift / d_f
            each = {
                "calibrated": square(r - 1.5),
                "hinge": square(max(1 - r, 0)) + square(max(r - 2, 0)),
                "feature-match": square(r),
            }[form]
        total += alpha * each * (b.seen[i].item() != 10)
    return total / len(b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_forms_against_the_formula(name, form, data, phi, geo):
    m, b, p = near(build_objective(name), data, drop=0.2)
    loss = AIDLoss(phi, geo, form, alpha=0.2, scale=USUAL)
    assert (loss.kappa, loss.alpha, loss.floor, loss.delta) == (2.0, 0.2, 0.05, 1.0)
    found = loss(m, b, b.noise, p, b.t)
    assert found.item() == pytest.approx(by_hand(loss, m, b, p), rel=5e-3)
    assert (b.seen == 10).any() and found.shape == ()
    assert torch.equal(diffusion_loss(m, b, [loss])[1], loss(m, b, b.noise, m(b.x, b.t, b.seen), b.t))


def test_edm_probe_image(data, phi, geo):
    "x_0 + (D - x_0) / sigma, with s_t = sigma / sqrt(1 + sigma^2)"
    o = build_objective("edm")
    m, b, p = near(o, data)
    sigma = (4 * b.t).exp()[:, None, None, None]
    probe = b.x0 + (o.x0(p, b.x, b.t) - b.x0) / sigma
    want = (phi(probe) - phi(b.x0)).norm(dim=1)
    clear = (sigma > 0.02).flatten()
    assert torch.allclose(feature_shift(phi, o, b, p)[clear], want[clear], rtol=1e-2, atol=1e-3)
    assert torch.allclose(noise_strength(o, b.t), (sigma / (1 + sigma**2).sqrt()).flatten(), rtol=1e-5)


def test_mean_strength_of_the_schedules():
    assert mean_strength(build_objective("eps")) == pytest.approx(0.806, abs=5e-4)
    assert mean_strength(build_objective("v", "linear")) == mean_strength(build_objective("eps"))
    u = torch.rand(200_000, generator=g()).double()
    o = build_objective("edm")
    sigma = (4 * o.draw(u)).exp()
    assert mean_strength(o) == pytest.approx((sigma / (1 + sigma**2).sqrt()).mean().item(), abs=2e-3)


def test_penalties():
    r = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.25, 5.0])
    assert aid_penalty(r, "literal").tolist() == pytest.approx([2.25, 1, 0.25, 0, 0.25, 0.5625, 12.25])
    assert aid_penalty(r, "calibrated").tolist() == pytest.approx([2, 1, 0.25, 0, 0.25, 0.5625, 6])
    assert torch.equal(aid_penalty(r, "per-time"), aid_penalty(r, "calibrated"))
    assert aid_penalty(r, "x0-band").tolist() == pytest.approx([0, 0, 0, 0, 0, 0.0625, 9])
    assert aid_penalty(r, "hinge").tolist() == pytest.approx([1, 0.25, 0, 0, 0, 0.0625, 5])
    assert aid_penalty(r, "feature-match").tolist() == pytest.approx([0, 0.25, 1, 2, 3, 3.5, 9])
    far = torch.tensor([1e6], requires_grad=True)
    for form in ("calibrated", "per-time", "hinge", "feature-match"):
        (slope,) = torch.autograd.grad(aid_penalty(far, form).sum(), far)
        assert slope.item() == pytest.approx(2), "far away the slope stays, and it is not clamped to 0"
    assert huber(torch.tensor(3.0), math.inf) == 9
    with pytest.raises(UsageError, match="Did you mean 'hinge'"):
        aid_penalty(r, "hing")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_reaches_the_denoiser_alone(name, data, phi, geo):
    o = build_objective(name)
    m, b, p = near(o, data, drop=0.0)
    for form in FORMS:
        loss = AIDLoss(phi, geo, form, scale=replace(USUAL, kappa=1.0))
        if form == "x0-band":
            m.net.size.data.fill_(4.0)  # far enough out that it counts
        (slope,) = torch.autograd.grad(loss(m, b, b.noise, m(b.x, b.t, b.seen), b.t), m.net.size)
        values = []
        for step in (-1e-3, 1e-3):
            with torch.no_grad():
                m.net.size += step
                values.append(loss(m, b, b.noise, m(b.x, b.t, b.seen), b.t).double().item())
                m.net.size -= step
        assert slope.isfinite() and slope.item() == pytest.approx((values[1] - values[0]) / 2e-3, rel=0.2)
    assert all(p.grad is None and not p.requires_grad for p in phi.clf.parameters())


def test_exact_noise_gives_a_finite_gradient(data, phi, geo):
    o = build_objective("eps")
    b = batch_of(o, data, drop=0.0)
    m = NoiseModel(Near(o, b.x0, b.noise, 0.0), o, 10)
    loss = AIDLoss(phi, geo)(m, b, b.noise, m(b.x, b.t, b.seen), b.t)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * 2) and m.net.size.grad.isfinite()


def test_dropped_labels_count_nothing(data, phi, geo):
    o = build_objective("v")
    m, b, p = near(o, data, drop=1.0)
    assert AIDLoss(phi, geo)(m, b, b.noise, p, b.t) == 0
    m, b, p = near(o, data, drop=0.3)
    whole, told = AIDLoss(phi, geo)(m, b, b.noise, p, b.t), (b.seen < 10)
    part = NoisyBatch(*(v[told] for v in vars(b).values()))
    assert whole.item() == pytest.approx(
        AIDLoss(phi, geo)(m, part, part.noise, p[told], part.t).item() * told.float().mean().item(), rel=1e-4
    )


def test_parts_of_a_team_add_up(data, phi, geo):
    o = build_objective("eps")
    m, b, p = near(o, data, n=61)
    loss = AIDLoss(phi, geo)
    parts = [slice(r, None, 2) for r in range(2)]
    total = sum(
        loss(m, NoisyBatch(*(v[at] for v in vars(b).values())), b.noise[at], p[at], b.t[at]).item() * len(b.t[at]) / 61
        for at in parts
    )
    assert total == pytest.approx(loss(m, b, b.noise, p, b.t).item(), rel=1e-5)


def test_training_with_the_loss(data, phi, geo):
    seen, loss = [], AIDLoss(phi, geo)

    def spy(*args):
        seen.append(1)
        return loss(*args)

    spy.after = loss.after = 0.3

    def train(**more):
        how = dict(unet="small", n_steps=10, diff_bs=16)
        return train_diffusion(data.train.images, data.train.labels, 10, **how, **more)

    before = phi.fingerprint
    a, b = (
        train(extra_losses=[spy, CBDM(data.counts)]),
        train(extra_losses=[loss, CBDM(data.counts)]),
    )
    assert a.fingerprint == b.fingerprint != train(extra_losses=[CBDM(data.counts)]).fingerprint and len(seen) == 7
    assert Extractor(phi.clf).fingerprint == before, "phi_0 is not trained"


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(form="literl"), "Did you mean 'literal'"),
        (dict(alpha=-1), "alpha"),
        (dict(kappa=0), "kappa"),
        (dict(floor=0), "floor"),
        (dict(delta=0), "delta"),
    ],
)
def test_wrong_settings_of_the_loss(phi, geo, change, text):
    with pytest.raises(UsageError, match=text):
        AIDLoss(phi, geo, **change)


def test_calibration_equates_the_medians(data, phi, geo, model):
    how = dict(n=200, sample_steps=3, bs=64)
    c = calibrate(model, phi, geo, data.train, **how)
    assert c == calibrate(model, phi, geo, data.train, **how) != calibrate(model, phi, geo, data.train, **how, seed=1)
    assert c.kappa * c.shift == pytest.approx(c.made)
    draw = generator(0, "calibrate")
    i = class_draw(data.train, 800, draw)
    b = noisy_batch(
        model.objective,
        torch.from_numpy(data.train.images[i.numpy()]),
        torch.from_numpy(data.train.labels)[i],
        10,
        draw,
        0.0,
    )
    on = NoiseModel(model.unet, model.objective, 10)
    with torch.no_grad():
        r, usual = (
            AIDLoss(phi, geo, form, scale=c).ratio(on, b, on(b.x, b.t, b.seen)) for form in ("calibrated", "per-time")
        )
    plan = make_plan(np.bincount(data.train.labels[i[:200].numpy()], minlength=10))
    made = np.median(geo.ratios(phi.encode(sample_images(model, plan, sample_steps=3)[0]), plan[:, 0]))
    assert r.median().item() == pytest.approx(made, rel=2e-2)
    for part in b.t.argsort().chunk(8):
        assert usual[part].median().item() == pytest.approx(made, rel=0.15), "at every time, not only over all of them"
    assert not all(abs(r[part].median().item() - made) < 0.15 * made for part in b.t.argsort().chunk(8))


def test_calibration_draws_what_is_going_to_be_made(data):
    wanted = np.array([0, 0, 10, 0, 0, 30, 0, 0, 0, 60])
    drawn = (
        np.bincount(data.train.labels[class_draw(data.train, 20_000, g(), wanted=wanted).numpy()], minlength=10)
        / 20_000
    )
    assert np.abs(drawn - wanted / 100).max() < 0.015
    natural = np.bincount(data.train.labels[class_draw(data.train, 20_000, g()).numpy()], minlength=10) / 20_000
    assert np.abs(natural - data.counts / data.counts.sum()).max() < 0.015
    with pytest.raises(UsageError, match="no class"):
        class_draw(data.train, 5, g(), wanted=np.zeros(10))


def test_usual_shift_is_a_running_median():
    share = torch.rand(6400, generator=g()).numpy()
    table = usual_shift(share, 1 + share)
    assert len(table) == 65 and np.abs(np.array(table) - np.linspace(1, 2, 65)).max() < 0.03
    assert torch.allclose(
        at_share(torch.tensor(table), torch.tensor([0.0, 0.505, 1.0])), torch.tensor([1.0, 1.505, 2.0]), atol=0.03
    )


def test_gradients_are_those_of_the_losses(data, phi, geo, model):
    loss = AIDLoss(phi, geo, "calibrated", alpha=0.3)
    found = gradient_balance(model, loss, data.train, n=96, bs=32)
    assert found == gradient_balance(model, loss, data.train, n=96, bs=32) and found.alpha == 0.3
    draw = generator(0, "gradients")
    i = class_draw(data.train, 96, draw)
    b = noisy_batch(
        model.objective,
        torch.from_numpy(data.train.images[i.numpy()]),
        torch.from_numpy(data.train.labels)[i],
        10,
        draw,
        0.1,
    )
    net = copy.deepcopy(model.unet).requires_grad_(True)
    values = diffusion_loss(NoiseModel(net, model.objective, 10), b, [loss])
    own = [
        torch.cat(
            [
                v.flatten()
                for v in torch.autograd.grad(v, list(net.parameters()), retain_graph=True, materialize_grads=True)
            ]
        )
        for v in values
    ]
    assert found.ratio == pytest.approx((own[1].norm() / own[0].norm()).item(), rel=1e-3)
    assert found.cosine == pytest.approx(torch.cosine_similarity(*own, dim=0).item(), abs=1e-3)
    assert len(found.ratios) == len(found.cosines) == 10 and all(abs(c) <= 1 + 1e-6 for c in found.cosines)
    assert not any(p.grad is not None for p in model.unet.parameters())


def test_weight_is_lowered_where_the_gradient_is_too_long():
    b = Balance(0.1, 6.5, -0.3, (), ())
    assert balanced_alpha(b) == pytest.approx(0.1 * 0.5 / 6.5) and balanced_alpha(replace(b, ratio=0.2)) == 0.1


def test_per_time_needs_a_calibration(phi, geo):
    with pytest.raises(UsageError, match="calibrate"):
        AIDLoss(phi, geo, "per-time")


def test_calibration_refuses(data, phi, geo, model):
    with pytest.raises(UsageError, match="'other' for the diffusion model"):
        calibrate(replace(model, class_names=("other", *data.class_names[1:])), phi, geo, data.train)
    nothing = replace(geo, diameters=torch.full((10,), math.nan))
    with pytest.raises(LtnbError, match="cannot calibrate"):
        calibrate(model, phi, nothing, data.train, n=8, sample_steps=1)


# scores in the manifest
def blend(data, strange=(0,)):
    "A maker without a network: real test images, and noise for every third item (for all of the `strange` classes)"
    tests, calls = [data.test.images[data.test.labels == c] for c in range(10)], []

    def make(part):
        calls.extend(map(tuple, part.tolist()))
        out = [
            np.random.default_rng([c, k]).integers(0, 256, (1, 8, 8), dtype=np.uint8)
            if k % 3 == 1 or c in strange
            else tests[c][k % 60] // (1 + k // 60)
            for c, k in part.tolist()
        ]
        return torch.from_numpy(np.stack(out))

    return make, calls


def test_scores_are_distances(tmp_path, data, phi, geo):
    make, _ = blend(data)
    made = make_synthetic(tmp_path, make_plan([7] * 10), make, "m")
    scored = score_zones(tmp_path, phi, geo, class_names=data.class_names)
    want = geo.ratios(phi.encode(made.items), made.labels)
    assert np.abs(aid_ratios(scored) - want).max() < 1e-4 and all(
        r["scores"]["aid_by"] == geo.fingerprint for r in scored.manifest
    )
    kept = scored.where(lambda r: zone_of(r["scores"]["aid_ratio"]) != "ood")
    assert len(kept) == (want.round(4) <= 2).sum() and 0 < len(kept) < 70
    assert aid_ratios(scored.where(lambda r: r["scores"]["aid_ratio"] <= 0.5)).max() <= 0.5


def test_only_new_rows_are_scored(tmp_path, data, phi, geo, monkeypatch):
    make, _ = blend(data)
    make_synthetic(tmp_path, make_plan([4] * 10), make, "m")
    score_zones(tmp_path, phi, geo)
    before, seen = (tmp_path / "manifest.jsonl").read_bytes(), []
    original = Extractor.encode
    monkeypatch.setattr(
        Extractor, "encode", lambda self, images, *a, **k: seen.append(len(images)) or original(self, images, *a, **k)
    )
    score_zones(tmp_path, phi, geo)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before and seen == []
    flag_copies(tmp_path, data.train)
    make_synthetic(tmp_path, make_plan([4] * 9 + [9]), make, "m")
    with pytest.raises(UsageError, match="00009-000004.*score_zones"):
        aid_ratios(Synthetic.open(tmp_path))
    grown = score_zones(tmp_path, phi, geo)
    assert seen == [5] and len(aid_ratios(grown)) == 45 and "pixel_distance" in grown.manifest[0]["scores"]


def test_scores_of_another_phi_are_refused(tmp_path, data, phi, geo):
    make, _ = blend(data)
    make_synthetic(tmp_path, make_plan([2] * 10), make, "m")
    before = score_zones(tmp_path, phi, geo)
    other = Extractor(classifier(data, seed=1))
    theirs = class_geometry(other, data.train)
    for call in (
        lambda: score_zones(tmp_path, other, theirs),
        lambda: score_zones(tmp_path, phi, class_geometry(phi, data.train, shrink=5)),
        lambda: draw_filtered(tmp_path, [2] * 10, make, "m", other, theirs),
    ):
        with pytest.raises(UsageError, match="scored with another phi_0.*again=True"):
            call()
    with pytest.raises(UsageError, match="class_geometry anew"):
        score_zones(tmp_path, other, geo)
    with pytest.raises(UsageError, match="class_geometry anew"):
        AIDLoss(other, geo)
    again = score_zones(tmp_path, other, theirs, again=True)
    assert {r["scores"]["aid_by"] for r in again.manifest} == {theirs.fingerprint} and (
        aid_ratios(again) != aid_ratios(before)
    ).any()


def test_other_data_is_refused(tmp_path, data, phi, geo):
    make, _ = blend(data)
    make_synthetic(tmp_path / "a", make_plan([1] * 10), make, "m")
    make_synthetic(
        tmp_path / "b",
        make_plan([1] * 10),
        lambda part: torch.randint(0, 256, (len(part), 3, 8, 8), dtype=torch.uint8),
        "m",
    )
    make_synthetic(tmp_path / "c", make_plan([1] * 10), lambda part: torch.zeros(len(part), 4), "m")
    make_synthetic(
        tmp_path / "d",
        make_plan([0] * 10 + [1]),
        lambda part: torch.randint(0, 256, (len(part), 1, 8, 8), dtype=torch.uint8),
        "m",
    )
    for folder, names, text in (
        ("a", data.class_names[:9], "10 classes.*9"),
        ("a", data.class_names[::-1], "class 0 is"),
        ("b", None, r"\(1, 8, 8\).*\(3, 8, 8\)"),
        ("c", None, "float32"),
        ("d", None, "0 to 9"),
    ):
        with pytest.raises(UsageError, match=text):
            score_zones(tmp_path / folder, phi, geo, class_names=names)
    with pytest.raises(UsageError, match="class 0 is"):
        class_geometry(phi, ImageSet(data.train.images, data.train.labels, data.class_names[::-1]))


def test_a_changed_manifest_is_not_overwritten(tmp_path, data):
    make, _ = blend(data)
    make_synthetic(tmp_path, make_plan([1] * 10), make, "m")

    def score(made):
        make_synthetic(tmp_path, make_plan([2] * 10), make, "m")
        return ({} for _ in range(len(made)))

    with pytest.raises(LtnbError, match="written anew"):
        add_scores(tmp_path, score)
    with pytest.raises(ValueError):
        add_scores(tmp_path, lambda made: [{}])
    assert len(Synthetic.open(tmp_path)) == 20 and not list(tmp_path.glob(".*"))


# the filter
def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


WANTED = [12, 0, 9, 5, 5, 5, 30, 5, 5, 70]


def test_every_class_gets_what_it_wants_or_its_cap(tmp_path, data, phi):
    geo = class_geometry(phi, data.train, shrink=20)
    far = 4
    geo = replace(geo, diameters=torch.where(torch.arange(10) == far, geo.diameters / 20, geo.diameters))
    make, calls = blend(data, strange=(far,))
    f = draw_filtered(tmp_path, WANTED, make, "m", phi, geo, cap=3)
    assert len(calls) == len(set(calls)) == len(f.made), "nothing is made twice"
    ratio, y = aid_ratios(f.made), f.made.labels
    for d in f.classes:
        c, k = d["class"], np.array([r["k"] for r in f.made.manifest])
        own = ratio[y == c]
        good = np.flatnonzero(own <= 2)[: WANTED[c]]
        assert d["wanted"] == WANTED[c] and d["kept"] == len(good) and d["capped"] == (len(good) < WANTED[c])
        assert d["drawn"] == (3 * WANTED[c] if d["capped"] else good[-1] + 1) <= len(own) <= 3 * WANTED[c]
        assert k[f.at][y[f.at] == c].tolist() == good.tolist(), "the first ones that pass"
        assert d["id"] == pytest.approx((own[: d["drawn"]] <= 1).mean()) and d["id"] + d["aid"] + d[
            "ood"
        ] == pytest.approx(1)
    strange = next(d for d in f.classes if d["class"] == far)
    assert strange["capped"] and strange["drawn"] == 15 and strange["kept"] < 5
    assert [d["class"] for d in f.classes] == [0, 2, 3, 4, 5, 6, 7, 8, 9] and sum(
        not d["capped"] for d in f.classes
    ) >= 5
    assert (
        len(f.kept) == sum(d["kept"] for d in f.classes)
        and (np.diff(f.at) > 0).all()
        and len(f.table(data.class_names, data.counts)) == 10
    )


def test_an_all_ood_class_is_reported_and_the_rest_goes_on(tmp_path, data, phi, geo):
    make, _ = blend(data, strange=())
    far = replace(geo, diameters=torch.where(torch.arange(10) == 2, 1e-6, geo.diameters * 100))
    f = draw_filtered(tmp_path, [4] * 10, make, "m", phi, far, cap=2.5)
    bad = f.classes[2]
    assert (bad["drawn"], bad["kept"], bad["ood"], bad["capped"]) == (10, 0, 1.0, True)
    assert (
        all(d["kept"] == d["drawn"] == 4 and not d["capped"] for d in f.classes if d["class"] != 2)
        and f.kept.counts(10).tolist() == [4, 4, 0] + [4] * 7
    )


def test_done_again_it_does_nothing(tmp_path, data, phi, geo):
    make, calls = blend(data)
    f = draw_filtered(tmp_path, [6] * 10, make, "m", phi, geo)
    before, n = files(tmp_path), len(calls)
    again = draw_filtered(tmp_path, [6] * 10, make, "m", phi, geo)
    assert (
        files(tmp_path) == before
        and len(calls) == n
        and f.classes == again.classes
        and f.at.tolist() == again.at.tolist()
    )


class Stop(Exception):
    "A stand-in for a power cut"


def test_killed_anywhere_and_resumed_it_gives_the_same_files(tmp_path, data, phi, geo, monkeypatch):
    "Cut at every moment: before a shard is made, after a plan is, before and after scoring"

    def drawn(folder, make):
        return draw_filtered(folder, [6] * 10, make, "m", phi, geo, shard_size=32, cap=4)

    whole, at, moments = drawn(tmp_path / "whole", blend(data)[0]), 0, []

    def tick(name):
        moments.append(name)
        if len(moments) == at:
            raise Stop

    def watched(f, name):
        def call(*args, **more):
            tick(f"before {name}")
            out = f(*args, **more)
            tick(f"after {name}")
            return out

        return call

    while at <= len(moments):
        at, folder, (make, made) = at + 1, tmp_path / f"cut-{at}", blend(data)
        moments.clear()
        with monkeypatch.context() as m:
            for f in (make_synthetic, add_scores):
                m.setattr(draw, f.__name__, watched(f, f.__name__))
            try:
                drawn(folder, watched(make, "make"))
            except Stop:
                pass
        again = drawn(folder, make)
        assert files(folder) == files(tmp_path / "whole"), moments[-1]
        assert again.classes == whole.classes and again.at.tolist() == whole.at.tolist()
        assert len(made) - len(set(made)) <= (32 if moments[-1] == "after make" else 0), (
            "no more than the shard that was cut is made twice"
        )
    assert len(moments) > 12 and moments.count("before add_scores") >= 2, "every kind of moment was cut at"


def test_what_is_kept_does_not_depend_on_the_rounds(tmp_path, data, phi, geo, monkeypatch):
    make, _ = blend(data)
    a = draw_filtered(tmp_path / "a", [6] * 10, make, "m", phi, geo)
    make_synthetic(tmp_path / "b", make_plan([30] * 10), make, "m")
    b = draw_filtered(tmp_path / "b", [6] * 10, make, "m", phi, geo)
    assert a.classes == b.classes and [r["id"] for r in a.kept.manifest] == [r["id"] for r in b.kept.manifest]
    more = draw_filtered(tmp_path / "a", [9] * 10, make, "m", phi, geo)
    assert {r["id"] for r in a.kept.manifest} <= {r["id"] for r in more.kept.manifest}


def test_bad_items_are_drawn_but_not_kept(tmp_path, data, phi, geo):
    make, _ = blend(data, strange=())

    def faulty(part):
        x = make(part)
        x[torch.from_numpy(part[:, 1] % 4 == 3)] = 0  # of one grey value
        return x

    wide = replace(geo, diameters=geo.diameters * 100)
    f = draw_filtered(tmp_path, [4, 8] + [0] * 8, faulty, "m", phi, wide, cap=2)
    assert [(d["drawn"], d["kept"], d["bad"], d["capped"]) for d in f.classes] == [(5, 4, 1, False), (10, 8, 2, False)]
    f = draw_filtered(tmp_path / "b", [4, 8] + [0] * 8, faulty, "m", phi, wide, cap=1)
    assert [(d["drawn"], d["kept"], d["bad"], d["capped"]) for d in f.classes] == [(4, 3, 1, True), (8, 6, 2, True)]


def test_another_model_remakes_or_refuses(tmp_path, data, phi, geo):
    make, calls = blend(data)
    draw_filtered(tmp_path, [3] * 10, make, "m", phi, geo)
    assert (
        len(made_rows(tmp_path, "m"))
        and not made_rows(tmp_path, "n")
        and not made_rows(tmp_path, "m", seed=1)
        and not made_rows(tmp_path / "none", "m")
    )
    with pytest.raises(UsageError, match="'m' there, 'n' here"):
        draw_filtered(tmp_path, [3] * 10, make, "n", phi, geo, other="refuse")
    n = len(calls)
    f = draw_filtered(tmp_path, [3] * 10, make, "n", phi, geo)
    assert {r["model"] for r in f.made.manifest} == {"n"} and len(calls) > n


def test_needed():
    yes, no = np.ones(50, bool), np.zeros(50, bool)
    assert draws_needed(10, yes[:0], 50) == 10 == draws_needed(10, yes[:10], 50) == draws_needed(10, yes, 50)
    assert draws_needed(10, no[:10], 50) == 20 and draws_needed(10, no, 50) == 50 == draws_needed(10, no[:40], 50)
    assert draws_needed(0, yes, 0) == 0 and draws_needed(10, np.arange(10) < 9, 50) == 10 + 2 + 2
    for seed in range(20):
        passed, seen, m = np.random.default_rng(seed).random(100) < 0.4, [], 0
        while (m := draws_needed(20, passed[:m], 100)) not in seen:
            seen.append(m)
        assert passed[:m].sum() >= 20 or m == 100
        assert all(draws_needed(20, passed[:n], 100) in seen for n in range(101)), "resumed anywhere, the same plans"


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(keep=("id", "aids")), "Did you mean 'aid'"),
        (dict(keep=()), "keep"),
        (dict(keep="idd"), "Did you mean 'id'"),
        (dict(cap=0.5), "cap"),
        (dict(wanted=[3] * 9), "9 classes"),
        (dict(wanted=[-1] + [3] * 9), "negative"),
        (dict(class_names="abcdefghij"), "class 0 is"),
    ],
)
def test_wrong_settings_of_the_filter(tmp_path, data, phi, geo, change, text):
    change = {"wanted": [3] * 10, **change}
    with pytest.raises(UsageError, match=text):
        draw_filtered(tmp_path / "f", change.pop("wanted"), blend(data)[0], "m", phi, geo, **change)
    assert not (tmp_path / "f").exists()


def test_nothing_wanted(tmp_path, data, phi, geo):
    f = draw_filtered(tmp_path, [0] * 10, blend(data)[0], "m", phi, geo)
    assert len(f.kept) == len(f.made) == 0 and f.classes == [] and len(f.table(data.class_names)) == 1


WORKER = """
import sys; sys.path.insert(0, "tests")
import numpy as np, torch; from test_aid import blend, classifier
from ltnb.aid import Extractor, class_geometry, draw_filtered
from ltnb.progress import Progress; from ltnb.data import LongTail; from ltnb.team import join_team
Progress.quiet = True; data = LongTail.digits()
with join_team("cpu") as team:
    phi = Extractor(classifier(data)); geo = class_geometry(phi, data.train)
    f = draw_filtered(sys.argv[1], [6] * 10, blend(data)[0], "m", phi, geo, shard_size=16, team=team)
    np.save(f"{sys.argv[1]}-{team.rank}.npy", f.at)
"""


@pytest.mark.slow_process
def test_two_processes_draw_the_same(tmp_path, data):
    both = pair(tmp_path / "two", program=WORKER, cwd=ROOT)
    assert [p.returncode for p in both] == [0, 0], "".join(p.stderr[-2000:] for p in both)
    phi = Extractor(classifier(data))
    f = draw_filtered(
        tmp_path / "one", [6] * 10, blend(data)[0], "m", phi, class_geometry(phi, data.train), shard_size=16
    )
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert all(np.load(f"{tmp_path / 'two'}-{r}.npy").tolist() == f.at.tolist() for r in range(2))


def test_a_filter_refuses_what_phi_does_not_see(tmp_path, data, phi, geo):
    "Images of another shape, and features"
    shapes = {"a": ((3, 8, 8), r"\(1, 8, 8\).*\(3, 8, 8\)"), "b": ((4,), "float32")}
    for name, (shape, text) in shapes.items():
        noise = np.random.default_rng(0).integers(0, 256, (20, *shape))
        made = torch.from_numpy(noise).to(torch.uint8 if len(shape) == 3 else torch.float32)
        with pytest.raises(UsageError, match=text):
            draw_filtered(tmp_path / name, [2] * 10, lambda part, made=made: made[: len(part)], "m", phi, geo)
