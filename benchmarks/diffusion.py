"""Image diffusion: our training loop against a plain one, our sampler against 1,000 ancestral steps, in one run each.

    python benchmarks/diffusion.py training cifar10_lt100.npz --unet medium --bs 32 --n-steps 8
    python benchmarks/diffusion.py sampling m --per-class 60

`training`: the plain loop is what most codes have: the same U-Net in 32-bit floats, eager, contiguous, a DataLoader
with two workers that decodes and flips one image at a time, Adam and EMA tensor by tensor. Ours is switched on a part
at a time. Every variant trains a step in turn; the rates are medians, without the first steps. The multiplications and
additions of a step are counted by torch, and their rate is printed, with --peak as a share of the chip's own
(989 TFLOP/s for an H100 in bf16).

`sampling`: `m` is a finished directory of `ltnb run diffusion`. Each sampler makes the same plan from the same noise.
FID and KID are those to the test images in the features of the run's judge, and say nothing beyond this table;
recognised and copied images are printed beside them, and the same for test images. With --inception and the weights of
torch-fidelity, the literature's FID and KID are printed too.
"""

import argparse
import copy
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from ltnb.core import choose_precision, cpu_flags
from ltnb.progress import Progress
from ltnb.data import LongTail
from ltnb.noise import build_objective
from ltnb.diffusion import Denoising, _Training, build_unet
from ltnb.samplers import Sampling, sample_images
from ltnb.judge import Judge
from ltnb.generate import find_model, training_data
from ltnb.metrics import generative_scores, inception_features
from ltnb.classifier import Classifier, encode
from ltnb.jobs import make_plan
from ltnb.team import Where
from PIL import Image
from torchvision import transforms


class PilSet(torch.utils.data.Dataset):
    "What the reference codes do for an item"

    def __init__(self, images, labels):
        self.images, self.labels = images.transpose(0, 2, 3, 1), labels
        self.transform = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i].squeeze())), int(self.labels[i])


class Plain:
    "DDPM training as the reference codes have it"

    def __init__(self, net, data, bs, device):
        self.net, self.device, self.n_classes = net.to(device).train(), device, data.n_classes
        self.optimizer, self.average = (
            torch.optim.Adam(net.parameters(), lr=2e-4, fused=False, foreach=False),
            copy.deepcopy(net),
        )
        self.alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).to(device)
        self.loader = torch.utils.data.DataLoader(
            PilSet(data.train.images, data.train.labels),
            bs,
            shuffle=True,
            num_workers=2,
            drop_last=True,
            pin_memory=device == "cuda",
            persistent_workers=True,
        )
        self.batches = iter(self.loader)

    def step(self):
        try:
            x, y = next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            x, y = next(self.batches)
        x, y = x.to(self.device), y.to(self.device)
        t, eps = torch.randint(1000, (len(x),), device=self.device), torch.randn_like(x)
        a = self.alpha_bar[t][:, None, None, None]
        y = torch.where(torch.rand(len(x), device=self.device) < 0.1, self.n_classes, y)
        loss = F.mse_loss(self.net(a.sqrt() * x + (1 - a).sqrt() * eps, t, class_labels=y).sample, eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=False)
        self.optimizer.step()
        with torch.no_grad():
            for p, q in zip(self.average.parameters(), self.net.parameters(), strict=True):
                p.mul_(0.9999).add_(q, alpha=1e-4)


class Ours:
    "A step of `train_diffusion`"

    def __init__(self, net, data, bs, device, precision, channels_last, compiled):
        real = data.train.images, data.train.labels, data.n_classes
        how = Denoising(diff_bs=bs, diff_lr=2e-4, flip=True, channels_last=channels_last)
        where = Where(device, precision, compiled)
        self.t, self.n = _Training(net, build_objective("eps"), *real, how, where), 0

    def step(self):
        self.t.step(self.n)
        self.n += 1


