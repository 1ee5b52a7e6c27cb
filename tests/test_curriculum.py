"Schedules, the composition of an epoch with the paper's counts, and a curriculum that is killed and goes on."

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnb import team
from ltnb.baseline import BaselineConfig
from ltnb.classifier import Classifier, pixel_stats
from ltnb.core import DataError, LtnbError, UsageError, generator
from ltnb.curriculum import (
    SCHEDULES,
    Adaptive,
    AllLevels,
    Composition,
    CurriculumOrder,
    DiverseToSpecific,
    Fixed,
    Pool,
    RandomLevel,
    SpecificToDiverse,
    Watch,
    ZigZag,
    best_level,
    block_sizes,
    build_schedule,
    compose_epoch,
    epoch_parts,
    epoch_sizes,
    hold_out_sources,
    learning_progress,
    pool_of,
    watch_classifier,
)
from ltnb.data import LongTail
from ltnb.guidance import hard_by_frequency, spectrum_plan
from ltnb.losses import build_loss
from ltnb.models import build_model
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.synthetic import Synthetic
from ltnb.team import Where
from ltnb.training import fit


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


GRID = (0, 10, 30, 50, 100)
DATA = LongTail.digits(n_max=60, imb_ratio=20.0)
HARD = hard_by_frequency(DATA.train)
PLAN = spectrum_plan(DATA.train, HARD, (0, 30, 60), [0, 1])
SHARE = Composition(tail_share="tail_class_share")


def noisy(plan):
    "The real image blended with noise"
    real = dict(zip(DATA.train.ids, DATA.train.images, strict=True))
    x = np.stack([real[i] for i in plan["source_id"]])
    share = plan["level"][:, None, None, None] / 100
    noise = np.random.default_rng(0).integers(0, 256, x.shape)
    return Synthetic(torch.from_numpy((share * x + (1 - share) * noise).astype(np.uint8)), plan.rows())


MADE = noisy(PLAN)
POOL = pool_of(DATA.train, HARD, MADE)
IMAGES = np.concatenate([DATA.train.images, MADE.items.numpy()])


def g(epoch=0, seed=0):
    return generator("test", seed, epoch)


# Schedules


def levels_of(schedule, n=65, state=None):
    return [schedule.levels(e, state) for e in range(n)]


def test_stages_are_those_of_the_paper():
    four = levels_of(DiverseToSpecific((10, 30, 50, 100), 60))
    assert four == [[10]] * 15 + [[30]] * 15 + [[50]] * 15 + [[100]] * 20
    assert levels_of(DiverseToSpecific(GRID, 60))[:60] == [[v] for v in GRID for _ in range(12)]
    assert levels_of(SpecificToDiverse(GRID, 60))[:60] == [[v] for v in GRID[::-1] for _ in range(12)]


@given(st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(m, 100), st.just(m))))
@settings(deadline=None)
def test_blocks_are_equal_and_the_remainder_comes_early(case):
    n, m = case
    sizes = block_sizes(n, m)
    assert sum(sizes) == n and len(sizes) == m and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_controls():
    assert levels_of(AllLevels((0, 30), 3), 4) == [[0, 30]] * 3 + [[100]]
    assert levels_of(Fixed((0,), 3), 4) == [[0]] * 3 + [[100]]
    assert [v for (v,) in levels_of(ZigZag((10, 30, 100), 7), 8)] == [10, 30, 100, 30, 10, 30, 100, 100]
    assert levels_of(ZigZag((100,), 3), 2) == [[100]] * 2
    drawn = levels_of(RandomLevel(GRID, 600, seed=3), 600)
    assert min(Counter(v for (v,) in drawn).values()) > 60, "120 of each are expected"
    assert drawn[::-1] == [RandomLevel(GRID, 600, seed=3).levels(e) for e in range(599, -1, -1)]
    assert drawn != levels_of(RandomLevel(GRID, 600, seed=4), 600)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_ends_with_real_images(name):
    levels = [30] if name == "fixed" else [100, 30, 0]
    assert levels_of(build_schedule(name, levels, 6), 9)[6:] == [[100]] * 3
    assert levels_of(build_schedule(name, levels, 0), 3) == [[100]] * 3, "no curriculum at all"


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: build_schedule("adaptiv", GRID, 5), "adaptive"),
        (lambda: build_schedule("fixed", GRID, 5), "one level"),
        (lambda: build_schedule("diverse-to-specific", GRID, 4), "4 curriculum epochs are too few for 5 levels"),
        (lambda: build_schedule("random", GRID, -1), "at least 0"),
        (lambda: build_schedule("all-levels", [0, 120], 5), "level 120"),
        *(
            (lambda n=n: build_schedule(n, [0, 30], 5), "lack 100")
            for n in ("adaptive", "zig-zag", "specific-to-diverse")
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, word):
    with pytest.raises(UsageError, match=word):
        make()


