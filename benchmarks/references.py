"""ltnb's functions and the authors' own code on equal tensors, value and gradient: a table.

python benchmarks/references.py FOLDER [OUT.md]

FOLDER holds what is compared with, one repository in each folder, called owner+name: a checkout or a bare clone. Their
code is read and run, never copied. A repository that is not there, or that lacks a package (LDMLR needs einops), is
skipped with a sentence.
"""

import contextlib
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
import types
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from ltnb.data import bands, longtail_counts, longtail_indices
from ltnb.noise import NoiseModel, NoisyBatch, build_objective, diffusion_loss, noise_ratios
from ltnb.cbdm import CBDM as ClassBalancing
from ltnb.heads import Head
from ltnb.decoupled import class_aware, nearest_mean, tau_norm
from ltnb.ldmlr_published import (
    PublishedModel,
    PublishedUNet,
    cosine_alpha_bar,
    posterior,
    sample_published,
    snr,
    x0_error,
)
from ltnb.losses import build_loss, class_balanced_weights
from ltnb.metrics import score
from ltnb.models import ResNet, WCDASHead, cosines
from ltnb.training import lr_factor
from torch import nn

LDAM, DECOUPLING = "kaidic/LDAM-DRW", "facebookresearch/classifier-balancing"
BALANCED, MISLAS = "jiawei-ren/BalancedMetaSoftmax-Classification", "dvlab-research/MiSLAS"
CLASS_BALANCED, ANGULAR = "vandit15/Class-balanced-loss-pytorch", "boranhan/WCDAS_code"
CBDM, LDMLR = "qym7/CBDM-pytorch", "AlvinHan123/LDMLR"
EDM, MIN_SNR = "NVlabs/edm", "TiankaiHang/Min-SNR-Diffusion-Training"


@dataclass
class Row:
    "One quantity"

    quantity: str
    ours: str  # module.function
    repository: str
    theirs: str  # file, function
    value: float  # greatest absolute difference
    gradient: float | None = None  # the same of the gradient; None where there is none
    scale: float = 1.0  # greatest absolute value of theirs
    note: str = ""  # how they part

    @property
    def agrees(self) -> bool:  # to rounding in float32, of the size of the quantity
        return max(self.value, self.gradient or 0.0) <= 1e-4 * max(self.scale, 1.0)


# their code
class Missing(Exception):
    "A repository or one of its packages is not here"


class Peers:
    "The repositories of a folder, unpacked into a temporary one"

    def __init__(self, folder: Path):
        self.folder, self.place = Path(folder), Path(tempfile.mkdtemp())

    def source(self, repository):  # a checkout or a bare clone
        base = self.folder / repository.replace("/", "+")
        found = next((p for p in (base, base / "repo") if (p / ".git").exists() or (p / "HEAD").is_file()), None)
        if found is None:
            raise Missing(f"{repository} is not in {self.folder.name}/: fetch it to {base.name}/")
        return found

    def commit(self, repository):
        return subprocess.run(
            ["git", "-C", self.source(repository), "rev-parse", "HEAD"], check=True, text=True, capture_output=True
        ).stdout.strip()

    def unpacked(self, repository):
        out = self.place / repository.replace("/", "+")
        if not out.exists():
            git = ["git", "-C", self.source(repository)]  # of a clone that lacks large files, only the code is read
            names = subprocess.run(
                [*git, "ls-tree", "-r", "--name-only", "HEAD"], check=True, capture_output=True, text=True
            )
            code = [n for n in names.stdout.splitlines() if n.endswith(".py")]
            got = subprocess.run([*git, "archive", "HEAD", "--", *code], check=True, capture_output=True)
            tarfile.open(fileobj=io.BytesIO(got.stdout)).extractall(out, filter="data")
        return out

    def load(self, repository, name, stand_ins=()):  # stand_ins: packages that are imported there but not used here
        root, before = self.unpacked(repository), dict(sys.modules)
        for n in stand_ins:
            sys.modules[n] = _Anything(n)
        sys.path.insert(0, str(root))
        try:
            with patch("torch.cuda.FloatTensor", torch.FloatTensor, create=True):
                return importlib.import_module(name)
        except ImportError as e:
            raise Missing(f"{repository}: {name} needs {e.name or e}") from e
        finally:
            sys.path.remove(str(root))
            for n in set(sys.modules) - set(before):  # names such as utils are those of many repositories
                if str(root) in str(getattr(sys.modules[n], "__file__", "")) or n in stand_ins:
                    del sys.modules[n]
            sys.modules.update({n: m for n, m in before.items() if sys.modules.get(n) is not m})


class _Anything(types.ModuleType):
    "A module with every name: for imports that are not used here"

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return _Anything(f"{self.__name__}.{name}")

    def __call__(self, *a, **k):
        return a[0] if a and callable(a[0]) else self


@contextlib.contextmanager
def on_the_cpu():
    "Their tensors are made on a GPU, with a mask of an older PyTorch"
    where = torch.where

    def boolean(c, *more):
        return where(c.bool(), *more)

    with patch("torch.cuda.FloatTensor", torch.FloatTensor, create=True), patch("torch.where", boolean):
        yield