def machine(device):
    chip = torch.cuda.get_device_name() if device == "cuda" else " ".join(cpu_flags())
    return f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def timed(loop, n, device):  # -> seconds of n steps
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        loop.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training(a):
    from torch.utils.flop_counter import FlopCounterMode

    data, best = LongTail.digits() if a.data == "digits" else LongTail.npz(a.data), choose_precision("auto", a.device)
    shape = data.train.images.shape[1:]
    ours = {
        "images on the device, contiguous, fp32": ("fp32", False, False),
        "+ channels_last": ("fp32", True, False),
        f"+ {best}": (best, True, False),
        f"{best}, contiguous": (best, False, False),
    }
    if a.compiled:
        ours[f"{best}, channels_last, compiled"] = (best, True, True)

    def new():
        return build_unet(a.unet, shape[1], shape[0], data.n_classes)

    loops = {"plain: DataLoader, contiguous, fp32": Plain(new(), data, a.bs, a.device)} | {
        name: Ours(new(), data, a.bs, a.device, *how) for name, how in ours.items()
    }
    with FlopCounterMode(display=False) as counter:
        loops["images on the device, contiguous, fp32"].step()
    flops, seconds = counter.get_total_flops(), {n: [] for n in loops}
    for i in range(a.n_steps + 2):
        for name, loop in loops.items():
            spent = timed(loop, a.repeat, a.device)
            if i >= 2:
                seconds[name].append(spent / a.repeat)
    print(
        f"unet {a.unet}, {sum(p.numel() for p in new().parameters()) / 1e6:.1f} M parameters, images {shape}, "
        f"batches of {a.bs}, median of {a.n_steps} x {a.repeat} steps; {machine(a.device)}"
    )
    print(f"{flops / a.bs / 1e9:.2f} GFLOP an image and training step")
    rate = {n: a.bs / statistics.median(s) for n, s in seconds.items()}
    plain = rate["plain: DataLoader, contiguous, fp32"]
    for n, r in rate.items():
        print(
            f"  {n:<40} {r:8.1f} images/s   x {r / plain:5.2f}   {r * flops / a.bs / 1e12:7.3f} TFLOP/s"
            + (f"   {r * flops / a.bs / 1e10 / a.peak:5.1f} % of the peak" if a.peak else "")
        )
    if a.device == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")


def sampling(a):
    model, run = find_model(a.run)
    data, why = training_data(run)
    if data is None:
        raise SystemExit(why)
    judge, precision = Judge(Classifier.load(run / "judge"), data, a.device), choose_precision("auto", a.device)
    plan = make_plan(np.where(model.counts > 0, a.per_class, 0))
    print(
        f"{run.name}: {len(plan):,} images of {model.image_shape}, guidance {a.guidance_scale:g}, {precision}; "
        f"{machine(a.device)}"
    )
    real, first, features = (
        judge(data.test.images, data.test.labels, "test", 0),
        None,
        {"judge": lambda x: encode(judge.clf, x, device=a.device).numpy()},
    )
    if a.inception:
        features["inception"] = lambda x: inception_features(x, a.inception, device=a.device)
    real_features = {name: f(data.test.images) for name, f in features.items()}
    for sampler, steps in [(s.split(":")[0], int(s.split(":")[1])) for s in a.samplers.split(",")]:
        how, where = Sampling(sampler, steps, a.guidance_scale), Where(a.device, precision)
        sample_images(model, plan[:256], how, where, sample_steps=2)  # warm
        start = time.perf_counter()
        images, _ = sample_images(model, plan, how, where)
        spent = time.perf_counter() - start
        first = first or spent
        row = judge(images, plan[:, 0], "made", 0)
        more = "   ".join(
            f"   {name}: FID {g.fid:.2f}, KID {g.kid:.4f}"
            for name, f in features.items()
            for g in [generative_scores(real_features[name], f(images.numpy()), name)]
        )
        print(
            f"  {sampler:<6} {steps:5} steps  {spent:8.1f} s  x {first / spent:6.1f}   recognised {row['all']:6.1%}"
            f"   copies {row['copies']:6.1%}{more}",
            flush=True,
        )
    half = np.arange(len(data.test)) % 2 == 0
    floor = "".join(
        f"   {name}: FID {g.fid:.2f}, KID {g.kid:.4f}"
        for name, x in real_features.items()
        for g in [generative_scores(x[half], x[~half], name)]
    )
    print(
        f"  {'test images, half against half':<36}   recognised {real['all']:6.1%}   "
        f"copies {real['copies']:6.1%}{floor}"
    )


if __name__ == "__main__":
    Progress.quiet = True
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = ap.add_subparsers(required=True)
    t, s = sub.add_parser("training"), sub.add_parser("sampling")
    t.set_defaults(call=training)
    t.add_argument("data", help="an .npz of ltnb, or digits")
    t.add_argument("--unet", default="medium")
    t.add_argument("--bs", type=int, default=32)
    t.add_argument("--n-steps", type=int, default=8)
    t.add_argument("--repeat", type=int, default=1, help="steps timed together")
    t.add_argument("--compiled", action="store_true")
    t.add_argument("--peak", type=float, help="TFLOP/s of the chip")
    s.set_defaults(call=sampling)
    s.add_argument("run")
    s.add_argument("--per-class", type=int, default=60)
    s.add_argument("--guidance-scale", type=float, default=1.0)
    s.add_argument("--samplers", default="ddpm:1000,ddpm:100,ddpm:20,ddim:20,dpm++:20,heun:10,dpm++:10,dpm++:5")
    s.add_argument("--inception", metavar="PATH", help="file of torch-fidelity's Inception weights")
    for p in (t, s):
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    a.call(a)
