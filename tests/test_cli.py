"The command as it is used: names, refusals, exit codes, finished and foreign directories."

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, ltnb
from ltnb.cli import RECIPES, Parser, add_settings, entry_notebook, help_of
from ltnb.refit import METHODS


def tree(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_cell_config_and_flags_are_equal(name):
    _, config_class = RECIPES[name].load()
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
    mean = lambda m, k: np.mean([r[k] for r in rows if r["method"] == m])
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
    files = lambda p: {str(f.relative_to(p)) for f in p.rglob("*") if f.is_file()}
    assert files(out) - files(tmp_path / "plain") == {"92_run_ldmlr.ipynb"} and not files(tmp_path / "plain") - files(
        out
    )
    for name in ("scores.json", "metrics.jsonl", "model/model.safetensors", "synthetic/seed-0/manifest.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name


def test_finished_notebook_run_is_unchanged(through_papermill):
    out, _, _, env = through_papermill
    before = tree(out)
    again = ltnb("run", "ldmlr", *TINY, "--out", out, cwd=out.parent, env=env)
    assert again.returncode == 0 and "label shift" in again.stdout and tree(out) == before


def test_killed_command_is_continued_at_once(tmp_path):
    "SIGKILL of the command while its kernel works; the same command right after takes over"
    args = [sys.executable, "-m", "ltnb", "run", "ldmlr", *TINY, "--n-epochs", "60", "--out", "run"]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    end = time.monotonic() + 600
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(args, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "scores.json").exists() and [p.name for p in tmp_path.iterdir()] == ["run"]


def test_papermill_alone(tmp_path):
    "papermill nbs/92_run_ldmlr.ipynb out.ipynb -p n_epochs 1 works too"
    values = ["-p", "n_epochs", "1", "-p", "n_steps", "50", "-p", "per_class", "20"]
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