# comparisons
def far(a, b):  # greatest absolute difference, and size
    a, b = (torch.as_tensor(np.asarray(v) if not torch.is_tensor(v) else v).detach().double() for v in (a, b))
    return float((a - b).abs().max()), float(b.abs().max())


def both(ours, theirs, *inputs):  # functions of the same tensors -> differences of value and gradient, size
    out = []
    for f in (ours, theirs):
        x = [v.clone().requires_grad_() if v.is_floating_point() else v for v in inputs]
        value = f(*x)
        mixed = (value.flatten() * torch.linspace(0.5, 1.5, value.numel())).sum()  # each output counts in its own way
        grads = torch.autograd.grad(mixed, [v for v in x if v.requires_grad], allow_unused=True)
        out.append((value, torch.cat([g.flatten() for g in grads if g is not None])))
    (a, ga), (b, gb) = out
    (value, size), (gradient, _) = far(a, b), far(ga, gb)
    return value, gradient, size


COUNTS = [500, 400, 300, 120, 60, 40, 20, 9, 5, 2]


def batch(n=64, k=10, seed=0, scale=3.0):  # logits and labels
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, k, generator=g), torch.randint(k, (n,), generator=g)


def data_rows(peers):
    "LDAM's long tails"
    m = peers.load(LDAM, "imbalance_cifar")
    for cls, k in ((m.IMBALANCECIFAR10, 10), (m.IMBALANCECIFAR100, 100)):
        own = types.SimpleNamespace(data=np.arange(50_000), cls_num=k)
        for kind, ratio in (("exp", 10), ("exp", 50), ("exp", 100), ("exp", 200), ("step", 100)):
            theirs = cls.get_img_num_per_cls(own, k, kind, 1 / ratio)
            value = far(longtail_counts(50_000 // k, k, ratio, kind), theirs)
            yield Row(
                f"class sizes, {k} classes, {kind}, ratio {ratio}",
                "data.longtail_counts",
                LDAM,
                "imbalance_cifar.py, get_img_num_per_cls",
                value[0],
                None,
                value[1],
            )
        labels = np.random.RandomState(7).permutation(np.repeat(np.arange(k), 50_000 // k))
        own = types.SimpleNamespace(data=np.arange(50_000)[:, None], targets=labels.tolist())
        np.random.seed(0)
        cls.gen_imbalanced_data(own, cls.get_img_num_per_cls(types.SimpleNamespace(data=labels), k, "exp", 0.01))
        value = far(longtail_indices(labels, 100, 0), own.data[:, 0])
        yield Row(
            f"images kept, {k} classes, ratio 100",
            "data.longtail_indices",
            LDAM,
            "imbalance_cifar.py, gen_imbalanced_data",
            value[0],
            None,
            value[1],
        )


def ldam_rows(peers):
    "LDAM's losses, schedule and network"
    m, z, y = peers.load(LDAM, "losses"), *batch()
    cos, weights = z.tanh(), class_balanced_weights(COUNTS).float()

    def row(name, ours, at, ours_fn, theirs_fn, x=z, note=""):
        with on_the_cpu():
            return Row(name, f"losses.{ours}", LDAM, at, *both(ours_fn, theirs_fn, x), note)

    drw = build_loss("ldam_drw", COUNTS)
    with on_the_cpu():
        margins, weighted = m.LDAMLoss(COUNTS), m.LDAMLoss(COUNTS, weight=weights)
    yield row(
        "LDAM", "LDAM", "losses.py, LDAMLoss", lambda x: build_loss("ldam", COUNTS)(x, y), lambda x: margins(x, y), cos
    )
    for epoch, theirs in ((159, margins), (160, weighted)):
        drw.set_epoch(epoch, 200)
        yield row(
            f"LDAM-DRW, epoch {epoch} of 200",
            "DRW",
            "losses.py, LDAMLoss; cifar_train.py, DRW",
            lambda x: drw(x, y),
            lambda x, t=theirs: t(x, y),
            cos,
        )
    yield row(
        "cross-entropy, re-weighted",
        "ClassBalanced",
        "cifar_train.py, Reweight",
        lambda x: build_loss("class_balanced", COUNTS)(x, y),
        lambda x: F.cross_entropy(x, y, weight=weights),
    )
    for gamma in (1.0, 2.0):
        yield row(
            f"focal, γ = {gamma:g}",
            "Focal",
            "losses.py, FocalLoss",
            lambda x, g=gamma: build_loss("focal", COUNTS, gamma=g)(x, y),
            lambda x, g=gamma: m.FocalLoss(gamma=g)(x, y),
        )
    yield row(
        "class-balanced focal, γ = 1",
        "ClassBalanced",
        "losses.py, FocalLoss with weight",
        lambda x: build_loss("class_balanced_focal", COUNTS)(x, y),
        lambda x: m.FocalLoss(weights, 1.0)(x, y),
        z,
        "the weight stands inside there, focal(w·ce), and the mean is over items; here w·focal(ce), as in the "
        "formula, over the sum of weights",
    )
    yield row(
        "the same, weight inside by hand",
        "Focal",
        "losses.py, FocalLoss with weight",
        lambda x: ((ce := weights[y] * F.cross_entropy(x, y, reduction="none")) * (1 - (-ce).exp())).mean(),
        lambda x: m.FocalLoss(weights, 1.0)(x, y),
    )
    source = (peers.unpacked(LDAM) / "cifar_train.py").read_text()
    own = {}
    exec(
        source[source.index("def adjust_learning_rate") : source.index("if __name__")], own
    )  # the file parses arguments
    rates = []
    for epoch in range(200):
        group = types.SimpleNamespace(param_groups=[{}])
        own["adjust_learning_rate"](group, epoch, types.SimpleNamespace(lr=0.1))
        rates.append(group.param_groups[0]["lr"])
    value = far([0.1 * lr_factor("ldam", e, 200, 5) for e in range(200)], rates)
    yield Row(
        "learning rates of 200 epochs, with warm-up",
        "training.lr_factor",
        LDAM,
        "cifar_train.py, adjust_learning_rate",
        value[0],
        None,
        value[1],
    )


def network_rows(peers):
    "ResNet-32 and the cosine head, with equal weights"
    m = peers.load(LDAM, "models.resnet_cifar")
    theirs, ours, g = m.resnet32(10).eval(), ResNet(10).eval(), torch.Generator().manual_seed(0)
    known = {k.replace("linear.", "fc."): v for k, v in theirs.state_dict().items()}
    for k, v in known.items():
        if "running" in k or "bn" in k and v.is_floating_point():
            v.add_(0.2 * torch.rand(v.shape, generator=g))
    theirs.load_state_dict({k.replace("fc.", "linear."): v for k, v in known.items()})
    ours.load_state_dict(known)
    x = torch.randn(4, 3, 32, 32, generator=g)
    for mode, training in (("evaluation", False), ("training", True)):
        ours.train(training), theirs.train(training)
        yield Row(
            f"ResNet-32, {mode}", "models.ResNet", LDAM, "models/resnet_cifar.py, resnet32", *both(ours, theirs, x)
        )
    z, head = torch.randn(16, 64, generator=g), m.NormedLinear(64, 10)
    yield Row(
        "cosine head",
        "models.cosines",
        LDAM,
        "models/resnet_cifar.py, NormedLinear",
        *both(
            lambda z, w: cosines(z, w.T),
            lambda z, w: torch.func.functional_call(head, {"weight": w}, (z,)),
            z,
            head.weight.data,
        ),
    )


def softmax_rows(peers):
    "Balanced softmax"
    m, z, y = peers.load(BALANCED, "loss.BalancedSoftmaxLoss"), *batch()
    n = torch.tensor(COUNTS)
    yield Row(
        "balanced softmax",
        "losses.BalancedSoftmax",
        BALANCED,
        "loss/BalancedSoftmaxLoss.py, balanced_softmax_loss",
        *both(
            lambda x: build_loss("balanced_softmax", COUNTS)(x, y),
            lambda x: m.balanced_softmax_loss(y, x, n, "mean"),
            z,
        ),
    )


def smoothing_rows(peers):
    "Label-aware smoothing, and weights that are learned"
    m, z, y = peers.load(MISLAS, "methods"), *batch()
    for shape in ("concave", "linear", "convex"):
        for head, tail in ((0.3, 0.0), (0.4, 0.1)):
            how = dict(smooth_head=head, smooth_tail=tail, shape=shape)
            yield Row(
                f"label-aware smoothing, {shape}, {head} to {tail}",
                "losses.LabelAwareSmoothing",
                MISLAS,
                "methods.py, LabelAwareSmoothing",
                *both(
                    lambda x, how=how: build_loss("label_aware_smoothing", COUNTS, **how)(x, y),
                    lambda x, how=how: m.LabelAwareSmoothing(COUNTS, **how)(x, y),
                    z,
                ),
            )
    scale = m.LearnableWeightScaling(10)
    yield Row(
        "LWS, logits",
        "heads.lws",
        MISLAS,
        "methods.py, LearnableWeightScaling",
        *both(
            lambda x, s: s * x,
            lambda x, s: torch.func.functional_call(scale, {"learned_norm": s[None]}, (x,)),
            z,
            torch.rand(10) + 0.5,
        ),
    )


def decoupling_rows(peers):
    "Kang et al.: τ-normalisation, LWS, nearest mean, class-aware sampling, bands"

    def at(name):
        return (peers.unpacked(DECOUPLING) / name).read_text()

    source, own = at("tau_norm.py"), {"torch": torch}
    exec(
        source[source.index("def pnorm") : source.index("for p in np.linspace")], own
    )  # the file reads features at once
    g = torch.Generator().manual_seed(0)
    w, b, z = torch.randn(10, 16, generator=g), torch.randn(10, generator=g), torch.randn(40, 16, generator=g)
    for tau in (0.0, 0.5, 1.0, 2.0):

        def ours(w, tau=tau):
            return tau_norm(Head(w, b, torch.ones(10)), tau).logits(z)

        def theirs(w, tau=tau):
            return z @ own["pnorm"](w, tau).T

        yield Row(
            f"τ-normalised logits, τ = {tau:g}",
            "heads.tau_norm",
            DECOUPLING,
            "tau_norm.py, pnorm",
            (value := far(ours(w), theirs(w)))[0],
            None,
            value[1],
        )  # theirs writes into its rows: no gradient
    text, own = at("models/TauNormClassifier.py"), {"nn": nn, "torch": torch, "Parameter": nn.Parameter}
    exec(text[text.index("class DotProduct") : text.index("def create_model")], own)
    clf = own["DotProduct_Classifier"](10, 16)
    clf.load_state_dict({"fc.weight": w, "fc.bias": b, "scales": torch.ones(10)})
    yield Row(
        "LWS, logits s (w x + b)",
        "heads.lws",
        DECOUPLING,
        "models/TauNormClassifier.py, DotProduct_Classifier",
        *both(
            lambda s: s * (z @ w.T + b),
            lambda s: torch.func.functional_call(clf, {"scales": s}, (z,))[0],
            torch.rand(10, generator=g) + 0.5,
        ),
    )
    yield from _nearest_rows(at("models/KNNClassifier.py"), z, g)
    yield from _sampler_rows(peers.load(DECOUPLING, "data.ClassAwareSampler"))
    text, own = at("utils.py"), {"np": np, "torch": torch}
    exec(text[text.index("def shot_acc") : text.index("def weighted_shot_acc")], own)
    rng = np.random.default_rng(0)
    counts, y = np.array([300, 101, 100, 50, 20, 19, 3]), np.repeat(np.arange(7), 20)
    said = np.where(rng.random(len(y)) < 0.5, y, rng.integers(0, 7, len(y)))
    s = score(said, y, counts)
    value = far([s.bands[k] for k in bands(counts)], own["shot_acc"](said, y, np.repeat(np.arange(7), counts)))
    yield Row(
        "accuracy of the bands",
        "metrics.score",
        DECOUPLING,
        "utils.py, shot_acc",
        value[0],
        None,
        value[1],
        "an empty band is 0 there, NaN here",
    )


def _nearest_rows(text, z, g):
    own = {"torch": torch, "nn": nn}
    exec(text[text.index("class KNNClassifier") : text.index("def create_model")], own)
    y = torch.arange(10).repeat(4)
    means = torch.stack([z[y == k].mean(0) for k in range(10)])
    knn = own["KNNClassifier"](16, 10, "un", "l2")
    knn.update({"mean": z.mean(0).numpy(), "uncs": means.numpy()})
    x = torch.randn(30, 16, generator=g)
    theirs, ours = knn(x)[0], nearest_mean(z, y).logits(x) - (x**2).sum(1, keepdim=True)
    value = far(ours, theirs)
    yield Row(
        "nearest mean, l2",
        "heads.nearest_mean",
        DECOUPLING,
        "models/KNNClassifier.py, l2_similarity",
        value[0],
        None,
        value[1],
        "without ‖x‖², which all classes share",
    )


def _sampler_rows(m):
    labels = np.repeat(np.arange(3), [60, 20, 3])
    theirs = torch.tensor(list(m.ClassAwareSampler(types.SimpleNamespace(labels=labels))))
    ours = class_aware(torch.from_numpy(labels), len(theirs), torch.Generator().manual_seed(0))
    for name, of in (
        ("classes", lambda i: torch.bincount(torch.from_numpy(labels)[i], minlength=3)),
        ("images", lambda i: torch.bincount(i, minlength=83)),
    ):
        value = far(of(ours), of(theirs))
        yield Row(
            f"how often an epoch shows each of the {name}",
            "heads.class_aware",
            DECOUPLING,
            "data/ClassAwareSampler.py, ClassAwareSampler",
            value[0],
            None,
            value[1],
            "the orders are random; num_samples_cls is 1 here, 4 in their ImageNet-LT config",
        )


def class_balanced_rows(peers):
    "Cui et al. in PyTorch"
    m, z, y = peers.load(CLASS_BALANCED, "class_balanced_loss"), *batch()
    for counts in ([5000, 500, 50], COUNTS):
        effective = 1 - np.power(0.9999, counts)  # theirs, inside CB_loss
        theirs = (1 - 0.9999) / effective
        value = far(class_balanced_weights(counts), theirs / theirs.sum() * len(counts))
        yield Row(
            f"class-balanced weights, {counts[0]} to {counts[-1]}",
            "losses.class_balanced_weights",
            CLASS_BALANCED,
            "class_balanced_loss.py, CB_loss",
            value[0],
            None,
            value[1],
        )
    for kind, name in (("softmax", "class_balanced"), ("focal", "class_balanced_focal")):

        def theirs(x, kind=kind):
            return m.CB_loss(y, x, COUNTS, 10, kind, 0.9999, 1.0)

        yield Row(
            f"class-balanced loss, {kind}",
            "losses.ClassBalanced",
            CLASS_BALANCED,
            "class_balanced_loss.py, CB_loss",
            *both(lambda x, n=name: build_loss(n, COUNTS)(x, y), theirs, z),
            "there K binary losses of "
            + ("the softmax's" if kind == "softmax" else "the sigmoid's")
            + " outputs; here the loss of the right class",
        )


def angular_rows(peers):
    "WCDAS's head"
    m, g = peers.load(ANGULAR, "models.Loss"), torch.Generator().manual_seed(0)
    z, w, y = torch.randn(32, 16, generator=g), torch.randn(10, 16, generator=g), torch.arange(32) % 10
    for gamma in (0.0, -1.0, 1.0):
        theirs, ours = m.WCDAS(16, 10, gamma=gamma), WCDASHead(16, 10, gamma)

        def of(module, names, z, w, shape):
            return torch.func.functional_call(module, {"weight": w, **names}, shape)

        def logits(z, w, t=theirs):
            return of(t, {}, z, w, (z, y, None))[0]

        def own(z, w, o=ours):
            return of(o, {}, z, w, (z,))

        yield Row(
            f"WCDAS logits, γ = {gamma:g}",
            "models.WCDASHead",
            ANGULAR,
            "models/Loss.py, WCDAS",
            *both(own, logits, z, w),
            f"π is 3.14 there: all logits are {np.pi / 3.14:.5f} times ours",
        )
        yield Row(
            f"the same with 3.14, γ = {gamma:g}",
            "models.WCDASHead",
            ANGULAR,
            "models/Loss.py, WCDAS",
            *both(lambda z, w, own=own: own(z, w) * (torch.pi / 3.14), logits, z, w),
        )


class Toy(nn.Module):
    "A network of times and classes for comparisons of losses; the last class is the null class"

    def __init__(self, channels=2, k=4):
        super().__init__()
        self.conv, self.out = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)
        self.code, self.k = nn.Embedding(k + 1, 8), k

    def forward(self, x, t, class_labels=None, y=None, augm=None, return_dict=False):
        y = class_labels if class_labels is not None else torch.full((len(x),), self.k) if y is None else y
        h = self.conv(x) + self.code(y)[..., None, None] + (t.float() / 500).sin()[:, None, None, None]
        out = self.out(torch.tanh(h))
        return (out,) if class_labels is not None else out


def of_weights(net, ours, theirs):  # scalars of the network -> differences of value and of the gradient of its weights
    out = []
    for f in (ours, theirs):
        net.zero_grad(set_to_none=True)
        value = f()
        value.backward()
        out.append((value, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])))
    (value, size), (gradient, _) = far(out[0][0], out[1][0]), far(out[0][1], out[1][1])
    return value, gradient, size


def cbdm_rows(peers):
    "CBDM's loss"
    m = peers.load(CBDM, "diffusion", ("tqdm",) if importlib.util.find_spec("tqdm") is None else ())
    torch.manual_seed(0)
    net, k, b, T = Toy(), 4, 16, 1000
    weight = torch.tensor([0.6, 0.2, 0.15, 0.05], dtype=torch.float64)
    trainer = m.GaussianDiffusionTrainer(net, 1e-4, 0.02, T, None, k, False, True, 1.0, weight, False)
    o = build_objective("eps", "linear")
    t = torch.arange(T)
    alpha, sigma = (v.flatten() for v in o.scales(t.float()))
    for name, mine, theirs in (
        ("signal", alpha, trainer.sqrt_alphas_bar),
        ("noise", sigma, trainer.sqrt_one_minus_alphas_bar),
    ):
        value = far(mine, theirs)
        yield Row(
            f"linear schedule, {name} at 1000 times",
            "diffusion.noise_ratios",
            CBDM,
            "diffusion.py, GaussianDiffusionTrainer",
            value[0],
            None,
            value[1],
        )
    x0, y, noise = torch.randn(b, 2, 8, 8).clamp(-1, 1), torch.randint(k, (b,)), torch.randn(b, 2, 8, 8)
    times, other = torch.randint(T, (b,)), torch.randint(k, (b,))
    with _fixed(times, noise, other, 0.5):
        main, regular = (v.mean() for v in trainer(x0, y))
    xt = alpha[times].view(-1, 1, 1, 1) * x0 + sigma[times].view(-1, 1, 1, 1) * noise
    regularise = ClassBalancing(weight.numpy(), "frequency")
    prior = regularise.prior
    below = prior.float().cumsum(0) - prior.float()
    part = NoisyBatch(x0, y, y, times.float(), noise, xt, (below + prior.float() / 2)[other])  # u that chooses `other`
    model = NoiseModel(net, o, k)

    def ours_main():
        return diffusion_loss(model, part)[0]

    def ours_regular():
        p = model(part.x, part.t, part.seen)
        return regularise(model, part, noise, p, part.t)

    def theirs(i):
        with _fixed(times, noise, other, 0.5):
            return trainer(x0, y)[i].mean()

    assert main > 0 and regular > 0
    yield Row(
        "denoising loss, ε",
        "diffusion.diffusion_loss",
        CBDM,
        "diffusion.py, GaussianDiffusionTrainer.forward",
        *of_weights(net, ours_main, lambda: theirs(0)),
    )
    yield Row(
        "class-balancing loss, ε, τ = 1",
        "cbdm.CBDM",
        CBDM,
        "diffusion.py, GaussianDiffusionTrainer.forward",
        *of_weights(net, ours_regular, lambda: theirs(1)),
        "labels are dropped item by item here, by whole batches there",
    )

    def joint_ours():
        return ours_main() + ours_regular()

    yield Row(
        "both together",
        "cbdm.CBDM",
        CBDM,
        "main.py, train",
        *of_weights(net, joint_ours, lambda: theirs(0) + theirs(1)),
    )


@contextlib.contextmanager
def _fixed(times, noise, other, drop):  # what CBDM's trainer draws
    with (
        patch("torch.randint", lambda *a, **k: times),
        patch("torch.randn_like", lambda x: noise),
        patch("torch.rand", lambda *a: torch.tensor([drop])),
        patch("numpy.random.choice", lambda *a, **k: other.numpy()),
    ):
        yield


def ldmlr_rows(peers):
    "The released LDMLR: network, loss, sampler, counts"
    stand_ins = ("accelerate", "ema_pytorch", "denoising_diffusion_pytorch", "denoising_diffusion_pytorch.version")
    m = peers.load(LDMLR, "model.ddpm_conditional", stand_ins)
    torch.manual_seed(0)
    dim, k, b = 16, 5, 8
    net = m.UNet_conditional(dim=dim, dim_mults=(1, 2, 4, 8), channels=1, num_classes=k).eval()
    process = m.ConditionalDiffusion1D(net, seq_length=64, timesteps=1000, objective="pred_x0")
    ours = PublishedUNet(64, k, dim).eval()
    _copy_in_order(net, ours)
    bar, T = cosine_alpha_bar(), 1000
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    a, c, variance = posterior(bar, before)
    for name, mine, theirs in (
        ("ᾱ", bar, process.alphas_cumprod),
        ("weight of x₀", a, process.posterior_mean_coef1),
        ("weight of x_t", c, process.posterior_mean_coef2),
        ("variance", variance, process.posterior_variance),
    ):
        value = far(mine, theirs)
        yield Row(
            f"posterior, {name}" if name != "ᾱ" else "cosine schedule, ᾱ",
            "ldmlr_published.posterior" if name != "ᾱ" else "ldmlr_published.cosine_alpha_bar",
            LDMLR,
            "model/ddpm_conditional.py, ConditionalDiffusion1D",
            value[0],
            None,
            value[1],
        )
    ratio = far(snr(bar) / process.loss_weight.double(), torch.ones(T))
    yield Row(
        "loss weights (relative)",
        "ldmlr_published.snr",
        LDMLR,
        "model/ddpm_conditional.py, ConditionalDiffusion1D",
        ratio[0],
        None,
        1.0,
    )
    z, y, t = torch.rand(b, 64), torch.randint(k, (b,)), torch.randint(1000, (b,))
    yield Row(
        "network, equal weights",
        "ldmlr_published.PublishedUNet",
        LDMLR,
        "model/ddpm_conditional.py, UNet_conditional",
        *both(lambda x: ours(x, t, y), lambda x: net(x[:, None], t, y)[:, 0], 2 * z - 1),
    )
    noise = torch.randn(b, 64)

    def my_loss(x):
        with patch("torch.randn", lambda *a, **k: noise):
            return (snr(bar.float())[t] * x0_error(ours, 2 * x - 1, y, t, bar.float(), None)).mean()

    def their_loss(x):
        return process.p_losses(2 * x[:, None] - 1, y, t, noise[:, None])

    yield Row(
        "loss",
        "ldmlr_published.published_loss",
        LDMLR,
        "model/ddpm_conditional.py, p_losses",
        *both(my_loss, their_loss, z),
    )
    plan = np.stack([y.numpy(), np.arange(b)], 1)
    start = torch.randn(b, 64)

    def zeros(key, part, shape):
        return start if len(key) == 3 else torch.zeros(len(part), *shape)

    process.num_timesteps, last = 20, [(t, t - 1) for t in range(19, -1, -1)]
    with patch("ltnb.ldmlr_published.item_noise", zeros), patch("ltnb.ldmlr_published.ancestral_times", lambda n: last):
        mine = sample_published(PublishedModel(ours, np.ones(k), 64), plan)[0]
    with (
        patch("torch.randn", lambda *a, **k: start[:, None]),
        patch("torch.randn_like", torch.zeros_like),
        patch.object(m, "tqdm", lambda x, **k: x),
    ):
        theirs = process.sample(y)[:, 0]
    value = far(mine, theirs)
    yield Row(
        "the last 20 ancestral steps, without their noise",
        "ldmlr_published.sample_published",
        LDMLR,
        "model/ddpm_conditional.py, p_sample_loop",
        value[0],
        None,
        value[1],
        "rounding, fed back through 20 steps of a network that is not trained",
    )
    text, own = (peers.unpacked(LDMLR) / "model/metrics.py").read_text(), {}
    exec(text[text.index("def get_mmf_idx") : text.index("# Original Code")], own)
    counts = np.arange(1, 301)
    mine = np.concatenate([np.full(len(c), i) for i, c in enumerate(bands(counts).values())])[
        np.argsort(np.concatenate(list(bands(counts).values())))
    ]
    value = far(mine, [own["get_mmf_idx"](int(n)) for n in counts])
    yield Row(
        "band of a class of 1 to 300 images",
        "data.bands",
        LDMLR,
        "model/metrics.py, get_mmf_idx",
        value[0],
        None,
        value[1],
        "a class of exactly 100 images is among the many there, medium here and in OLTR's rule; for which "
        "classes features are made goes by class number there on CIFAR",
    )


def _copy_in_order(theirs, ours):  # weights of the released network into the rebuilt one, by order and shape
    known, mine = [v for n, v in theirs.named_parameters()], ours.state_dict()
    order = _published_order(theirs, ours)
    assert sorted(map(id, order.values())) == sorted(map(id, known)), "a weight has no counterpart"
    for name, v in order.items():
        mine[name] = v.detach().reshape(mine[name].shape).clone()
    ours.load_state_dict(mine)


def _published_order(t, o):  # name in ours -> tensor of theirs
    pairs = {
        "enter": t.init_conv,
        "time.0": t.time_mlp[1],
        "time.2": t.time_mlp[3],
        "label": t.label_emb,
        "leave": t.final_conv,
    }
    blocks = [("middle.0", t.mid_block1), ("middle.2", t.mid_block2), ("last", t.final_res_block)]
    attentions = [("middle.1", t.mid_attn)]
    for side, levels in (("down", t.downs), ("up", t.ups)):
        for i, (one, two, attention, out) in enumerate(levels):
            blocks += [(f"{side}.{i}.0", one), (f"{side}.{i}.1", two)]
            attentions += [(f"{side}.{i}.2", attention)]
            pairs[f"{side}.{i}.3"] = out[1] if isinstance(out, nn.Sequential) else out
    found = {f"{n}.{w}": p for n, module in pairs.items() for w, p in module.named_parameters()}
    for n, r in blocks:
        for part, module in (
            ("scale_shift.1", r.mlp[1]),
            ("conv1", r.block1.proj),
            ("norm1", r.block1.norm),
            ("conv2", r.block2.proj),
            ("norm2", r.block2.norm),
            ("shortcut", r.res_conv),
        ):
            found |= {f"{n}.{part}.{w}": p for w, p in module.named_parameters()}
    for n, r in attentions:
        inner = r.fn.fn
        found |= {f"{n}.norm.gain": r.fn.norm.g, f"{n}.qkv.weight": inner.to_qkv.weight}
        out = inner.to_out
        if isinstance(out, nn.Sequential):
            found |= {f"{n}.out.0.{w}": p for w, p in out[0].named_parameters()} | {f"{n}.out.1.gain": out[1].g}
        else:
            found |= {f"{n}.out.{w}": p for w, p in out.named_parameters()}
    return found


def edm_rows(peers):
    "Karras et al.'s preconditioning, loss and noise levels"
    files = {n: (peers.unpacked(EDM) / f"training/{n}.py").read_text() for n in ("networks", "loss")}
    own = {"torch": torch, "DhariwalUNet": lambda **k: _Plain(net)}
    for text, start in ((files["networks"], "class EDMPrecond"), (files["loss"], "class EDMLoss")):
        exec(text[text.index(start) :].split("\n#----")[0], own)  # without what pickles their classes
    torch.manual_seed(0)
    net, o, b = Toy(), build_objective("edm"), 16
    wrapped, loss = own["EDMPrecond"](8, 2), own["EDMLoss"]()
    draws = torch.randn(b, 1, 1, 1)
    sigma = (draws * 1.2 - 1.2).exp()
    t = (sigma.log() / 4).flatten()
    value = far(o.draw(torch.special.ndtr(draws.flatten())), t)
    yield Row(
        "what the network is told of σ",
        "diffusion.EDM.draw",
        EDM,
        "training/loss.py, EDMLoss; networks.py, c_noise",
        value[0],
        None,
        value[1],
    )
    x0, noise, y = torch.randn(b, 2, 8, 8).clamp(-1, 1), torch.randn(b, 2, 8, 8), torch.full((b,), 4)
    x = x0 + sigma * noise
    model = NoiseModel(net, o, 4)
    yield Row(
        "denoised image",
        "diffusion.EDM.x0",
        EDM,
        "training/networks.py, EDMPrecond",
        *both(lambda v: o.x0(model(v, t, y), v, t), lambda v: wrapped(v, sigma), x),
    )
    part = NoisyBatch(x0, y, y, t, noise, x, torch.zeros(b))

    def theirs():
        with patch("torch.randn", lambda *a, **k: draws), patch("torch.randn_like", lambda v: noise):
            return loss(wrapped, x0).mean()

    yield Row(
        "loss",
        "diffusion.diffusion_loss",
        EDM,
        "training/loss.py, EDMLoss",
        *of_weights(net, lambda: diffusion_loss(model, part)[0], theirs),
    )
    text = (peers.unpacked(EDM) / "generate.py").read_text()
    own, seen = {"torch": torch, "np": np}, []
    exec(text[text.index("def edm_sampler") : text.index("# Generalized ablation")], own)

    class Still(nn.Module):
        sigma_min, sigma_max = 0, float("inf")

        def round_sigma(self, s):
            return torch.as_tensor(s)

        def forward(self, x, s, c=None):
            seen.append(float(s))
            return x * 0

    own["edm_sampler"](Still(), torch.zeros(1, 1, 2, 2), num_steps=1000)
    levels = torch.tensor(sorted(set(seen)), dtype=torch.float64)
    value = far(noise_ratios("karras") / levels, torch.ones(1000))
    yield Row(
        "1000 noise levels of the sampler (relative)",
        "diffusion.noise_ratios",
        EDM,
        "generate.py, edm_sampler",
        value[0],
        None,
        1.0,
    )


class _Plain(nn.Module):  # the toy network as EDM calls it
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, **k):
        return self.net(x, t, class_labels=torch.full((len(x),), self.net.k))[0]


