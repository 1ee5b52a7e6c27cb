"From a folder of photographs to a csv file, and to features that a recipe reads."

import csv
import subprocess
import sys

import ltnb
import numpy as np
import pytest
from conftest import TINY
from ltnb.data import LongTail
from ltnb.heads import Features
from PIL import Image


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two kinds of photographs that a small network can tell apart: light and dark, with noise"
    root, rng = tmp_path_factory.mktemp("photos") / "all", np.random.default_rng(0)
    for name, level, n in (("dark", 60, 40), ("light", 180, 25)):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray((level + rng.normal(0, 20, (20, 24, 3))).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "A finished baseline on them"
    from ltnb import cli

    out = tmp_path_factory.mktemp("run") / "r"
    assert (
        cli.main(
            [
                "run",
                "baseline",
                "--plain",
                "--quiet",
                "--dataset",
                "folder",
                "--data-root",
                str(photos),
                "--image-size",
                "12",
                "--n-epochs",
                "8",
                "--bs",
                "16",
                "--schedule",
                "cosine",
                "--warmup",
                "0",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def test_folder_to_csv(photos, trained, main, tmp_path):
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name, value in (("a.png", 50), ("deep/b.jpg", 190)):
        Image.new("RGB", (30, 20), (value,) * 3).save(tmp_path / "new" / name)
    Image.new("L", (9, 9), 200).save(tmp_path / "new" / "grey.png")
    (tmp_path / "new" / "torn.png").write_bytes(b"no image")
    code, out, err = main("predict", "--model", trained, "--images", tmp_path / "new", "--out", tmp_path / "p.csv")
    assert code == 0 and "3 photographs, 1 left out" in out and "torn.png" in err
    rows = list(csv.DictReader(open(tmp_path / "p.csv")))
    assert {r["path"]: r["class"] for r in rows} == {"a.png": "dark", "deep/b.jpg": "light", "grey.png": "light"}
    assert all(abs(float(r["dark"]) + float(r["light"]) - 1) < 1e-4 for r in rows)


@pytest.mark.slow_process
def test_load_in_python(photos, trained):
    clf, data = ltnb.load(trained), LongTail.folder(photos, image_size=12)
    probs = clf.predict(data.test.images)
    assert probs.shape == (13, 2) and (probs.argmax(1) == data.test.labels).mean() > 0.9
    done = subprocess.run(
        [sys.executable, "-c", "import ltnb, sys; assert 'torch' not in sys.modules; ltnb.load"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_encode_with_a_run(photos, trained, main, tmp_path):
    code, out, err = main(
        "encode",
        "--dataset",
        "folder",
        "--data-root",
        photos,
        "--image-size",
        "12",
        "--model",
        trained,
        "--out",
        tmp_path / "f.npz",
        "--quiet",
    )
    assert code == 0 and "52 train and 13 test features of width 64" in out, err
    f = Features.npz(tmp_path / "f.npz")
    assert f.class_names == ("dark", "light") and f.head is not None and f.counts.tolist() == [32, 20]
    code, out, err = main(
        "run", "ldmlr", "--plain", "--quiet", "--features", tmp_path / "f.npz", *TINY[2:], "--out", tmp_path / "run"
    )
    assert code == 0 and "ldmlr + label shift" in out, err


def test_encode_with_timm(photos, main, tmp_path):
    pytest.importorskip("timm")
    code, out, err = main(
        "encode",
        "--dataset",
        "folder",
        "--data-root",
        photos,
        "--image-size",
        "32",
        "--arch",
        "timm:resnet10t",
        "--pretrained",
        "false",
        "--out",
        tmp_path / "f.npz",
        "--quiet",
    )
    assert code == 0 and "of width 512" in out, err
    assert Features.npz(tmp_path / "f.npz").head is None


@pytest.mark.parametrize(
    "args, word",
    [
        (["predict"], "needs --model"),
        (["predict", "--model", "nowhere", "--images", ".", "--out", "p.csv"], "nowhere"),
        (["encode", "--out", "f.npz"], "one of --model"),
        (["encode", "--dataset", "folder", "--arch", "timm:resnet10t", "--out", "f.npz"], "--data-root"),
        (["encode", "--arch", "resnet8", "--out", "f.npz"], "--pretrained false"),
        (["encode", "--arch", "resnet8"], "needs --out"),
        (["predict", "--modle", "x"], "--model"),
    ],
)
def test_usage(main, args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = main(*args)
    assert code == 2 and word in err and not list(tmp_path.iterdir()), err
