"Networks, heads and classifiers: first weights, saving, files, and the published accuracies of the reference weights."

import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import cifar, shared
from ltnb.core import DataError, LtnbError, UsageError, save_tensors
from ltnb.files import ImageFiles, decode_image
from ltnb.data import longtail_counts
from ltnb.models import ARCHS, HEADS, CosineHead, LinearNet, WCDASHead, build_model, cosines, group_norm
from ltnb.classifier import Classifier, encode, load_classifier, luma, predict_files, write_predictions
from PIL import Image
from torch import nn

SMALL = ["convnet", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
PHOTO = {"resnet10": 512, "resnet50": 2048, "resnext50": 2048}


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def perturbed(net, seed=0):
    "Running statistics and weights as after some training, so that nothing passes by being 0 or 1"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in net.state_dict().values():
            if v.is_floating_point():
                v.mul_(1 + 0.1 * torch.rand(v.shape, generator=g)).add_(0.01 * torch.rand(v.shape, generator=g))
    return net


def classifier(arch="convnet", shape=(3, 8, 8), k=4, log_prior=(-0.1, -1.0, -2.0, -3.0), **more):
    return Classifier(
        perturbed(build_model(arch, k, shape[0], **more)),
        [f"c{i}" for i in range(k)],
        shape,
        [0.4] * shape[0],
        [0.2] * shape[0],
        arch,
        log_prior,
    ).eval()


# First weights


@pytest.mark.parametrize(
    "arch, ten, seven",
    [
        ("convnet", "fba145d6d417efd9", "a98e25e65f017fca"),
        ("resnet8", "d83643626271e78e", "f77dca1e87a82c6e"),
        ("resnet32", "ad1f9e0d58b5c2ba", "a788e8b0b26406a6"),
        ("resnet110", "191311bb636971b8", "313bd7bd61eb6302"),
    ],
)
def test_first_weights_stay(arch, ten, seven):
    "Hashes from before heads and norms were added (torch draws the same numbers on every CPU since 1.6)"
    for net, want in ((build_model(arch, 10), ten), (build_model(arch, 7, 1, 3), seven)):
        h = hashlib.sha256()
        for k, v in net.state_dict().items():
            h.update(k.encode())
            h.update(v.contiguous().numpy().tobytes())
        assert h.hexdigest()[:16] == want


@pytest.mark.parametrize("head", HEADS)
def test_seed_fixes_all_weights(head):
    a, b, c = (build_model("convnet", 5, seed=s, head=head).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["fc.weight"], c["fc.weight"])
    state = torch.random.get_rng_state()
    build_model("convnet", 5, head=head, norm="group")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("arch", [*SMALL, *PHOTO])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_network_has_features_and_head(arch, channels):
    net = (
        build_model(arch, 7, channels, head="cosine", norm="group").eval()
        if arch in ("convnet", "resnet8", "resnet10")
        else build_model(arch, 7, channels).eval().to("meta")
    )
    side = 32 if arch in PHOTO else 8
    x = torch.zeros(2, channels, side, side, device=next(net.parameters()).device)
    z = net.features(x)
    assert (
        z.shape == (2, net.n_features)
        and net.n_features == PHOTO.get(arch, 64)
        and net(x).shape == net.fc(z).shape == (2, 7)
    )


def test_sizes_against_the_literature():
    def count(arch, k):
        return sum(p.numel() for p in build_model(arch, k).parameters())

    assert count("resnet32", 10) == 464154
    assert [count(a, 1000) for a in ("resnet50", "resnext50")] == [25557032, 25028904], "as torchvision states"
    from torchvision.models import resnet50

    theirs, ours = resnet50().eval(), build_model("resnet50", 1000).eval()
    ours.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    ours.fc.load_state_dict(theirs.fc.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(arch="resnet-32"), "resnet32"),
        (dict(arch="resnet8", head="cosin"), "cosine"),
        (dict(arch="resnet8", norm="layer"), "batch"),
        (dict(arch="resnet50", pretrained=True), "timm:resnet50"),
        (dict(arch="timm:resnet50", norm="group", pretrained=True), "leave out norm"),
    ],
)
def test_build_refuses(kwargs, word):
    with pytest.raises(UsageError, match=word):
        build_model(n_classes=3, **kwargs)


# Heads and normalisation


