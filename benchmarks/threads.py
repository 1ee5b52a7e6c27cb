"""Threads, and how they wait: whole commands on an idle machine and beside a busy core, one after the other in one run.

    python benchmarks/threads.py --features features.npz

Each command is a process of its own, imports included. `auto` is what ltnb chooses; the others are set by the user's
variables. A core is kept busy by one Python process, which runs before the command starts (and, with `--late S`, in one
more column, S seconds after it). The table's ratios hold for this run: idle time over the best idle time of the same
work, and busy time over the same row's idle time. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")
WAYS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, libgomp's default": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
    "2 threads, as ltnb waits": {"OMP_NUM_THREADS": "2"},
    "--threads auto": {},
}


def commands(features, quick):
    "name -> arguments of the command"

    def steps(n):
        return str(max(n // 30, 2) if quick else n)

    works = {
        "demo, two seeds": ["demo", "--seeds", "1" if quick else "2"],
        "digits diffusion": [
            "run",
            "diffusion",
            "--plain",
            "--n-steps",
            steps(150),
            "--per-class",
            steps(60),
            "--judge-epochs",
            "1" if quick else "3",
        ],
    }
    if features:
        works["LDMLR on features"] = [
            "run",
            "ldmlr",
            "--plain",
            "--features",
            features,
            "--n-steps",
            steps(300),
            "--head-steps",
            steps(60),
            "--scratch-steps",
            steps(60),
        ]
    return works


@contextlib.contextmanager
def busy_core(after):
    "Another process computes from `after` seconds on; None keeps the machine idle"
    if after is None:
        yield
        return
    busy, over = [], threading.Event()

    def start():
        if not over.wait(after):
            busy.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))

    thread = threading.Thread(target=start)
    thread.start()
    if not after:
        thread.join()
    time.sleep(0 if after else 1)
    try:
        yield
    finally:
        over.set()
        thread.join()
        for p in busy:
            p.kill()
        for p in busy:
            p.wait()


def seconds(args, variables, after, limit):
    "(wall time, None beyond the limit; number of threads that the run says)"
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | variables
    with tempfile.TemporaryDirectory() as folder, busy_core(after):
        start = time.perf_counter()
        try:
            subprocess.run(
                [sys.executable, "-m", "ltnb", *args, "--quiet", "--out", folder + "/run"],
                env=env,
                check=True,
                timeout=limit,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return None, None
        took = time.perf_counter() - start
        return took, json.loads((Path(folder) / "run" / "environment.json").read_text())["threads"]["number"]


def row(name, how, times, numbers, best, limit):
    "A line of the table"
    idle, *others = times
    shown = [f"> {limit:.0f}" if t is None else f"{t:.1f}" for t in times]
    ratios = ["–" if None in (t, idle) else f"{t / idle:.2f}" for t in others]
    return [name, how, "/".join(map(str, numbers)), *shown, "–" if idle is None else f"{idle / best:.2f}", *ratios]


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--features", help="an .npz file of frozen features, for LDMLR")
    ap.add_argument("--quick", action="store_true", help="tiny settings, to see that it works")
    ap.add_argument("--late", type=float, help="also with a core that becomes busy so many seconds after the start")
    ap.add_argument(
        "--ways", help=f"which, by number, such as 0,4: {'; '.join(f'{i} {w}' for i, w in enumerate(WAYS))}"
    )
    ap.add_argument("--limit", type=float, default=240, help="seconds after which a command is stopped")
    a = ap.parse_args()
    ways = {w: WAYS[w] for i, w in enumerate(WAYS) if not a.ways or str(i) in a.ways.split(",")}
    moments = [None, 0.0] + ([a.late] if a.late else [])
    heads = [
        "work",
        "threads",
        "number",
        "idle, s",
        "busy, s",
        *(["busy later, s"] if a.late else []),
        "idle / best idle",
        "busy / idle",
        *(["later / idle"] if a.late else []),
    ]
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the start\n\n| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads), flush=True)
    for name, args in commands(a.features, a.quick).items():
        found = {how: [seconds(args, v, at, a.limit) for at in moments] for how, v in ways.items()}
        best = min(r[0][0] for r in found.values() if r[0][0])
        for how, results in found.items():
            times, numbers = zip(*results, strict=True)
            said = dict.fromkeys("–" if n is None else n for n in numbers)
            print(f"| {' | '.join(row(name, how, times, said, best, a.limit))} |", flush=True)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")
