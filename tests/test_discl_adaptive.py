"DisCL for low-quality data, from end to end, with a CLIP and a generator trained on the spot"

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ltnb import spectrum
from ltnb.clip import Clip
from ltnb.core import LtnbError, UsageError, read_json
from ltnb.curriculum import (
    Adaptive,
    AllLevels,
    Composition,
    CurriculumOrder,
    DiverseToSpecific,
    Pool,
    RandomLevel,
    Watch,
    compose_epoch,
)
from ltnb.data import LongTail
from ltnb.discl import DisCL
from ltnb.discl_adaptive import ADAPTIVE_PAIRS, DisCLAdaptive, f1_table, gain, paper_f1, plot_ensembling, run
from ltnb.discl_adaptive_steps import (
    CLIP_ROWS,
    Adapting,
    RealAlone,
    answer_of,
    clip_order,
    clip_rows,
    clip_schedules,
    resolve_adaptive,
)
from ltnb.discl_steps import DisCLConfig, check_discl, levels_of, tuned_of
from ltnb.guidance import REAL
from ltnb.pictures import new_figure
from ltnb.progress import Progress
from ltnb.recipe import Stage
from ltnb.spectrum import joined, open_spectrum
from ltnb.team import Where

TINY = dict(dataset="camera_digits", n_steps=2, diff_bs=8, sample_steps=4, guidance_scale=1.0, levels="0,50")
TINY |= dict(maker="labels", per_image=1, tries=1, clip_steps=2, rule="cosine", rule_cosine=-1.0, n_epochs=1)
TINY |= dict(fine_epochs=7, curriculum_epochs=6, fine_bs=160, held_sources=4, judge_epochs=0, device="cpu")
TINY |= dict(precision="fp32")
FEW = ("no synthetic", "random level", "discl")  # of the usual rows: each is a fine-tuning
MIXED = ["no synthetic + ensembling", "discl + ensembling"]
pytestmark = pytest.mark.usefixtures("small_unet", "tiny_clip")


@pytest.fixture(autouse=True, scope="module")
def quick():
    "Nothing is said, no picture drawn, which takes longer than these trainings; few rows and test images"
    few = partial(LongTail.camera_digits, n_test=10)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(LongTail, "camera_digits", staticmethod(few))
        m.setattr("ltnb.discl_adaptive_steps.CLIP_ROWS", FEW)
        m.setattr("ltnb.clip_training.LOOK_EVERY", 1)  # each step may be kept
        m.setattr(Progress, "quiet", True)
        m.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"a picture"))
        yield


def go(folder, **more):
    return run(DisCLConfig(**{**TINY, **more}, out=str(folder)))


def files(folder):
    "What two equal runs share"
    names = ("environment.json", "timing.jsonl", "config.json", "report.html")
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in names)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_unet, tiny_clip, quick):
    return go(tmp_path_factory.mktemp("adaptive") / "run", ablate="level 50").path


@pytest.fixture(scope="module")
def shared(whole):
    "The stage of that run, and what its fine-tunings share"
    data = LongTail.camera_digits()
    s = Stage(resolve_adaptive(DisCLConfig(**TINY), data), data, 0, Where())
    kept = joined(open_spectrum(whole / "made" / "spectrum-seed-0"))
    hard = np.flatnonzero(np.isin(data.train.ids, [r["source_id"] for r in kept.manifest]))
    return s, Adapting.of(s, None, hard, kept)


def test_every_control_has_its_row_and_both_test_sets(whole):
    rows = read_json(whole / "scores.json")
    by = {r["method"]: r for r in rows}
    assert set(by) == {"zero-shot", "cross-entropy", "label shift", *FEW, *MIXED, "level 50"}
    for r in rows:
        assert all(0 <= r[k] <= 1 for k in ("all", "macro_f1", "shifted_all", "shifted_macro_f1"))
    assert set(by["discl"]["se"]) >= {"zero-shot", "cross-entropy", "no synthetic", "random level"}
    assert [m for m, r in by.items() if "ablation" in r] == ["level 50"]
    main, more = DisCLAdaptive().tables(rows)
    assert main[0][:5] == ["method", "macro-F1", "vs no synthetic", "shifted macro-F1", "vs no synthetic"]
    assert [line[0] for line in more[1:]] == ["zero-shot", "no synthetic", "discl", "level 50"]
    assert str(whole) not in (whole / "scores.json").read_text() + (whole / "metrics.jsonl").read_text()


