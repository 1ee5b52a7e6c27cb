"Correction to a given test prior: the maths, what is read, the recipes' rows, the saved classifier."

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.core import LtnbError, UsageError
from ltnb.priors import class_prior, prior_text
from ltnb.losses import carried_prior, label_shift, retarget
from ltnb.metrics import expected_accuracy
from PIL import Image


@given(st.lists(st.floats(0.01, 1e6), min_size=3, max_size=3), st.lists(st.floats(0.01, 1e6), min_size=3, max_size=3))
def test_the_correction_is_bayes_rule(train, test):
    likelihood = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    pi, to = (torch.tensor(p, dtype=torch.float64) / sum(p) for p in (train, test))
    want = likelihood * to / (likelihood * to).sum(1, keepdim=True)
    got = label_shift((likelihood * pi).log(), train, test_prior=test).softmax(1)
    assert torch.allclose(got, want, atol=1e-5)


def test_equal_and_same_priors_are_the_known_cases():
    z = torch.randn(6, 4)
    assert torch.allclose(
        label_shift(z, [8, 4, 2, 1], test_prior=[1] * 4).softmax(1), label_shift(z, [8, 4, 2, 1]).softmax(1), atol=1e-6
    )
    assert torch.allclose(label_shift(z, [8, 4, 2, 1], test_prior=[16, 8, 4, 2]), z, atol=1e-6)


def test_expected_accuracy_and_its_nan():
    assert expected_accuracy([1, 0.5, 0], [2, 1, 1]) == 0.625
    assert np.isnan(expected_accuracy([1, None, 0], [2, 1, 1]))
    assert np.isnan(expected_accuracy([1, float("nan")], [1, 1]))


NAMES = ("cat", "dog", "owl")
WANT = [0.9, 0.05, 0.05]


@pytest.mark.parametrize(
    "kind, text",
    [
        ("csv", "class,count\ncat,90\ndog,5\nowl,5\n"),
        ("csv", "owl,5\ncat,90\ndog,5"),
        ("csv", "# counted in May, by hand\nclass,count\ncat,90\ndog,5\n# the rare one\nowl,5\n"),
        ("csv", "prior,class\n0.9,cat\n0.05,dog\n0.05,owl\n"),
        ("csv", "number,name,probability\n0,cat,.9\n1,dog,.05\n2,owl,.05"),
        ("csv", "y;n\n2;5\n0;90\n1;5"),
        ("csv", "class\tcount\r\ncat\t90\r\ndog\t5\r\nowl\t5\r\n"),
        ("csv", "90\n5\n5"),
        ("json", '{"cat": 90, "owl": 5, "dog": 5}'),
        ("json", '{"0": 0.9, "2": 0.05, "1": 0.05}'),
        ("json", "[90, 5, 5]"),
        (None, "90,5,5"),
        (None, " .9, .05, .05 "),
        (None, '{"cat": 18, "dog": 1, "owl": 1}'),
        (None, "train"),
        (None, "TRAIN"),
    ],
)
def test_priors_are_read(tmp_path, kind, text):
    given_ = text
    if kind:
        (given_ := tmp_path / f"p.{kind}").write_text(text)
    one = prior_text(str(given_))
    assert np.allclose(class_prior(one, NAMES, [180, 10, 10]), WANT)
    assert prior_text(one) == one and str(tmp_path) not in one, "what is kept is the content, not the place"


@pytest.mark.parametrize(
    "kind, text, word",
    [
        (None, "90,5", "2 numbers for 3 classes"),
        (None, "90,-5,5", "'-5' is no count"),
        (None, "nan,1,1", "'nan' is no count"),
        (None, "inf,1,1", "'inf'"),
        (None, "90,5,x", "'x' is no count"),
        (None, "90,0,5", "the class 'dog' the probability 0"),
        (None, "nowhere.csv", "does not exist"),
        (None, "", "is empty"),
        (None, "{", "cannot be read"),
        (None, "3", "does not exist"),
        ("csv", "", "is empty"),
        ("csv", "cat,90\ndog,5", "lacks the class 'owl' \\(1 of 3"),
        ("csv", "cat,90\ndgo,5\nowl,5", "the class 'dgo'.*Did you mean 'dog'"),
        ("csv", "cat,1\ndog,2\nowl,x", "'x' is no count"),
        ("csv", "cat,90\ncat,5\nowl,5", "'cat' stands there twice"),
        ("csv", "cat,90,1\ndog,5,1\nowl,5,1", "two columns"),
        ("json", '{"cat": "x", "dog": 1, "owl": 1}', "no count"),
        ("json", '{"cat": 1, "cat": 1}', "stands twice"),
        ("json", '{"cat": null, "dog": 1, "owl": 1}', "None is no count"),
        ("json", '{"3": 1, "0": 1, "1": 1}', "the class '3'"),
        ("json", "7", "expected counts"),
    ],
)
def test_priors_are_refused(tmp_path, kind, text, word):
    given_ = text
    if kind:
        (given_ := tmp_path / f"p.{kind}").write_text(text)
    with pytest.raises(UsageError, match=word):
        class_prior(prior_text(str(given_)), NAMES, [1, 1, 1])