def test_heads_against_their_formulas():
    g, x = (
        torch.Generator().manual_seed(0),
        torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    w = torch.randn(3, 5, generator=g, dtype=torch.float64)
    cos = (x @ w.T) / x.norm(dim=1)[:, None] / w.norm(dim=1)
    assert torch.allclose(cosines(x, w), cos)
    head = CosineHead(5, 3, 16.0)
    with torch.no_grad():
        head.weight.copy_(w)
    assert torch.allclose(head(x.float()).double(), 16 * cos, atol=1e-4)
    for gamma, s in ((0.0, None), (1.0, 250.0), (-1.0, 1.5), (6.0, None)):
        head, scale = WCDASHead(5, 3, gamma, s), s or math.log(2) + 1
        with torch.no_grad():
            head.weight.copy_(w)
        rho = 1 / (1 + math.exp(-gamma))
        want = scale / (2 * math.pi) * (1 - rho**2) / (1 + rho**2 - 2 * rho * cos)
        assert torch.allclose(head(x.float()).double(), want, rtol=1e-3)
        assert head.raw_s.requires_grad == (s is None)
    for s in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(UsageError, match="above 1"):
            WCDASHead(5, 3, s=s)


def test_heads_have_one_form_and_learn():
    assert (
        WCDASHead(4, 3).state_dict().keys()
        == WCDASHead(4, 3, s=250.0).state_dict().keys()
        == {"weight", "gamma", "raw_s"}
    )
    assert CosineHead(4, 3).state_dict().keys() == {"weight", "scale"} and [
        n for n, _ in CosineHead(4, 3).named_parameters()
    ] == ["weight"]
    for head in (CosineHead(4, 3, 10.0), WCDASHead(4, 3), WCDASHead(4, 3, s=250.0)):
        head(torch.randn(8, 4)).log_softmax(1)[:, 0].mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(torch.randn(2, 4).bfloat16()).dtype == torch.float32
        assert head(torch.zeros(1, 4)).isfinite().all(), "a feature of zeros has no direction, and no NaN"


@pytest.mark.parametrize("channels, groups", [(16, 8), (12, 4), (6, 2), (7, 1), (64, 8)])
def test_group_norm_groups(channels, groups):
    net = group_norm(nn.Sequential(nn.Conv2d(3, channels, 1), nn.Sequential(nn.BatchNorm2d(channels))))
    assert net[1][0].num_groups == groups and net[1][0].num_channels == channels


@pytest.mark.parametrize("arch", ["convnet", "resnet8", "resnet10"])
def test_group_norm_looks_at_one_image(arch):
    net, x = build_model(arch, 3, norm="group").train(), torch.randn(4, 3, 32, 32)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    assert torch.allclose(net.features(x)[:1], net.features(x[:1]), atol=1e-4)


# Saving


@pytest.mark.parametrize(
    "arch, head, norm",
    [
        *((a, "linear", "batch") for a in SMALL),
        *((a, h, n) for a in ("convnet", "resnet8", "resnet10") for h in HEADS for n in ("batch", "group")),
        ("resnet50", "cosine", "batch"),
        ("resnext50", "wcdas", "group"),
    ],
)
def test_round_trip(tmp_path, arch, head, norm):
    clf = classifier(arch, (3, 16, 16), head=head, norm=norm)
    if head == "cosine":
        clf.net.fc.scale.fill_(25)
    clf.save(tmp_path, method="m")
    back, x = Classifier.load(tmp_path), noise(3, 3, 16, 16)
    assert torch.equal(back.logits(x), clf.logits(x)) and not back.training
    assert all(
        getattr(back, k) == getattr(clf, k)
        for k in ("arch", "head", "norm", "class_names", "input_size", "mean", "std", "log_prior")
    ) and (back.head, back.norm) == (head, norm)
    d = json.loads((tmp_path / "model.json").read_text())
    assert (d["head"], d["norm"], d["method"]) == (head, norm, "m")


@pytest.mark.parametrize("head", HEADS)
def test_round_trip_of_a_head_alone(tmp_path, head):
    net = LinearNet(4, 6)
    net.fc = HEADS[head](6, 4)
    clf, z = Classifier(net, "abcd", (6,), head=head), np.random.default_rng(0).standard_normal((5, 6))
    clf.save(tmp_path)
    assert torch.equal(Classifier.load(tmp_path).logits(z), clf.logits(z)) and clf.logits(z).shape == (5, 4)
    with pytest.raises(DataError, match="floats"):
        clf.logits(noise(2, 6))


def test_folders_from_before_heads_and_norms_load(tmp_path):
    clf = classifier()
    clf.save(tmp_path)
    d = json.loads((tmp_path / "model.json").read_text())
    del d["head"], d["norm"]
    (tmp_path / "model.json").write_text(json.dumps(d))
    assert torch.equal(Classifier.load(tmp_path).logits(noise(2, 3, 8, 8)), clf.logits(noise(2, 3, 8, 8)))


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(arch="resnet8"), "do not fit"),
        (dict(norm="group"), "do not fit"),
        (dict(head="cosine"), "do not fit"),
        (dict(classes=["a", "b"]), "fc.weight has shape"),
        (dict(arch="resnet99"), "resnet99"),
        (dict(head="arc"), "arc"),
        (dict(format=2, ltnb="0.7.0"), "was written by ltnb 0.7.0 in format 2, .*upgrade ltnb"),
        (dict(format=0), "was written by ltnb .* in format 0, "),
        (dict(input_size=[]), "holds no classifier"),
        (dict(input_size=[1, 8, 8]), "do not fit"),
        (dict(normalisation=None), "holds no classifier"),
    ],
)
def test_loading_refuses(tmp_path, change, word):
    classifier().save(tmp_path)
    d = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**d, **change}))
    with pytest.raises(DataError, match=word):
        Classifier.load(tmp_path)


