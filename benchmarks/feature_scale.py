"""LDMLR from frozen features at the size of ImageNet-LT and of iNaturalist 2018: minutes and memory.

    python benchmarks/feature_scale.py                    # 115,846 x 2048, 1000 classes, 100 features a class, one seed
    python benchmarks/feature_scale.py --set inaturalist  # 437,513 x 64, 8142 classes, the recipe's 66 a class

The features are made here: class means and noise behind a ReLU, with class counts that fall from the set's largest
class to its smallest one. Accuracy on them says nothing; what is measured is the wall time of each stage of the whole
recipe (label shift, LDMLR and every control) and the peak of resident memory.
"""

import argparse, datetime, json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

SETS = {
    "imagenet": dict(n=115846, d=2048, k=1000, most=1280, least=5, test=50000, per_class=100),
    "inaturalist": dict(n=437513, d=64, k=8142, most=1000, least=2, test=24426, per_class=0),
}


def profile(n: int, k: int, most: int, least: int):
    "Class counts that fall from most to least and add up to n: least (most / least)^(u^q), u from 1 to 0"
    low, high = 0.0, 100.0  # the q that gives the asked total
    for _ in range(60):
        q = (low + high) / 2
        counts = np.rint(least * (most / least) ** (np.linspace(1, 0, k) ** q)).astype(int)
        low, high = (q, high) if counts.sum() > n else (low, q)
    room = np.flatnonzero((counts > least) & (counts < most))  # the few that rounding left over
    counts[room[: abs(n - counts.sum())]] += np.sign(n - counts.sum())
    return counts


def make(path: Path, n: int, d: int, k: int, most: int, least: int, n_test: int):
    "An npz of features with their head"
    rng = np.random.default_rng(0)
    counts = profile(n, k, most, least)
    means = rng.standard_normal((k, d), dtype=np.float32)
    labels, test = np.repeat(np.arange(k), counts), np.repeat(np.arange(k), n_test // k)

    def draw(y):
        return np.maximum(means[y] * 0.5 + rng.standard_normal((len(y), d), dtype=np.float32), 0)

    train = draw(labels)
    weight = np.add.reduceat(train, counts.cumsum() - counts) / counts[:, None].astype("f4")
    weight -= weight.mean(0)
    bias = np.log(counts / counts.sum()).astype("f4") - (weight**2).sum(1) / 2
    np.savez(
        path,
        train_features=train,
        train_labels=labels,
        test_features=draw(test),
        test_labels=test,
        fc_weight=weight,
        fc_bias=bias,
    )
    return counts


def commit():
    "The commit that is measured"
    here = Path(__file__).parent

    def ask(*args):
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True).stdout.strip()

    changed = " with changes" if ask("status", "--porcelain", "--", "../ltnb") else ""
    return (ask("rev-parse", "--short", "HEAD") or "unknown") + changed


def hardware():
    "Processor and memory"
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        cpu = next(l.split(":")[1].strip() for l in lines if l.startswith("model name"))
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    except (OSError, StopIteration):
        return "unknown"
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GB, load {os.getloadavg()[0]:.1f} at the start"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--set", choices=SETS, default="imagenet")
    for name in SETS["imagenet"]:
        ap.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the set's own")
    ap.add_argument("more", nargs="*", help="further options of ltnb run ldmlr, after --")
    a = ap.parse_args()
    s = {k: v if getattr(a, k) is None else getattr(a, k) for k, v in SETS[a.set].items()}
    print(f"commit {commit()}, {datetime.datetime.now():%Y-%m-%d}, {hardware()}")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"command: python {' '.join(sys.argv)}; OMP_NUM_THREADS={threads}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts = make(folder / "f.npz", s["n"], s["d"], s["k"], s["most"], s["least"], s["test"])
        print(
            f"{counts.sum():,} x {s['d']} features, {s['k']} classes, {counts.max()} to {counts.min()} items; "
            f"{s['test']:,} test features",
            flush=True,
        )
        per_class = ["--per-class", str(s["per_class"])] if s["per_class"] else []
        t = time.perf_counter()
        command = [sys.executable, "-m", "ltnb", "run", "ldmlr", "--plain", "--quiet", "--features", folder / "f.npz"]
        done = subprocess.run([*command, *per_class, "--out", folder / "run", *a.more], capture_output=True, text=True)
        seconds = time.perf_counter() - t
        if done.returncode:
            sys.exit(done.stderr)
        stages = [json.loads(l) for l in (folder / "run" / "timing.jsonl").read_text().splitlines()]
        print("\n".join(f"{s['stage']:16} {s['seconds']:8.1f} s" for s in stages))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{'whole command':16} {seconds:8.1f} s, of which {used.ru_utime + used.ru_stime:.1f} s on a processor "
            f"(the rest waited for one), peak memory {used.ru_maxrss / 2**20:.2f} GB; "
            f"load {os.getloadavg()[0]:.1f} at the end"
        )
        print(f"machine: {json.loads((folder / 'run' / 'environment.json').read_text())}")


if __name__ == "__main__":
    main()
