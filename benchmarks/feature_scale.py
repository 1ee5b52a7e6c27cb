"""LDMLR from frozen features at the size of ImageNet-LT: minutes and memory.

    python benchmarks/feature_scale.py            # 115,846 x 2048, 1000 classes, 100 features a class, one seed

The features are made here: 1000 class means and noise behind a ReLU, with the class counts of a Pareto profile from 1280
down to 5. Accuracy on them says nothing; what is measured is the wall time of each stage and the peak of resident memory.
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np


def make(path:Path, n:int, d:int, k:int, n_test:int):
    "An npz of features with their head"
    rng = np.random.default_rng(0)
    counts = np.maximum(5, (1280 * np.linspace(0, 1, k) ** 6).astype(int)[::-1])
    low, high = 0., 50. # a power that gives the asked total
    for _ in range(60):
        p = (low + high) / 2
        counts = np.maximum(5, (1280 * (1 - np.arange(k) / k) ** p)).astype(int)
        low, high = (p, high) if counts.sum() > n else (low, p)
    counts[0] += n - counts.sum()
    means = rng.standard_normal((k, d), dtype=np.float32)
    labels, test = np.repeat(np.arange(k), counts), np.repeat(np.arange(k), n_test // k)
    draw = lambda y: np.maximum(means[y] * .5 + rng.standard_normal((len(y), d), dtype=np.float32), 0)
    train = draw(labels)
    weight = np.stack([train[labels == c].mean(0) for c in range(k)])
    weight -= weight.mean(0)
    np.savez(path, train_features=train, train_labels=labels, test_features=draw(test), test_labels=test, fc_weight=weight, fc_bias=np.log(counts / counts.sum()).astype("f4") - (weight**2).sum(1) / 2)
    return counts


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(n=115846, d=2048, k=1000, test=50000, per_class=100).items(): ap.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts = make(folder / "f.npz", a.n, a.d, a.k, a.test)
        print(f"{counts.sum():,} x {a.d} features, {a.k} classes, {counts.max()} to {counts.min()} items; {a.test:,} test features")
        t = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ltnb", "run", "ldmlr", "--plain", "--quiet", "--features", folder / "f.npz", "--per-class", str(a.per_class), "--out", folder / "run"], capture_output=True, text=True)
        seconds = time.perf_counter() - t
        if done.returncode: sys.exit(done.stderr)
        stages = [json.loads(l) for l in (folder / "run" / "timing.jsonl").read_text().splitlines()]
        print("\n".join(f"{s['stage']:16} {s['seconds']:8.1f} s" for s in stages))
        print(f"{'whole command':16} {seconds:8.1f} s, peak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GB")
        print(f"machine: {json.loads((folder / 'run' / 'environment.json').read_text())}")


if __name__ == "__main__": main()