def test_names_that_are_numbers_are_names():
    assert class_prior('{"3": 8, "1": 2}', ("3", "1")).tolist() == [0.8, 0.2]
    assert class_prior('{"1": 8, "0": 2}', ("1", "0")).tolist() == [0.8, 0.2]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["csv", "json"]), st.one_of(st.text(max_size=60), st.text('0123.,-;\t\nab"{}[]:', max_size=40)))
def test_fuzzed_priors(tmp_path_factory, kind, text):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for given_ in (str(path), text):
        try:
            v = class_prior(prior_text(given_), NAMES, [1, 2, 3])
        except (LtnbError, OSError) as e:
            assert isinstance(e, LtnbError)
        else:
            assert v is not None and abs(v.sum() - 1) < 1e-9 and (v > 0).all()


PRIOR = "60,1,1,1,1,1,1,1,1,1"
SMALL = ["--plain", "--quiet", "--n-epochs", "2", "--heads", "false", "--device", "cpu", "--precision", "fp32"]


def test_baseline_rows_and_the_saved_classifier(main, tmp_path):
    code, out, err = main("run", "baseline", *SMALL, "--test-prior", PRIOR, "--out", tmp_path / "run")
    assert code == 0 and "expected, test prior" in out, err
    rows = {r["method"]: r for r in json.loads((tmp_path / "run" / "scores.json").read_text())}
    assert list(rows) == ["cross-entropy", "label shift", "label shift, test prior"]
    prior = np.array([60] + [1] * 9) / 69
    for r in rows.values():
        assert np.isclose(r["expected"], (prior * r["per_class"]).sum())
    assert rows["label shift, test prior"]["expected"] > rows["label shift"]["expected"]
    saved = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert saved["method"] == "label shift, test prior" and np.allclose(saved["test_prior"], prior)
    from ltnb.data import LongTail
    from ltnb.classifier import load_classifier

    clf, data = load_classifier(tmp_path / "run"), LongTail.digits()
    right = (clf.logits(data.test.images).argmax(1).numpy() == data.test.labels).mean()
    assert np.isclose(right, rows["label shift, test prior"]["all"])
    balanced = main(
        "run", "baseline", *SMALL, "--loss", "balanced_softmax", "--test-prior", PRIOR, "--out", tmp_path / "balanced"
    )
    assert balanced[0] == 0 and "balanced softmax, test prior" in balanced[1]


def test_a_prior_that_does_not_fit_is_refused_before_anything_runs(main, tmp_path):
    for recipe in ("baseline", "ldmlr", "diffult"):
        for more in ([], ["--plain"]):
            code, _, err = main("run", recipe, *more, "--test-prior", "1,2", "--out", tmp_path / "run")
            assert code == 2 and "2 numbers for 10 classes" in err and err.count("\n") == 1, (recipe, err)
    assert not list(tmp_path.rglob("checkpoints"))


def test_the_content_of_a_prior_file_is_the_setting(tmp_path):
    from ltnb.baseline import BaselineConfig

    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([3, 1]))
    a, b = (BaselineConfig(test_prior=str(tmp_path / n)) for n in ("a.json", "b.json"))
    assert a.digest() == b.digest() == BaselineConfig(test_prior="3,1").digest()
    assert a.digest() != BaselineConfig(test_prior="1,3").digest()
    assert BaselineConfig().digest() == BaselineConfig(test_prior=None).digest()
    assert "test_prior" in BaselineConfig().unknown_to({})


