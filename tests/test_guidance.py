"Levels, hard images and the plan of a spectrum: exact numbers, stable ids, refusals."

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltnb.classifier import Classifier, pixel_stats
from ltnb.core import DataError, UsageError
from ltnb.data import ImageSet, LongTail
from ltnb.guidance import (
    check_apart,
    check_cut,
    check_steps_for,
    checked_levels,
    cut_settings,
    hard_by_confidence,
    hard_by_frequency,
    hard_classes,
    keep_levels,
    level_steps,
    level_strength,
    own_probabilities,
    spectrum_plan,
    steps_levels,
)
from ltnb.models import build_model
from ltnb.synthetic import Synthetic, make_synthetic

DATA = LongTail.digits()
HARD = hard_by_frequency(DATA.train)


# Levels


def test_steps_are_rounded_not_cut():
    assert [level_steps(v) for v in (0, 10, 50, 70, 90, 99)] == [50, 45, 25, 15, 5, 1]
    assert [level_steps(v, 20) for v in (0, 10, 50, 95)] == [20, 18, 10, 1]
    assert level_strength(90) == pytest.approx(0.1) and level_strength(0) == 1 and level_strength(100) == 0
    with pytest.raises(UsageError, match="real image"):
        level_steps(100)


@given(st.integers(0, 99), st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_steps_are_the_nearest_whole_number_and_at_least_one(level, n):
    k = level_steps(level, n)
    assert 1 <= k <= n and (k == 1 or abs(100 * k - n * (100 - level)) <= 50)
    assert k >= level_steps(min(level + 1, 99), n)


@pytest.mark.parametrize("given, word", [([0.3], "did you mean 30"), ([-1], "-1"), ([101], "101"), ([], "no guidance")])
def test_what_is_no_level_is_refused(given, word):
    with pytest.raises(UsageError, match=word):
        checked_levels(given)


def test_levels_are_sorted_once_each_and_real_where_needed():
    assert checked_levels(np.array([50, 0, 50, 100])) == (0, 50, 100)
    assert all(type(v) is int for v in checked_levels(np.array([50, 0])))
    with pytest.raises(UsageError, match="0, 50 lack 100"):
        checked_levels([0, 50], real=True)


def test_few_steps_have_few_levels():
    assert steps_levels(4) == [0, 25, 50, 75] and steps_levels(1) == [0]
    for n in (1, 2, 3, 4, 7, 8, 20, 50):
        check_steps_for([*steps_levels(n), 100], n)  # a level that is listed can be made
        assert [level_steps(v, n) for v in steps_levels(n)] == list(range(n, 0, -1))
    for n in (20, 50):
        check_steps_for(range(0, 100, 10), n)
    with pytest.raises(UsageError, match="level 10 cannot be made: 4 steps make the levels 0, 25, 50, 75"):
        check_steps_for([0, 10], 4)
    with pytest.raises(UsageError, match="level 99 cannot"):
        check_steps_for([99], 20)
    with pytest.raises(UsageError, match="levels 10 and 12 would both be made in 18 steps"):
        check_steps_for([10, 12], 20)


# Hard images


@pytest.mark.parametrize(
    "counts, hard",
    [([100, 19, 20, 5], [1, 3]), ([90, 30, 50, 20], [1, 3]), ([9, 5, 7], [1]), ([9, 9, 8, 9], [0, 2])],
)
def test_hard_classes(counts, hard):
    assert hard_classes(counts).tolist() == hard


def test_equal_classes_have_no_hard_one():
    with pytest.raises(UsageError, match="no class is hard: all 3 have 7 images"):
        hard_classes([7, 7, 7])


def test_hard_by_frequency_is_every_image_of_the_few():
    assert np.array_equal(HARD, np.flatnonzero(DATA.counts[DATA.train.labels] < 20))


def test_hard_by_confidence_takes_the_least_probable():
    p = np.array([0.5, 0.1, 0.9, 0.1, 0.2])
    assert hard_by_confidence(p, 0.4).tolist() == [1, 3] and hard_by_confidence(p, 0.2).tolist() == [1]
    assert hard_by_confidence(p, 0.01).tolist() == [1] and len(hard_by_confidence(p, 1)) == 5
    for fraction in (0, 1.1):
        with pytest.raises(UsageError, match="fraction"):
            hard_by_confidence(p, fraction)


def test_own_probabilities_leave_the_mode_and_batchnorm():
    net = build_model("convnet", 10, 1, 0)
    clf = Classifier(net, DATA.class_names, (1, 8, 8), *pixel_stats(DATA.train.images), "convnet")
    x, y = DATA.train.images[:40], DATA.train.labels[:40]
    clf.train()
    before = {k: v.clone() for k, v in clf.state_dict().items()}
    p = own_probabilities(clf, x, y)
    assert clf.training and clf.net.training
    assert all(torch.equal(v, before[k]) for k, v in clf.state_dict().items())
    want = clf.eval().predict(x, device="cpu")[np.arange(40), y]
    assert np.array_equal(p, want)
    own_probabilities(clf, x, y)
    assert not clf.training


# The plan


def prompt(c, seed):
    return f"{DATA.class_names[c]} {seed}"


def test_the_plan_is_hard_image_by_level_by_seed():
    plan = spectrum_plan(DATA.train, HARD, [100, 30, 0], [3, 4], prompt)
    assert list(plan.columns) == ["class", "k", "source_id", "level", "seed", "prompt"]
    found = {(r["source_id"], r["level"], r["seed"]) for r in plan.rows()}
    assert len(plan) == len(found) == len(HARD) * 2 * 2 and {v for _, v, _ in found} == {0, 30}
    at = {i: n for n, i in enumerate(DATA.train.ids)}
    for r in plan.rows():
        i = at[r["source_id"]]
        assert r["class"] == DATA.train.labels[i] and r["prompt"] == prompt(r["class"], r["seed"])
        assert r["k"] == (DATA.train.labels[:i] == r["class"]).sum()


def test_ids_stay_when_the_plan_grows():
    few = spectrum_plan(DATA.train, HARD[3:], [0, 30], [3], prompt)
    for more in (
        spectrum_plan(DATA.train, HARD[3:], [0, 10, 30, 100], [3], prompt),
        spectrum_plan(DATA.train, HARD[3:], [0, 30], [2, 3], prompt),
        spectrum_plan(DATA.train, HARD, [30, 0], [3], prompt),
    ):
        assert len(more) > len(few) and set(few.ids) < set(more.ids)
    other = spectrum_plan(DATA.train, HARD[3:], [0, 30], [3])
    assert not set(few.ids) & set(other.ids), "another prompt is another item"


@pytest.mark.parametrize(
    "hard, levels, seeds, word",
    [([], [0], [0], "no hard image"), (HARD, [100], [0], "level 100 alone"), (HARD, [0], [], "no seed")],
)
def test_plans_of_nothing_are_refused(hard, levels, seeds, word):
    with pytest.raises(UsageError, match=word):
        spectrum_plan(DATA.train, hard, levels, seeds)


# What was made


def grey(part):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (len(part), 1, 8, 8), dtype=np.uint8))