def min_snr_rows(peers):
    "Hang et al.'s schedules, targets and weights"
    m = peers.load(MIN_SNR, "guided_diffusion.gaussian_diffusion")
    torch.manual_seed(0)
    net, b = Toy(), 16
    x0, noise, t = torch.randn(b, 2, 8, 8).clamp(-1, 1), torch.randn(b, 2, 8, 8), torch.randint(1, 990, (b,))
    y = torch.full((b,), 4)
    for schedule in ("linear", "cosine"):
        beta = m.get_named_beta_schedule(schedule, 1000)
        bar = np.cumprod(1 - beta)
        value = far(1 / (1 + noise_ratios(schedule).numpy() ** 2), bar)
        yield Row(
            f"{schedule} schedule, ᾱ",
            "diffusion.noise_ratios",
            MIN_SNR,
            "guided_diffusion/gaussian_diffusion.py, get_named_beta_schedule",
            value[0],
            None,
            value[1],
        )
        for kind, mean, key in (("eps", "EPSILON", "min_snr"), ("v", "VELOCITY", "vmin_snr")):
            for gamma in (0.0, 5.0):
                process = m.GaussianDiffusion(
                    betas=beta,
                    model_mean_type=m.ModelMeanType[mean],
                    loss_type=m.LossType.MSE,
                    model_var_type=m.ModelVarType.FIXED_LARGE,
                    mse_loss_weight_type=f"{key}_{gamma:g}" if gamma else "constant",
                )
                o = build_objective(kind, schedule, gamma)
                model, (alpha, sigma) = NoiseModel(net, o, 4), o.scales(t.float())
                part = NoisyBatch(x0, y, y, t.float(), noise, alpha * x0 + sigma * noise, torch.zeros(b))

                def theirs(process=process):
                    def run(x, s):
                        return net(x, s, y=y)

                    return process.training_losses(run, x0, t, noise=noise)["loss"].mean()

                yield Row(
                    f"loss, {kind}, {schedule}" + (f", min-SNR γ = {gamma:g}" if gamma else ""),
                    "diffusion.diffusion_loss",
                    MIN_SNR,
                    "guided_diffusion/gaussian_diffusion.py, training_losses",
                    *of_weights(net, lambda model=model, part=part: diffusion_loss(model, part)[0], theirs),
                )


