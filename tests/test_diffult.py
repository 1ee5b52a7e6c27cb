"DiffuLT as a whole: its four steps, its controls, and a run that a kill does not harm."

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import copy_before
from ltnb import classify, controls, diffult, diffult_ablations, diffult_steps, training
from ltnb.aid_loss import FORMS
from ltnb.classifier import Classifier
from ltnb.classify import OverBatch, trained_answer
from ltnb.controls import noise_images, real_repeated
from ltnb.core import UsageError, read_json, read_jsonl
from ltnb.data import LongTail
from ltnb.diffult import DiffuLT, run
from ltnb.diffult_ablations import (
    PUBLISHED,
    asked_for,
    class_table,
    classes_table,
    fit_budget,
    less_head,
    main_table,
    published,
)
from ltnb.diffult_steps import DiffuLTConfig, Eye, Made, draw, extractor, tail_classes, with_images
from ltnb.generator_steps import train_model
from ltnb.losses import effective_counts
from ltnb.progress import Progress
from ltnb.recipe import Answer, Answers, Stage
from ltnb.team import Where

pytestmark = pytest.mark.usefixtures("small_unet", "few_draws")
QUICK = dict(
    n_steps=10, diff_bs=16, n_epochs=60, target_per_class=5, sample_steps=3, cap=2.0, pipelines=False
)  # 60 epochs: after 40, one of eight draws of the weights leaves phi_0 no better than chance
BRIEF = {**QUICK, "n_epochs": 2, "judge_epochs": 2}  # with `patient_extractor`: only phi_0 takes 60 epochs
CORE = [
    "cross-entropy",
    "label shift",
    "equal iterations",
    "balanced softmax",
    "real repeated",
    "noise images",
    "generation",
    "generation + filter",
    "generation + weight",
    "aid loss",
    "aid loss + filter",
    "diffult",
    "diffult + label shift",
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


@pytest.fixture(scope="module")
def data():
    return LongTail.digits()


@pytest.fixture(scope="module")
def cfg(data):
    return DiffuLT().resolve(DiffuLTConfig(**QUICK), data)


@pytest.fixture(scope="module")
def stage(cfg, data):
    "One seed that keeps nothing"
    return Stage(cfg, data, 0, Where())


@pytest.fixture(scope="module")
def brief(cfg, data):
    "One seed whose classifiers take few epochs"
    return Stage(replace(cfg, n_epochs=BRIEF["n_epochs"]), data, 0, Where())


@pytest.fixture(scope="module")
def eye(done):
    "What the first step of that run left"
    return SEEN[0]


SEEN = []


def patient_extractor(s):
    "phi_0 as the run trains it, but for as many epochs as it needs"
    SEEN.append(extractor(replace(s, cfg=replace(s.cfg, n_epochs=QUICK["n_epochs"]))))
    return SEEN[-1]


@pytest.fixture(scope="module")
def done(tmp_path_factory, small_unet, few_draws):
    "A finished run of few steps; beside it, its directory as a power cut would have left it at two moments"
    Progress.quiet, folder = True, tmp_path_factory.mktemp("diffult")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(diffult, "extractor", patient_extractor)
        for place, name in ((diffult_steps, "calibrate"), (DiffuLT, "keep")):
            copy_before(m, place, name, folder / "run", folder / f"cut-{name}")
        return run(DiffuLTConfig(**BRIEF, out=str(folder / "run")))


def for_all_time(path):
    "What is in the files of a run, without those that say when and where"
    passing = ("environment.json", "timing.jsonl")
    files = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name not in passing)
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def only_cross_entropy(s, logits, wanted):
    "A stand-in for the controls, which are tested elsewhere"
    return Answers({"cross-entropy": Answer(logits, s.data.counts)}).corrected("cross-entropy")


def answer(s, made=None, weight=1.0, name="mixed", loss="cross_entropy", augment=None, epochs=1.0):
    "What a classifier says, and the prior of it, without keeping them"
    return trained_answer(s, made, weight, name, loss, augment, epochs)


