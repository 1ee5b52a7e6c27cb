"Files, locks, seeds and settings under faults."

import errno
import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ltnb import core, progress, runs
from ltnb.core import DataError, LtnbError, UsageError, load_tensors, read_jsonl, save_tensors, stable_seed, write_json
from ltnb.config import Config, limited
from ltnb.runs import Run


@dataclass(frozen=True)
class Toy(Config):
    recipe: ClassVar[str] = "toy"
    n: int = limited(3, 1, 9)
    x: float | None = None
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    out: str | None = None


@pytest.mark.parametrize("given", ["x", [1], 3])
def test_settings_that_are_none_are_refused(tmp_path, given):
    write_json(tmp_path / "config.json", {"format": 1, "recipe": "toy", "given": given, "data": {}})
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        Run(Toy(out=str(tmp_path))).check_same()


@pytest.mark.parametrize("letter", ["a", "é", "日", "😀"])
def test_a_message_goes_through_the_pipe_in_one_piece(tmp_path, monkeypatch, letter):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("LTNB_PROGRESS", str(tmp_path / "pipe"))
    progress.tell(letter * 500)
    lines = os.read(reader, 2**16).splitlines(keepends=True)
    os.close(reader)
    assert max(map(len, lines)) <= select.PIPE_BUF
    assert "".join(json.loads(line)["text"] for line in lines) == letter * 500


@pytest.mark.parametrize(
    "code, hint", [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, code, hint):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LtnbError, match=hint):
        write_json(tmp_path / "a.json", {"new": 2})
    assert core.read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_file_mode_is_the_users(tmp_path):
    write_json(tmp_path / "a.json", {})
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask


@given(st.binary(max_size=200))
def test_damaged_tensors_never_load(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    save_tensors(path, {"w": torch.arange(5.0)}, {"step": 3})
    good = path.read_bytes()
    path.write_bytes(junk + good[len(junk) :] if junk != good[: len(junk)] else junk)
    try:
        tensors, meta = load_tensors(path)
    except DataError as e:
        assert str(path) in str(e)
    else:
        assert path.read_bytes()[:100] == good[:100] or set(tensors) != {"w"} or meta != {"step": 3}, (
            "a changed header is seen"
        )


def test_torn_last_line_is_dropped_and_a_torn_middle_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"a": 1}]
    (tmp_path / "m.jsonl").write_text('{"a": 1\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 1"):
        read_jsonl(tmp_path / "m.jsonl")


@pytest.mark.slow_process
def test_seeds_do_not_depend_on_the_process():
    code = "from ltnb.core import stable_seed; print(stable_seed(7, 'epoch', 3))"
    for hash_seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert int(out.stdout) == stable_seed(7, "epoch", 3)


@pytest.mark.parametrize(
    "values, word",
    [
        ({"n": 0}, "at least 1"),
        ({"n": 10}, "at most 9"),
        ({"n": True}, "whole number"),
        ({"x": "1"}, "a number"),
        ({"x": float("nan")}, "finite"),
        ({"mode": "c"}, "Choose from|Did you mean"),
        ({"flag": 1}, "true or false"),
        ({"m": 1}, "no setting 'm'"),
    ],
)
def test_config_refuses(values, word):
    with pytest.raises(UsageError, match=word):
        Toy.from_dict(values)


def test_a_spelled_out_default_is_the_same_run(tmp_path):
    with Run(Toy(out=str(tmp_path))) as run:
        run.start(Toy(x=2.0), "cpu", "fp32")
    Run(Toy(x=2.0, out=str(tmp_path))).check_same()
    with pytest.raises(UsageError, match="x: None there, 3.0 here"):
        Run(Toy(x=3.0, out=str(tmp_path))).check_same()


def test_other_data_is_not_continued(tmp_path):
    with Run(Toy(out=str(tmp_path))) as run:
        run.start(Toy(), "cpu", "fp32", train="aaaa")
    with Run(Toy(out=str(tmp_path))) as run:
        with pytest.raises(LtnbError, match="train: 'aaaa' there, 'bbbb' here"):
            run.start(Toy(), "cpu", "fp32", train="bbbb")


@pytest.mark.slow_process
def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import time; from ltnb.runs import lock_file\n"
        f"held = lock_file({str(tmp_path / 'run.lock')!r}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LtnbError, match=f"pid {holder.pid}"):
        Run(Toy(out=str(tmp_path))).open(wait=0)
    holder.kill()
    holder.wait()
    Run(Toy(out=str(tmp_path))).open(wait=0).close()
    assert not (tmp_path / "run.lock").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LtnbError, match="not a folder"):
        Run(Toy(out=str(tmp_path / "file" / "run"))).open()
    with pytest.raises(UsageError, match="is a file"):
        Run(Toy(out=str(tmp_path / "file"))).open()


