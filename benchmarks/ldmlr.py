"""Stages 2 and 3 of LDMLR, corrected against as released, on the same features in the same run.

    python benchmarks/ldmlr.py ldmlr_cifar10_if100_features.npz

The corrected form is run to its end (one seed: train, sample, refit). The released form (ltnb's own
`variant="published"`, which stands in for the authors' code) would take hours on a CPU: its training steps, sampling
steps and head epochs are timed and extrapolated to 201 passes, 1000 steps and 400 epochs. Its accuracy is not measured
here.
"""

import argparse, math, statistics, time
from pathlib import Path
from types import SimpleNamespace

import torch
from ltnb.core import choose_precision, cpu_flags
from ltnb.progress import Progress
from ltnb.heads import Features
from ltnb.latent import planned_counts, train_latent
from ltnb.ldmlr import LDMLR, LDMLRConfig, planned, refitting, sampled
from ltnb.ldmlr_published import published_head, sample_published, train_published
from ltnb.metrics import score
from ltnb.jobs import make_plan
from ltnb.recipe import Stage
from ltnb.refit import base_head, fit_heads
from ltnb.team import Where


def seconds(f):
    t = time.perf_counter()
    out = f()
    return time.perf_counter() - t, out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("features")
    ap.add_argument(
        "--steps",
        type=int,
        default=10,
        help="training steps of the released network to time, after 2 that are not counted",
    )
    a = ap.parse_args()
    Progress.quiet = True
    f, precision = Features.npz(a.features), choose_precision()
    n = len(f.train)

    import tempfile

    cfg = LDMLR().resolve(LDMLRConfig(features=a.features), f)
    base = base_head(f, refitting(cfg), 0)
    t_train, model = seconds(
        lambda: train_latent(
            f.train,
            f.train_labels,
            f.n_classes,
            n_steps=cfg.n_steps,
            diff_bs=cfg.diff_bs,
            diff_lr=cfg.diff_lr,
            width=cfg.diff_width,
            precision=precision,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(cfg, f, 0, Where(run=SimpleNamespace(path=Path(folder))))
        t_sample, made = seconds(lambda: sampled(stage, model, planned(cfg, f), f, base))
    t_head, heads = seconds(lambda: fit_heads(f, base, made.items, made.labels, refitting(cfg), 0))
    ours = t_train + t_sample + t_head
    accuracy = {
        k: score(z.argmax(1), f.test_labels, f.counts).all
        for k, z in (
            ("label shift", base.corrected(f.test)),
            ("ldmlr + label shift", heads["label shift"].corrected(f.test)),
        )
    }

    times, real = [], (f.train, f.train_labels, f.n_classes)

    def timed_steps():  # the difference of two trainings leaves out what happens once
        few, many = (
            seconds(lambda k=k: train_published(*real, n_steps=k, precision="fp32"))[0] for k in (2, 2 + a.steps)
        )
        times.append((many - few) / a.steps)

    for _ in range(2):
        timed_steps()
    step = statistics.median(times)
    net = train_published(f.train, f.train_labels, f.n_classes, n_steps=1)
    plan = make_plan(planned_counts(f.counts, ratio=0.2))
    few, many = (seconds(lambda k=k: sample_published(net, plan[:256], k))[0] for k in (1, 4))
    per_item_step = (many - few) / 3 / 256
    x, y = (
        torch.cat([f.train, torch.rand(len(plan), f.train.shape[1])]),
        torch.cat([f.train_labels, torch.from_numpy(plan[:, 0])]),
    )
    epoch = seconds(lambda: published_head(x, y, base, 5))[0] / 5
    steps = 201 * math.ceil(n / 256)
    released = steps * step + 1000 * len(plan) * per_item_step + 400 * epoch

    print(
        f"{a.features}: {n:,} x {f.train.shape[1]}, {f.n_classes} classes; CPU {' '.join(cpu_flags())}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; ours {precision}, released fp32"
    )
    print(
        f"corrected, measured:    train {t_train:6.1f} s ({cfg.n_steps} steps), sample {t_sample:5.1f} s "
        f"({len(made):,} items), two heads {t_head:5.1f} s: {ours:.1f} s"
    )
    print(
        f"released, extrapolated: train {steps * step / 3600:6.2f} h ({steps:,} steps of {step * 1000:.0f} ms), "
        f"sample {1000 * len(plan) * per_item_step / 3600:.2f} h ({len(plan):,} items, 1000 steps), "
        f"head {400 * epoch:.0f} s: {released / 3600:.2f} h"
    )
    print(
        f"ratio {released / ours:.0f}; accuracy of the corrected form "
        + ", ".join(f"{k} {v * 100:.2f}" for k, v in accuracy.items())
    )


if __name__ == "__main__":
    main()