def test_no_name_of_a_control_contains_the_name_of_what_it_controls():
    controls = {b for _, b in ADAPTIVE_PAIRS} - {a for a, _ in ADAPTIVE_PAIRS if a.startswith("discl")}
    assert not [c for c in controls if "discl" in c]


def test_each_turn_probes_and_then_shows_the_level_with_the_most_progress(whole):
    found, epochs = (read_json(whole / p) for p in ("progress-seed-0.json", "epochs/discl-seed-0.json"))
    assert set(found["progress"]) == {"0", "50", "100"} and len(found["chosen"]) == 3
    for turn, level in enumerate(found["chosen"]):
        best = max(own[turn] for own in found["progress"].values())
        assert found["progress"][str(level)][turn] == pytest.approx(best, abs=1e-6)
        probe, shown = epochs[2 * turn : 2 * turn + 2]
        assert not any("level" in k for k in probe) and probe["hard"] > 0
        assert (f"level {level}" in shown) == (level != REAL)
    assert len(epochs) == 7 and not any("level" in k for k in epochs[-1])


def test_every_row_is_as_long(shared):
    s, a = shared
    for row in set(CLIP_ROWS) - {"discl"}:
        order = clip_order(s, a, row, None)
        sizes = [len(order.shown(e, torch.Generator().manual_seed(e))) for e in range(7)]
        real = [order.schedule.levels(e) == [REAL] for e in range(7)] if hasattr(order, "schedule") else [False] * 7
        assert all(n == m or alone for n, m, alone in zip(sizes, a.sizes, real, strict=True))


def test_a_held_out_source_is_in_no_epoch_of_any_row(shared):
    s, a = shared
    held = {a.pool.source_ids[i] for at in a.held.values() for i in at}
    assert set(a.held) == {0, 50, REAL} and all(len(at) == 4 for at in a.held.values()) and len(held) == 4
    for row in set(CLIP_ROWS) - {"discl"}:  # its own order is built on the same pool, and refuses another
        order = clip_order(s, a, row, None)
        for e in range(7):
            assert not held & set(a.pool.source_ids[order.shown(e, torch.Generator().manual_seed(e))])
    watch = Watch(a.held, lambda at: np.zeros(len(at)))
    with pytest.raises(UsageError, match="held-out images"):
        CurriculumOrder(replace(a.pool, held=None), clip_schedules(s.cfg)["discl"], a.how, watch)
    for epoch in range(7):
        watch.look(epoch)
        order = CurriculumOrder(a.pool, clip_schedules(s.cfg)["discl"], a.how, watch)
        assert not held & set(a.pool.source_ids[order.shown(epoch, torch.Generator().manual_seed(epoch))])


class Stop(Exception):
    "A stand-in for a power cut"


def test_killed_in_the_spectrum_and_in_the_curriculum_it_gives_the_same_files(whole, tmp_path, monkeypatch):
    out, batch, call = tmp_path / "run", spectrum.Editor.batch, CurriculumOrder.__call__

    def at_the_second_level(self, part, level, attempt=0):
        if level == 50:
            raise Stop
        return batch(self, part, level, attempt)

    def in_a_walk(among, epoch_of_the_cut):
        def cut(self, epoch, g):
            if epoch == epoch_of_the_cut and isinstance(self.schedule, among):
                raise Stop
            return call(self, epoch, g)

        return cut

    stops = [(spectrum.Editor, "batch", at_the_second_level)]
    for cut in (in_a_walk(RandomLevel, 2), in_a_walk(Adaptive, 3), in_a_walk(Adaptive, 4)):
        stops.append((CurriculumOrder, "__call__", cut))
    for where, name, stand_in in stops:
        with monkeypatch.context() as m:
            m.setattr(where, name, stand_in)
            m.setattr("ltnb.checkpoint.Clock.older_than", lambda self, seconds: True)
            with pytest.raises(Stop):
                go(out, ablate="level 50")
    go(out, ablate="level 50")
    mine, theirs = files(out), files(whole)
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if mine[k] != theirs[k]] == []


