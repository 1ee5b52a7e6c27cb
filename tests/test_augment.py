"Augmentation: every op against torchvision's, the draws against their probabilities, and what a batch may expect"

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as V2
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb import augment
from ltnb.augment import (
    CIFAR10_POLICY,
    OPS,
    Augment,
    AutoAugment,
    RandAugment,
    apply_ops,
    beta_draw,
    crop,
    cutmix,
    cutout,
    flip,
    mixup,
    op_levels,
    warp,
)
from ltnb.core import UsageError, generator
from scipy.stats import beta as BetaLaw
from torchvision.transforms import AutoAugment as TVAutoAugment
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import RandAugment as TVRandAugment
from torchvision.transforms.autoaugment import _apply_op

GEOMETRIC = OPS[1:6]
EVERY = [
    "none",
    "crop",
    "flip",
    "cutout",
    "autoaugment",
    "randaugment",
    "crop+flip",
    "crop+flip+autoaugment+cutout",
    "crop+flip+randaugment",
]


def images(g, b, c, h, w):
    "Noise, dim noise, smooth ramps, and images with a flat channel"
    x = torch.randint(256, (b, c, h, w), generator=g)
    ramp = (torch.arange(h)[:, None] * 5 + torch.arange(w) * 3).expand(b, c, h, w) % 256
    kind = torch.randint(4, (b, 1, 1, 1), generator=g)
    flat = torch.where(torch.arange(c)[:, None, None] == 0, x[:, :, :1, :1], x)
    return torch.where(kind == 0, x, torch.where(kind == 1, x // 8 + 90, torch.where(kind == 2, ramp, flat))).to(
        torch.uint8
    )


def theirs(x, name, level, fill=0):
    "torchvision, one image at a time"
    fill = [float(fill)] * x.shape[1] if fill else None
    return torch.stack(
        [_apply_op(i, name, m, InterpolationMode.NEAREST, fill) for i, m in zip(x, level.tolist(), strict=True)]
    )


def ours(x, name, level, fill=0):
    return apply_ops(x, torch.full((len(x), 1), OPS.index(name)), level[:, None], fill)


def unsure(name, level, h, w):
    "Pixels whose source lies within 1e-4 of the border between two: the processor's order of float32 sums decides"
    y, x, m = (
        torch.arange(h).double()[:, None] - (h - 1) / 2,
        torch.arange(w).double() - (w - 1) / 2,
        level.double()[:, None, None],
    )
    c, s = m.deg2rad().cos(), m.deg2rad().sin()
    at = {
        "ShearX": (x + m * (y + h / 2), y + 0 * m),
        "ShearY": (x + 0 * m, y + m * (x + w / 2)),
        "Rotate": (c * x - s * y, s * x + c * y),
    }.get(name)

    def near(v, n):
        return ((v + (n - 1) / 2 - 0.5) % 1 - 0.5).abs() > 0.5 - 1e-4

    return (near(at[0], w) | near(at[1], h))[:, None] if at else torch.zeros(len(level), 1, h, w, dtype=torch.bool)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    h=st.integers(8, 64),
    w=st.integers(8, 64),
    c=st.sampled_from([1, 3]),
    n_bins=st.sampled_from([10, 31, 0]),
    fill=st.sampled_from([0, 128]),
)
def test_op_is_torchvisions(name, seed, h, w, c, n_bins, fill):
    "Levels of both tables, and any level between them"
    g = torch.Generator().manual_seed(seed)
    x, (known, signed) = images(g, 6, c, h, w), op_levels(n_bins or 10, h, w)[name]
    level = known.double().expand(n_bins or 10)[torch.randint(n_bins or 10, (6,), generator=g)]
    if not n_bins and name != "Posterize":
        level = torch.rand(6, generator=g).double() * known.double().max()
    if signed:
        level = level * (torch.randint(2, (6,), generator=g) * 2 - 1)
    mine = ours(x, name, level, fill)
    far = (mine.int() - theirs(x, name, level, fill).int()).abs() > (0 if name in GEOMETRIC else 1)
    assert mine.dtype == torch.uint8 and not (far & ~unsure(name, level, h, w)).any()


