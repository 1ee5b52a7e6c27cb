"Scores against scikit-learn, intervals against their meaning."
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ltnb.core import DataError
from ltnb.metrics import paired_over_images, paired_over_seeds, score
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score


@given(st.integers(2, 12), st.integers(1, 200), st.integers(0, 10**6))
def test_against_scikit_learn(k, n, seed):
    rng = np.random.default_rng(seed)
    y, p, counts = rng.integers(0, k, n), rng.integers(0, k, n), rng.integers(1, 300, k)
    s = score(p, y, counts)
    assert math.isclose(s.all, accuracy_score(y, p))
    seen = np.unique(y)
    assert math.isclose(s.macro, np.mean(recall_score(y, p, labels=seen, average=None, zero_division=0)))
    if len(seen) == k: assert math.isclose(s.macro, balanced_accuracy_score(y, p))
    assert np.isnan(s.per_class).sum() == k - len(seen)
    many = np.intersect1d(np.flatnonzero(counts > 100), seen)
    assert math.isnan(s.bands["many"]) if not len(many) else math.isclose(s.bands["many"], s.per_class[many].mean())


def test_refusals():
    with pytest.raises(DataError, match="0 to 1 for 2 classes"): score(np.array([0]), np.array([2]), np.array([5, 5]))
    with pytest.raises(DataError, match="cannot be compared"): score(np.array([0, 1]), np.array([0]), np.array([5, 5]))


def test_intervals_cover():
    "A 95 % interval holds the truth about 95 times in 100"
    rng = np.random.default_rng(0)
    hits = sum(d.low <= .01 <= d.high for d in (paired_over_seeds(rng.normal(.01, .02, 5), np.zeros(5)) for _ in range(1000)))
    assert 925 <= hits <= 975
    right = rng.random((1000, 2, 400)) < np.array([.8, .75])[:, None]
    hits = sum(d.low <= .05 <= d.high for d in (paired_over_images(a, b) for a, b in right))
    assert 920 <= hits <= 975


def test_one_seed_has_no_interval():
    assert math.isnan(paired_over_seeds([.5], [.4]).low)
