"Spectra: the noise of a level, items that do not depend on their batch, pipelines, tries, a job a level."

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ltnb.core import DataError, UsageError
from ltnb.data import LongTail
from ltnb.diffusion import DiffusionModel, build_unet
from ltnb.draw import ItemScore
from ltnb.guidance import hard_by_frequency, level_steps, spectrum_plan
from ltnb.noise import NoiseModel, build_objective
from ltnb.samplers import SAMPLERS, Start, sample_batch
from ltnb.spectrum import (
    ImageToImage,
    best_of,
    img2img_maker,
    joined,
    level_ratio,
    level_facts,
    make_spectrum,
    open_spectrum,
    plot_spectrum,
    sdedit_maker,
    spectrum_noise,
    spectrum_of,
    text_alone,
)
from ltnb.synthetic import Synthetic
from ltnb.text2image import TextToImage, text_maker
from tiny_pipelines import saved, stable_diffusion, stable_diffusion_xl

DATA = LongTail.digits()
HARD = hard_by_frequency(DATA.train)
PLAN = spectrum_plan(DATA.train, HARD[::8], (0, 30, 90), (0, 5), lambda c, seed: f"a photo of a {c}")
UNET = build_unet("tiny", 8, 1, 10, 0).eval()
HOW = dict(sample_steps=10, sampler="ddim", guidance_scale=2.0)


def model(objective="v"):
    return DiffusionModel(UNET, build_objective(objective), DATA.class_names, (1, 8, 8), DATA.counts)


class NoNoise(nn.Module):
    "Says that there is no noise: what comes out of one step is what went in"

    def forward(self, x, t, class_labels, return_dict=False):
        return (torch.zeros_like(x),)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("level", [70, 90])
def test_a_walk_begins_with_the_noise_of_its_level(sampler, level):
    on = NoiseModel(NoNoise(), build_objective("eps"), 10)
    r, noise = level_ratio(on.objective, level), torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x0, y, g = torch.full_like(noise, 0.1), torch.zeros(64, dtype=torch.int64), [torch.Generator() for _ in noise]
    out = sample_batch(on, noise, y, None, g, Start(x0, r), sampler=sampler, sample_steps=1)
    assert torch.allclose(out, (x0 + r * noise).clamp(-1, 1), atol=0.05 * r)
    kept = on.objective.ratios[: 10 * (100 - level)]  # the time of the level
    assert len(kept) == 10 * (100 - level) and abs(r - kept[-1]) < 1e-9


@pytest.mark.parametrize("sampler, objective", zip(SAMPLERS, ("v", "edm", "eps", "v"), strict=True))
def test_items_depend_on_nothing_but_themselves(sampler, objective):
    make, settings = sdedit_maker(model(objective), DATA.train, **{**HOW, "sampler": sampler})
    whole, about = make(PLAN)
    assert whole.shape == (len(PLAN), 1, 8, 8) and whole.dtype == torch.uint8
    assert [a["sample_steps"] for a in about] == [level_steps(v, 10) for v in PLAN["level"]]
    order = np.random.default_rng(0).permutation(len(PLAN))[:7]
    part = make(PLAN.take(order))[0]
    assert (part.int() - whole[torch.from_numpy(order)].int()).abs().max() <= 1
    assert not torch.equal(make(PLAN.take(order), attempt=1)[0], part)
    assert settings["text_only"] == "img2img" and settings["sample_steps"] == 10


def test_seeds_and_levels_have_noise_of_their_own():
    noise = spectrum_noise((0,), PLAN, (1, 8, 8)).flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(PLAN)
    assert torch.equal(spectrum_noise((0,), PLAN.take([3]), (1, 8, 8)).flatten(1)[0], noise[3])


def test_higher_levels_are_nearer_to_the_source():
    make, _ = sdedit_maker(model(), DATA.train, **HOW)
    spectrum = {v: None for v in (0, 30, 90)}
    for v in spectrum:
        part = PLAN.take(PLAN["level"] == v)
        spectrum[v] = Synthetic(make(part)[0], [r | {"scores": {}} for r in part.rows()])
    far = [d["distance"] for d in level_facts(spectrum, DATA.train)]
    assert far == sorted(far, reverse=True) and far[2] < 0.5 * far[0]