def test_the_fine_tuned_clip_and_the_way_to_it_are_kept(whole):
    tuned, start = Clip.load(whole / "tuned"), Clip.load(whole / "clip")
    assert (whole / "clip" / "thresholds.json").exists() and (whole / "generator").is_dir()  # what a page asks for
    assert tuned.fingerprint != start.fingerprint
    sweep = read_json(whole / "ensembling" / "discl-seed-0.json")
    by = {r["method"]: r for r in read_json(whole / "scores.json")}
    assert [p["alpha"] for p in sweep] == [round(0.1 * i, 1) for i in range(11)]
    for at, row in ((0, "zero-shot"), (5, "discl + ensembling"), (10, "discl")):
        assert sweep[at]["test"]["macro_f1"] == pytest.approx(by[row]["macro_f1"])
        assert sweep[at]["shifted"]["accuracy"] == pytest.approx(by[row]["shifted_all"])
    _, axes = new_figure(6, 3, 2)
    assert len(plot_ensembling({"no synthetic": sweep, "discl": sweep}, axes)[1].lines) == 2


def test_without_a_shifted_set_its_columns_are_empty(tmp_path):
    run = go(
        tmp_path / "run", dataset="digits", imb_ratio=20.0, n_max=40, tuned="clip", levels="50", curriculum_epochs=4
    )
    rows = run.scores()
    assert all(r["shifted_all"] is None for r in rows)
    main = DisCLAdaptive().tables(rows)[0]
    assert all(line[3] == line[4] == "–" for line in main[1:]) and "shifted" not in DisCLAdaptive().verdict(rows)[1]
    sweep = json.loads((run.path / "ensembling" / "discl-seed-0.json").read_text())
    _, axes = new_figure(6, 3, 2)
    assert "shifted" not in sweep[0] and len(plot_ensembling({"discl": sweep}, axes)) == 2


def test_real_images_alone_fill_the_same_epochs():
    pool = Pool(np.arange(6), np.arange(6), np.full(6, REAL), np.arange(6) >= 4)
    order, g = RealAlone(pool, pool.tail, [9, 6, 4]), torch.Generator().manual_seed(0)
    assert np.bincount(order.shown(0, g)).sum() == 9 and set(np.bincount(order.shown(0, g))[:4]) == {1}
    assert sorted(order.shown(1, g).tolist()) == list(range(6)) and len(set(order.shown(2, g).tolist())) == 4


def test_any_schedule_may_probe_and_counts_its_stages_in_pairs():
    walk = DiverseToSpecific((50, 70, REAL), 8, probe=True)
    assert [walk.levels(e)[0] for e in range(9)] == [100, 50, 100, 50, 100, 70, 100, 100, 100]
    with pytest.raises(UsageError, match="too few"):
        DiverseToSpecific((50, 70, 90, REAL), 6, probe=True)
    every = AllLevels((0, 50), 4, probe=True)
    assert [every.probes(e) for e in range(6)] == [True, False, True, False, False, False]


def test_several_levels_at_once_are_not_several_times_as_much(shared):
    _, a = shared
    g = torch.Generator().manual_seed(0)
    whole = compose_epoch(a.pool, [0, 50], g, Composition(1.0, "all made", with_hard=False))
    most = compose_epoch(a.pool, [0, 50], g, a.how)
    made = [int((a.pool.levels[at] != REAL).sum()) for at in (whole, most)]
    assert made[0] == 2 * made[1] == len(a.pool.made([0, 50]))


def test_a_loss_that_compares_leaves_no_prior():
    data, said = LongTail.camera_digits(), {k: torch.randn(100, 10) for k in ("test", "shifted")}
    answer = answer_of(said, data, {"ablation": "curriculum"})
    assert len(set(answer.prior.tolist())) == 1 and answer.facts["ablation"] == "curriculum"
    alone = answer_of({"test": said["test"]}, data, {})
    assert 0 < answer.facts["shifted_all"] < 1 and np.isnan(alone.facts["shifted_all"])