def test_progress_is_a_mean_without_outliers():
    before, d = np.full(100, 0.3), np.random.default_rng(0).uniform(0, 0.02, 100)
    jumps = np.where(np.arange(100) == 7, 0.6, d)
    assert learning_progress(before, before + d) == pytest.approx(d.mean())
    assert learning_progress(before, before + jumps) == pytest.approx(np.delete(d, 7).mean())
    assert learning_progress(before, before + jumps, trimmed=False) == pytest.approx(jumps.mean())
    assert learning_progress([0.1], [0.4]) == pytest.approx(0.3)


def test_ties_go_to_the_larger_level():
    assert best_level({100: -0.1, 10: 0.2, 50: 0.2 - 1e-9}) == 50
    assert best_level({0: 0.0, 100: 0.0}) == 100 and best_level({0: 0.1, 100: 0.0}) == 0


def look(**p):
    return {int(k[1:]): np.full(6, v) for k, v in p.items()}


def test_the_adaptive_schedule_compares_the_last_two_looks():
    s = [look(_10=0.1, _50=0.1, _100=0.9), look(_10=0.5, _50=0.2, _100=0.9), look(_10=0.5, _50=0.6, _100=0.9)]
    a = Adaptive((10, 50, 100), 4)
    assert [a.levels(0, s[:1]), a.levels(1, s[:2]), a.levels(2, s), a.levels(4, s)] == [[100], [10], [50], [100]]
    paired = Adaptive((10, 50, 100), 4, probe=True)
    assert [paired.levels(e, s) for e in range(5)] == [[100], [50], [100], [50], [100]]
    assert [paired.probes(e) for e in range(6)] == [True, False, True, False, False, False]
    s[1][10][0] = 0.0  # one image falls
    s[1][10][1:] = 0.19
    assert a.levels(1, s[:2]) == [50] and Adaptive((10, 50, 100), 4, trimmed=True).levels(1, s[:2]) == [50]


def test_trimming_is_a_switch():
    before = {10: np.zeros(20), 100: np.zeros(20)}
    after = {10: np.where(np.arange(20) == 0, 1.0, 0.01), 100: np.full(20, 0.02)}
    assert Adaptive((10, 100), 4).levels(1, [before, after]) == [100]
    assert Adaptive((10, 100), 4, trimmed=False).levels(1, [before, after]) == [10]


# The composition of an epoch


