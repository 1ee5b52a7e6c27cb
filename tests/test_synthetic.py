"Generation as a job: killed, shared or extended, the same manifest; bad items out, copies found, memory flat."

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb import core
from ltnb.core import DataError, LtnbError, UsageError, load_tensors, stable_seed
from ltnb.runs import lock_file, unlock_file
from ltnb.files import ImageFiles
from ltnb.data import ImageSet, LongTail
from ltnb.jobs import Plan, bad_items, draw_items, item_id, item_noise, job_worker, make_plan
from ltnb.synthetic import ShardItems, Synthetic, job_summary, make_synthetic, mix, write_png
from ltnb.copies import copies, copy_threshold, flag_copies, near_copies
from warm import Command


class Stop(Exception):
    "A stand-in for a power cut"


def image(part, attempt=0):  # stand-ins that depend on the item alone, and are cheap
    h = (part[:, :1] * 1_000_003 + part[:, 1:] + 7 * attempt) * 2_654_435_761 + np.arange(1, 193) * 40_503_001
    return torch.from_numpy((h >> 9).astype(np.uint8).reshape(-1, 3, 8, 8))


def mortal(lives, log=None):  # dies when it is called once more
    left = [lives]

    def make(part):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        if log is not None:
            log.extend(part.tolist())
        return image(part)

    return make


def content(folder, names="*"):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob(names))}


def finish(folder, plan, lives=(), world=1, shard_size=4, log=None, **more):
    "Workers of all ranks that are killed after some shards each, then one that is not"
    for i, n in enumerate(lives):
        try:
            make_synthetic(folder, plan, mortal(n, log), "m", shard_size=shard_size, worker=(i % world, world), **more)
        except Stop:
            pass
    return make_synthetic(folder, plan, mortal(10**9, log), "m", shard_size=shard_size, **more)


