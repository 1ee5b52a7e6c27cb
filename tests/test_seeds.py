"More seeds continue a run: those that are there stay as they are, and the whole is what one command would have made."

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from ltnb import baseline, baseline_steps, chatdiff, diffult, diffult_steps, discl, generator, ldmlr, together
from ltnb.baseline import BaselineConfig
from ltnb.chatdiff import ChatDiffConfig
from ltnb.core import DataError, read_json, write_json
from ltnb.config import Config, limited
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.diffult import DiffuLTConfig
from ltnb.discl_steps import DisCLConfig
from ltnb.generator import DiffusionConfig
from ltnb.ldmlr_settings import DemoConfig, LDMLRConfig
from matplotlib.figure import Figure

pytestmark = pytest.mark.usefixtures("small_unet", "tiny_clip", "few_draws")
HERE = dict(device="cpu", precision="fp32")
HEADS = dict(n_steps=20, per_class=5, head_steps=5, scratch_steps=5)
RECIPES = {
    "baseline": (baseline, BaselineConfig, dict(n_epochs=1, heads=False)),
    "ldmlr": (ldmlr, LDMLRConfig, dict(n_epochs=1, **HEADS)),
    "diffusion": (generator, DiffusionConfig, dict(n_steps=4, diff_bs=8, sample_steps=2, per_class=2, judge_epochs=0)),
    "diffult": (
        diffult,
        DiffuLTConfig,
        dict(
            n_steps=2,
            diff_bs=8,
            n_epochs=1,
            target_per_class=4,
            sample_steps=1,
            cap=1.0,
            pipelines=False,
            aid_kappa=1.0,
            judge_epochs=1,
        ),
    ),
    "discl": (
        discl,
        DisCLConfig,
        dict(
            n_steps=2,
            diff_bs=8,
            clip_steps=2,
            n_epochs=1,
            sample_steps=2,
            guidance_scale=1.0,
            levels="0,50",
            maker="labels",
            per_image=1,
            tries=1,
            rule="cosine",
            rule_cosine=-1.0,
            fine_epochs=3,
            curriculum_epochs=3,
            judge_epochs=0,
        ),
    ),
}
RECIPES["chatdiff"] = (
    chatdiff,
    ChatDiffConfig,
    dict(n_steps=2, diff_bs=8, n_epochs=1, target_per_class=4, sample_steps=1, cap=1.0, clip_steps=2, judge_epochs=1),
)
TINY = ["run", "baseline", "--plain", "--n-epochs", "1", "--heads", "false", "--device", "cpu", "--precision", "fp32"]


class Stop(Exception):
    "A stand-in for a power cut"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Nothing is said, and no picture drawn: that takes longer than these trainings"
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"a picture"))