def test_text_alone_forgets_the_image():
    other = DATA.train.take(np.arange(len(DATA.train)))
    flipped = type(other)(np.ascontiguousarray(255 - np.asarray(other.images)), other.labels, other.class_names)
    at = np.flatnonzero(PLAN["level"] == 0)
    plan = PLAN.take(at)
    new = plan.columns | {"source_id": [flipped.ids[DATA.train.ids.index(s)] for s in plan["source_id"]]}
    for way, same in (("txt2img", True), ("img2img", False)):
        a, b = (sdedit_maker(model("eps"), t, **HOW, text_only=way)[0] for t in (DATA.train, flipped))
        assert torch.equal(a(plan)[0], b(type(plan)(new))[0]) == same
    with pytest.raises(UsageError, match="txt2img"):
        sdedit_maker(model(), DATA.train, text_only="txt2image")


def test_a_strange_source_is_refused():
    make, _ = sdedit_maker(model(), DATA.train, **HOW)
    plan = spectrum_plan(LongTail.digits(seed=1).train, HARD[:1], (50,))
    with pytest.raises(DataError, match="no image of this training set"):
        make(plan)


def test_the_best_of_the_tries_stays():
    calls = []

    def make(part, attempt=0):
        calls.append((len(part), attempt))
        values = np.array([(7 * k + 3 * attempt) % 10 for k in part["k"]])
        images = torch.from_numpy(values).to(torch.uint8)[:, None, None, None].repeat(1, 1, 2, 2)
        return images, [{}] * len(part)

    score = ItemScore("clip", lambda x, rows: {"clip": x[:, 0, 0, 0].float().numpy()}, "me")
    plan = PLAN.take(np.arange(0, len(PLAN), 2))
    images, about = best_of(make, score, lambda r: r["scores"]["clip"] >= 6 and r["class"] >= 0, tries=3)(plan)
    tried = np.array([[(7 * k + 3 * n) % 10 for n in range(3)] for k in plan["k"]])
    for row, a, x in zip(tried, about, images, strict=True):
        passed = np.flatnonzero(row >= 6)
        want = row[passed[0]] if len(passed) else row.max()
        assert x.max() == want == a["scores"]["clip"] and row[a["tries"] - 1] == want and a["scores"]["clip_by"] == "me"
    assert [n for _, n in calls] == [0, 1, 2] and calls[0][0] > calls[1][0] >= calls[2][0]
    best_of(make, score, lambda r: True, tries=3)(plan, attempt=2)
    assert calls[-1][1] == 6, "another attempt has other tries"


def test_a_job_a_level(tmp_path):
    make, settings = sdedit_maker(model(), DATA.train, **HOW)
    entered = []

    class Around:
        def __init__(self, level):
            entered.append(level)

        __enter__ = __exit__ = lambda self, *a: None

    made = make_spectrum(tmp_path, PLAN, make, "m", settings=settings, around=Around, shard_size=5)
    assert entered == [0, 30, 90] == list(made)
    assert all(r["level"] == v for v, m in open_spectrum(tmp_path).items() for r in m.manifest)
    whole = joined(made)
    assert sorted(r["id"] for r in whole.manifest) == PLAN.ids and len(whole.items) == len(PLAN)
    more = spectrum_plan(DATA.train, HARD[::8], (0, 30, 50, 90), (0, 5), lambda c, seed: f"a photo of a {c}")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*")}
    make_spectrum(tmp_path, more, make, "m", settings=settings)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a level more makes nothing anew"
    own = spectrum_of(open_spectrum(tmp_path), PLAN["source_id"][0], n=2)
    assert {len(m) for m in own.values()} == {2} and list(own) == [0, 30, 50, 90]
    ax = plot_spectrum({v: m.items[:].numpy() for v, m in own.items()}, {v: ["a", "b"] for v in own})
    assert len(ax.images) == 8 and {"0 %", "90 %"} <= {t.get_text() for t in ax.texts}
    with pytest.raises(DataError, match="no spectrum"):
        open_spectrum(tmp_path / "level-00")