# the run
def test_what_a_run_leaves(done):
    rows = done.scores()
    assert [r["method"] for r in rows] == CORE
    assert not [m for m in CORE[:-2] if "diffult" in m], "no control's name contains that of the method"
    names = set(for_all_time(done.path))
    assert {
        "model/model.json",
        "generator/ltnb.json",
        "phi/model.json",
        "classes-seed-0.json",
        "report.html",
        "figures/classes.png",
        "figures/samples.png",
        "made/cbdm-seed-0/manifest.jsonl",
        "made/aid-seed-0/manifest.jsonl",
    } <= names
    assert not [n for n in names if n.startswith("checkpoints")]
    assert set(next(r for r in rows if r["method"] == "diffult")["se"]) == set(DiffuLT.compared)
    assert {
        "id",
        "aid",
        "ood",
        "drawn",
        "kept",
        "copies",
        "distance",
        "recognised",
        "diversity",
        "alpha",
        "gradients",
    } <= set(rows[-1]) and "drawn" not in rows[0]
    assert rows[0]["id"] + rows[0]["aid"] + rows[0]["ood"] == pytest.approx(1) and rows[0]["diversity"] == 1, (
        "unseen real images, beside the generators"
    )
    said = DiffuLT().summary(done)
    assert all(m in said for m in CORE) and "CBDM + AID loss" in said and "diffult against label shift" in said
    assert json.loads((done.path / "classes-seed-0.json").read_text())[9]["images"] == 1


def test_the_classifier_that_is_kept(done, data):
    clf, rows = Classifier.load(done.path / "model"), done.scores()
    made = [r["class"] for r in read_jsonl(done.path / "made" / "aid-seed-0" / "manifest.jsonl")]
    accuracy = (clf.predict(data.test.images).argmax(1) == data.test.labels).mean()
    assert (
        abs(accuracy - next(r["all"] for r in rows if r["method"] == "diffult + label shift")) < 0.02 and len(made) > 0
    )
    info = json.loads((done.path / "model" / "model.json").read_text())
    counts = np.array(info["effective_counts"])
    kept = [d["kept"] or 0 for d in read_json(done.path / "classes-seed-0.json")]
    assert np.allclose(counts, data.counts + 0.3 * np.array(kept)), "the effective prior, once"
    assert np.allclose(clf.log_prior, np.log(counts / counts.sum()), atol=1e-5)


class Stop(Exception):
    "A stand-in for a power cut"


def stop(*args, **more):
    raise Stop


@pytest.mark.parametrize("name", ["calibrate", "keep"])
def test_a_run_that_was_killed_goes_on(done, monkeypatch, name):
    cut, calls, real = done.path.with_name(f"cut-{name}"), [], training.fit
    assert list(cut.glob("checkpoints/*")) and not (cut / "scores.json").exists(), "it was cut at work"
    monkeypatch.setattr(diffult, "extractor", patient_extractor)
    monkeypatch.setattr(classify, "fit", lambda *a, **k: calls.append(k.get("name")) or real(*a, **k))
    again = run(DiffuLTConfig(**BRIEF, out=str(cut)))
    a, b = for_all_time(again.path), for_all_time(done.path)
    assert a.keys() == b.keys() and [k for k in a if a[k] != b[k]] == []
    assert "noise" not in calls, "what was trained is not trained again"


def test_a_finished_run_is_left_alone(done):
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*")}
    run(done.config)
    assert before == {p: p.stat().st_mtime_ns for p in done.path.rglob("*")}


def test_the_sweeps(tmp_path, monkeypatch, eye):
    monkeypatch.setattr(diffult, "controls", only_cross_entropy)
    monkeypatch.setattr(diffult, "extractor", lambda s: eye)  # so that classifiers may be trained for one epoch
    r = run(DiffuLTConfig(**{**BRIEF, "n_steps": 2, "n_epochs": 1}, ablate="all", out=str(tmp_path / "run")))
    rows = {x["method"]: x for x in r.scores()}
    forms = [f"form: {form}" for form in FORMS if form != "per-time"]
    shares = [f"tail only, {percent} % of the head" for percent in (0, 40, 80, 100)]
    assert set(rows) - set(CORE) == {"ddpm", *forms, *(f"{form} + filter + weight" for form in forms), *shares}
    assert all(rows[form]["form"] == form[6:] and len(rows[form]["gradients"]["cosines"]) == 10 for form in forms)
    alphas = {form: rows[form]["alpha"] for form in ("aid loss", "form: x0-band", "form: calibrated")}
    assert alphas["aid loss"] <= 0.1 == alphas["form: calibrated"] and alphas["form: x0-band"] <= 1, (
        "lowered where the gradient is too long"
    )
    assert (
        rows["ddpm"]["ablation"] == "ddpm"
        and rows["tail only, 0 % of the head"]["tail_aid"] is not None
        and rows["tail only, 100 % of the head"]["tail"] >= 0
    )
    assert "What was swept" in (r.path / "report.html").read_text()