def imagenet_lt(seeds=8):
    "Class counts with the totals of ImageNet-LT, and a spectrum at four levels"

    def equal(n, k):
        return np.full(k, n // k) + (np.arange(k) < n % k)

    counts = np.concatenate([equal(89_293, 391), equal(24_910, 473), equal(1_643, 136)])
    y, levels = np.repeat(np.arange(1000), counts), (0, 10, 30, 50)
    source = np.tile(np.flatnonzero(counts[y] < 20), seeds * len(levels))
    classes = np.concatenate([y, y[source]])
    level = np.concatenate([np.full(len(y), 100), np.repeat(levels, len(source) // len(levels))])
    hard = (counts[classes] < 20) & (level == 100)
    return counts, Pool(classes, np.concatenate([np.arange(len(y)), source]).astype(str), level, hard)


COUNTS, IMAGENET = imagenet_lt()


def test_the_counts_of_imagenet_lt():
    assert (len(COUNTS), COUNTS.sum(), (COUNTS < 20).sum(), COUNTS[COUNTS < 20].sum()) == (1000, 115_846, 136, 1_643)
    assert len(IMAGENET.head) == 114_203 and IMAGENET.tail_class_share == 0.136
    assert epoch_sizes(IMAGENET, Composition()) == epoch_sizes(IMAGENET, SHARE) == (34_260, 5_392)


@pytest.mark.parametrize(
    "levels, parts",
    [
        ([10], {"head": 34_260, "hard": 1_643, "level 10": 3_749}),
        ([100], {"head": 34_260, "hard": 1_643, "hard again": 3_749}),
    ],
)
def test_an_epoch_of_imagenet_lt(levels, parts):
    at = compose_epoch(IMAGENET, levels, g())
    assert len(at) == 39_652 and epoch_parts(IMAGENET, at) == parts
    assert len(set(at.tolist())) == (39_652 if levels == [10] else 34_260 + 1_643), "made: without replacement"


def test_all_levels_share_the_made_part():
    parts = epoch_parts(IMAGENET, compose_epoch(IMAGENET, [0, 10, 30, 50, 100], g()))
    made = [parts[f"level {v}"] for v in (0, 10, 30, 50)]
    assert sum(made) == 3_749 and min(made) > 800, "937 of each are expected"


def test_too_few_made_items_are_repeated():
    _, pool = imagenet_lt(seeds=2)  # 3,286 of a level
    at = compose_epoch(pool, [30], g())
    assert epoch_parts(pool, at) == {"head": 34_260, "hard": 1_643, "level 30": 3_749}
    assert len(set(at.tolist())) < 39_652


def test_the_hard_real_images_can_be_left_out():
    parts = epoch_parts(IMAGENET, compose_epoch(IMAGENET, [0], g(), with_hard=False))
    assert parts == {"head": 34_260, "level 0": 5_392}
    assert epoch_parts(IMAGENET, compose_epoch(IMAGENET, [100], g(), with_hard=False))["hard"] == 1_643, (
        "but not in the end"
    )


def test_all_made_items_beside_all_others():
    how = Composition(head_fraction=1, tail_share="all made", with_hard=False)
    stage, end = compose_epoch(IMAGENET, [50], g(), how), compose_epoch(IMAGENET, [100], g(), how)
    assert epoch_parts(IMAGENET, stage) == {"head": 114_203, "level 50": 8 * 1_643}
    assert epoch_parts(IMAGENET, end) == {"head": 114_203, "hard": 1_643}
    assert len(set(stage.tolist())) == len(stage) and len(set(end.tolist())) == len(end)


def test_an_epoch_depends_on_its_generator_alone():
    first, again, next_, other = (compose_epoch(IMAGENET, [10], g(*k)) for k in ((0,), (0,), (1,), (0, 1)))
    assert torch.equal(first, again) and not torch.equal(first, next_) and not torch.equal(first, other)
    head = [set(a.tolist()) & set(IMAGENET.head.tolist()) for a in (first, next_)]
    assert 0.27 < len(head[0] & head[1]) / 34_260 < 0.33, "the head is drawn anew: 30 % are expected twice"
    early = set(first[:1000].tolist()) & set(IMAGENET.by_level[10].tolist())
    assert 40 < len(early) < 160, "shuffled: 95 are expected"


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(), "a tail_share of 0.136 beside 46 head images is 7 items, and there are 46 hard images"),
        (dict(tail_share=1.0), "between 0 and 1"),
        (dict(tail_share="classes"), "tail_class_share"),
        (dict(head_fraction=1.5), "head_fraction"),
        (dict(tail_shares=0.5), "tail_share"),
    ],
)
def test_compositions_that_cannot_be_are_refused(change, word):
    with pytest.raises(UsageError, match=word):
        compose_epoch(POOL, [30], g(), **change)


# The pool


def test_the_pool_is_in_the_order_of_the_images():
    n = len(DATA.train)
    assert len(POOL) == len(IMAGES) and (POOL.levels[:n] == 100).all() and set(POOL.levels[n:]) == {0, 30, 60}
    assert np.array_equal(POOL.classes, np.concatenate([DATA.train.labels, MADE.labels]))
    assert sorted([*POOL.head.tolist(), *POOL.tail.tolist()]) == list(range(n))
    assert POOL.tail.tolist() == HARD.tolist() and {len(v) for v in POOL.by_level.values()} == {2 * len(HARD)}


def test_a_spectrum_of_other_images_is_refused():
    with pytest.raises(DataError, match="no hard image of this training set"):
        pool_of(DATA.train, HARD[1:], MADE)
    with pytest.raises(DataError, match="no hard image of this training set"):
        pool_of(LongTail.digits(seed=1).train, HARD, MADE)
    rows = [{**r, "class": (r["class"] + 1) % 10} for r in MADE.manifest]
    with pytest.raises(DataError, match="no hard image of this training set"):
        pool_of(DATA.train, HARD, Synthetic(MADE.items, rows))


def test_held_out_sources_are_in_no_epoch():
    pool, held = hold_out_sources(POOL, (0, 30, 60, 100), 12)
    sources = {v: list(POOL.source_ids[at]) for v, at in held.items()}
    assert list(held) == [0, 30, 60, 100] and len(set(sources[0])) == 12
    assert all(s == sources[0] for s in sources.values()), "a source a column"
    assert all((POOL.levels[at] == v).all() for v, at in held.items())
    for order in (AllLevels((0, 30, 60), 8), Adaptive((0, 100), 8, probe=True), Fixed((30,), 0)):
        watch = Watch(held, lambda at: np.zeros(len(at)))
        order = CurriculumOrder(pool, order, SHARE, watch)
        for e in range(8):
            assert not set(POOL.source_ids[order(e, g(e))]) & set(sources[0])
    again = hold_out_sources(POOL, (0, 30, 60, 100), 12)[1]
    assert all(np.array_equal(held[v], again[v]) for v in held)
    assert set(POOL.source_ids[hold_out_sources(POOL, (0, 100), 12, seed=1)[1][0]]) != set(sources[0])


def test_a_source_without_every_level_is_not_held_out():
    gone = (POOL.source_ids == POOL.source_ids[HARD[0]]) & (POOL.levels == 30)
    pool = Pool(*(v[~gone] for v in (POOL.classes, POOL.source_ids, POOL.levels, POOL.hard)))
    n = len(HARD) - 1
    with pytest.raises(UsageError, match=f"{n} sources cannot be held out: {n} have"):
        hold_out_sources(pool, (0, 30), n)
    held = hold_out_sources(pool, (0, 30), n - 1)[1]
    assert POOL.source_ids[HARD[0]] not in set(pool.source_ids[held[0]])


# The order


def test_orders_that_cannot_be_are_refused():
    pool, held = hold_out_sources(POOL, (0, 30, 100), 5)
    watch = Watch(held, lambda at: np.zeros(len(at)))
    for args, error, word in (
        ((POOL, DiverseToSpecific((0, 45, 100), 6), SHARE), DataError, "no made image of level 45"),
        ((POOL, DiverseToSpecific((0, 30, 100), 6)), UsageError, "no made one would be shown"),
        ((pool, Adaptive((0, 30, 100), 6), SHARE), UsageError, "needs a watch"),
        ((pool, Adaptive((0, 60, 100), 6), SHARE, watch), UsageError, "nothing of level 60 is held out"),
        ((POOL, Adaptive((0, 30, 100), 6), SHARE, watch), UsageError, "5 held-out images"),
    ):
        with pytest.raises(error, match=word):
            CurriculumOrder(*args)


def test_no_hard_image_is_refused():
    none = np.zeros(0, np.int64)
    pool = pool_of(DATA.train, none, Synthetic(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), []))
    with pytest.raises(UsageError, match="no hard image"):
        CurriculumOrder(pool, Fixed((0,), 0))


