"A classifier as one ONNX file: what is in it, what it is checked on, and what is refused before anything is written."

import json
import sys

import numpy as np
import pytest
from ltnb import export as room
from ltnb.core import LtnbError, UsageError, write_json
from ltnb.data import LongTail
from ltnb.export import check_export, export, largest_differences, photographs, to_onnx
from ltnb.losses import log_prior
from ltnb.models import LinearNet, build_model
from ltnb.classifier import Classifier, pixel_stats

pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
DATA = LongTail.digits()


def classifier(shape=(1, 8, 8), arch="convnet", **more):
    names = [f"digit {n} ü" for n in DATA.class_names]
    net = build_model(arch, 10, shape[0], **more)
    stats = pixel_stats(DATA.train.images.repeat(shape[0], 1))
    return Classifier(net, names, shape, *stats, arch, log_prior(DATA.counts)).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run directory as the recipes leave it, without a training"
    folder = tmp_path_factory.mktemp("run")
    classifier().save(folder / "model")
    write_json(folder / "config.json", {"recipe": "baseline", "dataset": "digits", "seed": 0, "imb_ratio": 100.0})
    return folder


@pytest.fixture(scope="module")
def graph(run):
    return to_onnx(Classifier.load(run / "model")).SerializeToString()


def ask(graph, x, name="images"):
    return ort.InferenceSession(graph).run(["probabilities", "logits"], {name: x})


def test_the_command(run, main, tmp_path):
    "The file answers like the classifier for any number of images, and knows its classes; it can be written again"
    out = tmp_path / "new" / "m.onnx"
    code, said, err = main("export", "--model", run, "--out", out)
    assert code == 0, err
    assert "10 classes, with a correction of the prior" in said and "32 test images of digits" in said and "e-0" in said
    import onnx

    about = {p.key: p.value for p in onnx.load(out).metadata_props}
    clf = Classifier.load(run / "model")
    assert tuple(json.loads(about["classes"])) == clf.class_names and json.loads(about["input_size"]) == [1, 8, 8]
    assert json.loads(about["prior_correction"]) == clf.log_prior
    assert json.loads(about["normalisation"])["mean"] == list(clf.mean)
    for n in (1, 7):
        probs, logits = ask(str(out), DATA.test.images[:n])
        assert np.abs(logits - clf.logits(DATA.test.images[:n]).numpy()).max() < 1e-4
        assert np.abs(probs - clf.predict(DATA.test.images[:n])).max() < 1e-5 and probs.shape == (n, 10)
    assert main("export", "--model", run / "model", "--out", out)[0] == 0


def test_what_is_refused(run, main, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "to_onnx", lambda clf: pytest.fail("exported before the check"))
    (tmp_path / "theirs.onnx").write_bytes(b"theirs")
    (tmp_path / "folder.onnx").mkdir()
    new, theirs = tmp_path / "m.onnx", tmp_path / "theirs.onnx"
    refused = {
        ("--out", theirs): "did not write it",
        ("--out", tmp_path / "m.pt"): ".onnx",
        (): "--out",
        ("--out", tmp_path / "folder.onnx"): "is a folder",
        ("--out", theirs / "m.onnx"): "not a folder",
        ("--out", tmp_path / f"{'n' * 252}.onnx"): "too long",
        ("--out", new, "--images", tmp_path / "none"): "is no folder",
        ("--out", new, "--images", tmp_path): "no image that can be read",
    }
    for args, says in refused.items():
        code, out, err = main("export", "--model", run, *args)
        assert code == 2 and says in err and err.count("\n") == 1, (args, err)
    assert main("export", "--model", tmp_path, "--out", tmp_path / "m.onnx")[0] == 2
    assert (tmp_path / "theirs.onnx").read_bytes() == b"theirs" and not (tmp_path / "m.onnx").exists()


def test_a_missing_package_is_one_sentence(run, main, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            code, _, err = main("export", "--model", run, "--out", tmp_path / "m.onnx")
        assert code == 1 and 'pip install "ltnb[onnx]"' in err and name in err and err.count("\n") == 1


def test_a_wrong_graph_is_not_kept(run, graph, tmp_path, monkeypatch):
    clf = Classifier.load(run / "model")
    assert max(largest_differences(graph, clf, DATA.test.images[:20])) < 1e-5
    clf.log_prior = None  # forgotten
    assert largest_differences(graph, clf, DATA.test.images[:20])[0] > 0.01
    import onnx

    monkeypatch.setattr(room, "to_onnx", lambda clf: onnx.load_from_string(graph))
    monkeypatch.setattr(room, "load_classifier", lambda run: clf)
    with pytest.raises(LtnbError, match="differs from the classifier"):
        export(run, tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


def test_frozen_features_and_no_prior(tmp_path):
    "A run from features: floats in; its features are the check's, where they lie"
    z = np.random.default_rng(0).standard_normal((50, 6), np.float32)
    np.savez(tmp_path / "some.npz", test_features=z)
    Classifier(LinearNet(3, 6), "abc", (6,)).save(tmp_path / "model")
    assert "noise alone" in check_export(tmp_path, Classifier.load(tmp_path / "model"))[1]
    write_json(tmp_path / "config.json", {"features": str(tmp_path / "some.npz"), "dataset": None, "seed": 0})
    said = export(tmp_path, tmp_path / "m.onnx")
    assert "without a correction" in said and "32 test features of some" in said
    want = Classifier.load(tmp_path / "model").predict(z)
    assert np.abs(ask(str(tmp_path / "m.onnx"), z, "features")[0] - want).max() < 1e-6


def test_what_it_is_checked_on(run, tmp_path):
    "Photographs, the run's own test images, digits where they fit, and noise that is called noise"
    from PIL import Image

    (tmp_path / "b").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 80 * i, np.uint8)).save(tmp_path / "b" / f"{i}.png")
    (tmp_path / "a.jpg").write_bytes(b"no image")
    grey, colour = classifier(), classifier((3, 16, 16))
    x, what = check_export(run, grey, tmp_path)
    assert x.shape == (3, 1, 8, 8) and x.dtype == np.uint8 and "3 photographs" in what
    assert sorted(x[:, 0, 0, 0]) == [0, 80, 160]
    assert photographs(tmp_path, colour, 2).shape == (2, 3, 16, 16)
    x, what = check_export(run, grey)
    assert np.array_equal(x[0], DATA.test.images[0]) and "test images of digits" in what
    assert "bundled digits and 32 images of noise" in check_export(tmp_path, grey)[1]
    x, what = check_export(run, colour)  # not the set of this run
    assert x.shape == (32, 3, 16, 16) and "noise alone" in what and "--images" in what
    write_json(tmp_path / "config.json", {"dataset": "folder", "data_root": str(tmp_path / "gone"), "seed": 0})
    assert "noise alone" in check_export(tmp_path, colour)[1]
    with pytest.raises(UsageError, match="takes 6"):
        photographs(tmp_path, Classifier(LinearNet(3, 6), "abc", (6,)), 2)