def test_pipelines(cfg, data, eye, monkeypatch):
    "The same images with other losses and augmentations; cutout is never larger than half of the image"
    seen, made = [], real_repeated(data, np.maximum(5 - data.counts, 0))

    def classified(s, made=None, weight=1.0, name="mixed", loss="cross_entropy", augment=None):
        seen.append((augment, weight))
        return Answer(torch.zeros(1, 10), data.counts)

    monkeypatch.setattr(diffult_steps, "classify", classified)
    s = Stage(DiffuLTConfig(**{**QUICK, "pipelines": True, "augment": "crop+flip"}), data, 0, Where())
    out = with_images(s, SimpleNamespace(everything=made, kept=made), "aid loss", {"form": "per-time"})
    assert list(out) == [
        "aid loss",
        "aid loss + filter",
        "diffult",
        "diffult, balanced softmax",
        "diffult, autoaugment + cutout",
        "diffult, ldam-drw",
    ]
    assert [a for a, _ in seen] == [None] * 4 + ["crop+flip+autoaugment+cutout", None]
    assert [w for _, w in seen] == [1.0, 1.0, 0.3, 0.3, 0.3, 0.3]
    assert all(a.facts == {"form": "per-time"} for a in out.values())
    sizes, short = [], DiffuLT().resolve(DiffuLTConfig(**{**QUICK, "n_epochs": 1}), data)
    monkeypatch.setattr(classify, "Augment", lambda names, size=16: sizes.append(size) or (lambda x, g: x))
    answer(Stage(short, data, 0, Where()), augment="cutout")
    assert sizes == [4]


# the steps
def test_weighted_cross_entropy_is_divided_by_the_batch():
    loss, z, y = (
        OverBatch([3.0, 2.0]),
        torch.randn(5, 2, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 0, 0, 1]),
    )
    w = torch.tensor([1.0, 0.3, 1.0, 0.3, 0.3])
    assert torch.allclose(loss(z, y, w), (w * F.cross_entropy(z, y, reduction="none")).sum() / 5)
    assert torch.allclose(loss(z, y), F.cross_entropy(z, y))


def test_the_filter_fills_up(cfg, data, stage, eye, tmp_path):
    model = train_model(cfg, data, 0)
    f = draw(stage, model, eye, tmp_path)
    wanted = np.maximum(5 - data.counts, 0)
    assert Made(model, f, {}).everything.counts(10).tolist() == wanted.tolist()
    for d in f.classes:
        assert d["kept"] == d["wanted"] or d["capped"]
    assert (f.kept.counts(10) <= wanted).all() and len(f.made) <= 2 * wanted.sum() + 10


def test_a_class_out_of_distribution_is_reported_and_the_run_goes_on(cfg, data, stage, brief, eye, tmp_path):
    "The cap is reached, what there is is kept, and a classifier is trained on it"
    model, far = train_model(cfg, data, 0), copy.copy(eye.geometry)
    object.__setattr__(far, "diameters", eye.geometry.diameters.clone())
    far.diameters[9] = 1e-6
    f = draw(stage, model, Eye(eye.clf, eye.phi, far), tmp_path)
    last = next(d for d in f.classes if d["class"] == 9)
    assert (last["kept"], last["capped"], last["drawn"], last["ood"]) == (0, True, 8, 1.0)
    rows = [{"method": m, "per_class": [0.5] * 10} for m in ("cross-entropy", "diffult")]
    made = Made(model, f, {})
    lines = classes_table(class_table(data, made, made, rows))
    assert lines[-1][-1] == "capped" and lines[-1][4] == "0"
    assert len(answer(brief, f.kept, 0.3)[0]) == len(data.test)


def test_controls_make_the_same_number(data):
    wanted = np.maximum(20 - data.counts, 0)
    a, b = real_repeated(data, wanted), noise_images(data, wanted, 0)
    assert a.counts(10).tolist() == b.counts(10).tolist() == wanted.tolist()
    real = {x.tobytes() for x in data.train.images}
    assert all(x.numpy().tobytes() in real for x in a.items) and not any(x.numpy().tobytes() in real for x in b.items)
    assert {r["source_id"] for r in a.manifest} <= set(data.train.ids)


