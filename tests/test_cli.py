"The command as it is used: names, refusals, exit codes, finished and foreign directories."

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, ltnb
from ltnb.cli import RECIPES
from ltnb.core import UsageError
from ltnb.config import Parser, add_settings, help_of
from ltnb.headless import entry_notebook
from ltnb.refit import METHODS


def tree(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_cell_config_and_flags_are_equal(name):
    config_class = RECIPES[name].load().config
    cells = [
        c
        for c in json.loads(entry_notebook(RECIPES[name].notebook).read_text())["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    ]
    source = "".join(cells[0]["source"])
    scope = {}
    exec(source, scope)
    scope.pop("__builtins__")
    scope.pop("__annotations__")
    config = config_class()
    assert scope == config.to_dict() and list(scope) == list(config.to_dict())
    parser = Parser()
    add_settings(parser, config_class)
    assert [a.dest for a in parser._actions if a.dest != "help"] == list(scope)
    helps = help_of(config_class)
    for line in source.strip().split("\n"):
        field, text = line.split(":")[0], line.split("  # ")[1]
        assert (
            helps[field]
            and helps[field].split(" (")[0].split(":")[0].split(";")[0]
            == text.split(" (")[0].split(":")[0].split(";")[0]
        ), field
        kind, _, _ = config_class.hints()[field]
        assert f"{field}: {kind.__name__} = " in line, f"papermill reads the type of {field} from this line"


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "a command is needed"),
        (["dmeo"], "Did you mean 'demo'"),
        (["run"], "ldmlr"),
        (["run", "ldlmr"], "Did you mean 'ldmlr'"),
        (["run", "ldmlr", "--n-epoch", "3"], "--n-epochs"),
        (["run", "ldmlr", "--n_epochs", "3"], "--n-epochs"),
        (["run", "ldmlr", "--n-epochs", "1.5"], "whole number"),
        (["run", "ldmlr", "--n-epochs", "0"], "at least 1"),
        (["run", "ldmlr", "--n-epochs"], "expected one argument"),
        (["run", "ldmlr", "--imb-ratio", "0.01"], "did you mean 100"),
        (["run", "ldmlr", "--imb-ratio", "-3"], "at least 1"),
        (["run", "ldmlr", "--imb-ratio", "nan"], "finite"),
        (["run", "ldmlr", "--imb-ratio", "500"], "at most 114"),
        (["run", "ldmlr", "--dataset", "cifar"], "cifar10"),
        (["run", "ldmlr", "--dataset", "npz"], "--data-root"),
        (["run", "ldmlr", "--dataset", "npz", "--data-root", "no.npz"], "no.npz does not exist"),
        (["run", "ldmlr", "--arch", "resnet31"], "resnet32"),
        (["run", "ldmlr", "--features", "no.npz"], "no.npz does not exist"),
        (["run", "ldmlr", "--features", "no.npz", "--imb-ratio", "10"], "imb_ratio cannot be used with features"),
        (["run", "ldmlr", "digits"], "options begin with --"),
        (["run", "--plain", "ldmlr"], "name first"),
        (["run", "ldmlr", "--dataset", "cifar10", "--data-root", "nowhere"], "--download"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--sed", "1"], "--seed"),
        (["list", "--all"], "not an option"),
        (["run", "ldmlr", "--download", "perhaps"], "true or false"),
    ],
)
def test_usage_errors(main, args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main(*args)
    assert code == 2 and word in err, (code, err)
    assert err.startswith("ltnb: ") and len(err.strip().split("\n")) == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing is written before the usage is right"


def test_cuda_that_is_not_there(main):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = main("run", "ldmlr", "--device", "cuda", "--plain")
    assert code == 2 and "--device cpu" in err


def test_data_errors_are_one_sentence_and_exit_1(main, tmp_path):
    good = dict(
        train_features=np.ones((6, 3), "f4"),
        train_labels=np.array([0, 0, 1, 1, 2, 2]),
        test_features=np.ones((4, 3), "f4"),
        test_labels=np.array([0, 1, 2, 2]),
    )
    for change, word in (
        (dict(train_features=np.full((6, 3), np.nan, "f4")), "NaN"),
        (dict(test_features=np.ones((4, 2), "f4")), "width"),
        (dict(train_labels=np.array([0, 0, 0, 0, 2, 2])), "no training feature"),
    ):
        np.savez(tmp_path / "f.npz", **{**good, **change})
        for more in ([], ["--plain"]):
            code, _, err = main("run", "ldmlr", "--features", tmp_path / "f.npz", "--out", tmp_path / "run", *more)
            assert code == 1 and word in err and len(err.strip().split("\n")) == 1, err
    (tmp_path / "f.npz").write_bytes(b"PK no archive")
    code, _, err = main("run", "ldmlr", "--features", tmp_path / "f.npz", "--out", tmp_path / "run")
    assert code == 1 and "damaged" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    code, _, err = main("run", "ldmlr", "--features", tmp_path / "f.npz", "--debug")
    assert code == 1 and "Traceback" in err


def test_unwritable_out(main, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = main("run", "ldmlr", "--plain", "--out", tmp_path / "file" / "run")
    assert code == 2 and "choose another path" in err
    code, _, err = main("run", "ldmlr", "--plain", "--out", tmp_path / "file")
    assert code == 2 and "is a file" in err


def test_full_disk_is_one_sentence(main, tmp_path, monkeypatch):
    original, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = main("run", "ldmlr", "--plain", "--quiet", *TINY, "--out", tmp_path / "run")
    assert code == 1 and "disk is full" in err and "same command" in err and "Traceback" not in err
    monkeypatch.undo()
    assert main("run", "ldmlr", "--plain", "--quiet", *TINY, "--out", tmp_path / "run")[0] == 0


def test_demo(demo):
    out, text, log = demo
    assert [m for m in METHODS if re.search(rf"^{re.escape(m)}  ", text, flags=re.M)] == list(METHODS)
    for column in (
        "all",
        "many",
        "medium",
        "few",
        "top third",
        "middle third",
        "last third",
        "vs label shift",
        "all, from scratch",
        "from scratch vs label shift",
    ):
        assert column in text
    rows = json.loads((out / "scores.json").read_text())
    assert (
        len(rows) == 5 * len(METHODS)
        and {r["seed"] for r in rows} == set(range(5))
        and {r["method"] for r in rows} == set(METHODS)
    )
    assert {
        "config.json",
        "environment.json",
        "scores.json",
        "metrics.jsonl",
        "timing.jsonl",
        "figures",
        "model",
        "report.html",
        "synthetic",
    } == {p.name for p in out.iterdir()}

    def mean(m, k):
        return np.mean([r[k] for r in rows if r["method"] == m])

    assert mean("label shift", "all") > mean("cross-entropy", "all") + 0.02
    assert mean("ldmlr + label shift", "scratch_all") - mean("garbage", "scratch_all") > 0.1, (
        "from scratch, garbage shows"
    )
    assert abs(mean("ldmlr + label shift", "all") - mean("garbage", "all")) < 0.05, "the warm start hides it"
    assert "seed 4: heads: done" in log


def test_files_hold_no_time_host_or_path(demo):
    out = demo[0]
    for name in ("scores.json", "metrics.jsonl", "synthetic/seed-0/manifest.jsonl"):
        text = (out / name).read_text()
        assert str(out) not in text and not re.search(r"\d{4}-\d\d-\d\d|seconds|\btime|hostname", text)


@pytest.mark.slow_process
def test_finished_run_is_printed_and_unchanged(demo):
    out, first, _ = demo
    before = tree(out)
    again = ltnb("demo", "--out", out, env={"COLUMNS": "150"})
    assert again.returncode == 0 and again.stdout == first and tree(out) == before


def test_other_settings_are_refused_with_the_difference(demo, main):
    out = demo[0]
    before = tree(out)
    code, _, err = main("demo", "--seed", "3", "--out", out)
    assert code == 2 and "seed: 0 there, 3 here" in err
    code, _, err = main("run", "ldmlr", "--out", out)
    assert code == 2 and "holds a run of demo, not of ldmlr" in err
    assert tree(out) == before


def test_run_keeps_the_executed_notebook(through_papermill):
    out, printed, log, _ = through_papermill
    nb = json.loads((out / "92_run_ldmlr.ipynb").read_text())
    assert sum("image/png" in o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])) >= 4
    text = json.dumps(nb)
    assert "n_steps = 60" in text and "done (3)" not in text, "settings are injected, progress stays out"
    assert "seed 0: classifier: done (3)" in log and "label shift" in printed and "WARNING" not in log
    assert not [p.name for p in (*out.iterdir(), *out.parent.iterdir()) if "lock" in p.name or "kernel" in p.name]


def test_papermill_and_plain_write_the_same_files(through_papermill, tmp_path, main):
    out = through_papermill[0]
    assert main("run", "ldmlr", "--plain", "--quiet", *TINY, "--out", tmp_path / "plain")[0] == 0

    def files(p):
        return {str(f.relative_to(p)) for f in p.rglob("*") if f.is_file()}

    assert files(out) - files(tmp_path / "plain") == {"92_run_ldmlr.ipynb"} and not files(tmp_path / "plain") - files(
        out
    )
    for name in ("scores.json", "metrics.jsonl", "model/model.safetensors", "synthetic/seed-0/manifest.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


@pytest.mark.slow_process
def test_finished_notebook_run_is_unchanged(through_papermill):
    out, _, _, env = through_papermill
    before = tree(out)
    again = ltnb("run", "ldmlr", *TINY, "--out", out, cwd=out.parent, env=env)
    assert again.returncode == 0 and "label shift" in again.stdout and tree(out) == before


@pytest.mark.slow_process
def test_killed_command_is_continued_at_once(tmp_path):
    "SIGKILL of the command while its kernel works; the same command right after takes over"
    args = [sys.executable, "-m", "ltnb", "run", "ldmlr", *TINY, "--n-epochs", "8", "--out", "run"]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    end = time.monotonic() + 600
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(args, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "scores.json").exists() and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow_process
def test_papermill_alone(tmp_path):
    "papermill nbs/92_run_ldmlr.ipynb out.ipynb -p n_epochs 1 works too"
    few = {
        "n_epochs": 1,
        "n_steps": 10,
        "diff_width": 16,
        "diff_bs": 32,
        "per_class": 5,
        "head_steps": 10,
        "scratch_steps": 10,
    }
    values = [v for name, n in few.items() for v in ("-p", name, str(n))]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / "92_run_ldmlr.ipynb"),
            "out.ipynb",
            *values,
            "--no-progress-bar",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    runs = list((tmp_path / "runs").iterdir())
    assert (
        len(runs) == 1
        and re.fullmatch(r"ldmlr-digits-[0-9a-f]{6}", runs[0].name)
        and (runs[0] / "scores.json").exists()
    )


def test_finished_plain_run_is_left_alone(main, tmp_path):
    assert main("run", "ldmlr", "--plain", "--quiet", *TINY, "--out", tmp_path / "run")[0] == 0
    before = tree(tmp_path / "run")
    code, out, _ = main("run", "ldmlr", *TINY, "--out", tmp_path / "run")
    assert code == 0 and "label shift" in out and tree(tmp_path / "run") == before


def test_the_notebook_works_where_the_command_was_given(main, tmp_path, monkeypatch):
    "Default data folders are those of the command: the kernel is told to work in the same place"
    seen = {}
    import papermill.execute

    monkeypatch.setattr(
        papermill.execute,
        "execute_notebook",
        lambda *a, **k: seen.update(k) or (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = main("run", "ldmlr", *TINY, "--out", "run")
    assert seen["cwd"] == str(tmp_path) and code == 1 and "disk is full" in err


def test_default_directory_is_found_again(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LTNB_RUNS", raising=False)
    for _ in range(2):
        assert main("run", "ldmlr", "--plain", "--quiet", *TINY)[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_list_and_help(main):
    code, out, _ = main("list")
    assert code == 0 and "ltnb run ldmlr" in out
    for flag in ("--dataset", "--imb-ratio", "--n-steps", "--shrink-n0"):
        assert flag in out
    for args in (
        ["--help"],
        ["demo", "--help"],
        ["run", "--help"],
        ["run", "ldmlr", "--help"],
        ["list", "--help"],
        ["--version"],
    ):
        code, out, err = main(*args)
        assert code == 0 and out and not err
    code, out, _ = main("run", "ldmlr", "--help")
    assert "accuracy" not in out and "largest / smallest class" in out and "--plain" in out


TOY = """
from dataclasses import dataclass
from typing import ClassVar
from ltnb.sources import DataConfig
from ltnb.config import auto

@dataclass(frozen=True)
class ToyConfig(DataConfig):
    recipe: ClassVar[str] = "toy"
    n_epochs: int = auto(digits=80, other=200, low=1) # passes over the training set
    warmup: int = auto(lambda cfg, data: cfg.n_epochs // len(data), "n_epochs by images", low=0) # growing learning rate
    heads: bool = auto(digits=True, other=False) # also fit heads
"""


def test_a_default_that_depends_on_the_data_is_one_line(tmp_path, monkeypatch, capsys):
    "Its words in the help and in `ltnb list`, its value in `filled`, its limits: all from the field"
    from ltnb import cli

    (tmp_path / "toy_of_the_test.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    from toy_of_the_test import ToyConfig

    says = "passes over the training set (default: 80 for digits, else 200)"
    helps = help_of(ToyConfig)
    assert helps["n_epochs"] == says and helps["warmup"] == "growing learning rate (default: n_epochs by images)"
    assert helps["heads"].endswith("(default: true for digits, else false)")
    add_settings(parser := Parser("ltnb run toy"), ToyConfig)
    assert says in " ".join(parser.format_help().split())
    entry = cli.Entry("toy", "toy", "ToyConfig", 99, "a toy")
    monkeypatch.setattr(cli.Entry, "load", lambda self: SimpleNamespace(config=ToyConfig))
    monkeypatch.setattr(cli, "RECIPES", {"toy": entry})
    cli.list_command([])
    assert says in capsys.readouterr().out
    digits, cifar = (ToyConfig(dataset=d).filled(range(20)) for d in ("digits", "cifar10"))
    assert (digits.n_epochs, digits.warmup, digits.heads) == (80, 4, True)
    assert (cifar.n_epochs, cifar.warmup, cifar.heads) == (200, 10, False)
    assert ToyConfig(n_epochs=7, warmup=0).filled(range(20)).n_epochs == 7
    with pytest.raises(UsageError, match="n_epochs must be at least 1"):
        ToyConfig(n_epochs=0)


@pytest.mark.slow_process
def test_the_package_gives_what_is_used_most_and_imports_it_late():
    code = (
        "import sys, ltnb\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert {'LongTail', 'Classifier', 'Synthetic', 'fit', 'load', 'run'} <= set(dir(ltnb))\n"
        "assert not hasattr(ltnb, 'Longtail') and not {'torch', 'numpy'} & set(sys.modules)\n"
        "try: ltnb.Longtail\n"
        "except AttributeError as e: assert str(e) == \"module 'ltnb' has no attribute 'Longtail'\"\n"
        "from ltnb import LongTail, Classifier, Synthetic, fit, load, run\n"
        "assert LongTail.__module__ == 'ltnb.data' and ltnb.fit is fit and callable(Synthetic.open)\n"
        "from ltnb.classifier import Classifier as same\n"
        "assert Classifier is same"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_recipe_by_its_name(tmp_path, monkeypatch):
    "ltnb.run: the command's settings as keywords, the same refusals, the finished run"
    import ltnb
    from ltnb.progress import Progress

    for name, settings, word in (
        ("basline", {}, "Did you mean 'baseline'"),
        ("baseline", {"n_epoch": 3}, "Did you mean 'n_epochs'"),
        ("baseline", {"n_epochs": "3"}, "whole number"),
    ):
        with pytest.raises(UsageError, match=word):
            ltnb.run(name, **settings)
    monkeypatch.setattr(Progress, "quiet", True)
    small = dict(n_epochs=1, heads=False, device="cpu", precision="fp32", out=str(tmp_path / "run"))
    run = ltnb.run("baseline", **small)
    assert run.finished and {r["method"] for r in run.scores()} >= {"cross-entropy"}
    assert ltnb.load(run.path).class_names == ltnb.load(tmp_path / "run" / "model").class_names
    before = tree(tmp_path / "run")
    assert ltnb.run("baseline", **small).finished and tree(tmp_path / "run") == before


@pytest.mark.parametrize(
    "config, says",
    [
        ({"format": 0, "ltnb": "0.0.0"}, "was written by ltnb 0.0.0 in format 0"),
        ({"format": 2, "ltnb": "0.7.0"}, "was written by ltnb 0.7.0 in format 2"),
        ({"format": "one", "ltnb": "0.7.0"}, "was written by ltnb 0.7.0 in format 'one'"),
        ({"ltnb": "0.0.0", "recipe": "baseline", "n_epochs": 3}, "ltnb 0.0.0 in an older layout, without given"),
        (
            {"format": 1, "recipe": "baseline", "given": {}},
            "an ltnb of unknown version in an older layout, without data",
        ),
        ({"model_type": "vit"}, "was not written by ltnb"),
        ([1, 2], "was not written by ltnb"),
    ],
)
def test_a_run_of_another_layout_is_refused_by_its_version(main, tmp_path, config, says):
    "Begun or finished, with a notebook or without, from Python too: one sentence, exit code 1, nothing touched"
    import ltnb
    from ltnb.core import LtnbError, write_json

    write_json(tmp_path / "config.json", config)
    (tmp_path / "checkpoints").mkdir()
    for finished in (False, True):
        if finished:
            write_json(tmp_path / "scores.json", [{"method": "cross-entropy", "seed": 0, "all": 0.5}])
        before = tree(tmp_path)
        for more in ([], ["--plain"]):
            code, out, err = main("run", "baseline", "--out", tmp_path, *more)
            assert code == 1 and says in err and not out and err.count("\n") == 1, err
            assert "choose another --out" in err and ("upgrade ltnb" in err) == says.endswith("format 2")
        with pytest.raises(LtnbError, match="was(?: not)? written by"):
            ltnb.run("baseline", out=str(tmp_path))
        assert tree(tmp_path) == before
