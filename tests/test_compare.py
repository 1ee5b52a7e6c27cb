"A comparison: refused before it runs, killed and continued, shared by workers, planned in flat memory."

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ltnb.compare
import numpy as np
import pytest
from conftest import ROOT, SMALL_UNET

from ltnb.baseline import Baseline
from ltnb.baseline_steps import BaselineConfig
from ltnb.classifier import Classifier
from ltnb.cli import CELLS
from ltnb.combine import Combine, CombineConfig
from ltnb.compare import (
    RANK,
    asked_tables,
    calibration_of,
    compare,
    environments,
    longest_first,
    per_class_of,
    plan_of,
    summary_of,
)
from ltnb.core import DataError, UsageError, read_json, write_json
from ltnb.diffusion import UNETS
from ltnb.forecast import Part, Rate, measured_rates, nearest_rate
from ltnb.grammar import MAKERS, ORDERS, read_combination
from ltnb.matrix import Cell, CompareConfig, Matrix, complete, data_of, matrix
from ltnb.progress import Progress
from ltnb.workers import Task, Workers, is_locked, job_settings
from warm import Command

TINY = "n_max=40 imb_ratio=8 n_epochs=3 bs=16 wd=0.0005 ldmlr.n_steps=10 ldmlr.per_class=5 ldmlr.head_steps=5 "
TINY += "ldmlr.scratch_steps=5"
SAME = dict(datasets="digits", settings=TINY, device="cpu", precision="fp32", threads="1")


def config(out, methods="cross-entropy,label-shift,ldmlr", **more):
    return CompareConfig(**{**SAME, "methods": methods, "out": str(out), **more})


def cells(cfg):
    return matrix(*complete(cfg), CELLS).cells


def typed(cfg):
    own = ("methods", "datasets", "settings", "device", "precision", "threads", "out", "seeds", "workers")
    return [f"--{n}={getattr(cfg, n)}" for n in own]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


