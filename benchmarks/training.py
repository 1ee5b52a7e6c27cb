"""Our training loop against a plain torchvision one: same network, same images, same recipe, one process, one run.

    python benchmarks/training.py cifar10_lt100.npz --arch resnet8 --n-epochs 3

The plain loop is what most long-tail codes have: PIL images, torchvision transforms, a DataLoader with two workers,
32-bit floats, contiguous tensors. Ours is switched on a part at a time, so that the shares of loader, layout and number
format can be told apart. Each variant trains one epoch in turn; the rates are medians over the epochs after the first.
Accuracy is printed for the first and the last variant.
"""

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from ltnb.augment import Augment
from ltnb.core import choose_precision, cpu_flags, generator
from ltnb.data import LongTail
from ltnb.losses import build_loss
from ltnb.models import build_model
from ltnb.classifier import Classifier, pixel_stats
from ltnb.batches import Batches, epoch_order
from ltnb.team import Where, train_step
from ltnb.training import lr_factor, view
from PIL import Image
from torchvision import transforms


class PilSet(torch.utils.data.Dataset):
    "What torchvision's CIFAR10 does for an item"

    def __init__(self, images, labels, mean, std):
        self.images, self.labels = images.transpose(0, 2, 3, 1), labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def plain_epoch(clf, optimizer, loader, device):
    clf.train()
    for x, y in loader:
        loss = F.cross_entropy(clf.net(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_epoch(clf, optimizer, data, loss, epoch, bs, how):
    (batches, y), (layout, precision) = data, how
    clf.train()
    order = epoch_order(y, 1.0, generator("bench", epoch, device=y.device)).split(bs)
    for i, x in enumerate(batches.follow(order)):
        x, parts = view(clf, x, ("bench", epoch, i), Augment("crop+flip"))
        shown = x.contiguous(memory_format=layout), parts
        train_step(clf.net, optimizer, loss, shown, y[order[i]], where=Where(precision=precision))


@torch.no_grad()
def accuracy(clf, data, device):
    return (clf.logits(data.test.images, device=device).argmax(1).cpu().numpy() == data.test.labels).mean()


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("archive")
    ap.add_argument("--arch", default="resnet8")
    ap.add_argument("--n-epochs", type=int, default=3)
    ap.add_argument("--bs", type=int, default=128)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    data, best = LongTail.npz(a.archive), choose_precision("auto", a.device)
    mean, std = pixel_stats(data.train.images)
    y, n = torch.from_numpy(data.train.labels).to(a.device), len(data.train)
    loader = torch.utils.data.DataLoader(
        PilSet(data.train.images, data.train.labels, mean, std),
        a.bs,
        shuffle=True,
        num_workers=2,
        pin_memory=a.device == "cuda",
    )
    loss, batches = build_loss("cross_entropy", data.counts).to(a.device), Batches(data.train.images, a.device)
    variants = {
        "plain: DataLoader, contiguous, fp32": None,
        "images in memory, contiguous, fp32": (torch.contiguous_format, "fp32"),
        "+ channels_last": (torch.channels_last, "fp32"),
        f"+ {best}": (torch.channels_last, best),
    }
    clfs, optimizers, rates = {}, {}, {v: [] for v in variants}
    for v, how in variants.items():
        clfs[v] = Classifier(build_model(a.arch, data.n_classes), data.class_names, (3, 32, 32), mean, std, a.arch).to(
            a.device, memory_format=how[0] if how else torch.contiguous_format
        )
        optimizers[v] = torch.optim.SGD(
            clfs[v].net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-4
        )
    for epoch in range(a.n_epochs):
        for v, how in variants.items():
            for group in optimizers[v].param_groups:
                group["lr"] = 0.1 * lr_factor("cosine", epoch, a.n_epochs)
            if a.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            if how is None:
                plain_epoch(clfs[v], optimizers[v], loader, a.device)
            else:
                our_epoch(clfs[v], optimizers[v], (batches, y), loss, epoch, a.bs, how)
            if a.device == "cuda":
                torch.cuda.synchronize()
            rates[v].append(n / (time.perf_counter() - start))
    names = list(variants)
    rate = {v: statistics.median(r[1:] or r) for v, r in rates.items()}
    chip = torch.cuda.get_device_name() if a.device == "cuda" else " ".join(cpu_flags())
    print(
        f"{a.arch}, {n:,} images, batches of {a.bs}, {a.n_epochs} epochs; {chip}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )
    for v in names:
        print(f"  {v:<38} {rate[v]:8.0f} images/s   x {rate[v] / rate[names[0]]:.2f}")
    print(
        f"test accuracy: plain {accuracy(clfs[names[0]], data, a.device):.3f}, "
        f"ours {accuracy(clfs[names[-1]], data, a.device):.3f}"
    )
    if a.device == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
    else:
        import resource

        own, workers = (
            resource.getrusage(w).ru_maxrss / 1024 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(f"peak memory of the process: {own:.0f} MB; of its largest worker: {workers:.0f} MB")
