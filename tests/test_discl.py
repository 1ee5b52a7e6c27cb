"DisCL from end to end, on models trained on the spot"

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ltnb import discl, spectrum
from ltnb.core import DataError, LtnbError, UsageError, read_json
from ltnb.curriculum import CurriculumOrder
from ltnb.data import LongTail
from ltnb.discl import DisCL, explained, paper_numbers
from ltnb.discl_steps import AsTheyAre, DisCLConfig, asked_rows, levels_of, resolve_discl, schedules
from ltnb.guidance import hard_by_frequency
from ltnb.knowledge import Knowledge, write_knowledge
from ltnb.progress import Progress
from ltnb.spectrum import open_spectrum
from tiny_pipelines import saved, stable_diffusion_xl

FEW = dict(imb_ratio=20.0, n_max=40)
TINY = dict(**FEW, n_steps=2, diff_bs=8, sample_steps=4, guidance_scale=1.0, levels="0,50", per_image=1, maker="labels")
TINY |= dict(tries=2, clip_steps=2, rule="cosine", rule_cosine=-1.0, n_epochs=1, fine_epochs=4, curriculum_epochs=3)
TINY |= dict(judge_epochs=0, held_sources=2, ablate="adaptive", device="cpu", precision="fp32")
ROWS = ["cross-entropy", "label shift", "balanced softmax"]
for row in ("no synthetic", "real repeated", "text only", "all levels", "discl"):
    ROWS += [row, f"{row} + label shift"]
ROWS += ["discl, balanced softmax", "adaptive", "adaptive + label shift"]
pytestmark = pytest.mark.usefixtures("small_unet", "tiny_clip")


@pytest.fixture(autouse=True, scope="module")
def quick():
    "Nothing is said, and no picture drawn: that takes longer than these trainings"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Progress, "quiet", True)
        m.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"a picture"))
        yield


def go(folder, **more):
    return DisCL().run(DisCLConfig(**{**TINY, **more}, out=str(folder)))


def files(folder):
    "What two equal runs share"
    names = ("environment.json", "timing.jsonl", "config.json", "report.html")
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in names)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_unet, tiny_clip, quick):
    return go(tmp_path_factory.mktemp("discl") / "run").path


def test_every_control_has_its_row(whole):
    rows = read_json(whole / "scores.json")
    assert sorted(r["method"] for r in rows) == sorted(ROWS)
    by = {r["method"]: r for r in rows}
    assert set(by["discl"]["se"]) >= {"cross-entropy", "no synthetic", "real repeated", "text only", "all levels"}
    assert [m for m, r in by.items() if "ablation" in r] == ["adaptive", "adaptive + label shift"]
    assert str(whole) not in (whole / "scores.json").read_text() + (whole / "metrics.jsonl").read_text()


def test_the_spectrum_has_every_hard_image_at_every_level(whole):
    train = LongTail.digits(**FEW).train
    hard = {train.ids[i] for i in hard_by_frequency(train)}
    made = open_spectrum(whole / "made" / "spectrum-seed-0")
    assert list(made) == [0, 50]
    for m in made.values():
        assert {r["source_id"] for r in m.manifest} == hard and all(1 <= r["tries"] <= 2 for r in m.manifest)
        assert all("clip" in r["scores"] and r["prompt"] for r in m.manifest)
    facts = read_json(whole / "levels-seed-0.json")
    assert [(d["level"], d["made"]) for d in facts] == [(v, len(hard)) for v in (0, 50)]


def test_epochs_walk_along_the_levels(whole):
    def parts(row):
        return read_json(whole / "epochs" / f"{row}-seed-0.json")

    walk = parts("discl")
    assert ["level 0" in walk[0], "level 50" in walk[1], "level 50" in walk[2]] == [True, True, False]
    assert all("hard again" in e and not any("level" in k for k in e) for e in walk[2:])
    sizes = {sum(e.values()) for row in ("discl", "all-levels", "no-synthetic", "real-repeated") for e in parts(row)}
    assert len(sizes) == 1, "every row shows as many images in an epoch"
    assert not any("level" in k for row in ("no-synthetic", "real-repeated") for e in parts(row) for k in e)
    assert all("hard" not in e for e in parts("text-only")[:3])


