"Nothing lost: stopped anywhere, continued, the end is bit for bit the same (on the CPU)."

import hashlib
import os
import random
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import everywhere
from ltnb import core, latent
from ltnb.augment import Augment
from ltnb.core import LtnbError, read_jsonl
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.data import LongTail
from ltnb.latent import train_latent
from ltnb.ldmlr import LDMLRConfig, run
from ltnb.models import build_model
from ltnb.classifier import Classifier, pixel_stats
from ltnb.jobs import item_noise, make_plan
from ltnb.synthetic import make_synthetic
from ltnb.training import fit
from matplotlib.figure import Figure
from warm import Command


FEW = dict(seeds=2, n_epochs=3, n_steps=120, diff_width=16, diff_bs=32, per_class=20, head_steps=10, scratch_steps=10)
FEW |= dict(device="cpu", precision="fp32")


class Stop(Exception):
    "A stand-in for a power cut"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "Nothing is said, and no picture drawn: `content` leaves pictures out"
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"a picture"))


def content(folder, leave=("timing.jsonl", "environment.json", "config.json", "report.html")):
    "Hashes of all files that two equal runs must share"
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in leave and p.suffix not in (".png", ".ipynb")
    }


@contextmanager
def open_run(path, stop_at=None):
    "A run whose power fails right after the checkpoint of step `stop_at`"
    with Run(LDMLRConfig(out=str(path))) as r:
        r.start(LDMLRConfig(), "cpu", "fp32")
        original = r.save

        def save(name, tensors, **meta):
            original(name, tensors, **meta)
            if meta["step"] == stop_at:
                raise Stop

        r.save = save
        yield r


def classifier_training(path, stop_at=None):
    data = LongTail.digits(seed=1)
    clf = Classifier(
        build_model("convnet", 10, 1), data.class_names, (1, 8, 8), *pixel_stats(data.train.images), "convnet"
    )
    with open_run(path, stop_at) as r:
        return fit(
            clf,
            data.train.images,
            data.train.labels,
            n_epochs=6,
            bs=64,
            mixup=0.5,
            augment=Augment("crop+flip"),
            run=r,
            save_every=0,
        )


def latent_training(path, stop_at=None):
    data = LongTail.digits(seed=1)
    z, y = torch.from_numpy(data.train.images).flatten(1).float(), torch.from_numpy(data.train.labels)
    with open_run(path, stop_at) as r:
        return train_latent(z, y, 10, n_steps=44, diff_bs=64, width=16, run=r, save_every=0)


@pytest.mark.parametrize("train, stops", [(classifier_training, (1, 4, 6)), (latent_training, (10, 40, 44))])
def test_stage_continues_bit_for_bit(tmp_path, train, stops, monkeypatch):
    monkeypatch.setattr(latent, "LOOK_EVERY", 10)
    whole = train(tmp_path / "whole").net.state_dict()
    for stop in stops:
        with pytest.raises(Stop):
            train(tmp_path / str(stop), stop_at=stop)
        again = train(tmp_path / str(stop)).net.state_dict()
        assert all(torch.equal(whole[k], again[k]) for k in whole)
        assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
            tmp_path / str(stop) / "metrics.jsonl"
        ).read_bytes()


def test_metrics_newer_than_the_checkpoint_are_cut(tmp_path):
    classifier_training(tmp_path / "whole")
    with pytest.raises(Stop):
        classifier_training(tmp_path / "cut", stop_at=3)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"stage": "classifier", "seed": 0, "step": 4, "lr": 9, "loss": 9}\n{"stage": "cla')
    classifier_training(tmp_path / "cut")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A small run that nobody disturbed"
    path = tmp_path_factory.mktemp("whole") / "run"
    assert start(path).wait(120) == 0
    return path


def start(path):
    how = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items()]
    return Command("run", "ldmlr", "--plain", "--quiet", *how, "--out", path)


@pytest.mark.slow_process
def test_sigkill_anywhere(whole, tmp_path):
    "Kill the command again and again at random moments of its work; the files are those of the undisturbed run"
    rng, path, kills = random.Random(0), tmp_path / "run", 0
    for attempt in range(10):
        process, lock = start(path), path / "run.lock"
        while process.poll() is None and not (lock.exists() and lock.read_text() == f"pid {process.pid}"):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        if kills == 3:
            assert start(path).wait(120) == 0
            break
    assert kills and content(path) == content(whole)


