"An output never replaces an input or a foreign file, and one that cannot be written is found before the work."

import os

import numpy as np
import pytest
from ltnb import core
from ltnb.core import UsageError, atomic_write, check_output
from ltnb.config import Config
from PIL import Image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Photographs in two classes, an archive of images, and an untrained classifier"
    from ltnb.data import LongTail
    from ltnb.classifier import new_encoder

    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(root / "photos" / name / f"{name}{i}.png")
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 2
    np.savez(
        root / "set.npz",
        train_images=images[:16],
        train_labels=labels[:16],
        test_images=images[16:],
        test_labels=labels[16:],
    )
    new_encoder("resnet8", LongTail.npz(root / "set.npz"), False).save(root / "run" / "model")
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    "A copy of them, the working folder, with other spellings of its files"
    import shutil

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "labels.csv").write_text("path,label\na.png,cat\n")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "link.npz").symlink_to(tmp_path / "set.npz")
    os.link(tmp_path / "set.npz", tmp_path / "hard.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(root):
    "Every file below a folder, with its bytes"
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


PREDICT = ["predict", "--model", "run", "--images", "photos", "--device", "cpu"]
ENCODE = ["encode", "--dataset", "npz", "--data-root", "set.npz", "--arch", "resnet8", "--pretrained", "false"]
RUN = ["run", "baseline", "--dataset", "folder", "--data-root", "photos", "--n-epochs", "1"]
CARD = ["data", "--dataset", "folder", "--data-root", "photos"]
GENERATE = ["generate", "--model", "run", "--per-class", "1"]
LONG = "x" * 300
REFUSED = [
    (ENCODE, "set.npz", "input"),
    (ENCODE, "photos/../set.npz", "input"),
    (ENCODE, "./link.npz", "input"),
    (ENCODE, "hard.npz", "input"),
    (ENCODE, "f.npy", "name it f.npz"),
    (ENCODE, "f", "name it f.npz"),
    (ENCODE, "photos", "is a folder"),
    (ENCODE, "new/", "is a folder"),
    (PREDICT, "photos/cat/cat0.png", "does not end in .csv"),
    (PREDICT, "labels.csv", "did not write it"),
    (PREDICT, "photos", "is a folder"),
    (PREDICT, "run", "is a folder"),
    (PREDICT, ".", "is a folder"),
    (PREDICT, "labels.csv/p.csv", "not a folder"),
    (PREDICT, "/proc/p.csv", "cannot be written"),
    (PREDICT, "/dev/null", "device"),
    (PREDICT, LONG + ".csv", "too long"),
    (PREDICT, LONG + "/p.csv", "too long"),
    (PREDICT, "", "empty"),
    (RUN, "photos", "input"),
    (RUN, "link", "input"),
    (RUN, ".", "holds the input"),
    (RUN, "photos/cat/../out", "lies in"),
    (RUN, "link/out", "lies in"),
    (RUN, "labels.csv", "is a file"),
    (RUN, "labels.csv/out", "not a folder"),
    (RUN, "/proc/out", "cannot be written"),
    (RUN, LONG, "too long"),
    (RUN, "", "empty"),
    ([*RUN, "--plain"], "link/out", "lies in"),
    ([*RUN, "--plain"], ".", "holds the input"),
    (["demo"], "labels.csv", "is a file"),
    (CARD, "photos", "input"),
    (CARD, ".", "holds the input"),
    (CARD, "link/card", "lies in"),
    (CARD, "labels.csv", "is a file"),
    (CARD, "", "empty"),
    (CARD, LONG, "too long"),
    (GENERATE, "run", "input"),
    (GENERATE, "labels.csv", "is a file"),
]


@pytest.mark.parametrize("command, out, word", REFUSED, ids=[f"{c[0]}-{o[:20]}-{w}" for c, o, w in REFUSED])
def test_refused_before_anything_runs(place, main, command, out, word):
    before = contents(place)
    code, printed, said = main(*command, "--out", out)
    assert code == 2 and word in said and not printed, said
    assert len(said.strip().split("\n")) == 1 and "kept" not in said
    assert contents(place) == before


def test_files_of_other_commands_are_foreign(place, main):
    "A run's figures, somebody's archive with the same arrays, a folder of pictures, a notebook"
    (place / "theirs" / "figures").mkdir(parents=True)
    (place / "theirs" / "figures" / "counts.png").write_bytes(b"theirs")
    (place / "theirs" / "png").mkdir()
    (place / "theirs" / "91_run_baseline.ipynb").write_text('{"cells": [], "metadata": {}}')
    np.savez(
        place / "theirs" / "f.npz",
        train_features=np.ones((2, 2)),
        train_labels=[0, 1],
        test_features=np.ones((2, 2)),
        test_labels=[0, 1],
        class_names=["a", "b"],
    )
    (place / "entry").mkdir()
    (place / "entry" / "91_run_baseline.ipynb").write_text('{"cells": [], "metadata": {}}')
    before = contents(place)
    theirs = (CARD, "theirs"), (GENERATE, "theirs"), (ENCODE, "theirs/f.npz"), (RUN, "theirs"), (RUN, "entry")
    for command, out in theirs:
        code, _, said = main(*command, "--out", out)
        assert code == 2 and contents(place) == before, (command[0], said)


def test_ones_own_is_replaced_without_a_question(place, main):
    (place / "p.csv").symlink_to(place / "elsewhere.csv")
    own = [(PREDICT, o) for o in ("p.csv", "photos/p.csv", "run/p.csv")] + [(ENCODE, "deep/er/f.npz"), (CARD, "card")]
    for command, out in own:
        for _ in range(2):
            code, _, said = main(*command, "--out", out)
            assert code == 0, said
    assert (place / "p.csv").is_symlink()
    assert (place / "elsewhere.csv").read_text() == (place / "run" / "p.csv").read_text()
    from ltnb.heads import Features

    assert len(Features.npz(place / "deep" / "er" / "f.npz").train) == 16


def test_a_promise_is_true_for_its_command(place, main, monkeypatch):
    "What encode computed is not kept, and it does not say so"

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, said = main(*ENCODE, "--out", "f.npz")
    assert code == 1 and "disk is full" in said and "same command" in said and "kept" not in said
    with core.work_is_kept():
        said = str(core.os_error(OSError(28, ""), "writing"))
    assert "what was computed before is kept" in said


def test_the_same_holds_in_python(place):
    "A recipe that is called from Python or by papermill"
    from ltnb.baseline import BaselineConfig, run

    before = contents(place)
    for out, word in (("photos", "input"), ("link/out", "lies in"), ("labels.csv", "is a file")):
        config = BaselineConfig(dataset="folder", data_root="photos", n_epochs=1, out=out)
        with pytest.raises(UsageError, match=word):
            run(config)
    assert contents(place) == before
    for values in (dict(out=""), dict(data_root=""), dict(out="a\0b")):
        with pytest.raises(UsageError, match="empty"):
            BaselineConfig(**values)


def test_inputs_that_a_folder_would_swallow(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "list.txt").write_text("")
    (tmp_path / "f.npz").write_text("")
    check_output(tmp_path, [("--features", tmp_path / "f.npz", False)], writes=("model",))
    with pytest.raises(UsageError, match="holds the input --train-list"):
        check_output(tmp_path, [("--train-list", tmp_path / "model" / "list.txt", False)], writes=("model",))


def test_names_that_fill_the_file_system(tmp_path):
    "The temporary name beside a file is longer than its own"
    with atomic_write(tmp_path / ("y" * 251 + ".csv")) as f:
        f.write("whole")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]


def test_names_in_another_encoding(tmp_path):
    "A file name that is not UTF-8 arrives in Python with surrogates"
    name = os.fsdecode(b"caf\xe9")
    core.write_json(tmp_path / "a.json", {"name": name, "other": "日本"})
    assert core.read_json(tmp_path / "a.json") == {"name": name, "other": "日本"}
    core.write_jsonl(tmp_path / "a.jsonl", [{"name": name}])
    assert core.read_jsonl(tmp_path / "a.jsonl") == [{"name": name}]
    with atomic_write(tmp_path / name) as f:
        f.write(name)
    assert (tmp_path / name).read_bytes() == b"caf\\udce9"


def test_commands_know_their_inputs():
    from ltnb.cli import EncodeConfig, PredictConfig

    predict = PredictConfig(model="m", images="i", out="o.csv")
    assert predict.inputs() == [("--model", "m", False), ("--images", "i", False)]
    assert ("--data-root", "d", True) in EncodeConfig(dataset="folder", data_root="d").inputs()
    assert Config().inputs() == []