plans = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(plans, st.integers(1, 7), st.lists(st.integers(0, 4), max_size=4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_any_kill_any_world_same_bytes(per_class, shard_size, lives, world):
    plan = make_plan(per_class)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        log = []
        finish(a, plan, shard_size=shard_size)
        finish(b, plan, lives, world, shard_size, log)
        assert content(a) == content(b), "no file more, none less, none different"
        assert sorted(log) == plan.tolist(), "each item is made once"


@given(st.lists(plans, min_size=2, max_size=4), st.integers(1, 6), st.lists(st.integers(0, 2), max_size=2))
@settings(max_examples=15, deadline=None)
def test_extended_plans(steps, shard_size, lives):
    "Plans that grow and shrink, in any order: nothing is made twice, and each manifest is that of a direct run"
    with tempfile.TemporaryDirectory() as a:
        log = []
        for i, per_class in enumerate(steps):
            plan = make_plan(per_class)
            made = finish(a, plan, lives, shard_size=shard_size + i, log=log)
            with tempfile.TemporaryDirectory() as b:
                finish(b, plan)
                assert content(a, "manifest.jsonl") == content(b, "manifest.jsonl")
            assert torch.equal(made.items, image(plan)) if len(plan) else not len(made)
        assert len(log) == len({tuple(p) for p in log})


@given(plans, st.integers(0, 600))
@settings(max_examples=25, deadline=None)
def test_draws_are_those_of_the_slow_way(per_class, more):
    plan = make_plan([*per_class, more + 1])[::3]

    def slow(key, plan, draw):
        out = None
        for c, k in plan.tolist():
            v = np.asarray(draw(np.random.Generator(np.random.Philox(stable_seed(*key, c, k // 256))), 256, c))[k % 256]
            out = [v] if out is None else [*out, v]
        return np.array(out).reshape(len(plan), 2)

    def draw(g, n, c):
        return g.standard_normal((n, 2)) + c

    assert np.array_equal(draw_items(("a", 1), plan, draw), slow(("a", 1), plan, draw))
    assert make_plan(per_class).tolist() == [[c, k] for c, n in enumerate(per_class) for k in range(n)]


def test_empty_and_wrong_plans(tmp_path):
    assert make_plan([]).shape == (0, 2) and item_noise(("a",), make_plan([0]), (3,)).shape == (0, 3)
    assert len(make_synthetic(tmp_path, make_plan([0, 0]), image, "m")) == 0
    for bad in ([(0, 1), (0, 0)], [(0, 0), (0, 0)], [(0, -1)], [(0, 10**6)], [0, 1]):
        with pytest.raises(UsageError, match="plan"):
            make_synthetic(tmp_path / "bad", bad, image, "m")
    with pytest.raises(UsageError, match="negative"):
        make_plan([-1])
    with pytest.raises(UsageError, match="whole"):
        make_plan([1.5])
    for more, word in (
        ({"attempts": 0}, "attempts"),
        ({"shard_size": 0}, "shard_size"),
        ({"other": "ask"}, "remake"),
        ({"worker": (2, 2)}, "worker"),
    ):
        with pytest.raises(UsageError, match=word):
            make_synthetic(tmp_path / "bad", make_plan([2]), image, "m", **more)
    with pytest.raises(LtnbError, match="gave 1 items"):
        make_synthetic(tmp_path / "few", make_plan([2]), lambda part: image(part)[:1], "m")
    with pytest.raises(UsageError, match="'sha'"):
        make_synthetic(tmp_path / "own", make_plan([1]), lambda part: (image(part), [{"sha": "x"}]), "m")


# --- plans with columns


def edited(part, attempt=0):  # stand-ins that depend on all columns
    assert isinstance(part, Plan)
    level = np.array([len(s) + n for s, n in zip(part["source_id"], part["level"].tolist(), strict=True)])
    return image(part.pairs, attempt) ^ torch.from_numpy(level.astype(np.uint8))[:, None, None, None]


columned = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from([20, 50, 90]), st.sampled_from(["a.png", "é", ""])),
    min_size=1,
    max_size=12,
    unique=True,
)


def planned(rows):
    c, k, level, source = zip(*rows, strict=True)
    return Plan({"source_id": source, "class": c, "k": k, "level": level})


@given(columned, st.integers(1, 5), st.lists(st.integers(0, 3), max_size=3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_columns_any_kill_any_world_same_bytes(rows, shard_size, lives, world):
    "As of plans without columns: whatever is killed, in whichever order the rows are given"
    plan, log = planned(rows), []
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        for i, n in enumerate([*lives, 10**9]):
            left = [n]

            def make(part, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise Stop
                log.extend(part.ids)
                return edited(part)

            try:
                made = make_synthetic(b, plan, make, "m", shard_size=shard_size, worker=(i % world, world))
            except Stop:
                pass
        whole = make_synthetic(a, planned(rows[::-1]), edited, "m", shard_size=shard_size)
        assert content(a) == content(b) and sorted(log) == sorted(plan.ids)
        assert [r["id"] for r in made.manifest] == sorted(plan.ids) == plan.in_order().ids
        assert torch.equal(made.items, whole.items) and torch.equal(made.items, edited(plan.in_order()))
        for row, known in zip(made.manifest, plan.in_order().rows(), strict=True):
            assert {k: row[k] for k in known} == known and row["prompt"] is None and row["seed"] == 0
        lazy = Synthetic.open(a)
        some = lazy.where(lambda r: r["level"] == 50)
        assert len(some) == sum(r[2] == 50 for r in rows) and torch.equal(lazy.items[:], made.items)
        assert lazy.labels.tolist() == plan.in_order()["class"].tolist()


def test_a_plan_with_another_level_makes_only_that(tmp_path):
    rows, log = [(c, k, 20, "a.png") for c in range(2) for k in range(3)], []

    def make(part):
        log.extend(part.ids)
        return edited(part)

    make_synthetic(tmp_path, planned(rows), make, "m", shard_size=4)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    more = [(c, k, 90, "a.png") for c in range(2) for k in range(3)]
    made = make_synthetic(tmp_path, planned(rows + more), make, "m", shard_size=4)
    assert len(log) == len(set(log)) == len(made) == 12
    assert make_synthetic(tmp_path, planned(more), make, "m").counts(2).tolist() == [3, 3] and len(log) == 12
    make_synthetic(tmp_path, planned(rows), make, "m", shard_size=4)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_failed_items_of_a_plan_with_columns(tmp_path):
    def make(part, attempt=0):
        x = edited(part, attempt)
        x[torch.from_numpy(part["level"] > 60 + 30 * attempt)] = 0
        return x, [{"try": attempt}] * len(part)

    rows = [(0, k, level, "a.png") for k in range(3) for level in (20, 80, 95)]
    made = make_synthetic(tmp_path, planned(rows), make, "m", shard_size=2, attempts=2)
    assert sorted((r["k"], r["level"], r["attempt"]) for r in made.manifest) == sorted(
        (k, level, int(level > 60)) for _, k, level, _ in rows if level < 90
    )
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [(r["k"], r["level"], r["attempts"]) for r in failed] == [(k, 95, 2) for k in range(3)]
    assert job_summary(tmp_path) == {"items": 6, "tried_again": {0: 3}, "failed": {0: 3}}


def test_ids_come_from_all_columns():
    "Of class and k alone where there is nothing else, whatever the order of the columns"
    assert Plan({"k": [7], "class": [3]}).ids == [item_id(3, 7)] == ["00003-000007"]
    one, two = planned([(3, 7, 20, "a.png")]), Plan({"level": [20], "source_id": ["a.png"], "k": [7], "class": [3]})
    assert one.ids == two.ids and one.ids[0].startswith("00003-000007-") and one.fingerprint == two.fingerprint
    other = [
        planned([(3, 7, 21, "a.png")]),
        planned([(3, 7, 20, "b.png")]),
        Plan({"class": [3], "k": [7], "level": [20]}),
    ]
    assert len({one.ids[0], *(p.ids[0] for p in other)}) == 4
    assert torch.equal(item_noise(("m",), one, (4,)), item_noise(("m",), make_plan([0, 0, 0, 8])[7:], (4,)))
    assert one == planned([(3, 7, 20, "a.png")]) and one != other[0]


@pytest.mark.parametrize(
    "columns, text",
    [
        ({"class": [0]}, "no column 'k'"),
        ({"class": [0], "k": [0], "id": ["x"]}, "cannot have a column 'id'"),
        ({"class": [0], "k": [0, 1]}, "differ in length"),
        ({"class": [0.5], "k": [0]}, "whole numbers"),
        ({"class": [0], "k": [0], "level": [float("nan")]}, "finite"),
        ({"class": [0], "k": [0], "level": [[1, 2]]}, "one value a row"),
        ({"class": [0, 0], "k": [0, 1], "prompt": ["a", 3.5j]}, "of one kind"),
    ],
)
def test_wrong_columns(columns, text):
    with pytest.raises(UsageError, match=text):
        Plan(columns)


def test_jobs_of_different_columns_do_not_mix(tmp_path):
    "Nor do rows that are named twice, or a maker that fills in a column of the plan"
    plan = planned([(0, 0, 20, "a.png"), (0, 1, 20, "a.png")])
    make_synthetic(tmp_path, make_plan([2]), image, "m")
    before = content(tmp_path)
    with pytest.raises(UsageError, match="columns"):
        make_synthetic(tmp_path, plan, edited, "m", other="refuse")
    assert content(tmp_path) == before
    assert len(make_synthetic(tmp_path, plan, edited, "m")) == 2
    with pytest.raises(UsageError, match="'level': 20, 'source_id'|'source_id': 'a.png', 'level': 20"):
        make_synthetic(tmp_path / "twice", plan.take([0, 1, 1]), edited, "m")
    with pytest.raises(UsageError, match="'level', which"):
        make_synthetic(tmp_path / "own", plan, lambda part: (edited(part), [{"level": 3}] * len(part)), "m")


def test_torn_shards_of_a_plan_with_columns(tmp_path):
    plan = planned([(c, k, level, "a.png") for c in range(2) for k in range(2) for level in (20, 50)])
    make_synthetic(tmp_path, plan, edited, "m", shard_size=3)
    whole, shard = content(tmp_path), tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="lack 3 of the items.*shard-00001"):
        Synthetic.open(tmp_path)
    for path in tmp_path.glob("shard-*"):
        path.unlink()
    with pytest.raises(DataError, match="lack 8 of the items"):
        Synthetic.open(tmp_path)
    make_synthetic(tmp_path, plan, edited, "m", shard_size=3)
    assert content(tmp_path) == whole


# --- workers


def test_threads_share_a_plan(tmp_path):
    "Workers with and without ranks, at once: each shard is made once, and all see the whole"
    plan, log, out, errors = make_plan([40, 30]), [], [], []

    def make(part):
        time.sleep(0.003)
        log.append(tuple(part[0]))
        return image(part)

    def work(worker):
        try:
            out.append(make_synthetic(tmp_path / "a", plan, make, "m", shard_size=4, worker=worker))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(w,)) for w in ((0, 1), (0, 1), (1, 3), (2, 3))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(out) == 4 and len(log) == len(set(log)) == 18
    finish(tmp_path / "b", plan)
    assert content(tmp_path / "a") == content(tmp_path / "b") and all(torch.equal(o.items, out[0].items) for o in out)


def test_claims(tmp_path):
    "A claim of a living worker is respected, with a way out; one of a dead worker is taken over"
    plan = make_plan([8])
    with pytest.raises(Stop):
        make_synthetic(tmp_path, plan, mortal(0), "m", shard_size=4)
    held, log = lock_file(tmp_path / "shard-00001.lock"), []
    assert make_synthetic(tmp_path, plan, mortal(9, log), "m", shard_size=4, wait=0) is None and len(log) == 4
    with pytest.raises(LtnbError, match="lacks 1 of 2 shards.*shard-00001.*run the same command again"):
        make_synthetic(tmp_path, plan, image, "m", shard_size=4, wait=0.2)
    assert not (tmp_path / "manifest.jsonl").exists()
    unlock_file(tmp_path / "shard-00001.lock", held)
    (tmp_path / "shard-00001.lock").write_text("pid 1")  # a file without a lock: its writer was killed
    (tmp_path / "shard-00000.lock").write_text("pid 1")
    (tmp_path / ".shard-00001.safetensors.1.part").write_text("half")
    (tmp_path / ".manifest.jsonl.1.part").write_text("half")
    make_synthetic(tmp_path, plan, image, "m", shard_size=4)
    finish(tmp_path / "b", plan)
    assert {k: v for k, v in content(tmp_path, "[s.m]*").items() if k != "b"} == content(tmp_path / "b")


@pytest.mark.parametrize(
    "env, want",
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (0, 3)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, None),
        ({"RANK": "x", "WORLD_SIZE": "4"}, None),
    ],
)
def test_ranks(env, want, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if want:
        assert job_worker() == want
    else:
        with pytest.raises(UsageError, match="RANK"):
            job_worker()


# --- another job, lost and torn files, a full disk


def test_another_job(tmp_path):
    plan = make_plan([6])
    make_synthetic(tmp_path, plan, image, "m", settings={"steps": 20, "scale": 1.5}, shard_size=4)
    before = content(tmp_path)
    for more, word in (
        ({"model": "n"}, "model: 'm' there, 'n' here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"settings": {"steps": 50, "scale": 1.5}}, "steps: 20 there, 50 here"),
    ):
        with pytest.raises(UsageError, match=word):
            make_synthetic(
                tmp_path,
                plan,
                mortal(0),
                **{"model": "m", "settings": {"steps": 20, "scale": 1.5}, **more},
                other="refuse",
            )
    assert content(tmp_path) == before
    make_synthetic(
        tmp_path, plan, mortal(0), "m", settings={"scale": 1.5, "steps": 20}, other="refuse"
    )  # the same, in another order
    assert content(tmp_path) == before
    new = make_synthetic(tmp_path, make_plan([2]), lambda p: image(p) ^ 1, "n", shard_size=4)
    assert torch.equal(new.items, image(make_plan([2])) ^ 1) and len(content(tmp_path, "shard-*.safetensors")) == 1
    (tmp_path / "shards.jsonl").unlink()  # as an older version left it
    with pytest.raises(UsageError, match="no shards.jsonl"):
        make_synthetic(tmp_path, plan, image, "n", other="refuse")
    assert torch.equal(make_synthetic(tmp_path, plan, image, "n").items, image(plan))


def test_torn_files(tmp_path):
    plan = make_plan([9])
    finish(tmp_path / "a", plan)
    whole, shard = content(tmp_path / "a"), tmp_path / "a" / "shard-00001.safetensors"
    for cut in (0, 1, 100, shard.stat().st_size - 1):
        shard.write_bytes(shard.read_bytes()[:cut])
        with pytest.raises(DataError, match="lack 4 of the items.*shard-00001"):
            Synthetic.open(tmp_path / "a")
        log = []
        finish(tmp_path / "a", plan, log=log)
        assert content(tmp_path / "a") == whole and len(log) == 4
    manifest = tmp_path / "a" / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + '{"id"')
    with pytest.raises(DataError, match="line 10"):
        Synthetic.open(tmp_path / "a")
    with pytest.raises(DataError, match="remove it and run"):
        finish(tmp_path / "a", plan)
    manifest.unlink()
    with pytest.raises(DataError, match="no finished generation"):
        Synthetic.open(tmp_path / "a")
    finish(tmp_path / "a", plan)
    assert content(tmp_path / "a") == whole


@pytest.mark.parametrize("left", range(5))
def test_full_disk(tmp_path, monkeypatch, left):
    "The n-th file finds the disk full, before or after its bytes"
    plan, original, state = make_plan([8]), os.replace, [left]

    def replace(a, b):
        state[0] -= 1
        if state[0] < 0:
            raise OSError(28, "No space left on device")
        original(a, b)

    monkeypatch.setattr(core.os, "replace", replace)
    if left < 4:
        with pytest.raises(LtnbError, match="disk is full.*kept"):
            finish(tmp_path / "a", plan)
    monkeypatch.undo()
    assert not list((tmp_path / "a").glob("*.lock")) + list((tmp_path / "a").glob(".*"))
    finish(tmp_path / "a", plan)
    finish(tmp_path / "b", plan)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.slow_process
def test_a_real_full_disk(tmp_path):
    "The system's own file size limit, in the middle of a shard"
    code = (
        "import sys, resource, signal; from test_synthetic import image; from ltnb.jobs import *\n"
        "from ltnb.synthetic import *; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "make_synthetic(sys.argv[1], make_plan([400]), image, 'm', shard_size=100)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 1 and "file size limit" in done.stderr and "kept" in done.stderr, done.stderr
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["shards.jsonl"]


# --- items that cannot be used


def test_what_is_bad():
    x = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[1], x[3] = 0, 255
    assert bad_items(x).tolist() == [False, True, False, True, False]
    f = torch.zeros(4, 3)
    f[1, 2], f[3, 0] = float("nan"), -float("inf")
    assert bad_items(f).tolist() == [False, True, False, True], "a feature of zeros is a feature"
    for empty in (f[:0], x[:0], torch.zeros(3, 0)):
        assert not bad_items(empty).any()


def test_bad_items_are_tried_again(tmp_path):
    "The same result whoever is killed; what stays bad is listed, counted, and in no shard"
    plan, calls = make_plan([6, 5]), []

    def make(part, attempt=0):
        calls.append((part.tolist(), attempt))
        x = image(part, attempt)
        x[torch.from_numpy((part[:, 1] % 4 > attempt))] = 0
        return x, [{"try": attempt}] * len(part)

    made = make_synthetic(tmp_path / "a", plan, make, "m", shard_size=4, attempts=3)
    good = plan[plan[:, 1] % 4 < 3]
    assert [(r["class"], r["k"], r["attempt"], r["try"]) for r in made.manifest] == [
        (c, k, k % 4, k % 4) for c, k in good.tolist()
    ]
    assert all(torch.equal(x, image(p[None], p[1] % 4)[0]) for x, p in zip(made.items, good, strict=True))
    assert [r for r, n in calls if n == 2] == [[[0, 2], [0, 3]], [[1, 2], [1, 3]]], "only bad rows are asked for again"
    assert job_summary(tmp_path / "a") == {"items": 9, "tried_again": {0: 3, 1: 2}, "failed": {0: 1, 1: 1}}
    assert [json.loads(r) for r in (tmp_path / "a" / "failed.jsonl").read_text().splitlines()] == [
        {"id": item_id(c, 3), "class": c, "k": 3, "attempts": 3} for c in (0, 1)
    ]
    assert sum(len(load_tensors(p)[0]["items"]) for p in (tmp_path / "a").glob("shard-*")) == 9
    calls.clear()
    make_synthetic(tmp_path / "a", make_plan([4, 2]), make, "m", shard_size=4, attempts=3)
    assert not calls and job_summary(tmp_path / "a") == {"items": 5, "tried_again": {0: 2, 1: 1}, "failed": {0: 1}}
    direct = make_synthetic(tmp_path / "b", make_plan([3, 2]), make, "m", attempts=3)
    assert torch.equal(direct.items, made.items[[0, 1, 2, 5, 6]]) and not (tmp_path / "b" / "failed.jsonl").exists()


def test_a_check_of_ones_own_and_nothing_good(tmp_path):
    made = make_synthetic(
        tmp_path / "a", make_plan([4]), lambda p: torch.arange(4.0)[:, None], "m", check=lambda x: x[:, 0] > 2
    )
    assert made.items.flatten().tolist() == [0, 1, 2]
    with pytest.raises(LtnbError, match="all 4 items"):
        make_synthetic(tmp_path / "b", make_plan([4]), lambda p: torch.full((len(p), 3), float("nan")), "m")


# --- reading


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    "A folder of 5 shards, of which one was added later"
    folder = tmp_path_factory.mktemp("made")
    make_synthetic(
        folder, make_plan([7, 6]), lambda p: (image(p), [{"level": int(k)} for _, k in p]), "m", shard_size=4
    )
    return folder, make_synthetic(
        folder,
        make_plan([9, 6]),
        lambda p: (image(p), [{"level": int(k)} for _, k in p]),
        "m",
        shard_size=4,
        keep=False,
    )


def test_lazy_items_read_like_a_tensor(generated):
    folder, lazy = generated
    x = image(make_plan([9, 6]))
    assert (
        isinstance(lazy.items, ShardItems)
        and lazy.items.shape == x.shape
        and lazy.items.dtype == x.dtype
        and lazy.items.ndim == 4
        and len(lazy) == 15
    )
    mask = torch.arange(15) % 3 == 0
    for i in (
        0,
        -1,
        slice(None),
        slice(3, 9),
        slice(None, None, 4),
        [],
        [3, 3, 0],
        np.array([14, 2]),
        torch.tensor([1, 12]),
        mask,
        mask.numpy(),
    ):
        assert torch.equal(lazy.items[i], x[torch.from_numpy(i) if isinstance(i, np.ndarray) else i]), i
    for i in (15, -16, [15]):
        with pytest.raises(IndexError):
            lazy.items[i]
    again = pickle.loads(pickle.dumps(lazy))
    assert torch.equal(again.items.tensor(), x) and list(again.manifest) == list(lazy.manifest)
    assert torch.equal(mix(x[:2].float(), [0, 1], lazy.items, lazy.labels)[0][2:], x.float())


def test_lazy_and_eager_agree(generated):
    folder, lazy = generated
    eager = make_synthetic(folder, make_plan([9, 6]), mortal(0), "m")
    assert (
        isinstance(eager.items, torch.Tensor)
        and eager.manifest == list(lazy.manifest)
        and lazy.manifest[3:5] == eager.manifest[3:5]
    )
    assert lazy.labels.tolist() == eager.labels.tolist() and lazy.counts(3).tolist() == [9, 6, 0]
    for keep in (lambda r: r["level"] > 5, lambda r: False):
        a, b = lazy.where(keep), eager.where(keep)
        assert (
            torch.equal(a.items.tensor(), b.items)
            and list(a.manifest) == b.manifest
            and a.labels.tolist() == b.labels.tolist()
            and len(a) == len(b)
        )
    assert all(
        r["sha"] == hashlib.blake2b(x.numpy().tobytes(), digest_size=16).hexdigest()
        for r, x in zip(eager.manifest, eager.items, strict=True)
    )
    assert eager.manifest[0]["sha"] == ImageSet(eager.items.numpy(), eager.labels, ("a", "b")).ids[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_every_dtype(tmp_path, dtype):
    def make(p):
        return (torch.from_numpy(p[:, 1:]) + torch.arange(3)).to(dtype)

    assert torch.equal(make_synthetic(tmp_path, make_plan([5]), make, "m", shard_size=2).items, make(make_plan([5])))


def test_shapes_must_agree(tmp_path):
    with pytest.raises(DataError, match="different shapes"):
        make_synthetic(tmp_path, make_plan([4]), lambda p: torch.ones(len(p), int(p[0, 1]) + 1), "m", shard_size=2)


def test_the_cache_is_bounded(generated):
    items = Synthetic.open(generated[0]).items
    items.cache_mb = 2 * 4 * 192 / 1e6
    for i in range(15):
        items[i]
    assert len(items._cache) <= 2


# --- PNG


def test_png(tmp_path, generated):
    from PIL import Image

    made, names = generated[1], ["../a:b", "..-a_b"]
    assert write_png(made, tmp_path, names) == 15
    folders = sorted(p for p in tmp_path.iterdir())
    assert (
        len(folders) == 2
        and all(p.is_dir() for p in folders)
        and sorted(p.stem for p in tmp_path.rglob("*.png")) == [r["id"] for r in made.manifest]
    )
    for row, x in zip(made.manifest, made.items, strict=True):
        assert np.array_equal(np.asarray(Image.open(next(tmp_path.rglob(f"{row['id']}.png")))).transpose(2, 0, 1), x)
    stale = next(tmp_path.rglob("00000-000002.png"))
    stamp = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png") if p != stale}
    Image.new("RGB", (8, 8)).save(stale)  # of another model
    assert (
        write_png(made, tmp_path, names) == 1
        and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png") if p != stale} == stamp
    )
    with pytest.raises(UsageError, match="has no name"):
        write_png(made, tmp_path, ["a"])
    with pytest.raises(UsageError, match="uint8"):
        write_png(Synthetic(torch.zeros(1, 3), [{}]), tmp_path, ["a"])


def test_class_folder_names(tmp_path):
    def grey(p):
        return image(p)[:, :1]

    names = ["cat", "CAT", "a/b", "a\\b", "", "..", "naïve – ü", "x" * 300]
    write_png(make_synthetic(tmp_path / "a", make_plan([1] * 8), grey, "m"), tmp_path / "png", names)
    made = [p.name for p in (tmp_path / "png").iterdir()]
    assert len({m.lower() for m in made}) == 8 and {"cat", "CAT-1", "a_b", "a_b-3", "class-4", "class-5"} <= set(made)


# --- near copies


@pytest.mark.parametrize("kind", ["tensor", "array", "lazy"])
def test_near_copies_equals_the_slow_way(tmp_path, kind):
    g = np.random.default_rng(0)
    real, made = (g.integers(0, 256, (n, 3, 5, 5)).astype(np.uint8) for n in (70, 40))
    made[7], made[9] = real[3], real[8] ^ 1
    slow = np.sqrt(((made[:, None].astype(float) - real[None]) ** 2).mean((2, 3, 4)))
    items = {
        "tensor": torch.from_numpy(made),
        "array": made,
        "lazy": make_synthetic(
            tmp_path, make_plan([40]), lambda p: torch.from_numpy(made)[p[:, 1]], "m", shard_size=6, keep=False
        ).items,
    }[kind]
    d, i = near_copies(items, real)["pixel"]
    assert np.allclose(d, slow.min(1), atol=1e-4) and (i == slow.argmin(1)).all() and d[7] == 0 and d[9] == 1
    y, z = g.integers(0, 4, 40), g.integers(0, 3, 70)  # class 3 has no real image
    d, i = near_copies(items, real, y, z)["pixel"]
    slow[y[:, None] != z[None]] = np.inf
    assert (
        np.allclose(d, slow.min(1), atol=1e-4)
        and (i[y < 3] == slow.argmin(1)[y < 3]).all()
        and (i[y == 3] == -1).all()
        and np.isinf(d[y == 3]).all()
    )
    f = near_copies(items, torch.from_numpy(real), embed=lambda x: x.flatten(1)[:, :4].float())["feature"]
    far = np.sqrt(((made.reshape(40, -1)[:, None, :4].astype(float) - real.reshape(70, -1)[None, :, :4]) ** 2).sum(2))
    assert np.allclose(f[0], far.min(1), atol=1e-4)


def test_near_copies_in_blocks(monkeypatch):
    "Several blocks on both sides give what one block gives"
    from ltnb import copies

    g = torch.Generator().manual_seed(0)
    made, real = torch.randn(50, 8, generator=g), torch.randn(90, 8, generator=g)
    one = near_copies(made, real)
    monkeypatch.setattr(copies._nearest, "__defaults__", (4 * 8 * 7,))
    many = near_copies(made, real)
    assert (
        set(one) == {"feature"}
        and (one["feature"][1] == many["feature"][1]).all()
        and np.allclose(one["feature"][0], torch.cdist(made, real).min(1).values, atol=1e-5)
    )


def test_near_copies_edges(tmp_path):
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    d, i = near_copies(x, x[:0])["pixel"]
    assert np.isinf(d).all() and (i == -1).all() and len(near_copies(x[:0], x)["pixel"][0]) == 0
    with pytest.raises(UsageError, match="compared"):
        near_copies(x, torch.zeros(3, 1, 5, 5, dtype=torch.uint8))
    with pytest.raises(UsageError, match="labels"):
        near_copies(x, x, made_labels=[0, 0, 0])
    with pytest.raises(UsageError, match="held-out"):
        copy_threshold(x, x[:0])
    from PIL import Image

    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "0.png")
    assert near_copies(torch.full((2, 3, 4, 4), 5, dtype=torch.uint8), ImageFiles(tmp_path, ["0.png"], 4))["pixel"][
        0
    ].tolist() == [5, 5]


def test_flags(tmp_path):
    "Copies of train, of test, and of neither are told apart; the manifest is rewritten in one piece, and stays"
    data = LongTail.digits(seed=0)
    train, half = data.train, len(data.test) // 2
    order = np.random.default_rng(0).permutation(len(data.test))
    test, held = data.test.take(order[:half]), data.test.take(order[half:])

    def make(part):
        return torch.from_numpy(np.stack([(train.images[k], test.images[k], held.images[k])[c] for c, k in part]))

    def embed(x):
        return x.flatten(1).float()[:, ::2]

    make_synthetic(tmp_path, make_plan([60] * 3), make, "m", shard_size=32)
    flagged, limit = flag_copies(tmp_path, train, test, embed), copy_threshold(train.images, held.images, embed=embed)
    leak = np.array([r["scores"]["leak"] for r in flagged.manifest])
    assert copies(flagged, limit)[:60].all() and copies(flagged, limit["pixel_distance"])[120:].mean() < 0.15
    assert not leak[:60].any() and leak[60:120].all() and 0.2 < leak[120:].mean() < 0.9
    assert (
        [r["scores"]["nearest_id"] for r in flagged.manifest][:60]
        == train.ids[:60]
        == [r["sha"] for r in flagged.manifest][:60]
    )
    own = near_copies(held.images, train.images)["pixel"][0]
    assert abs((own <= limit["pixel_distance"]).mean() - 0.05) < 0.01, "by construction"
    before = content(tmp_path)
    flag_copies(tmp_path, train, test, embed)
    make_synthetic(tmp_path, make_plan([60] * 3), mortal(0), "m")
    assert content(tmp_path) == before
    longer = make_synthetic(tmp_path, make_plan([61, 60, 60]), make, "m")
    assert "leak" in longer.manifest[0]["scores"] and not longer.manifest[60]["scores"]
    with pytest.raises(UsageError, match="00000-000060.*flag_copies"):
        copies(longer, 3.0)
    monkey = longer.take(np.arange(3))
    assert copies(monkey, 3.0).all() and len(monkey) == 3
    make_synthetic(tmp_path / "features", make_plan([2]), lambda p: torch.ones(len(p), 3), "m")
    with pytest.raises(UsageError, match="near_copies"):
        flag_copies(tmp_path / "features", train)


def test_scores_of_changed_items_are_dropped(tmp_path):
    "An item that was made anew with other bytes has not been compared yet"
    data = LongTail.digits(seed=0)
    make_synthetic(tmp_path, make_plan([6]), lambda p: image(p)[:, :1], "m", shard_size=3)
    flag_copies(tmp_path, data.train)
    (tmp_path / "shard-00000.safetensors").unlink()
    made = make_synthetic(tmp_path, make_plan([6]), lambda p: image(p)[:, :1] ^ 1, "m", shard_size=3)
    assert [bool(r["scores"]) for r in made.manifest] == [False] * 3 + [True] * 3


# --- real kills, and the size of ImageNet-LT

WORK = (
    "import sys, time; from test_synthetic import image; from ltnb.jobs import *; from ltnb.synthetic import *\n"
    "def make(part): time.sleep(.1); return image(part)\n"
)


def start(folder, rank=0, world=1):
    code = (
        WORK + f"how = dict(shard_size=20, worker=({rank}, {world}), keep=False)\n"
        "make_synthetic(sys.argv[1], make_plan([700, 300]), make, 'm', **how)"
    )
    return Command(folder, program=code, cwd=Path(__file__).parent)


@pytest.mark.slow_process
def test_sigkill(tmp_path):
    "Two processes share a plan; one is killed, then both, and the files are those of a job that nobody disturbed"
    one, two = start(tmp_path / "a"), start(tmp_path / "a", 1, 2)

    def shards():
        return len(list((tmp_path / "a").glob("shard-*.safetensors")))

    end = time.monotonic() + 600
    while shards() < 8 and one.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    one.kill()
    one.wait()
    before = shards()
    while shards() < before + 6 and two.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    two.kill()
    assert two.wait() == -signal.SIGKILL and 0 < shards() < 50 and not (tmp_path / "a" / "manifest.jsonl").exists()
    made, log = shards(), []
    make_synthetic(
        tmp_path / "a", make_plan([700, 300]), lambda p: log.append(1) or image(p), "m", shard_size=20, other="refuse"
    )
    assert len(log) == 50 - made
    make_synthetic(tmp_path / "b", make_plan([700, 300]), image, "m", shard_size=20)
    assert content(tmp_path / "a") == content(tmp_path / "b") and not list((tmp_path / "a").glob(".*"))


LARGE = """
import json, sys, time
from pathlib import Path
import numpy as np
from test_synthetic import Stop, image, mortal
from ltnb.jobs import *
from ltnb.synthetic import *
def peak(): # MB; ru_maxrss would count the parent too
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
make_synthetic(sys.argv[1] + "/small", make_plan([50]), image, "m", keep=False).items[3] # everything is loaded
start, t, told = peak(), time.time(), []
plan = make_plan(np.full(1000, 350))
try: make_synthetic(sys.argv[1] + "/large", plan, mortal(170), "m", keep=False)
except Stop: pass
log = []
def make(p): return log.append(len(p)) or image(p)
made = make_synthetic(sys.argv[1] + "/large", plan, make, "m", progress=told.append, keep=False)
t = time.time() - t
at = np.random.default_rng(0).permutation(len(plan))[:500]
assert (made.items[at] == image(plan[at])).all()
assert len(made.take(plan[:, 1] == 7).where(lambda r: r["class"] >= 500)) == 500
facts = {"grown": peak() - start, "seconds": t, "made": sum(log), "told": sum(told), "items": len(made)}
facts |= {"labels": made.counts(1000).tolist() == [350] * 1000, "last": made.manifest[-1]["id"]}
print(json.dumps(facts))
"""


@pytest.mark.slow_process
def test_350000_items_in_flat_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    d = json.loads(done.stdout)
    print(d)
    assert d["grown"] < 150, f"{d['grown']:.0f} MB"
    assert (
        d["items"] == d["told"] == 350_000
        and d["made"] == 350_000 - 170 * 1024
        and d["labels"]
        and d["last"] == item_id(999, 349)
    )