def test_the_prior_that_is_taken_out_is_the_one_that_was_shown(whole):
    shown, counts = (
        np.array(read_json(whole / "model" / "model.json")["effective_counts"]),
        LongTail.digits(**FEW).counts,
    )
    assert shown.sum() == sum(sum(e.values()) for e in read_json(whole / "epochs" / "discl-seed-0.json"))
    assert shown.argmax() != counts.argmax() or shown.max() / shown.sum() < counts.max() / counts.sum()


class Stop(Exception):
    "A stand-in for a power cut"


def test_killed_in_the_spectrum_and_in_the_curriculum_it_gives_the_same_files(whole, tmp_path, monkeypatch):
    out, batch, call = tmp_path / "run", spectrum.Editor.batch, CurriculumOrder.__call__

    def at_the_second_level(self, part, level, attempt=0):
        if level == 50:
            raise Stop
        return batch(self, part, level, attempt)

    def in_the_walk(self, epoch, g):
        if epoch == 2 and self.watch is None and len(self.schedule.among) == 3:
            raise Stop
        return call(self, epoch, g)

    def in_the_adaptive_walk(self, epoch, g):
        if epoch == 2 and self.watch is not None:
            raise Stop
        return call(self, epoch, g)

    stops = (spectrum.Editor, "batch", at_the_second_level), (CurriculumOrder, "__call__", in_the_walk)
    for where, name, stand_in in (*stops, (CurriculumOrder, "__call__", in_the_adaptive_walk)):
        with monkeypatch.context() as m:
            m.setattr(where, name, stand_in)
            with pytest.raises(Stop):
                go(out)
    go(out)
    mine, theirs = files(out), files(whole)
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if mine[k] != theirs[k]] == []


def test_a_level_of_which_nothing_is_left_is_named(tmp_path):
    with pytest.raises(DataError, match="no image of level 0 is left: none of its"):
        go(tmp_path / "run", rule_cosine=1.0)


def test_hard_by_confidence_told_texts(tmp_path):
    run = go(
        tmp_path / "run", judge_epochs=1, hard="confidence", hard_fraction=0.1, maker="text", ablate=None, levels="50"
    )
    assert {r["method"] for r in run.scores()} == set(ROWS) - {"text only", "text only + label shift"} - set(ROWS[-2:])
    made = open_spectrum(run.path / "made" / "spectrum-seed-0")
    n = len(LongTail.digits(**FEW).train)
    assert list(made) == [50] and len(made[50]) == int(0.1 * n + 0.5)
    first = read_json(run.path / "epochs" / "discl-seed-0.json")[0]
    assert first["level 50"] == len(made[50]) and first["head"] == n - len(made[50])
    sizes = {p.stem.removesuffix("-seed-0"): [*read_json(p)] for p in (run.path / "epochs").glob("*.json")}
    mean = {row: np.mean([sum(epoch.values()) for epoch in epochs]) for row, epochs in sizes.items()}
    equal = [mean[row] for row in ("discl", "no-synthetic", "real-repeated")]
    assert max(equal) - min(equal) <= 1, "equal budgets"
    assert all(epoch["hard again"] for epoch in sizes["real-repeated"])