@pytest.mark.parametrize("slope", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
def test_ties_round_as_torchvisions(name, slope):
    "With whole slopes and sizes that are powers of two, every sum is exact and every source lies between two pixels"
    for n in (8, 16, 32, 64):
        x = torch.randint(256, (4, 3, n, n), generator=generator("ties", n), dtype=torch.uint8)
        level = torch.full((4,), slope)
        assert unsure(name, level, n, n).all() and torch.equal(ours(x, name, level), theirs(x, name, level))


def test_tables_are_torchvisions():
    tv = TVAutoAugment(AutoAugmentPolicy.CIFAR10)
    assert list(CIFAR10_POLICY) == tv._get_policies(AutoAugmentPolicy.CIFAR10)
    for n_bins, h, w in [(10, 32, 32), (31, 32, 32), (31, 17, 48), (7, 64, 8)]:
        mine, rand, auto = (
            op_levels(n_bins, h, w),
            TVRandAugment()._augmentation_space(n_bins, (h, w)),
            tv._augmentation_space(n_bins, (h, w)),
        )
        assert set(mine) == set(OPS) == set(rand) | set(auto) and list(rand) == list(OPS[:14])
        for space in (rand, auto):
            assert all(torch.equal(mine[k][0], v) and mine[k][1] == signed for k, (v, signed) in space.items())


@pytest.mark.parametrize(
    "policy",
    [AutoAugment(), RandAugment(), AutoAugment(fill=128), RandAugment(n=3, magnitude=20)],
    ids=["auto", "rand", "auto-128", "rand-3"],
)
@pytest.mark.parametrize("c", [1, 3])
def test_policy_is_torchvisions_given_the_draws(policy, c):
    x = images(generator("end"), 300, c, 32, 32)
    ops, level = policy.draw(x, generator("draws", c))
    want = []
    for image, names, magnitudes in zip(x, ops.tolist(), level.tolist(), strict=True):
        for k, m in zip(names, magnitudes, strict=True):
            image = _apply_op(
                image, OPS[k], m, InterpolationMode.NEAREST, [float(policy.fill)] * c if policy.fill else None
            )
        want.append(image)
    got = policy(x, generator("draws", c))
    assert (got.int() - torch.stack(want).int()).abs().max() <= 1
    assert len(set(ops.flatten().tolist())) >= 13 and (got != x).flatten(1).any(1).float().mean() > 0.5


def within(count, n, p, sigmas=5):  # a Python or tensor number, draws, probability
    "Is a count what n draws of probability p give?"
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p)) + 1e-9


def test_autoaugment_draws_by_its_table():
    n, x = 50_000, torch.zeros(50_000, 1, 32, 32, dtype=torch.uint8)
    ops, level = AutoAugment().draw(x, generator("auto"))
    known = op_levels(10, 32, 32)
    for slot in (0, 1):
        for k, name in enumerate(OPS[1:], 1):
            mine, chance = ops[:, slot] == k, sum(p[slot][1] for p in CIFAR10_POLICY if p[slot][0] == name) / 25
            assert within(mine.sum(), n, chance), (slot, name)
            values = {
                float(known[name][0][p[slot][2]]) if p[slot][2] is not None else 0.0
                for p in CIFAR10_POLICY
                if p[slot][0] == name and p[slot][1] > 0
            }
            assert set(level[mine, slot].abs().tolist()) == values
            if known[name][1] and 0.0 not in values and chance:
                assert within((level[mine, slot] < 0).sum(), int(mine.sum()), 0.5), name
            if not known[name][1]:
                assert (level[mine, slot] >= 0).all()

    def both(a, b):
        return (ops == torch.tensor([OPS.index(a), OPS.index(b)])).all(1)

    assert (
        within(both("Rotate", "TranslateX").sum(), n, 0.7 * 0.3 / 25)
        and within(both("ShearY", "TranslateY").sum(), n, 0.5 * 0.7 / 25)
        and not both("Rotate", "Equalize").any()
    )
    signs = level[both("ShearY", "TranslateY")].sign().prod(1)
    assert within((signs > 0).sum(), len(signs), 0.5), "the two signs of a pair do not depend on each other"
    assert within((ops == 0).all(1).sum(), n, sum((1 - a[1]) * (1 - b[1]) for a, b in CIFAR10_POLICY) / 25)