def test_load_classifier(tmp_path):
    import ltnb

    clf, x = classifier(), noise(2, 3, 8, 8)
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="holds no classifier"):
        load_classifier(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not finished"):
        load_classifier(str(tmp_path / "run"))
    with pytest.raises(UsageError, match="does not exist"):
        ltnb.load(tmp_path / "nowhere")
    clf.save(tmp_path / "run" / "model")
    for at in (tmp_path / "run", str(tmp_path / "run" / "model")):
        assert torch.equal(ltnb.load(at).logits(x), clf.logits(x))
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        ltnb.load(tmp_path / "run")
    save_tensors(tmp_path / "run" / "model" / "model.safetensors", {"fc.weight": torch.zeros(4, 64)})
    with pytest.raises(DataError, match="do not fit"):
        ltnb.load(tmp_path / "run")


@pytest.mark.slow_process
def test_the_package_has_load_without_torch():
    code = "import ltnb, sys; assert callable(ltnb.load) and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


# Images in, answers out


def test_logits_predict_encode_agree():
    clf, x, seen = classifier(), noise(11, 3, 8, 8), []
    whole = clf.logits(x, progress=seen.append)
    assert seen == [11] and whole.shape == (11, 4) and not whole.requires_grad and whole.dtype == torch.float32
    assert torch.allclose(clf.logits(x, bs=3), whole, atol=1e-5)
    assert np.allclose(clf.predict(x, bs=4), whole.softmax(1).numpy(), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(clf(torch.from_numpy(x)), whole, atol=1e-5)
        assert torch.allclose(clf.net.fc(encode(clf, x)) - torch.tensor(clf.log_prior), whole, atol=1e-5), (
            "the prior is subtracted once"
        )
    assert torch.allclose(clf.logits(x, precision="bf16"), whole, atol=0.1)
    assert (
        clf.logits(x[:0]).shape == (0, 4) and clf.predict(x[:0]).shape == (0, 4) and encode(clf, x[:0]).shape == (0, 64)
    )
    assert torch.equal(clf.logits(x[:, ::-1]), clf.logits(x[:, ::-1].copy())), "views with negative strides too"


@pytest.mark.parametrize(
    "images, word",
    [
        (noise(2, 3, 9, 9), "3 x 8 x 8, got 3 x 9 x 9"),
        (noise(2, 1, 8, 8), "got 1 x 8 x 8"),
        (noise(2, 64), "got 64"),
        (noise(2), "a single number"),
        (noise(2, 3, 8, 8).astype("f4"), "uint8"),
        (noise(2, 8, 8, 3), "got 8 x 8 x 3"),
    ],
)
def test_other_images_are_refused(images, word):
    clf = classifier()
    for f in (clf.logits, clf.predict, lambda x: encode(clf, x)):
        with pytest.raises(DataError, match=word):
            f(images)


@pytest.fixture
def album(tmp_path):
    "Files of mixed kinds and sizes below two folders, with broken ones among them"
    rng, at = np.random.default_rng(0), tmp_path / "album"
    (at / "b" / "deep").mkdir(parents=True)
    kinds = {
        "a.jpg": ("RGB", (40, 30)),
        "b/grey.png": ("L", (8, 8)),
        "b/deep/alpha.PNG": ("RGBA", (9, 31)),
        "b/palette.gif": ("P", (16, 16)),
        "b/one bit.bmp": ("1", (20, 20)),
        'é, "quoted".webp': ("RGB", (12, 50)),
        "cmyk.tif": ("CMYK", (10, 10)),
    }
    for name, (mode, (w, h)) in kinds.items():
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).convert(mode).save(at / name)
    Image.fromarray(rng.integers(0, 65535, (9, 9)).astype(np.uint16)).save(at / "sixteen.png")
    (at / "broken.jpg").write_bytes((at / "a.jpg").read_bytes()[:200])
    (at / "b" / "empty.png").write_bytes(b"")
    (at / "notes.txt").write_text("no image")
    (at / ".hidden.png").write_bytes(b"")
    return at, sorted([*kinds, "sixteen.png"]), ["b/empty.png", "broken.jpg"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bs", [1, 3, 64])
def test_predict_files(album, channels, bs):
    at, good, broken = album
    clf = classifier(shape=(channels, 8, 8))
    paths, probs, bad = predict_files(clf, at, bs, "cpu", "fp32")
    assert paths == good and [p for p, _ in bad] == broken and all(str(at) not in m and m for _, m in bad)
    by_hand = np.stack([decode_image(at / p, 8) for p in paths])
    if channels == 1:
        by_hand = np.stack([np.asarray(Image.fromarray(x.transpose(1, 2, 0)).convert("L"))[None] for x in by_hand])
    assert np.allclose(probs, clf.predict(by_hand), atol=1e-5) and probs.shape == (len(good), 4)


def test_files_read_like_arrays(album):
    at, good, broken = album
    for channels in (1, 3):
        clf, files = classifier(shape=(channels, 8, 8)), ImageFiles(at, good, 8)
        x = luma(files[:]) if channels == 1 else files[:]
        assert torch.allclose(clf.logits(files, bs=3), clf.logits(x), atol=1e-5) and torch.allclose(
            encode(clf, files, bs=2), encode(clf, x), atol=1e-5
        )
        with pytest.raises(DataError, match="size=8"):
            clf.logits(ImageFiles(at, good, 9))
        with pytest.raises(DataError, match="empty.png"):
            clf.logits(ImageFiles(at, [*good, *broken], 8))
    with pytest.raises(DataError, match="square RGB"):
        classifier(shape=(4, 8, 8)).logits(ImageFiles(at, good, 8))
    with pytest.raises(DataError, match="square RGB"):
        encode(classifier(shape=(3, 8, 12)), ImageFiles(at, good, 8))


def test_predict_files_refuses(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    paths, probs, bad = predict_files(classifier(), tmp_path)
    assert paths == [] and probs.shape == (0, 4) and [p for p, _ in bad] == ["bad.png"]
    (tmp_path / "empty").mkdir()
    for clf, folder, word in (
        (classifier(), tmp_path / "empty", "holds no image"),
        (classifier(), tmp_path / "no", "is no folder"),
        (classifier(), tmp_path / "bad.png", "is no folder"),
        (classifier(shape=(3, 8, 12)), tmp_path, "square"),
        (classifier(shape=(2, 8, 8)), tmp_path, "grey or RGB"),
        (Classifier(LinearNet(2, 5), "ab", (5,)), tmp_path, "takes 5"),
    ):
        with pytest.raises(UsageError, match=word):
            predict_files(clf, folder)


def test_luma_is_pillows():
    x = noise(50, 3, 6, 5)
    assert np.array_equal(
        luma(x)[:, 0], np.stack([np.asarray(Image.fromarray(i.transpose(1, 2, 0)).convert("L")) for i in x])
    )


def test_write_predictions(tmp_path):
    names, paths = ["a", 'with, "comma"', "é\n"], ["x/1.jpg", 'odd,"2".png', os.fsdecode(b"\xff.png")]
    probs = np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3 + 1e-4, 1 / 3], [0.0, 1e-9, 1.0]], "f4")
    write_predictions(tmp_path / "deep" / "p.csv", names, probs, paths)
    rows = list(csv.reader(io.StringIO((tmp_path / "deep" / "p.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["path", "class", "probability", *names]
    assert [r[:2] for r in rows[1:]] == [["x/1.jpg", "a"], ['odd,"2".png', 'with, "comma"'], ["\\xff.png", "é\n"]]
    assert np.allclose(np.array([r[3:] for r in rows[1:]], float), probs, rtol=1e-5) and all(
        float(r[2]) == max(map(float, r[3:])) for r in rows[1:]
    )
    write_predictions(tmp_path / "none.csv", names, np.zeros((0, 3)), [])
    assert len((tmp_path / "none.csv").read_text(encoding="utf-8").strip()) > 0
    for wrong in (probs[:2], probs[:, :2], probs[0]):
        with pytest.raises(DataError, match="shape"):
            write_predictions(tmp_path / "p.csv", names, wrong, paths)


# timm


def test_timm_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LtnbError, match="pip install timm"):
        build_model("timm:resnet18", 3)


@pytest.mark.parametrize(
    "name, side", [("resnet10t", 32), ("mobilenetv3_small_050", 32), ("test_convnext", 64), ("test_vit", 160)]
)
def test_timm(tmp_path, name, side):
    pytest.importorskip("timm")
    for norm in ("batch", "group"):
        clf = classifier(f"timm:{name}", (1, side, side), head="cosine", norm=norm)
        assert norm == "batch" or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in clf.net.modules())
        clf.save(tmp_path)
        x = noise(2, 1, side, side)
        assert encode(clf, x).shape == (2, clf.net.n_features) and torch.equal(
            Classifier.load(tmp_path).logits(x), clf.logits(x)
        )
    assert torch.equal(build_model(f"timm:{name}", 3).fc.weight, build_model(f"timm:{name}", 3).fc.weight)


def test_timm_group_norm_keeps_activations():
    timm = pytest.importorskip("timm")

    def count(net):
        return sum(isinstance(m, (nn.ReLU, nn.Hardswish)) for m in net.modules())

    net = timm.create_model("mobilenetv3_small_050", num_classes=0)
    assert count(group_norm(net)) == count(timm.create_model("mobilenetv3_small_050", num_classes=0)) > 0


def test_timm_refuses(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    with pytest.raises(UsageError, match="timm:resnet50"):
        build_model("timm:resnet_50", 3)
    with pytest.raises(UsageError, match="list_models"):
        build_model("timm:§§§", 3)
    with pytest.raises(UsageError, match="Invalid pretrained tag"):
        build_model("timm:resnet50.no_such_tag", 3)

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(LtnbError, match="cannot be loaded .Name or service not known") as e:
        build_model("timm:resnet10t", 3, pretrained=True)
    assert e.value.exit_code == 1


# Reference weights


@pytest.mark.parametrize(
    "name, k, n_max, order, argmax, shifted",
    [("cifar10", 10, 5000, -1, 72.49, 80.86), ("cifar100", 100, 500, 1, 41.28, 48.59)],
)
def test_reference_weights(name, k, n_max, order, argmax, shifted):
    """The LDMLR authors' ResNet-32 on the whole test set. Their CIFAR-10 weights want blue-green-red images, those of
    CIFAR-100 red-green-blue; mean and deviation go by position in both"""
    from ltnb.core import load_tensors

    weights, (images, labels, _) = (
        load_tensors(shared(f"ldmlr_{name}_if100_resnet32.safetensors"))[0],
        cifar(name, "test"),
    )
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)[:, ::order])
    net = build_model("resnet32", k)
    net.load_state_dict(weights)  # their names are ours
    counts = longtail_counts(n_max, k, 100)
    clf = Classifier(
        net,
        range(k),
        (3, 32, 32),
        np.array([125.3, 123.0, 113.9]) / 255,
        np.array([63.0, 62.1, 66.7]) / 255,
        "resnet32",
    )
    plain = clf.logits(images, bs=64).numpy()  # a quarter faster than 512 at a time
    clf.log_prior = np.log(counts / counts.sum()).tolist()
    corrected = plain - np.array(clf.log_prior, "f4")
    assert np.allclose(clf.logits(images[:100]).numpy(), corrected[:100], atol=1e-4), (
        "what was just counted is what the classifier says"
    )
    got = [100 * (z.argmax(1) == labels).mean() for z in (plain, corrected)]
    assert np.allclose(got, [argmax, shifted], atol=0.02), got


def test_names_of_networks_are_stable():
    assert list(ARCHS) == [*SMALL, *PHOTO] and list(HEADS) == ["linear", "cosine", "wcdas"]