def test_equal_iterations_are_equal(data, stage, monkeypatch):
    seen, wanted = {}, np.maximum(5 - data.counts, 0)
    monkeypatch.setattr(controls, "classify", lambda s, made=None, **k: seen.setdefault(k["name"], (made, k)))
    said = controls.controls(stage, torch.zeros(len(data.test), 10), wanted)
    assert list(said) == CORE[:6]
    made, k = seen["equal-iterations"]
    total = len(data.train) + np.maximum(5 - data.counts, 0).sum()
    assert made is None and abs(k["epochs"] * len(data.train) - total) < 1e-6
    assert (
        len(seen["real-repeated"][0]) + len(data.train) == total
        and seen["balanced-softmax"][1]["loss"] == "balanced_softmax"
    )


def test_the_prior_of_the_answers(data, brief):
    made = real_repeated(data, np.maximum(5 - data.counts, 0))
    _, counts = answer(brief, made, 0.3)
    assert torch.allclose(counts, effective_counts(data.counts, made.counts(10), 0.3))
    assert torch.allclose(answer(brief)[1], torch.from_numpy(data.counts).double())


def test_less_of_the_head(data):
    tail = tail_classes(data)
    assert tail.tolist() == [9, 8, 7, 6, 5] or set(tail.tolist()) == {5, 6, 7, 8, 9}
    part = less_head(data, 0.4, 0)
    assert (part.counts[5:] == data.counts[5:]).all() and part.counts[:5].tolist() == [
        round(0.4 * n) for n in data.counts[:5]
    ]
    assert (less_head(data, 0.0, 0).counts[:5] == 0).all()


# settings
@pytest.mark.parametrize(
    "change,text",
    [
        (dict(target_per_class=1), "nothing to generate"),
        (dict(ablate="aid-form"), "Did you mean 'aid-forms'"),
        (dict(syn_weight=0.0), "ignores every generated image"),
        (dict(objective="edm", min_snr=5.0), "own weights"),
        (dict(augment="crops"), "crop"),
    ],
)
def test_settings_that_cannot_be_run(data, change, text):
    with pytest.raises(UsageError, match=text):
        DiffuLT().resolve(DiffuLTConfig(**{**QUICK, **change}), data)


@pytest.mark.parametrize(
    "change",
    [
        dict(syn_weight=1.5),
        dict(syn_weight=-0.1),
        dict(cap=0.5),
        dict(keep="all"),
        dict(aid_form="literally"),
        dict(target_per_class=0),
        dict(budget_minutes=0.0),
    ],
)
def test_values_out_of_range(change):
    with pytest.raises(UsageError):
        DiffuLTConfig(**change)


def test_a_phi_at_chance_stops_the_run_early(tmp_path, main):
    code, _, err = main("run", "diffult", "--plain", "--n-epochs", "1", "--n-steps", "5", "--out", tmp_path / "run")
    assert code == 1 and "no more than chance" in err and not (tmp_path / "run" / "made").exists()


def test_a_class_without_images(data, tmp_path, main):
    np.savez(
        tmp_path / "d.npz",
        train_images=np.zeros((6, 8, 8), np.uint8),
        train_labels=[0, 0, 0, 0, 2, 2],
        test_images=np.zeros((3, 8, 8), np.uint8),
        test_labels=[0, 1, 2],
    )
    code, _, err = main(
        "run", "diffult", "--plain", "--dataset", "npz", "--data-root", tmp_path / "d.npz", "--out", tmp_path / "run"
    )
    assert code in (1, 2) and "no training image" in err, err


def test_the_defaults_are_the_papers():
    c = DiffuLTConfig()
    assert (c.cb_tau, c.cb_gamma, c.aid_alpha, c.syn_weight, c.cap, c.keep, c.aid_form, c.shrink) == (
        1.0,
        0.25,
        None,
        0.3,
        5.0,
        "id+aid",
        "per-time",
        0.0,
    )
    assert asked_for(DiffuLTConfig(ablate="all")) == ["ddpm", "aid-forms", "head-share"] and not hasattr(c, "heads")