def test_torn_checkpoint_is_skipped_by_name(tmp_path, capsys):
    with Run(Toy(out=str(tmp_path))) as run:
        run.save("stage", {"w": torch.ones(9)}, step=1)
        path = tmp_path / "checkpoints" / "stage.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        assert run.load("stage") == (None, {})
    assert "stage.safetensors" in capsys.readouterr().err


@pytest.mark.slow_process
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    code = (
        "import os; from ltnb.core import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'a.json')!r}) as f:\n"
        " f.write('half'); f.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code])
    assert core.read_json(tmp_path / "a.json") == {"old": 1}
    Run(Toy(out=str(tmp_path))).open().close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json"], (
        "the temporary file is swept away at the next start"
    )


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("mine")
    with pytest.raises(UsageError, match="checkpoints but no config.json"):
        Run(Toy(out=str(tmp_path))).open()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "sub").mkdir()
    for name in ("notes.txt", "sub/.other.part"):
        (tmp_path / name).write_text("mine")
    with Run(Toy(out=str(tmp_path))) as run:
        run.start(Toy(), "cpu", "fp32")
        run.finish([])
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "sub" / ".other.part").exists()


def test_the_directory_is_looked_at_again_once_it_is_locked(tmp_path, monkeypatch):
    "Another config finishes here while this one waits for the lock"
    mine = Run(Toy(n=4, out=str(tmp_path)))
    original = runs.lock_file

    def lock_file(path, wait):
        monkeypatch.setattr(runs, "lock_file", original)
        with Run(Toy(n=5, out=str(tmp_path))) as other:
            other.start(Toy(n=5), "cpu", "fp32")
        return original(path, wait)

    monkeypatch.setattr(runs, "lock_file", lock_file)
    with pytest.raises(UsageError, match="n: 5 there, 4 here"):
        mine.open()
    assert not (tmp_path / "run.lock").exists()


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(LtnbError):
        Run(Toy(out=str(tmp_path / ("x" * 300)))).check_same()


def test_progress_into_a_pipe(tmp_path, monkeypatch, capsys):
    "Stages and sentences reach whoever reads; when nobody does, the work goes on"
    from ltnb.progress import Progress

    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Progress, "quiet", False)
    monkeypatch.setenv("LTNB_PROGRESS", str(tmp_path / "pipe"))
    p = Progress("alone", 2)
    p.step()
    p.close()
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    p = Progress("stage", 2)
    p.step(2)
    p.close()
    progress.tell("a note")
    progress.show_messages(os.read(reader, 10000), {})
    os.close(reader)
    assert capsys.readouterr().err == "a note\nstage: done (2)\na note\n"


def test_precision_of_the_environment(monkeypatch, main):
    "LTNB_PRECISION decides what auto is, and nothing else; a wrong one stops before any work"
    from ltnb.core import choose_precision

    for forced in ("fp32", "bf16"):
        monkeypatch.setenv("LTNB_PRECISION", forced)
        assert choose_precision("auto") == choose_precision("auto", "cuda") == forced
        assert (choose_precision("fp32"), choose_precision("bf16")) == ("fp32", "bf16")
    monkeypatch.setenv("LTNB_PRECISION", "bf32")
    code, out, err = main("run", "baseline", "--plain", "--n-epochs", "1")
    assert (code, out) == (2, "") and "LTNB_PRECISION='bf32' is not a precision" in err


def test_another_recipes_run_is_named(main, tmp_path):
    "In one sentence, not by every setting that the two do not share"
    from ltnb.core import write_json

    (tmp_path / "run").mkdir()
    write_json(
        tmp_path / "run" / "config.json",
        {"format": 1, "recipe": "diffult", "given": {"recipe": "diffult", "lr": 1}, "data": {}},
    )
    code, _, err = main("run", "baseline", "--plain", "--out", tmp_path / "run")
    assert code == 2 and "holds a run of diffult, not of baseline" in err and len(err) < 300
