"""Every step, loss, sampler and head on a GPU that is not there: a tensor on the wrong device fails on a laptop.

FakeTensors have no values, so what looks at values (`.item()`, `nonzero`, `bincount`, a test for numbers that are not
finite, schedulers of diffusers) runs on `pretend_gpu`, which computes on the CPU, and must give what that gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretend import BACKWARD, fake_gpu, pretend_gpu

from ltnb import diffusion, ldmlr
from ltnb.aid import Extractor, check_extractor, class_geometry
from ltnb.aid_loss import FORMS, AIDLoss, AIDScale, calibrate, mean_strength
from ltnb.augment import AUGMENTATIONS, OPS, Augment, apply_ops, cutmix, mixup, op_levels
from ltnb.core import generator
from ltnb.data import ImageSet, LongTail
from ltnb.noise import OBJECTIVES, build_objective
from ltnb.diffusion import Denoising, DiffusionModel, build_unet, train_diffusion
from ltnb.samplers import SAMPLERS, Sampling, sample_images
from ltnb.cbdm import CB_LABELS, CBDM
from ltnb.heads import Features, Head, fit_head
from ltnb.decoupled import choose_tau, crt, lws, nearest_mean, tau_norm
from ltnb.latent import PULLS, Denoiser, Neighbourhood, ddim, denoising_loss, sample_features, train_latent
from ltnb.ldmlr import LDMLR, LDMLRConfig, planned, sampled
from ltnb.ldmlr_published import (
    PublishedUNet,
    cosine_alpha_bar,
    encode_as_coded,
    published_loss,
    sample_published,
    train_published,
)
from ltnb.losses import LOSSES, BalancedSoftmax, build_loss
from ltnb.models import HEADS, build_model
from ltnb.classifier import Classifier, encode
from ltnb.jobs import make_plan
from ltnb.recipe import Stage
from ltnb.copies import near_copies
from ltnb.batches import epoch_order, held_out
from ltnb.team import Where, train_step
from ltnb.training import fit, view
from ltnb.together import Stack, stack_step

COUNTS = np.array([12, 6, 4, 2])
LABELS = np.repeat(np.arange(4), COUNTS)
N, K = len(LABELS), len(COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 1, 8, 8), dtype=np.uint8)
FEATURES = torch.rand(N, 6, generator=torch.Generator().manual_seed(0))
DEVICES = pytest.mark.parametrize("gpu", [fake_gpu, pretend_gpu], ids=["fake", "pretend"])


def pairs(some, others):
    "Each of some and each of others, once at least"
    some, others = list(some), list(others)
    return [(s, others[0]) for s in some] + [(some[-1], o) for o in others[1:]]


def classifier(arch="convnet", head="linear", norm="batch", seed=0):
    "An untrained network for the images"
    return Classifier(build_model(arch, K, 1, seed, head=head, norm=norm), "abcd", (1, 8, 8), (0.5,), (0.3,), arch)


def unet_model(objective="v"):
    "An untrained diffusion model"
    unet = build_unet("tiny", 8, 1, K).eval()
    return DiffusionModel(unet, build_objective(objective), tuple("abcd"), (1, 8, 8), COUNTS)


def aid_loss(form, objective):
    "The loss of an untrained phi_0, with its constants"
    phi = Extractor(classifier())
    loss = AIDLoss(phi, class_geometry(phi, image_set()), form, scale=AIDScale(1.0, 0.8, 1.0, (0.5,) * 65))
    loss._mean[repr(objective)] = mean_strength(objective)  # a number, which FakeTensors have not
    return loss


def a_head():
    return Head(torch.randn(K, 6), torch.zeros(K), torch.from_numpy(COUNTS).double())


def image_set():
    return ImageSet(IMAGES, LABELS, tuple("abcd"))


class ToCPU(torch.autograd.Function):
    "A gradient on the wrong device"

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return ON_CPU


class Forgotten(BalancedSoftmax):
    "A constant that nobody moves"

    def adjust(self, logits, labels):
        return logits + self.shift.float()


ON_CPU = torch.zeros(2)


def gpu_ones(*shape, **more):
    return torch.ones(*shape, device="cuda:0", **more)


def wrong_gradient():
    x = gpu_ones(2, requires_grad=True)
    ToCPU.apply(x).sum().backward()
    return x.grad + x.detach()


def on_gpu(gpu, values, leaves=()):
    "Do all values, and the gradients of all leaves, lie on the GPU?"
    if gpu is pretend_gpu or BACKWARD:
        assert all(p.grad is not None for p in leaves)
    return {v.device.type for v in (*values, *(p.grad for p in leaves if p.grad is not None))} == {"cuda"}


MISMATCHES = {
    "values": lambda: gpu_ones(2) + torch.ones(2),
    "a generator": lambda: torch.rand(2, device="cuda:0", generator=torch.Generator("cpu")),
    "a shuffle": lambda: torch.randperm(4, generator=torch.Generator("cuda:0")),
    "an index": lambda: torch.ones(2)[gpu_ones(1, dtype=torch.long)],
    "a constant": lambda: build_loss_like(Forgotten)(gpu_ones(3, K), gpu_ones(3, dtype=torch.long)),
    "a loss": lambda: build_loss_like(LOSSES["class_balanced"])(gpu_ones(3, K), gpu_ones(3, dtype=torch.long)),
    "a network": lambda: classifier_like()(gpu_ones(2, 1, 8, 8)),
    "a gradient": wrong_gradient,
    "augmented images": lambda: Augment("crop")(gpu_ones(2, 1, 8, 8, dtype=torch.uint8), torch.Generator("cpu")),
}
MADE = {"loss": build_loss("class_balanced", COUNTS), "constant": Forgotten(COUNTS), "network": classifier().eval().net}


def build_loss_like(kind):
    return MADE["constant" if kind is Forgotten else "loss"]  # made where values can be read


def classifier_like():
    return MADE["network"]


@DEVICES
@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_caught(what, gpu, monkeypatch):
    if what == "a gradient" and gpu is fake_gpu and not BACKWARD:
        pytest.skip("a PyTorch built for CUDA asks the driver in every backward pass")
    with gpu(monkeypatch), pytest.raises(RuntimeError, match="device"):
        MISMATCHES[what]()


@DEVICES
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, gpu, monkeypatch):
    loss = build_loss(name, COUNTS)
    with gpu(monkeypatch):
        loss.to("cuda:0").set_epoch(9, 10)
        z, y = torch.randn(6, K, device="cuda:0", requires_grad=True), gpu_ones(6, dtype=torch.long)
        for weights in (None, torch.rand(6, device="cuda:0")):
            value = loss(z, y, weights)
            value.backward()
            assert on_gpu(gpu, [value, loss.prior], [z])


@DEVICES
@pytest.mark.parametrize("names", [*AUGMENTATIONS, "crop+flip+autoaugment+cutout"])
def test_augmentations(names, gpu, monkeypatch):
    with gpu(monkeypatch):
        x = Augment(names)(gpu_ones(5, 3, 8, 8, dtype=torch.uint8), torch.Generator("cuda:0"))
        assert on_gpu(gpu, [x]) and x.shape == (5, 3, 8, 8) and x.dtype == torch.uint8


@DEVICES
@pytest.mark.parametrize("op", OPS)
def test_ops(op, gpu, monkeypatch):
    level = float(op_levels(31, 8, 8)[op][0].flatten()[-1])
    with gpu(monkeypatch):
        at, level = gpu_ones(5, 1, dtype=torch.long) * OPS.index(op), gpu_ones(5, 1, dtype=torch.float64) * level
        assert on_gpu(gpu, [apply_ops(gpu_ones(5, 1, 8, 8, dtype=torch.uint8), at, level)])


@DEVICES
@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing(mix, gpu, monkeypatch):
    with gpu(monkeypatch):
        x, y = gpu_ones(5, 1, 8, 8, requires_grad=True), gpu_ones(5, dtype=torch.long)
        mixed, _, partner, lam = mix(x, y, torch.Generator("cuda:0"), 0.3)
        (mixed * lam).sum().backward()
        assert on_gpu(gpu, [mixed, partner], [x])


@DEVICES
@pytest.mark.parametrize("head", HEADS)
def test_a_step_of_fit(head, gpu, monkeypatch):
    how = {"linear": {"mixup": 0.5}, "cosine": {"cutmix": 1.0}}.get(head, {})
    clf = classifier("resnet8", head, "group" if head == "wcdas" else "batch")
    loss = build_loss("ldam_drw" if head == "cosine" else "cross_entropy", COUNTS)
    with gpu(monkeypatch):
        clf.to("cuda:0", memory_format=torch.channels_last).train()
        x, y, w = (torch.from_numpy(v).to("cuda:0") for v in (IMAGES, LABELS, np.ones(N, np.float32)))
        leaves = list(clf.net.parameters())
        optimizer = torch.optim.SGD(leaves, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        loss.to("cuda:0")
        for step in range(2):  # the second one has momentum
            shown = view(clf, x, (0, step), Augment("crop+flip+randaugment+cutout", size=4), **how)
            value = train_step(clf.net, optimizer, loss, shown, y, w, 1.0)
        assert on_gpu(gpu, [value, *leaves], leaves)


@DEVICES
def test_a_step_of_several_seeds(gpu, monkeypatch):
    norm = "batch" if gpu is fake_gpu else "group"  # stacked, BatchNorm makes tensors that cannot pretend
    clfs = [classifier(norm=norm, seed=s) for s in (0, 1)]
    losses, stack = [build_loss("cross_entropy", COUNTS) for _ in clfs], Stack([c.train().net for c in clfs])
    with gpu(monkeypatch):
        stack.to("cuda:0")
        x, y = torch.from_numpy(IMAGES).to("cuda:0"), torch.from_numpy(LABELS).to("cuda:0")
        views = [view(c, x, (s,), Augment("flip"), 0.5) for s, c in enumerate(clfs)]
        leaves = list(stack.parameters())
        optimizer = torch.optim.SGD(leaves, lr=0.1, momentum=0.9, nesterov=True)
        values = stack_step(stack, optimizer, [v.to("cuda:0") for v in losses], views, [y, y], "fp32")
        assert on_gpu(gpu, [values], leaves)


def diffusion_step(monkeypatch, gpu, objective, losses=()):
    "One step of `train_diffusion`: does it stay on the GPU?"
    net = build_unet("tiny", 8, 1, K)
    with gpu(monkeypatch):
        how = Denoising(diff_bs=6, diff_lr=1e-3, flip=True, nudge=0.5, label_drop=0.2, ema=0.999)
        t = diffusion._Training(net, objective, IMAGES, LABELS, K, how, Where("cuda:0"))
        values = t.step(0, losses)
        return on_gpu(gpu, [values], list(t.net.parameters()))


@DEVICES
@pytest.mark.parametrize("name, label", pairs(OBJECTIVES, CB_LABELS))
def test_a_step_of_diffusion_and_cbdm(name, label, gpu, monkeypatch):
    objective = build_objective(name, None, 0.0 if name == "edm" else 5.0)
    assert diffusion_step(monkeypatch, gpu, objective, [CBDM(COUNTS, label, share=0.5)])


@DEVICES
@pytest.mark.parametrize("name, form", pairs(OBJECTIVES, FORMS))
def test_a_step_with_the_aid_loss(name, form, gpu, monkeypatch):
    objective = build_objective(name)
    assert diffusion_step(monkeypatch, gpu, objective, [aid_loss(form, objective)])


@DEVICES
def test_steps_of_feature_diffusion(gpu, monkeypatch):
    net, old, alpha_bar = Denoiser(6, K, 16), PublishedUNet(6, K, 16), cosine_alpha_bar().float()
    with gpu(monkeypatch):
        x, y, g = FEATURES.to("cuda:0"), torch.from_numpy(LABELS).to("cuda:0"), torch.Generator("cuda:0")
        values = [
            denoising_loss(net.to("cuda:0"), x, y, g),
            published_loss(old.to("cuda:0"), x, y, alpha_bar.to("cuda:0"), g),
        ]
        for v in values:
            v.backward()
        assert on_gpu(gpu, values, [p for n in (net, old) for p in n.parameters()])
        for scale in (None, gpu_ones(N)):
            assert on_gpu(gpu, [ddim(net, x, net.code(y), scale, 3)])


def both(monkeypatch, compute):
    "What a function of a device gives on the pretended GPU and on the CPU"
    with pretend_gpu(monkeypatch):
        there = compute("cuda:0")
    return there, compute("cpu")


def weights(net):
    return torch.cat([v.detach().cpu().double().flatten() for v in net.state_dict().values()])


@pytest.mark.parametrize(
    "how",
    [
        dict(mixup=0.5, augment=Augment("crop+flip"), ema=0.9),
        dict(power=0.0, cutmix=1.0, clip=1.0),
        dict(loss="balanced_softmax", augment=Augment("autoaugment+cutout", size=4)),
        dict(loss="ldam_drw", head="cosine", weights=np.ones(N), held_out=(IMAGES, LABELS), patience=2),
    ],
    ids=str,
)
def test_fit(how, monkeypatch):
    how = {"loss": "cross_entropy", "head": "linear", **how}

    def train(device):
        loss = build_loss(how["loss"], COUNTS.astype(float) ** how.get("power", 1.0))
        more = {k: v for k, v in how.items() if k not in ("loss", "head")}
        clf = fit(
            classifier(head=how["head"]), IMAGES, LABELS, n_epochs=2, bs=8, lr=0.01, loss=loss, device=device, **more
        )
        return weights(clf.net), clf.logits(IMAGES, device=device), encode(clf, IMAGES, device=device)

    for a, b in zip(*both(monkeypatch, train), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_draws(monkeypatch):
    def draw(device):
        y = torch.from_numpy(LABELS).to(device)
        g = [generator("draws", i, device=device) for i in range(3)]
        return epoch_order(y, 1.0, g[0]), epoch_order(y, 0.5, g[1]), *held_out(y, g[2], 0.5)

    for a, b in zip(*both(monkeypatch, draw), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_diffusion(objective, monkeypatch):
    def train(device):
        o = build_objective(objective)
        return train_diffusion(
            IMAGES,
            LABELS,
            K,
            n_steps=2,
            diff_bs=6,
            objective=objective,
            power=0.5,
            flip=True,
            nudge=0.5,
            extra_losses=[aid_loss("calibrated", o), CBDM(COUNTS)],
            device=device,
        )

    a, b = both(monkeypatch, train)
    torch.testing.assert_close(weights(a.unet), weights(b.unet), rtol=0, atol=1e-3)  # Adam is fused there, and not here


@pytest.mark.parametrize("objective, sampler", pairs(OBJECTIVES, SAMPLERS))
def test_sampling_images(objective, sampler, monkeypatch):
    plan = make_plan([2, 1, 0, 1])

    def sample(device):
        return sample_images(unet_model(objective), plan, Sampling(sampler, 3, 2.0), device=device)[0]

    a, b = both(monkeypatch, sample)
    assert (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("pull", PULLS)
def test_sampling_features(pull, monkeypatch):
    model = train_latent(FEATURES, torch.from_numpy(LABELS), K, n_steps=2, diff_bs=8, width=16, n_blocks=1)
    base = a_head()
    around, plan = Neighbourhood.find(base, FEATURES, torch.from_numpy(LABELS), K, 4.0), make_plan([2, 1, 0, 3])
    a, b = both(monkeypatch, lambda device: sample_features(model.to(device), plan, around, pull=pull)[0])
    assert a.device.type == "cpu" and torch.equal(a, b), "the noise of an item is the same on every device"


def test_training_features(monkeypatch):
    y = torch.from_numpy(LABELS)

    def train(device):
        one = train_latent(FEATURES, y, K, n_steps=3, diff_bs=8, width=16, n_blocks=1, device=device)
        other = train_published(FEATURES, y, K, n_steps=3, diff_bs=8, dim=16, device=device)
        return weights(one.net), weights(other.net), sample_published(other, make_plan([1, 2, 0, 1]), 4, device)[0]

    for a, b in zip(*both(monkeypatch, train), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["corrected", "published"])
def test_the_recipe_samples_where_it_runs(variant, monkeypatch, tmp_path):
    y = torch.from_numpy(LABELS)
    f = Features(FEATURES, y, FEATURES, y, tuple("abcd"), a_head())
    given = LDMLRConfig(variant=variant, n_steps=2, sample_steps=3, diff_width=16, features="x.npz")
    cfg, seen = LDMLR().resolve(given, f), []
    model, plan = ldmlr.feature_generator(Stage(cfg, f, 0, Where()), f), planned(cfg, f)
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].device.type))

    def sample(device):
        stage = Stage(cfg, f, 0, Where(device, run=SimpleNamespace(path=tmp_path / device)))
        return sampled(stage, model, plan, f, f.head).items

    a, b = both(monkeypatch, sample)
    assert torch.equal(a, b) and set(seen[: len(seen) // 2]) == {"cuda"} and set(seen[len(seen) // 2 :]) == {"cpu"}


def test_heads(monkeypatch):
    y, w = torch.from_numpy(LABELS), torch.rand(N) + 0.1
    start = a_head()

    def refit(device):
        z, labels, base = FEATURES.to(device), y.to(device), Head(*(v.to(device) for v in vars(start).values()))
        heads = [
            fit_head(z, labels, COUNTS, w.to(device), start, steps=3),
            fit_head(z, labels, COUNTS, steps=3),
            crt(z, labels, K, n_epochs=0.5),
            lws(base, z, labels, n_epochs=0.5),
            tau_norm(base, 0.7),
            nearest_mean(z, labels),
            nearest_mean(z, labels, "cosine"),
        ]
        assert choose_tau(base, z, labels) >= 0
        return [h.logits(z).cpu() for h in heads] + [h.corrected(z).cpu() for h in heads]

    for a, b in zip(*both(monkeypatch, refit), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_looks_at_images(monkeypatch):
    data = LongTail(image_set(), image_set(), "toy")

    def look(device):
        clf, model = classifier(), unet_model()
        phi = Extractor(clf)
        shape = class_geometry(phi, data.train, device=device)
        found = calibrate(model, phi, shape, data.train, n=8, device=device, sample_steps=2)
        check = check_extractor(phi, data.train, strict=False, device=device)
        coded = encode_as_coded(clf, data, bs=8, device=device)
        d, index = near_copies(IMAGES[:5], IMAGES[5:], device=device)["pixel"]
        numbers = [found.made, found.shift, check.accuracy]
        return np.concatenate([shape.centres.flatten(), numbers, coded.flatten(), d, index])

    a, b = both(monkeypatch, look)
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