def test_a_watched_order_states_the_real_counts():
    pool, held = hold_out_sources(POOL, (0, 30, 100), 5)
    order = CurriculumOrder(pool, Adaptive((0, 30, 100), 6), SHARE, Watch(held, len))
    assert np.array_equal(order.counts, DATA.counts)
    assert CurriculumOrder(POOL, Fixed((0,), 3), SHARE).counts is None, "fit asks it ahead"


# Trainings


HOW = dict(n_epochs=5, bs=48, lr=0.02, schedule="cosine", seed=2)


def fresh():
    net = build_model("convnet", 10, 1, 0)
    return Classifier(net, DATA.class_names, (1, 8, 8), *pixel_stats(DATA.train.images), "convnet")


def weights(clf):
    return {k: v.clone() for k, v in clf.net.state_dict().items()}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


class Stop(Exception):
    "A stand-in for a power cut"


def train(schedule, run=None, watched=True, **how):
    "A training along a schedule -> weights, the order"
    clf = fresh()
    pool, held = hold_out_sources(POOL, (0, 30, 60, 100), 12)
    watch = watch_classifier(clf, IMAGES, POOL.classes, held, Where(run=run), seed=2) if watched else None
    order = CurriculumOrder(pool, schedule, SHARE, watch)
    fit(clf, IMAGES, POOL.classes, order=order, run=run, **{**HOW, **how})
    return weights(clf), order