def test_published_numbers_stand_beside_ours():
    c = DiffuLTConfig(dataset="cifar100", imb_ratio=100.0)
    assert (
        published(c)["diffult"] == 51.5
        and published(DiffuLTConfig()) == {} == published(DiffuLTConfig(dataset="cifar100", imb_ratio=100.0, n_max=300))
        and PUBLISHED["cifar10", 100]["diffult"] == 84.7
    )
    rows = [
        {"method": m, "seed": 0, "all": 0.4, "many": 0.4, "medium": 0.4, "few": 0.4}
        for m in ("cross-entropy", "diffult")
    ]
    cells = main_table(rows, c)
    assert cells[0][-1] == "published" and [x[-1] for x in cells[1:]] == ["38.3", "51.5"]


def test_the_verdict_is_made_from_intervals():
    def row(m, v, **se):
        return {"method": m, "seed": 0, "all": v, "many": v, "medium": v, "few": v, "se": se}

    rows = [
        row("label shift", 0.8),
        row("diffult", 0.9, **{"label shift": 0.01}),
        row("generation", 0.7, **{"cross-entropy": 0.5}),
        row("cross-entropy", 0.69),
    ]
    said = DiffuLT().verdict(rows)
    assert any("diffult against label shift" in s and "a gain" in s for s in said) and any(
        "generation against cross-entropy" in s and "no clear difference" in s for s in said
    )


def test_a_budget_is_measured_once_and_kept(tmp_path, monkeypatch, eye):
    calls = []
    monkeypatch.setattr(diffult, "extractor", lambda s: eye)
    monkeypatch.setattr(diffult, "controls", only_cross_entropy)
    monkeypatch.setattr(diffult_ablations, "seconds_a_run", lambda *a: calls.append(1) or (0.0, 120.0))
    few = {**BRIEF, "n_steps": 20, "n_epochs": 4, "budget_minutes": 1.0}
    monkeypatch.setattr(diffult_steps, "calibrate", stop)
    with pytest.raises(Stop):
        run(DiffuLTConfig(**few, out=str(tmp_path / "run")))
    kept = read_json(tmp_path / "run" / "config.json")
    assert (kept["n_steps"], kept["n_epochs"]) == (10, 2) and calls == [1]
    monkeypatch.setattr(diffult_ablations, "seconds_a_run", lambda *a: calls.append(1) or (0.0, 600.0))
    with pytest.raises(Stop):
        run(DiffuLTConfig(**few, out=str(tmp_path / "run")))
    assert calls == [1] and read_json(tmp_path / "run" / "config.json") == kept, "a restart keeps what was measured"


def test_the_budget_is_estimated_from_the_machine(cfg, data):
    one = fit_budget(replace(cfg, budget_minutes=1.0, n_steps=40000, n_epochs=8000), data, Where())
    two = fit_budget(replace(cfg, budget_minutes=1e4), data, Where())
    assert one.n_steps < 40000 and one.n_epochs < 8000 and (two.n_steps, two.n_epochs) == (cfg.n_steps, cfg.n_epochs)
    assert abs(one.n_steps / 40000 - one.n_epochs / 8000) < 0.02


def test_a_budget_below_what_the_images_take(cfg, data, monkeypatch):
    monkeypatch.setattr(diffult_ablations, "seconds_a_run", lambda *a: (600.0, 600.0))
    with pytest.raises(UsageError, match="about 10.0 minutes"):
        fit_budget(replace(cfg, budget_minutes=5.0), data, Where())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    assert run(DiffuLTConfig(**QUICK, device="cuda", compiled=False, out=str(tmp_path / "run"))).finished


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_made_in_the_run_s_precision_and_measured_in_that_of_the_classes(precision, monkeypatch):
    seen = {}

    def image_maker(model, how, where, seed):
        seen["made"] = where.precision
        return None, {}

    def draw_filtered(*args, where, **how):
        seen["measured"] = where.precision

    monkeypatch.setattr(diffult_steps, "image_maker", image_maker)
    monkeypatch.setattr(diffult_steps, "draw_filtered", draw_filtered)
    data = LongTail.digits()
    cfg = DiffuLT().resolve(DiffuLTConfig(dataset="digits", precision=precision), data)
    stage = Stage(cfg, data, 0, Where(precision=precision))
    draw(stage, SimpleNamespace(fingerprint="m"), Eye(None, None, None), "folder")
    assert seen == {"made": precision, "measured": "fp32"}