# words
@pytest.mark.parametrize(
    "methods, more, said",
    [
        ("labelshift", {}, "label-shift"),
        ("chatdif", {}, "chatdiff"),
        ("ldmlr", {"datasets": "digit"}, "digits"),
        ("ldmlr", {"datasets": "digits:many"}, "ratio"),
        ("ldmlr", {"settings": "n_epoch=3"}, "n_epochs"),
        ("ldmlr", {"settings": "ldmrl.n_epochs=3"}, "ldmlr"),
        ("ldmlr", {"settings": "ldmlr.loss=focal"}, "loss"),
        ("ldmlr", {"settings": "seed=3"}, "--seed"),
        ("cross-entropy,label-shift", {"settings": "label-shift.n_epochs=2"}, "n_epochs"),
        ("labels+discl", {}, "one level only"),
        ("spectrum+aid", {}, "clip"),
        ("discl+ldam", {}, "linear"),
        ("ldmlr+aid", {}, "features"),
        ("diffult+balanced-softmx", {}, "balanced-softmax"),
        ("text+aid+all", {}, "twice"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, methods, more, said):
    with pytest.raises(UsageError) as e:
        cells(config(tmp_path / "c", methods, **more))
    assert said in str(e.value)
    assert not (tmp_path / "c").exists()


def test_two_sets_of_one_directory_and_a_directory_of_another_run(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("datasets:\n  a b: {dataset: digits}\n  a-b: {dataset: digits}\n")
    with pytest.raises(UsageError, match="another name"):
        cells(config(tmp_path / "c", datasets=None, plan=str(plan)))
    plan.write_text("methds: [ldmlr]\n")
    with pytest.raises(UsageError, match="methods"):
        cells(config(tmp_path / "c", plan=str(plan)))
    with pytest.raises(DataError, match="no-plan"):
        cells(config(tmp_path / "c", plan=str(tmp_path / "no-plan.yaml")))
    write_json(tmp_path / "c/digits/ldmlr/config.json", {"format": 1, "recipe": "diffult", "given": {}, "data": {}})
    with pytest.raises(UsageError, match=r"digits/ldmlr.*diffult"):
        compare(config(tmp_path / "c", "ldmlr"), CELLS)


def test_methods_that_are_rows_of_one_run_share_it_and_narrow_settings_win(tmp_path):
    cfg = config(tmp_path, "cross-entropy,label_shift,crt,balanced_softmax,diffult+balanced-softmax", settings="bs=8")
    assert [c.name for c in cells(cfg)] == [
        "digits/cross-entropy",
        "digits/balanced-softmax",
        "digits/cbdm-aid+aid+mixed+balanced-softmax",
    ]
    given = "bs=8 digits.bs=9 balanced-softmax.bs=10 balanced-softmax@digits.n_epochs=2"
    a, b = cells(config(tmp_path, "balanced-softmax,cross-entropy", settings=given))
    assert (a.config.bs, a.config.n_epochs, b.config.bs, b.config.n_epochs) == (10, 2, 9, None)


def test_every_maker_has_a_combination_and_published_methods_are_lines_of_the_grammar():
    assert {read_combination(f"{m}+all").make for m in MAKERS} == set(MAKERS)
    assert read_combination("diffult+crt").name == "cbdm-aid+aid+mixed+cross-entropy+crt"
    assert read_combination("discl+clip:top1").folder == "spectrum+clip-top1+discl+cross-entropy"
    for order in (o for o in ORDERS if o != "mixed"):
        assert read_combination(f"spectrum+{order}").order == order


# plan
def test_a_plan_of_large_lists_without_their_images(tmp_path):
    share = (1 / 256) ** np.linspace(0, 1, 1000)
    counts = np.maximum((115_846 * share / share.sum()).astype(int), 2)
    counts[0] += 115_846 - counts.sum()
    lines = (f"train/n{k:08}/{i}.JPEG {k}\n" for k, n in enumerate(counts) for i in range(n))
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "test.txt").write_text("".join(f"val/{k}/{i}.JPEG {k}\n" for k in range(1000) for i in range(50)))
    files = f"train_list: {tmp_path}/train.txt, test_list: {tmp_path}/test.txt, data_root: /nowhere"
    (tmp_path / "p.yaml").write_text(f"datasets:\n  imagenet-lt: {{dataset: lists, {files}}}\n")
    cfg = config(tmp_path / "c", datasets=None, plan=str(tmp_path / "p.yaml"), settings="arch=resnet10 image_size=64")
    start, said = time.process_time(), plan_of(cfg, CELLS)
    assert time.process_time() - start < 20
    assert "imagenet-lt/ldmlr" in said and "its lists alone" in said and " h " in said
    assert f"{1000 * max(30, int(counts.max()) // 15):,}" in said, "features of LDMLR"
    assert not (tmp_path / "c").exists(), "nothing is written"


def test_a_plan_says_what_was_not_measured_and_what_is_not_there(tmp_path):
    (tmp_path / "p.yaml").write_text("datasets:\n  mine: {dataset: npz, data_root: nowhere.npz}\n")
    said = plan_of(config(tmp_path / "c", "ldmlr", datasets=None, plan=str(tmp_path / "p.yaml")), CELLS)
    assert "cannot be estimated" in said and "nowhere.npz" in said
    part = Part("phi", "classifier", "resnet10 at 64", 6e12)
    assert nearest_rate(part, "cuda", [], [Rate(part.kind, part.network, "cpu", 1e12, "")]) == (None, "not measured")
    here, known = ([Rate("classifier", n, "cpu", v, "")] for n, v in (("resnet8 at 32", 1e9), ("resnet10 at 64", 2e9)))
    assert nearest_rate(part, "cpu", here, known) == (2e9, "measured elsewhere")
    assert nearest_rate(part, "cpu", here, []) == (1e9, "from other work")


def test_rates_leave_out_what_was_taken_from_a_store(tmp_path):
    write_json(tmp_path / "environment.json", {"device": "cpu"})
    rows = '{"seed": 0, "stage": "phi", "seconds": 2.0}\n{"seed": 1, "stage": "phi", "reused": "k", "seconds": 0}\n'
    (tmp_path / "timing.jsonl").write_text(rows + '{"seed": 1, "stage": "phi", "seconds": 0.1}\n')
    (rate,) = measured_rates(tmp_path, [Part("phi", "classifier", "x", 10.0)], "run")
    assert rate.per_second == 5


# workers
def test_a_failed_task_is_told_and_the_others_go_on(tmp_path):
    def task(name, code):
        path = tmp_path / name
        return Task(name, path, (path / "done").exists, (sys.executable, "-S", "-c", code.format(path)))

    fine = "import pathlib; p = pathlib.Path('{}'); p.mkdir(); (p / 'done').touch()"
    bad = "import sys; sys.exit('ltnb: the disk is full.')"
    tasks = [task("a", fine), task("b", bad), task("c", "import os, signal; os.kill(os.getpid(), 9)"), task("d", fine)]
    ended = {a.task.name: a for a in Workers(tasks, tmp_path / "all", 2).run()}
    assert {n: a.state for n, a in ended.items()} == {"a": "done", "b": "failed", "c": "failed", "d": "done"}
    assert ended["b"].why == "the disk is full." and "signal 9" in ended["c"].why


def test_jobs_and_gpus_are_dealt_out(monkeypatch):
    asked = job_settings("partition=gpu time=600 gpus_per_node=1")
    assert asked == {"slurm_partition": "gpu", "slurm_time": 600, "gpus_per_node": 1}
    monkeypatch.setattr("ltnb.compare.gpus_here", lambda: tuple("01234567"))
    cfg = config("c", launch="torchrun --nproc-per-node 4", device="cuda")
    assert [environments(cfg, 2)(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1,2,3", "4,5,6,7"]
    assert environments(config("c", device="cuda"), 8)(3)["CUDA_VISIBLE_DEVICES"] == "3"


# whole comparisons
@pytest.fixture(scope="module")
def adopted(tmp_path_factory):
    "A run made by hand where a comparison would make it, and its bytes"
    out = tmp_path_factory.mktemp("compare") / "c"
    cell = cells(config(out))[0]
    Baseline().run(BaselineConfig(**{**cell.config.to_dict(), "seeds": 1}))
    return out, (cell.path / "scores.json").read_bytes()


GROUP = "import os, sys; from ltnb.cli import main; os.setsid(); sys.exit(main(sys.argv[1:]))"


def started(cfg):
    "`ltnb compare` as a process group of its own"
    return Command("compare", *typed(cfg), program=GROUP)


def killed_when(process, there, group):
    "SIGKILL as soon as a file is there: to the command alone, or to its cells as well"
    end = time.monotonic() + 300
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait(30)


@pytest.fixture(scope="module")
def killed(adopted):
    "The same comparison, killed twice, and continued by two jobs at once; cross-entropy is there already"
    pytest.importorskip("submitit")
    out, _ = adopted
    cfg = config(out, "cross-entropy,label-shift,balanced-softmax,ldmlr", workers="1")
    for group in (True, False):  # the second time, the cell goes on alone, and the jobs have to leave it alone
        killed_when(started(cfg), lambda: is_locked(out / "digits/ldmlr"), group)
    return out, *compare(replace(cfg, executor="local", workers="2"), CELLS)


def test_killed_twice_and_continued_it_has_the_scores_of_runs_by_hand(killed, adopted, tmp_path):
    out, plan, failed = killed
    assert not failed
    assert (out / "digits/cross-entropy/scores.json").read_bytes() == adopted[1], "a run that is there stays as it is"
    rows = read_json(out / "scores.json")
    for name in ("ldmlr", "balanced-softmax"):
        (cell,) = (c for c in plan.cells if c.path.name == name)
        recipe = CELLS[cell.recipe].load()
        alone = recipe.run(type(cell.config)(**{**cell.config.to_dict(), "out": str(tmp_path / name)}))
        assert (alone.path / "scores.json").read_bytes() == (cell.path / "scores.json").read_bytes()
        assert [r["all"] for r in rows if r["cell"] == cell.name] == [r["all"] for r in alone.scores()]


def test_tables_page_and_what_is_printed(killed):
    out, plan, failed = killed
    for file in ("scores.csv", "table.csv", "table.json", "table.md", "table.tex", "report.html", "costs.json"):
        assert (out / file).stat().st_size > 100, file
    page = (out / "report.html").read_text()
    for words in ("Which classes gain", "Calibration", "Budget", "n_epochs=3"):
        assert words in page
    said = summary_of(plan, failed)
    assert "vs best control" in said and "p (Holm)" not in said and "ldmlr + label shift" in said
    rows = read_json(out / "scores.json")
    twice = rows + [r | {"seed": 1, "all": min(r["all"] + 0.01, 1.0)} for r in rows]
    assert "p (Holm)" in asked_tables(twice)[0]


def test_two_jobs_shared_what_was_left(killed):
    out, _, _ = killed
    assert len(list((out / "jobs").glob("*_submitted.pkl"))) == 2
    assert {p.name for p in (out / "logs").glob("*.log")} == {"digits-balanced-softmax.log", "digits-ldmlr.log"}


@pytest.fixture
def slurm(tmp_path):
    "A folder of our own that the machines of a SLURM share"
    pytest.importorskip("submitit")
    if "LTNB_SLURM" not in os.environ:
        pytest.skip("LTNB_SLURM names no folder that the machines of a SLURM share")
    folder = Path(os.environ["LTNB_SLURM"]) / f"{tmp_path.parent.name}-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("way", ["submitted", "array"])
def test_slurm_gives_the_scores_of_one_worker(way, slurm):
    "Jobs of `--executor slurm`, and the shell file of an array as it stands but for the size of its jobs"
    cfg = config(slurm / "c", "cross-entropy,ldmlr", seeds=2)
    if way == "submitted":
        plan, failed = compare(replace(cfg, executor="slurm", workers="2", slurm="time=10"), CELLS)
        assert not failed and len(list((plan.out / "jobs").glob("*_submitted.pkl"))) == 2
    else:
        write_json(slurm / "plan.json", {"methods": cfg.methods, "datasets": cfg.datasets})
        jobs = ["sbatch", "--wait", "--array=0-1", "--gres=none", "--cpus-per-task=1", "--time=10"]
        more = [t for t in typed(cfg) if not t.startswith(("--out", "--workers", "--methods", "--datasets"))]
        script = [ROOT / "benchmarks/slurm/array.sh", slurm / "plan.json", cfg.out, *more]
        subprocess.run([*jobs, *script], cwd=slurm, check=True, capture_output=True, timeout=600)
    one = replace(cfg, out=str(slurm / "one"), workers="1")
    assert not compare(one, CELLS)[1]
    assert (slurm / "c/scores.json").read_bytes() == (slurm / "one/scores.json").read_bytes()


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    "A comparison of a combination that is there already, and of cross-entropy, whose cell fails: (plan, failed)"
    out, name = tmp_path_factory.mktemp("combined") / "c", "labels+all+mixed+cross-entropy+nearest-mean"
    tiny = f"n_max=40 imb_ratio=8 n_epochs=2 bs=16 wd=0.0005 {name}.n_steps=3 {name}.diff_bs=8 {name}.sample_steps=2"
    cfg = config(out, f"{name},cross-entropy", settings=tiny)
    (cell,) = (c for c in cells(cfg) if c.recipe == "combine")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(UNETS, "tiny", SMALL_UNET)
        m.setattr(Progress, "quiet", True)
        Combine().run(CombineConfig(**{**cell.config.to_dict(), "seeds": 1}))
    return cfg, cell


def test_a_failed_cell_is_exit_code_1_and_on_the_page(combined, main, monkeypatch):
    cfg, cell = combined
    broken = (sys.executable, "-S", "-c", "import sys; sys.exit('ltnb: the disk is full.')")
    real = ltnb.compare.task_of
    monkeypatch.setattr("ltnb.compare.task_of", lambda *a: replace(real(*a), command=broken))
    code, said, _ = main("compare", *typed(cfg))
    assert code == 1 and "digits/cross-entropy failed: the disk is full." in said
    assert cell.methods[0].name in said, "what is finished is in the table"
    page = (Path(cfg.out) / "report.html").read_text()
    assert "the disk is full" in page and cell.methods[0].name in page


def test_a_combination_with_another_last_layer_keeps_that_network(combined):
    _, cell = combined
    (row,) = (r for r in read_json(cell.path / "scores.json") if r["method"] == cell.methods[0].name)
    data, clf = data_of(cell.config), Classifier.load(cell.path / "model")
    right = clf.predict(data.test.images, device="cpu").argmax(1) == data.test.labels
    assert float(right.mean()) == pytest.approx(row["all"], abs=1e-6)
    assert list(calibration_of(cell, data)) == [row["method"]]


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "array"])
def test_shell_files_are_sound(name):
    subprocess.run(["bash", "-n", ROOT / f"benchmarks/slurm/{name}.sh"], check=True)


def test_a_shell_file_runs_as_it_stands(tmp_path):
    (tmp_path / "p.yaml").write_text("methods: [cross-entropy]\ndatasets: [digits]\ndevice: cpu\n")
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "benchmarks/slurm/eight_gpus.sh", tmp_path / "p.yaml", tmp_path / "c", "--dry-run"]
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 cells, seed 0" in done.stdout, done.stderr
    assert not (tmp_path / "c").exists()


def test_what_takes_long_begins_first():
    "A cell that is left alone at the end holds up the whole: the order is that of the seconds that are on record"
    costs = read_json(ROOT / "results" / "compare-digits-cpu" / "costs.json")["cells"]
    seconds = {r: sum(c["seconds"] for c in costs if c["cell"].endswith(f"/{r}")) for r in RANK[1:]}
    assert list(seconds) == sorted(seconds, key=seconds.get)
    cells = [SimpleNamespace(recipe=r, config=SimpleNamespace(dataset=d)) for d in ("digits", "npz") for r in seconds]
    first, *_, last = longest_first(cells)
    assert (first.recipe, first.config.dataset) == ("diffult", "npz")
    assert (last.recipe, last.config.dataset) == ("ldmlr", "digits")


@pytest.mark.parametrize("dataset", ["digits", "camera_digits"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_classes_that_change_places_with_the_seed_have_no_names(dataset, seeds):
    cell = Cell("s", "baseline", BaselineConfig(dataset=dataset), ())
    rows = [dict(set="s", asked=True, method="m", seed=k, per_class=[0.5] * 10) for k in range(seeds)]
    names = per_class_of(Matrix((cell,), ROOT, range(seeds)), rows)["s"]["class_names"]
    assert (names is None) == (seeds == 2)