ROOMS = (
    data_rows,
    ldam_rows,
    network_rows,
    softmax_rows,
    smoothing_rows,
    decoupling_rows,
    class_balanced_rows,
    angular_rows,
    cbdm_rows,
    ldmlr_rows,
    edm_rows,
    min_snr_rows,
)


def measure(folder):  # -> rows, sentences about what was skipped, commits by repository
    "All rows that the folder allows"
    peers, rows, skipped = Peers(folder), [], []
    for room in ROOMS:
        try:
            rows += list(room(peers))
        except Missing as e:
            skipped.append(f"{room.__doc__}: {e}.")
    return rows, skipped, {r: peers.commit(r) for r in dict.fromkeys(row.repository for row in rows)}


def page(rows, skipped, commits):  # -> Markdown
    "The table"

    def show(v):
        return "–" if v is None else "0" if v == 0 else f"{v:.1e}"

    agree = sum(r.agrees for r in rows)
    lines = [
        "# Beside the authors' code",
        "",
        f"{len(rows)} quantities on equal tensors, float32 on a CPU: the greatest absolute difference of the value "
        f"and, where there is one, of the gradient (of the inputs, or of the weights of a network). {agree} agree to "
        "rounding (1e-4 of the size of the quantity); of the others the last column says how they part. Fetched code "
        "is run, never copied.",
        "",
        f"torch {torch.__version__}, {date.today()}, `python benchmarks/references.py FOLDER "
        "results/references/README.md`, where FOLDER holds a checkout or a bare clone of each repository, called "
        "owner+name.",
        "",
        "| repository | commit |",
        "|---|---|",
        *(f"| {r} | {c[:12]} |" for r, c in commits.items()),
        "",
        "| quantity | ltnb | reference | value | gradient | agrees | note |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.quantity} | `{r.ours}` | {r.repository.split('/')[1]}: {r.theirs} | {show(r.value)} | "
        f"{show(r.gradient)} | {'yes' if r.agrees else 'no'} | {r.note} |"
        for r in rows
    ]
    return "\n".join([*lines, *(["", "Skipped:", "", *(f"- {s}" for s in skipped)] if skipped else [])]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    found = measure(Path(sys.argv[1]))
    text = page(*found)
    if len(sys.argv) == 3:
        Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
        Path(sys.argv[2]).write_text(text)
    print(text)