def test_levels_are_queries(tmp_path):
    plan = spectrum_plan(DATA.train, HARD[:5], [0, 30, 60], [0, 1])
    made = make_synthetic(tmp_path, plan, grey, "grey")
    assert Counter(r["level"] for r in keep_levels(made, [0, 60, 100]).manifest) == {0: 10, 60: 10}
    one = keep_levels(made, [30], lambda r: r["seed"] == 1)
    assert isinstance(one, Synthetic) and {(r["level"], r["seed"]) for r in one.manifest} == {(30, 1)}
    assert len(keep_levels(made, [30], lambda r: r["level"] > 0)) == 10, "a level that nobody asks for may be empty"
    with pytest.raises(DataError, match="no image of level 0 is left: none of its 10 passes"):
        keep_levels(made, [0, 30], lambda r: r["level"] > 0)
    with pytest.raises(DataError, match="no image of level 10: it has the levels 0, 30, 60"):
        keep_levels(made, [10])


def test_a_spectrum_of_another_cut_is_refused(tmp_path):
    plan = spectrum_plan(DATA.train, HARD[:2], [0])
    make_synthetic(tmp_path / "with", plan, grey, "grey", settings={"steps": 5, **cut_settings(DATA)})
    make_synthetic(tmp_path / "without", plan, grey, "grey")
    check_cut(tmp_path / "with", DATA)
    other = LongTail.digits(seed=1)
    for folder, data in ((tmp_path / "with", other), (tmp_path / "without", DATA), (tmp_path / "none", DATA)):
        with pytest.raises(UsageError, match="another cut"):
            check_cut(folder, data)


def test_held_out_sources_are_not_trained_on():
    check_apart(["a", "b", "b"], ["c"])
    with pytest.raises(UsageError, match="2 held-out images, such as a,"):
        check_apart(["a", "b", "b", "d"], ["b", "a"])


def test_equal_images_of_a_class_each_have_a_spectrum():
    x = np.repeat(DATA.train.images[:2], [3, 2], 0)
    train = ImageSet(x, np.array([0, 0, 0, 1, 1]), ("a", "b"))
    plan = spectrum_plan(train, np.array([3, 4]), [0, 50])
    assert len(plan) == 4 and len(set(plan.ids)) == 4