def train_in(path, schedule, stop=None, monkeypatch=None, **how):
    "The same in a run; the power fails before step `stop`"
    count, original = [0], team.train_step

    def step(*a):
        count[0] += 1
        if count[0] > stop:
            raise Stop
        return original(*a)

    with Run(BaselineConfig(out=str(path))) as run:
        run.start(BaselineConfig(), "cpu", "fp32")
        if stop is not None:
            everywhere(monkeypatch, "train_step", step)
        try:
            return train(schedule, run, **how)
        except Stop:
            return None, None
        finally:
            everywhere(monkeypatch, "train_step", original) if stop is not None else None


def left(path):
    names = ("classifier-seed-2", "classifier-looks-seed-2")
    return [(path / f"checkpoints/{n}.safetensors").read_bytes() for n in names] + [
        (path / "metrics.jsonl").read_bytes()
    ]


FOLLOWS = {"adaptive": Adaptive((0, 30, 60, 100), 4), "with a probe": Adaptive((0, 30, 60, 100), 4, probe=True)}


@pytest.mark.parametrize("name", FOLLOWS)
def test_a_curriculum_that_is_killed_ends_byte_for_byte(name, tmp_path, monkeypatch):
    want, whole = train_in(tmp_path / "whole", FOLLOWS[name], save_every=0.0)
    for stop in (1, 2, 3, 1):  # in the middle of an epoch and at its end
        train_in(tmp_path / "cut", FOLLOWS[name], stop, monkeypatch, save_every=0.0)
    got, order = train_in(tmp_path / "cut", FOLLOWS[name], save_every=0.0)
    assert equal(want, got) and left(tmp_path / "whole") == left(tmp_path / "cut")
    assert [order.levels(e) for e in range(5)] == [whole.levels(e) for e in range(5)]


def test_a_checkpoint_that_is_older_than_the_looks_chooses_again(tmp_path, monkeypatch):
    schedule = FOLLOWS["adaptive"]
    want, _ = train_in(tmp_path / "whole", schedule, save_every=0.0)
    train_in(tmp_path / "cut", schedule, 3, monkeypatch, save_every=0.0)
    train_in(tmp_path / "cut", schedule, 8, monkeypatch, save_every=1e9)  # looks are kept, checkpoints are not
    assert equal(want, train_in(tmp_path / "cut", schedule, save_every=0.0)[0])
    assert left(tmp_path / "whole") == left(tmp_path / "cut")


def test_looks_that_are_gone_are_missed(tmp_path, monkeypatch):
    train_in(tmp_path, FOLLOWS["adaptive"], 5, monkeypatch, save_every=0.0)
    (tmp_path / "checkpoints/classifier-looks-seed-2.safetensors").unlink()
    with pytest.raises(LtnbError, match="what was measured before epoch 1 is gone"):
        train_in(tmp_path, FOLLOWS["adaptive"], save_every=0.0)


def test_to_look_changes_no_bit():
    walk = DiverseToSpecific((0, 30, 60, 100), 4)
    (watched, order), (alone, _) = train(walk), train(walk, watched=False)
    assert equal(watched, alone) and len(order.watch.kept) == 4
    assert {v: len(d) for v, d in order.watch.progress().items()} == {0: 3, 30: 3, 60: 3, 100: 3}


def test_another_seed_is_another_curriculum_and_the_same_is_the_same():
    walk = DiverseToSpecific((0, 30, 60, 100), 4)
    a, b, c = (train(walk, watched=False, **how)[0] for how in ({}, {}, {"seed": 3}))
    assert equal(a, b) and not equal(a, c)


def test_balanced_softmax_takes_the_real_counts_where_they_are_stated():
    schedule, loss = DiverseToSpecific((0, 30, 60, 100), 4), build_loss("balanced_softmax", DATA.counts)
    with pytest.raises(DataError, match="other counts than those that its order shows"):
        fit(fresh(), IMAGES, POOL.classes, order=CurriculumOrder(POOL, schedule, SHARE), loss=loss, **HOW)
    order = CurriculumOrder(POOL, schedule, SHARE, counts=DATA.counts)
    fit(fresh(), IMAGES, POOL.classes, order=order, loss=loss, **HOW | {"n_epochs": 1})