def test_randaugment_draws_each_op_alike():
    n, x = 40_000, torch.zeros(40_000, 1, 24, 48, dtype=torch.uint8)
    ops, level = RandAugment(n=3, magnitude=12).draw(x, generator("rand"))
    assert ops.shape == level.shape == (n, 3)
    for k, name in enumerate(OPS):
        value, signed = op_levels(31, 24, 48)[name]
        value = float(value[12]) if value.ndim else 0.0
        for slot in range(3):
            mine = level[ops[:, slot] == k, slot]
            assert within(len(mine), n, 0 if name == "Invert" else 1 / 14) and (mine.abs() == value).all()
            if signed:
                assert within((mine < 0).sum(), len(mine), 0.5)
            else:
                assert (mine >= 0).all()
    assert within((ops[:, 0] == ops[:, 1]).sum(), n, 1 / 14)


def test_crop_and_flip_are_windows_of_the_padded_image():
    "One image at a time, with the numbers drawn in the same order: row, column, mirror"
    x = images(generator("crop"), 64, 3, 12, 20)
    for pad in (0, 2, 4):
        g, h = generator("same", pad), generator("same", pad)
        top, left, mirrored = (torch.randint(n, (64,), generator=h).tolist() for n in (2 * pad + 1, 2 * pad + 1, 2))
        padded = F.pad(x, (pad, pad, pad, pad))
        want = torch.stack(
            [padded[i, :, t : t + 12, l : l + 20] for i, (t, l) in enumerate(zip(top, left, strict=True))]
        )
        assert (
            torch.equal(
                flip(crop(x, g, pad), g),
                torch.stack([v.flip(2) if m else v for v, m in zip(want, mirrored, strict=True)]),
            )
            and len(set(mirrored)) == 2
        )
    board = torch.arange(240, dtype=torch.uint8).view(
        1, 1, 12, 20
    )  # every pixel is its own value, so the one in the middle tells where the window was
    views = crop(board.expand(5000, -1, -1, -1), generator("windows"), 3)
    windows = F.pad(board, (3, 3, 3, 3))[0].unfold(1, 12, 1).unfold(2, 20, 1)
    top, left = views[:, 0, 6, 10].long() // 20 - 3, views[:, 0, 6, 10].long() % 20 - 7
    assert torch.equal(views[:, 0], windows[0, top, left]) and all(
        within(((top == i) & (left == j)).sum(), 5000, 1 / 49) for i in range(7) for j in range(7)
    )
    assert within(
        (flip(x[:1].expand(5000, -1, -1, -1), generator("mirror")) == x[:1]).flatten(1).all(1).sum(), 5000, 0.5
    )


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_cutout_is_a_clipped_square_anywhere(size):
    n, h, w = 6000, 9, 12
    x = torch.full((n, 2, h, w), 200, dtype=torch.uint8)
    hole = cutout(x, generator("hole", size), size) == 0
    assert torch.equal(hole[:, 0], hole[:, 1]) and hole[:, 0].flatten(1).any(1).all()
    rows, columns = hole[:, 0].any(2), hole[:, 0].any(1)
    assert torch.equal(hole[:, 0], rows[:, :, None] & columns[:, None]), "the hole is a rectangle"

    def span(centre, n):
        return set(range(max(0, centre - size // 2), min(n, centre - size // 2 + size)))

    for lines, m in ((rows, h), (columns, w)):
        seen = [frozenset(np.flatnonzero(r)) for r in lines.numpy()]
        spans = [frozenset(span(c, m)) for c in range(m)]
        assert all(within(seen.count(s), n, spans.count(s) / m) for s in set(spans)) and set(seen) == set(spans)


def test_cutout_fills_each_channel_with_its_own_value():
    x = images(generator("fill"), 50, 3, 16, 16)
    y = cutout(x, generator("fill"), 8, (7, 8, 9))
    hole = cutout(torch.full_like(x, 1), generator("fill"), 8) == 0
    assert (
        torch.equal(y, torch.where(hole, torch.tensor([7, 8, 9], dtype=torch.uint8)[:, None, None], x))
        and y.dtype == torch.uint8
    )
    with pytest.raises(UsageError, match="2 values for images of 3 channels"):
        cutout(x, generator("fill"), 8, (1, 2))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_mixes_images_as_labels(lam):
    x, y = images(generator("mix"), 40, 3, 8, 8), torch.arange(40)
    mixed, a, b, share = mixup(x, y, generator("mix"), lam)
    assert (
        mixed.dtype == torch.float32
        and torch.equal(a, y)
        and sorted(b.tolist()) == y.tolist()
        and not torch.equal(a, b)
        and share == lam
    )
    assert torch.equal(b, torch.randperm(40, generator=generator("mix")))
    torch.testing.assert_close(mixed, lam * x[a].float() + (1 - lam) * x[b].float())
    torch.testing.assert_close(mixup(x.float(), y, generator("mix"), lam)[0], mixed)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixes_of_normalised_images(mix):
    "Negative values, other float formats, one image, no image; the input stays as it is"
    x, y = torch.randn(16, 3, 12, 10, generator=generator("float")), torch.arange(16)
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        z = x.to(kind)
        mixed, a, b, lam = mix(z, y, generator("mix"), 0.4)
        assert mixed.dtype == kind and torch.equal(z, x.to(kind)) and (mixed != z).any() and 0 < lam < 1
    for n in (0, 1):
        mixed, a, b, _ = mix(x[:n], y[:n], generator("mix"), 0.4)
        assert mixed.shape == (n, 3, 12, 10) and b.tolist() == list(range(n))
        torch.testing.assert_close(mixed, x[:n])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_is_beta(alpha):
    lam = np.array([beta_draw(alpha, seed) for seed in range(4000)])
    var = 1 / (4 * (2 * alpha + 1))
    assert (
        abs(lam.mean() - 0.5) < 5 * math.sqrt(var / 4000)
        and abs(lam.var() / var - 1) < 0.12
        and beta_draw(alpha, 7) == lam[7]
        and len(set(lam)) > 3990
    )
    assert within(
        (abs(lam - 0.5) < 0.25).sum(), 4000, BetaLaw(alpha, alpha).cdf(0.75) - BetaLaw(alpha, alpha).cdf(0.25), 6
    )


def test_lambda_touches_no_state():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert (
        isinstance(beta_draw(0.5, 0), float)
        and torch.equal(torch_state, torch.get_rng_state())
        and (numpy_state == np.random.get_state()[1]).all()
    )


def test_cutmix_counts_what_it_pasted():
    g, y, kept = generator("cut"), torch.arange(20), []
    x, asked = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 12, 18), torch.linspace(0, 1, 200)
    for want in asked.tolist():
        mixed, a, b, lam = cutmix(x, y, g, want)
        pasted = (mixed == b[:, None, None, None]) & (a != b)[:, None, None, None]
        assert (
            mixed.dtype == torch.uint8
            and torch.equal(mixed, torch.where(pasted, b[:, None, None, None], x))
            and torch.equal(a, y)
            and lam.ndim == 0
        )
        for box in pasted[a != b][:, 0]:
            assert torch.equal(box, box.any(1)[:, None] & box.any(0)) and abs(1 - box.float().mean() - lam) < 1e-6
        kept.append(lam)
    kept = torch.stack(kept)
    assert (kept >= asked - 1e-6).all() and (kept > asked + 0.1).any() and (kept - asked).abs().median() < 0.2, (
        "a box is as large as lambda asks, or clipped"
    )
    assert kept.min() < 0.3 and kept[-1] == 1


def test_cutmix_puts_the_box_anywhere():
    "Sides of sqrt(1 - lam), centred on any row and column alike"
    x, y = torch.arange(2.0)[:, None, None, None].expand(2, 1, 12, 16), torch.arange(2)
    seen = [
        (mixed[0, 0] > 0, lam)
        for mixed, _, b, lam in (cutmix(x, y, generator("box", i), 0.75) for i in range(6000))
        if b[0] == 1
    ]
    assert within(len(seen), 6000, 0.5)
    for axis, n in ((1, 12), (0, 16)):
        spans = [frozenset(range(max(0, c - n // 4), min(n, c + n // 4))) for c in range(n)]
        lines = [frozenset(np.flatnonzero(box.any(axis))) for box, _ in seen]
        assert set(lines) == set(spans) and all(
            within(lines.count(s), len(seen), spans.count(s) / n) for s in set(spans)
        )


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(UsageError, match="alpha must be above 0"):
        beta_draw(alpha, 0)


@pytest.mark.parametrize("mix", [mixup, cutmix])
@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lambda_is_a_share(mix, lam):
    with pytest.raises(UsageError, match="between 0 and 1"):
        mix(torch.zeros(2, 3, 4, 4), torch.zeros(2), generator("a"), lam)


@pytest.mark.parametrize("names", EVERY)
@pytest.mark.parametrize(
    "shape", [(0, 3, 16, 16), (1, 3, 32, 32), (7, 1, 8, 8), (5, 3, 12, 31), (64, 3, 32, 32)], ids=str
)
def test_a_view_is_a_function_of_batch_and_generator(names, shape):
    x = images(generator("view"), *shape)
    before, augment_ = x.clone(), Augment(names, pad=2, size=4)
    first, g = augment_(x, generator("view", 1)), generator("view", 1)
    assert (
        torch.equal(first, augment_(x, g))
        and torch.equal(x, before)
        and (first.shape, first.dtype, first.device) == (x.shape, x.dtype, x.device)
    )
    assert torch.equal(first, augment_(x.to(memory_format=torch.channels_last), generator("view", 1))), (
        "memory layout does not matter"
    )
    if shape[0] == 64:
        assert torch.equal(first, augment_(x, g)) == (names == "none") and torch.equal(first, x) == (names == "none")


def test_what_happens_to_an_image_does_not_depend_on_the_others():
    x = images(generator("alone"), 60, 3, 20, 20)
    ops, level = RandAugment().draw(x, generator("alone"))
    assert torch.equal(
        apply_ops(x, ops, level),
        torch.cat([apply_ops(x[i : i + 1], ops[i : i + 1], level[i : i + 1]) for i in range(60)]),
    )


@pytest.mark.parametrize("policy", [AutoAugment(128), RandAugment()], ids=["auto", "rand"])
def test_computing_all_images_changes_nothing(policy, monkeypatch):
    "As on an accelerator, which computes every op for every image and keeps those that drew it"
    x = images(generator("all"), 200, 3, 24, 32)
    want = policy(x, generator("all", 1))
    monkeypatch.setattr(augment, "_counts_are_free", lambda x: False)
    assert torch.equal(policy(x, generator("all", 1)), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_is_the_cpu_given_the_draws():
    x = images(generator("gpu"), 256, 3, 32, 32)
    for policy in (AutoAugment(), RandAugment()):
        ops, level = policy.draw(x, generator("gpu"))
        one = ops.clone()
        one[:, 1] = 0
        assert (
            apply_ops(x.cuda(), one.cuda(), level.cuda()).cpu().int() - apply_ops(x, one, level).int()
        ).abs().max() <= 1
    for names in EVERY:
        assert torch.equal(
            Augment(names)(x.cuda(), generator("gpu", device="cuda")),
            Augment(names)(x.cuda(), generator("gpu", device="cuda")),
        )


def test_the_order_is_fixed():
    x = images(generator("order"), 32, 3, 32, 32)
    made, g = Augment("cutout+autoaugment + flip+crop", size=10), generator("order", 1)
    assert made.names == "crop+flip+autoaugment+cutout" and repr(made) == "Augment('crop+flip+autoaugment+cutout')"
    want = cutout(AutoAugment()(flip(crop(x, g), g), g), g, 10)
    assert torch.equal(made(x, generator("order", 1)), want)
    g = generator("order", 2)
    assert torch.equal(
        Augment("randaugment+cutout", fill=(1, 2, 3))(x, generator("order", 2)),
        cutout(RandAugment()(x, g), g, 16, (1, 2, 3)),
    )
    assert Augment().names == Augment("none").names == "none" and Augment("none")(x, g) is x


@pytest.mark.parametrize(
    "names, words",
    [
        ("crop+flop", "Did you mean 'flip'"),
        ("autoagument", "you mean 'autoaugment'"),
        ("xyz", "Choose from: crop"),
        ("", "no augmentation ''"),
        ("crop+crop", "twice"),
        ("autoaugment+randaugment", "two policies"),
        ("none+crop", "stands alone"),
    ],
)
def test_wrong_names(names, words):
    with pytest.raises(UsageError, match=words):
        Augment(names)


@pytest.mark.parametrize(
    "wrong", [dict(n=-1), dict(magnitude=31), dict(magnitude=-1), dict(n_bins=1, magnitude=0)], ids=str
)
def test_wrong_magnitudes(wrong):
    with pytest.raises(UsageError, match="magnitude < n_bins"):
        RandAugment(**wrong)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 8, 8, dtype=torch.uint8)], ids=["float", "two-channels"]
)
def test_policies_take_bytes_of_one_or_three_channels(x):
    with pytest.raises(UsageError, match="uint8 images of 1 or 3 channels"):
        AutoAugment()(x, generator("x"))


def test_new_kernels_are_within_one_level():
    "torchvision.transforms.v2 sums in another order"
    x, level = images(generator("v2"), 40, 3, 32, 32), torch.linspace(-0.9, 0.9, 40).double()
    kernels = {
        "Brightness": V2.adjust_brightness,
        "Color": V2.adjust_saturation,
        "Contrast": V2.adjust_contrast,
        "Sharpness": V2.adjust_sharpness,
    }
    for name, f in kernels.items():
        assert (
            ours(x, name, level).int()
            - torch.stack([f(i, 1 + m) for i, m in zip(x, level.tolist(), strict=True)]).int()
        ).abs().max() <= 1
    assert (ours(x, "AutoContrast", level).int() - V2.autocontrast(x).int()).abs().max() <= 1 and torch.equal(
        ours(x, "Equalize", level), V2.equalize(x)
    )


def test_equalize_needs_255_pixels_below_the_brightest():
    small, large = images(generator("few"), 30, 1, 15, 17), (torch.arange(272) // 2).to(torch.uint8).view(1, 1, 17, 16)
    assert (
        torch.equal(ours(small, "Equalize", torch.zeros(30)), small)
        and ours(large, "Equalize", torch.zeros(1)).max() == 255
    )


def test_warp_moves_each_image_by_its_own_map():
    x = images(generator("warp"), 3, 3, 10, 14)
    theta = torch.tensor([[[1.0, 0, 2], [0, 1, 0]], [[1, 0, 0], [0, 1, -3]], [[-1, 0, 0], [0, 1, 0]]])
    y = warp(x, theta, 9)
    assert (
        torch.equal(y[0], F.pad(x[0], (0, 2), value=9)[:, :, 2:])
        and torch.equal(y[1], F.pad(x[1], (0, 0, 3, 0), value=9)[:, :10])
        and torch.equal(y[2], x[2].flip(2))
    )
