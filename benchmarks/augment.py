"""Views a second of 32 x 32 images: a batch at once, and torchvision on PIL images one by one, in one run.

python benchmarks/augment.py [THREADS]
"""

import sys
import time

import numpy as np
import torch
import torchvision
from ltnb.augment import Augment, beta_draw, cutmix, mixup
from ltnb.core import cpu_flags, generator
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

BS = 128
PAD = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
THEIRS = {
    "crop+flip": PAD,
    "crop+flip+autoaugment": [*PAD, T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)],
    "crop+flip+randaugment": [*PAD, T.RandAugment()],
}


def photographs(n):
    "Smooth images with a little noise"
    x = (
        torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=generator("bench")), size=32, mode="bilinear")
        * 220
    )
    return (x + 35 * torch.rand(n, 3, 32, 32, generator=generator("noise"))).clamp(0, 255).to(torch.uint8)


def rates(*fs, rounds=7, seconds=0.3):
    "Images a second of each function, taking turns; the median of the rounds"
    out = [[] for _ in fs]
    for f in fs:
        f()
    for _ in range(rounds):
        for f, rate in zip(fs, out, strict=True):
            k, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                k, _ = k + 1, f()
            rate.append(k * BS / (time.perf_counter() - start))
    return np.median(out, 1)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = photographs(BS)
    there, labels, g = x.to(device), torch.arange(BS, device=device), generator("views", device=device)
    arrays = list(x.permute(0, 2, 3, 1).contiguous().numpy())
    pictures = [Image.fromarray(a) for a in arrays]

    def timed(f):
        f()
        if device == "cuda":
            torch.cuda.synchronize()

    chip = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(
        f"32 x 32 RGB, batches of {BS} on {chip}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{torch.get_num_threads()} thread(s), {' '.join(cpu_flags()) or 'no known flags'}; images a second"
    )
    print(f"{'policy':34}{'batched':>10}{'PIL':>10}{'ratio':>8}{'array-PIL-tensor':>18}{'ratio':>8}")
    for names, steps in THEIRS.items():
        view, mine = T.Compose(steps), Augment(names)
        a, b, c = rates(
            lambda mine=mine: timed(lambda: mine(there, g)),
            lambda view=view: [view(p) for p in pictures],
            lambda view=view: torch.stack([pil_to_tensor(view(Image.fromarray(p))) for p in arrays]),
        )
        print(f"{names:34}{a:10.0f}{b:10.0f}{a / b:8.1f}{c:18.0f}{a / c:8.1f}")
    more = {
        "crop+flip+cutout": Augment("crop+flip+cutout"),
        "crop+flip+autoaugment+cutout": Augment("crop+flip+autoaugment+cutout"),
        "mixup": lambda x, g: mixup(x, labels, g, beta_draw(1.0, 0)),
        "cutmix": lambda x, g: cutmix(x, labels, g, beta_draw(1.0, 0)),
    }
    for names, f in more.items():
        rate = rates(lambda f=f: timed(lambda: f(there, g)))[0]
        print(f"{names:34}{rate:10.0f}")