# Pipelines


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    there = tmp_path_factory.mktemp("pipelines")
    kinds = dict(sd=stable_diffusion(), refiner=stable_diffusion_xl(refiner=True))
    return {n: saved(there / n, p) for n, p in kinds.items()}


@pytest.mark.parametrize("name", ["sd", "refiner"])
def test_a_pipeline_runs_the_steps_of_the_level(folders, name, monkeypatch):
    pipe = ImageToImage.open(folders[name])
    make, settings = img2img_maker(pipe, DATA.train, full_size=64, sample_steps=10, guidance_scale=3.0, bs=4)
    assert settings["size"] == 8 and settings["full_size"] == 64
    calls, real = [], pipe.pipe.unet.forward
    monkeypatch.setattr(pipe.pipe.unet, "forward", lambda *a, **k: calls.append(1) or real(*a, **k))
    for level in (90, 30):
        plan = PLAN.take(PLAN["level"] == level)
        plan = plan.take(slice(0, 2))
        calls.clear()
        both = make(plan)[0]
        assert len(calls) == level_steps(level, 10)
    assert both.shape == (2, 1, 8, 8)
    alone = make(plan.take([1]))[0]
    assert (alone[0].int() - both[1].int()).abs().max() <= 1
    assert not torch.equal(make(plan, attempt=1)[0], both)


def test_a_pipeline_never_resizes_in_silence(folders):
    pipe = ImageToImage.open(folders["sd"])
    odd = type(DATA.train)(np.zeros((2, 3, 12, 16), np.uint8) + np.arange(16, dtype=np.uint8), np.arange(2), ("a", "b"))
    with pytest.raises(UsageError, match="12 x 16 pixels are no multiples of 8"):
        img2img_maker(pipe, odd)
    with pytest.raises(UsageError, match="squeezed"):
        img2img_maker(pipe, odd, full_size=64)


def test_level_zero_from_the_text_alone(folders):
    pipe = ImageToImage.open(folders["sd"])
    make, _ = img2img_maker(pipe, DATA.train, full_size=64, sample_steps=2, guidance_scale=1.0)
    base = TextToImage.open(folders["sd"])

    def draw(seed):
        return text_maker(base, sample_steps=2, guidance_scale=1.0, seed=seed, size=8, channels=1, full_size=64)[0]

    both, plan = text_alone(make, draw), PLAN.take(PLAN["k"] == PLAN["k"][0])
    plan = plan.take(np.flatnonzero(plan["class"] == plan["class"][0]))
    plan = plan.take(np.flatnonzero(plan["level"] < 90))
    images, _ = both(plan)
    zero = plan["level"] == 0
    assert torch.equal(images[~zero], make(plan.take(~zero))[0])
    assert not torch.equal(images[zero][0], images[zero][1]), "seeds differ"
    with pytest.raises(UsageError, match="refiner"):
        TextToImage.open(folders["refiner"])


def test_pipelines_that_count_otherwise_are_refused(tmp_path):
    saved(tmp_path / "lcm", stable_diffusion("LatentConsistencyModelPipeline"))
    with pytest.raises(UsageError, match="LatentConsistencyModelPipeline"):
        ImageToImage.open(tmp_path / "lcm")


def test_a_slider_walks_along_the_levels():
    "In JupyterLab: what it shows follows it; where there are no widgets there is none"
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed: the slider was not moved")
    import matplotlib.pyplot as plt
    from ltnb import spectrum

    columns = {v: np.zeros((2, 1, 8, 8), np.uint8) for v in (0, 30, 100)}
    drawn, real = [], spectrum.plot_spectrum
    with pytest.MonkeyPatch.context() as m:
        m.setattr(spectrum, "plot_spectrum", lambda shown, notes: (drawn.append(list(shown)), real(shown, notes))[1])
        m.setattr(plt, "show", lambda: plt.close("all"))
        slider = spectrum.level_slider(columns, {v: ["", ""] for v in columns})
        for level in (30, 100, 0):
            slider.children[0].value = level
            assert drawn[-1] == [level]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "ipywidgets", None)
        assert spectrum.level_slider(columns, {}) is None