def test_a_refiner_makes_the_spectrum_of_small_images(tmp_path, monkeypatch):
    saved(tmp_path / "refiner", stable_diffusion_xl(refiner=True))
    names = LongTail.digits(**FEW).class_names
    write_knowledge(tmp_path / "k.json", {n: Knowledge(name=n, features=["a bar"]) for n in names})
    how = dict(
        maker="text",
        pipeline=str(tmp_path / "refiner"),
        knowledge=str(tmp_path / "k.json"),
        full_size=64,
        ablate=None,
        tries=1,
        hard_below=8,
    )
    monkeypatch.setattr(discl, "keep_levels", lambda *a: 1 / 0)  # that far: the rest needs no pipeline
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "run", **how)
    made = open_spectrum(tmp_path / "run" / "made" / "spectrum-seed-0")
    assert list(made) == [0, 50] and tuple(made[50].items.shape[1:]) == (1, 8, 8)
    assert made[50].manifest[0]["scores"]["clip_by"] and made[50].manifest[0]["prompt"].startswith("a photo")
    with pytest.raises(UsageError, match="refiner"):
        DisCL().check(DisCLConfig(**{**TINY, **how, "text_only": "txt2img"}))


def test_published_numbers_stand_beside_the_same_data_only():
    def of(n=None, **how):
        return paper_numbers(DisCLConfig(**how), n)

    assert of(dataset="cifar100", imb_ratio=100.0)["discl"].endswith("30.91")
    assert of(dataset="lists", n=115_846)["discl"].endswith("39.82")
    assert not of(dataset="cifar100", imb_ratio=10.0) and not of(dataset="digits", imb_ratio=100.0)
    assert not of(dataset="cifar100", imb_ratio=100.0, n_max=100) and not of(dataset="lists", n=115_845)


def test_the_gain_is_taken_apart():
    rows = [{"method": m, "seed": 0, "all": v} for m, v in
            zip(("cross-entropy", "no synthetic", "real repeated", "all levels", "discl"), (0.3, 0.35, 0.5, 0.55, 0.54),
                strict=True)]  # fmt: skip
    assert explained(rows) == [
        "discl is +24.00 points from cross-entropy: +5.00 by more epochs, +15.00 by the tail repeated, "
        "+5.00 by made images in place of repeats, -1.00 by their order."
    ]
    assert explained(rows[:-1]) == []


def test_real_images_as_they_are():
    at = AsTheyAre(10, 25).shown(0, torch.Generator().manual_seed(0))
    assert len(at) == 25 and set(np.bincount(at).tolist()) == {2, 3} and set(at[:10].tolist()) == set(range(10))


def test_rows_and_levels():
    assert levels_of(DisCLConfig(levels="50, 0,100")) == (0, 50)
    assert "text only" not in asked_rows(DisCLConfig(levels="10,50"))
    assert asked_rows(DisCLConfig(ablate="all")) == list(schedules(DisCLConfig()))
    cfg = resolve_discl(DisCLConfig(device="cpu"), LongTail.digits())
    assert (cfg.head_fraction, cfg.sample_steps, cfg.full_size, cfg.sampler) == (0.3, 20, None, "dpm++")


@pytest.mark.parametrize(
    "given, word",
    [
        (dict(levels="0,0.3"), "did you mean 30"),
        (dict(levels="0,120"), "120"),
        (dict(levels="a"), "no numbers"),
        (dict(levels="100"), "level below it"),
        (dict(levels="0,10"), "level 10 cannot be made"),
        (dict(ablate="levels"), "no row 'levels'"),
        (dict(curriculum_epochs=5), "more than fine_epochs"),
        (dict(curriculum_epochs=2), "too few for 3 levels"),
        (dict(tail_share=0.05), "no made one would be shown"),
        (dict(imb_ratio=1.0), "no class is hard"),
        (dict(hard_fraction=0.0), "no hard image"),
        (dict(sampler="own"), "pipeline"),
        (dict(full_size=64), "pipeline"),
        (dict(pipeline="no/where", maker="text"), "no/where"),
        (dict(text_only="text"), "text_only"),
        (dict(pipeline="no/where"), "maker"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, given, word):
    out = tmp_path / "run"
    with pytest.raises(LtnbError, match=word):
        DisCL().check_inputs(DisCLConfig(**{**TINY, **given}, out=str(out)))
    assert not out.exists()