def test_ldmlr_rows(tmp_path):
    from ltnb.ldmlr import LDMLRConfig, run

    rng = np.random.RandomState(0)
    y, centres = np.repeat([0, 1, 2], (60, 20, 8)), rng.randn(3, 6) * 2
    x = (centres[y] + rng.randn(len(y), 6)).astype("f4")
    np.savez(
        tmp_path / "f.npz",
        train_features=x,
        train_labels=y,
        test_features=x,
        test_labels=y,
        class_names=np.array(NAMES),
    )
    (tmp_path / "p.csv").write_text("owl,10\ncat,1\ndog,1\n")
    r = run(
        LDMLRConfig(
            features=str(tmp_path / "f.npz"),
            n_steps=20,
            per_class=5,
            head_steps=5,
            scratch_steps=5,
            test_prior=str(tmp_path / "p.csv"),
            ablate="guidance",
            device="cpu",
            precision="fp32",
            out=str(tmp_path / "run"),
        )
    )
    rows = {x["method"]: x for x in r.scores()}
    assert {"label shift, test prior", "ldmlr + label shift, test prior"} <= set(rows)
    assert all("expected" in x for x in rows.values())
    prior = np.array([1, 1, 10]) / 12
    assert np.isclose(rows["ldmlr"]["expected"], (prior * rows["ldmlr"]["per_class"]).sum())
    saved = json.loads((r.path / "model" / "model.json").read_text())
    assert saved["method"] == "ldmlr + label shift, test prior" and np.allclose(saved["test_prior"], prior)
    carried = np.array(saved["effective_counts"]) / np.sum(saved["effective_counts"])
    assert np.allclose(saved["prior_correction"]["log_prior"], np.log(carried) - np.log(prior), atol=1e-5), (
        "removed once, added once"
    )


def classifier(tmp_path, name="model", **saved):
    from ltnb.models import build_model
    from ltnb.classifier import Classifier

    clf = Classifier(
        build_model("convnet", 3, 3), NAMES, (3, 8, 8), arch="convnet", log_prior=saved.pop("log_prior", None)
    )
    clf.eval().save(tmp_path / name, **saved)
    return tmp_path / name


@pytest.mark.parametrize(
    "saved",
    [
        dict(
            method="label shift",
            effective_counts=[80.0, 15.0, 5.0],
            train_counts=[80, 15, 5],
            log_prior=np.log([0.8, 0.15, 0.05]),
        ),
        dict(
            method="label shift, test prior",
            effective_counts=[80.0, 15.0, 5.0],
            train_counts=[1, 1, 1],
            test_prior=[0.2, 0.2, 0.6],
            log_prior=np.log([4, 0.75, 0.05 / 0.6]),
        ),
        dict(method="label shift", log_prior=np.log([0.8, 0.15, 0.05])),
        dict(method="cross-entropy", train_counts=[80, 15, 5]),
    ],
)
def test_a_saved_classifier_is_turned_from_whatever_was_saved(tmp_path, saved):
    from ltnb.classifier import Classifier

    folder = classifier(tmp_path, **saved)
    clf = Classifier.load(folder)
    x = np.random.RandomState(0).randint(0, 256, (9, 3, 8, 8)).astype(np.uint8)
    with torch.no_grad():
        raw = clf.net(clf.prepare(torch.from_numpy(x))).float()
    for to in ("1,2,3", "3,1,1"):
        retarget(clf, folder, to)
        want = label_shift(raw, [80, 15, 5], test_prior=[float(v) for v in to.split(",")]).softmax(1)
        assert np.allclose(clf.predict(x), want.numpy(), atol=1e-5)


def test_a_classifier_without_a_record_is_refused(tmp_path):
    from ltnb.classifier import Classifier

    folder = classifier(tmp_path, method="ldmlr")
    with pytest.raises(UsageError, match="does not record the prior"):
        retarget(Classifier.load(folder), folder, "1,2,3")
    saved = {"method": "balanced softmax", "effective_counts": [1.0, 1.0], "train_counts": [9, 1]}
    assert carried_prior(saved) == [1.0, 1.0]


def test_predict_command(main, tmp_path):
    folder = classifier(
        tmp_path,
        method="label shift",
        effective_counts=[80.0, 15.0, 5.0],
        train_counts=[80, 15, 5],
        log_prior=np.log([0.8, 0.15, 0.05]),
    )
    (tmp_path / "photos").mkdir()
    for i in range(3):
        x = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(x).save(tmp_path / "photos" / f"{i}.png")

    def ask(name, *more):
        code, _, err = main(
            "predict",
            "--model",
            folder,
            "--images",
            tmp_path / "photos",
            "--out",
            tmp_path / name,
            "--device",
            "cpu",
            "--precision",
            "fp32",
            *more,
        )
        if code:
            return code, err
        return np.array([[float(r[n]) for n in NAMES] for r in csv.DictReader((tmp_path / name).open())])

    plain, equal, train = ask("a.csv"), ask("b.csv", "--test-prior", "1,1,1"), ask("c.csv", "--test-prior", "train")
    odds = train / plain
    assert np.allclose(plain, equal, atol=1e-5)
    assert np.allclose(odds / odds[:, :1], np.array([80, 15, 5]) / 80, atol=1e-3)
    code, err = ask("d.csv", "--test-prior", '{"cat": 1, "dog": 2, "fox": 3}')
    assert code == 2 and "'fox'" in err and not (tmp_path / "d.csv").exists()