def content(folder, leave=("environment.json", "timing.jsonl")):
    "Hashes of what two equal runs share"
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in leave)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tree(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


@pytest.mark.parametrize("name", RECIPES)
def test_more_seeds_continue_and_leave_the_first_alone(name, tmp_path, monkeypatch):
    module, config, settings = RECIPES[name]
    settings = settings | dict(n_max=30, imb_ratio=30.0)
    monkeypatch.setattr(diffult_steps, "check_extractor", lambda *a, **k: None)  # after one epoch phi_0 knows nothing

    def go(folder, seeds):
        return module.run(config(**settings, **HERE, seeds=seeds, out=str(tmp_path / folder))).path

    before = content(go("grown", 1))
    rows, metrics = ((tmp_path / "grown" / n).read_bytes() for n in ("scores.json", "metrics.jsonl"))
    assert content(go("grown", 2)) == content(go("whole", 2))
    stated = ("config.json", "scores.json", "metrics.jsonl", "report.html")  # with the numbers of all seeds
    kept = {k: v for k, v in before.items() if k not in stated and not k.startswith("figures/")}
    now = content(tmp_path / "grown")
    assert kept and {k: now[k] for k in kept} == kept
    assert (tmp_path / "grown" / "scores.json").read_bytes().startswith(rows.rstrip(b"\n] "))
    assert (tmp_path / "grown" / "metrics.jsonl").read_bytes().startswith(metrics)
    assert read_json(tmp_path / "grown" / "config.json")["seeds"] == 2
    assert "2 seeds" in (tmp_path / "grown" / "report.html").read_text()
    assert not (tmp_path / "grown" / "checkpoints").exists()


def test_fewer_seeds_than_there_are(main, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "quiet", False)
    assert main(*TINY, "--seeds", "2", "--out", tmp_path / "run")[0] == 0
    before = tree(tmp_path / "run")
    code, out, err = main(*TINY, "--seeds", "1", "--out", tmp_path / "run")
    assert code == 0 and "±" in out and "has 2 seeds, 1 is asked for: all 2 are kept and shown" in err
    assert main(*TINY, "--seeds", "2", "--out", tmp_path / "run")[2] == "" and tree(tmp_path / "run") == before


def test_the_directory_keeps_its_name():
    for config, digest, of_three in (
        (BaselineConfig, "9040cc", "a35a2b"),
        (LDMLRConfig, "7ebd86", "540cf3"),
        (DemoConfig, "62f86d", "540cf3"),
    ):  # as they were when seeds were counted in
        assert {config().digest(), config(seeds=3).digest(), config(seeds=5).digest()} == {digest}
        assert config().digest(3) == of_three
    assert BaselineConfig(threads="2").digest() == BaselineConfig().digest() != BaselineConfig(seed=1).digest()


def test_directories_that_count_the_seeds_in_are_continued(main, tmp_path, monkeypatch):
    "A run of an earlier version: its name and its config.json hold the number of seeds"
    monkeypatch.setenv("LTNB_RUNS", str(tmp_path))
    assert main(*TINY, "--quiet", "--seeds", "2")[0] == 0
    new, old = (
        tmp_path / f"baseline-digits-{d}"
        for d in (
            BaselineConfig(n_epochs=1, heads=False, **HERE).digest(),
            BaselineConfig(n_epochs=1, heads=False, **HERE).digest(2),
        )
    )
    new.rename(old)
    config = read_json(old / "config.json")
    write_json(old / "config.json", config | {"given": config["given"] | {"seeds": 2}})
    before, first = tree(old), (old / "model" / "model.safetensors").read_bytes()
    assert main(*TINY, "--quiet", "--seeds", "2")[0] == 0 and tree(old) == before
    assert main(*TINY, "--quiet", "--seeds", "3")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert (old / "model" / "model.safetensors").read_bytes() == first
    config = read_json(old / "config.json")
    assert config["seeds"] == config["given"]["seeds"] == 3
    assert set(Run(BaselineConfig(out=str(old))).rows_by_seed()) == {0, 1, 2}
    for p in (old / "scores.json", old / "report.html"):
        p.unlink()  # and one that was stopped
    assert main(*TINY, "--quiet", "--seeds", "3", "--out", old)[0] == 0


# a recipe that only counts
@dataclass(frozen=True)
class Counting(Config):
    recipe: ClassVar[str] = "counting"
    not_identity: ClassVar[tuple] = ("out", "seeds")
    seed: int = 0  # the first seed
    seeds: int = limited(1, 1, 1000)  # how many seeds
    device: str = "cpu"  # where
    precision: str = "fp32"  # how
    out: str | None = None  # where the run is kept


def count(out, seeds, stop_at=None, seen=None):
    "The seeds that are computed now, and how many the run has then"

    def one_seed(cfg, data, seed, device, precision, run):
        run.save(f"classifier-seed-{seed}", {"w": torch.ones(1)})
        if seed == stop_at:
            raise Stop
        now.append(seed)
        return [{"method": "m", "seed": seed, "all": 0.5}]

    def finish(run, cfg, rows, data):
        assert cfg.seeds == len(rows)

    now, data = [], SimpleNamespace(fingerprint=lambda: "a1b2")
    run = Run(Counting(seeds=seeds, out=str(out)))
    run.carry_out(lambda seed: data, lambda cfg, data: cfg, one_seed, finish)
    return now, len(run.scores())


def checkpoints(out):
    return sorted(p.name for p in (out / "checkpoints").glob("*"))


def test_a_stop_on_the_way_to_more(tmp_path):
    assert count(tmp_path, 2) == ([0, 1], 2)
    scores = (tmp_path / "scores.json").read_bytes()
    with pytest.raises(Stop):
        count(tmp_path, 5, stop_at=3)
    assert (tmp_path / "scores.json").read_bytes() == scores, "the table of two is whole until that of five is"
    there = checkpoints(tmp_path)
    assert count(tmp_path, 2) == ([], 2) and checkpoints(tmp_path) == there, "work on the others is kept"
    assert count(tmp_path, 5) == ([3, 4], 5) and not checkpoints(tmp_path)
    assert read_json(tmp_path / "config.json")["seeds"] == 5


def test_a_kill_at_the_very_end(tmp_path):
    "Between the table and the removal of the checkpoints, and between the last of these and their folder"
    assert count(tmp_path, 1) == ([0], 1)
    for names in (["classifier-seed-0.safetensors", "scores-seed-0.json", "denoiser-seed-0.1.safetensors"], []):
        (tmp_path / "checkpoints").mkdir()
        for n in names:
            (tmp_path / "checkpoints" / n).touch()
        assert count(tmp_path, 1) == ([], 1) and not (tmp_path / "checkpoints").exists()


def test_fewer_seeds_than_were_begun(tmp_path):
    with pytest.raises(Stop):
        count(tmp_path, 5, stop_at=3)
    assert count(tmp_path, 1) == ([], 3), "what is done stays, also where one seed would do"
    assert checkpoints(tmp_path) == ["classifier-seed-3.safetensors"], "and a half-trained one may be wanted yet"
    assert read_json(tmp_path / "config.json")["seeds"] == 3
    assert count(tmp_path, 4) == ([3], 4) and not (tmp_path / "checkpoints").exists()


def test_a_damaged_table_is_named(tmp_path):
    count(tmp_path, 1)
    for text in ("[{", '["no row"]', '{"seed": 0}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(DataError, match="scores.json"):
            count(tmp_path, 2)
        assert (tmp_path / "scores.json").read_text() == text


# seeds that are trained at once
def side_by_side(out, seeds):
    return baseline.run(BaselineConfig(n_epochs=2, heads=False, side_by_side=True, seeds=seeds, **HERE, out=str(out)))


def test_seeds_side_by_side(tmp_path, monkeypatch):
    groups, original = [], together.fit_seeds

    def fit_seeds(clfs, images, labels, seeds, *a, **k):
        groups.append(seeds)
        return original(clfs, images, labels, seeds, *a, **k)

    monkeypatch.setattr(baseline_steps, "fit_seeds", fit_seeds)
    rows = side_by_side(tmp_path / "run", 2).scores()
    kept = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    grown = side_by_side(tmp_path / "run", 4).scores()
    assert groups == [[0, 1], [2, 3]] and grown[: len(rows)] == rows and len(grown) == 2 * len(rows)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == kept


def test_seeds_that_were_begun_together_are_ended_together(tmp_path, monkeypatch):
    "Stopped in the second epoch of seeds 0 and 1, then asked for 3: two go on where they were, and one comes to them"

    def stop(run, **row):
        if row.get("step") == 2:
            raise Stop
        run._append("metrics.jsonl", row)

    with monkeypatch.context() as m:
        m.setattr(Run, "log", stop)
        m.setattr("ltnb.checkpoint.Clock.older_than", lambda *a: True)
        with pytest.raises(Stop):
            side_by_side(tmp_path / "cut", 2)
    assert "classifier-seeds-0-1.safetensors" in os.listdir(tmp_path / "cut" / "checkpoints")
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    seen, original = [], together.fit_seeds

    def fit_seeds(clfs, images, labels, seeds, *a, **k):
        seen.append(seeds)
        return original(clfs, images, labels, seeds, *a, **k)

    monkeypatch.setattr(baseline_steps, "fit_seeds", fit_seeds)
    rows, two = side_by_side(tmp_path / "cut", 3).scores(), side_by_side(tmp_path / "other", 2).scores()
    assert seen == [[0, 1], [2], [0, 1]] and rows[: len(two)] == two
    first = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()][:2]
    assert [(r["of"], r["step"]) for r in first] == [(0, 1), (1, 1)], "the first epoch was not trained again"