def test_the_data_choose_what_is_fine_tuned_and_older_runs_keep_their_names(monkeypatch):
    monkeypatch.setattr("ltnb.discl_adaptive_steps.CLIP_ROWS", CLIP_ROWS)
    assert DisCLConfig().digest() == "a63980"
    plain, low, wild = (DisCLConfig(dataset=d) for d in ("digits", "camera_digits", "iwildcam"))
    wild = replace(wild, clip="ViT-B-32:openai")
    assert [tuned_of(c) for c in (plain, low, wild)] == ["classifier", "clip", "clip"]
    assert type(DisCLAdaptive().of(plain)) is DisCL and type(DisCLAdaptive().of(low)) is DisCLAdaptive
    cfg = resolve_adaptive(DisCLConfig(dataset="camera_digits", device="cpu"), LongTail.camera_digits())
    assert (cfg.hard, cfg.tuned, levels_of(wild)) == ("confidence", "clip", (50, 70, 90))
    assert clip_rows(low) == list(CLIP_ROWS)
    assert clip_rows(wild) == [r for r in CLIP_ROWS if r != "text only"]


def test_published_numbers_stand_beside_iwildcam_only():
    paper = paper_f1(DisCLConfig(dataset="iwildcam"))
    assert paper["discl"] == "54.3 / 38.2" and not paper_f1(DisCLConfig(dataset="camera_digits"))
    assert not paper_f1(DisCLConfig(dataset="iwildcam", imb_ratio=10.0))
    row = dict(seed=0, all=0.5, shifted_all=0.5, macro_f1=0.4, shifted_macro_f1=0.3)
    cells = f1_table([row | {"method": m} for m in ("no synthetic", "discl")], paper)
    assert [line[-1] for line in cells] == ["published", "52.2 / 35.5", "54.3 / 38.2"]


def test_a_gain_is_paired_over_seeds():
    rows = [dict(method=m, seed=s, macro_f1=v) for m, own in (("a", (0.5, 0.7)), ("b", (0.4, 0.6)))
            for s, v in enumerate(own)]  # fmt: skip
    assert gain(rows, "a", "b").startswith("+10.0 [") and gain(rows[::2], "a", "b") == "+10.0"
    assert gain(rows, "a", "a") == gain(rows, "a", "c") == gain(rows, "a", "b", "shifted_macro_f1") == "–"


@pytest.mark.parametrize(
    "given, word",
    [
        (dict(levels="0,0.5"), "did you mean 50"),
        (dict(levels="100"), "level below it"),
        (dict(curriculum_epochs=7), "is odd"),
        (dict(curriculum_epochs=4), "too few for 3 levels"),
        (dict(fine_epochs=5), "more than fine_epochs"),
        (dict(ablate="adaptive"), "no row 'adaptive'"),
        (dict(test_prior="5,3,1"), "prior of a classifier"),
        (dict(tuned_clip="no/where"), "no/where"),
        (dict(held_sources=42), "leave none to train on"),
        (dict(hard="frequency", imb_ratio=1.0), "no class is hard"),
        (dict(hard_fraction=0.0), "no hard image"),
        (dict(tuned="classifier", tuned_clip="ViT-B-16:openai"), "tuned_clip is for"),
        (dict(tuned="clip", dataset="digits", tuned_clip="ViT-B-16"), "names no weights"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, given, word):
    config = DisCLConfig(**{**TINY, **given}, out=str(tmp_path / "run"))
    with pytest.raises(LtnbError, match=word):
        DisCLAdaptive().of(config).check_inputs(config)
    assert not (tmp_path / "run").exists()


def test_too_few_whole_sources_are_refused(whole):
    data = LongTail.camera_digits()
    s = Stage(resolve_adaptive(DisCLConfig(**TINY), data), data, 0, Where())
    kept = joined(open_spectrum(whole / "made" / "spectrum-seed-0"))
    half = kept.where(lambda r: r["level"] == 0 or r["k"] % 7 == 0)
    hard = np.flatnonzero(np.isin(data.train.ids, [r["source_id"] for r in kept.manifest]))
    few = Stage(replace(s.cfg, held_sources=30), data, 0, Where())
    with pytest.raises(UsageError, match="have an item at every level"):
        Adapting.of(few, None, hard, half)


def test_each_of_the_two_refuses_what_the_other_does():
    with pytest.raises(UsageError, match="ltnb.discl_adaptive"):
        check_discl(DisCLConfig(dataset="camera_digits"))
    with pytest.raises(UsageError, match="ltnb.discl does"):
        DisCLAdaptive().check(DisCLConfig())