def test_same_bytes_through_faults_at_every_write(whole, tmp_path, monkeypatch):
    "The n-th file that is written finds the disk full; the next start goes on, and no more than its work is repeated"
    cfg = LDMLRConfig(**FEW, out=str(tmp_path / "run"))
    original, state = os.replace, {"left": 0}

    def replace(a, b):
        if state["left"] == 0:
            raise OSError(28, "No space left on device")
        state["left"] -= 1
        original(a, b)

    monkeypatch.setattr(os, "replace", replace)
    for left in (0, 2, 7):
        state["left"] = left
        with pytest.raises(LtnbError, match="disk is full"):
            run(cfg)
    state["left"] = 10**9
    run(cfg)
    assert content(tmp_path / "run") == content(whole)


def test_a_lost_stage_is_made_again(whole, tmp_path, monkeypatch, capsys):
    "Damage the classifier's checkpoint after a later stage failed"
    cfg = LDMLRConfig(**FEW, out=str(tmp_path / "run"))
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr("ltnb.ldmlr.fitted", lambda *a: (_ for _ in ()).throw(Stop()))
        run(cfg)
    torn = tmp_path / "run" / "checkpoints" / "classifier-seed-0.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    run(cfg)
    assert "classifier-seed-0" in capsys.readouterr().err
    same = content(tmp_path / "run")
    assert same.pop("metrics.jsonl") and {**same, "metrics.jsonl": 0} == {**content(whole), "metrics.jsonl": 0}

    def in_order(path):
        return sorted(read_jsonl(path / "metrics.jsonl"), key=lambda r: (r["seed"], r["stage"], r["step"]))

    assert in_order(tmp_path / "run") == in_order(whole)


def test_shards_do_not_depend_on_who_makes_them(tmp_path):
    plan = make_plan([7, 0, 5, 9])

    def make(part):
        return item_noise(("m",), part, (3,))

    whole = make_synthetic(tmp_path / "a", plan, make, "m", shard_size=4)
    for lost in ([0], [2, 3], [5]):
        for s in lost:
            (tmp_path / "a" / f"shard-{s:05d}.safetensors").unlink()
        again = make_synthetic(tmp_path / "a", plan, make, "m", shard_size=4)
        assert torch.equal(again.items, whole.items)
    other = make_synthetic(tmp_path / "b", plan, make, "m", shard_size=5)
    assert torch.equal(other.items, whole.items) and other.manifest == whole.manifest
    longer = make_synthetic(tmp_path / "a", make_plan([7, 2, 5, 9]), make, "m", shard_size=4)
    at = {r["id"]: x for r, x in zip(longer.manifest, longer.items, strict=True)}
    assert all(torch.equal(at[r["id"]], x) for r, x in zip(whole.manifest, whole.items, strict=True)), (
        "an item keeps its noise in a longer plan"
    )


def test_a_stale_shard_is_not_taken_for_a_new_one(tmp_path):
    plan = make_plan([4])
    make_synthetic(tmp_path, plan, lambda p: torch.zeros(len(p), 2), "old model", shard_size=2)
    new = make_synthetic(tmp_path, plan, lambda p: torch.ones(len(p), 2), "new model", shard_size=2)
    assert new.items.eq(1).all() and {r["model"] for r in new.manifest} == {"new model"}
    other = make_synthetic(
        tmp_path, plan, lambda p: torch.full((len(p), 2), 2.0), "new model", settings=(1.4,), shard_size=2
    )
    assert other.items.eq(2).all(), "other settings make other items"
    assert len(make_synthetic(tmp_path / "none", make_plan([0, 0]), lambda p: torch.zeros(len(p), 2), "m")) == 0


def test_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        classifier_training(tmp_path, stop_at=2)
    original = core.save_tensors
    everywhere(monkeypatch, "save_tensors", lambda *a: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        classifier_training(tmp_path)
    everywhere(monkeypatch, "save_tensors", original)
    with Run(LDMLRConfig(out=str(tmp_path))) as r:
        assert r.load("classifier-seed-0")[1]["step"] == 2


def test_a_kill_between_scores_and_sweep(whole, tmp_path):
    "A finished run that still has its checkpoints loses them, and nothing else changes"
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert run(LDMLRConfig(**FEW, out=str(tmp_path / "run"))).finished
    assert not (tmp_path / "run" / "checkpoints").exists() and content(tmp_path / "run") == content(whole)
