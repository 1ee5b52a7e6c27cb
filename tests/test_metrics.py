"Scores against scikit-learn, intervals against their meaning."

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.data import BANDS, THIRDS, thirds
from ltnb.metrics import (
    bootstrap,
    calibration,
    confusion,
    generative_by_band,
    generative_scores,
    inception_features,
    interval_over_seeds,
    log_softmax,
    mean_sd,
    paired_bootstrap,
    paired_over_images,
    paired_over_seeds,
    score,
    worst,
)
from ltnb.pictures import (
    METHOD_COLORS,
    confusion_flow,
    plot_by_rank,
    plot_confusion,
    plot_distribution,
    plot_flow,
    plot_methods,
    plot_reliability,
)
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, log_loss, recall_score


@given(st.integers(2, 12), st.integers(1, 200), st.integers(0, 10**6))
def test_against_scikit_learn(k, n, seed):
    rng = np.random.default_rng(seed)
    y, p, counts = rng.integers(0, k, n), rng.integers(0, k, n), rng.integers(1, 300, k)
    s = score(p, y, counts)
    assert math.isclose(s.all, accuracy_score(y, p))
    seen = np.unique(y)
    assert math.isclose(s.macro, np.mean(recall_score(y, p, labels=seen, average=None, zero_division=0)))
    if len(seen) == k:
        assert math.isclose(s.macro, balanced_accuracy_score(y, p))
    assert np.isnan(s.per_class).sum() == k - len(seen)
    many = np.intersect1d(np.flatnonzero(counts > 100), seen)
    assert math.isnan(s.bands["many"]) if not len(many) else math.isclose(s.bands["many"], s.per_class[many].mean())


def test_refusals():
    with pytest.raises(DataError, match="0 to 1 for 2 classes"):
        score(np.array([0]), np.array([2]), np.array([5, 5]))
    with pytest.raises(DataError, match="cannot be compared"):
        score(np.array([0, 1]), np.array([0]), np.array([5, 5]))


def test_intervals_cover():
    "A 95 % interval holds the truth about 95 times in 100"
    rng = np.random.default_rng(0)
    hits = sum(
        d.low <= 0.01 <= d.high
        for d in (paired_over_seeds(rng.normal(0.01, 0.02, 5), np.zeros(5)) for _ in range(1000))
    )
    assert 925 <= hits <= 975
    right = rng.random((1000, 2, 400)) < np.array([0.8, 0.75])[:, None]
    hits = sum(d.low <= 0.05 <= d.high for d in (paired_over_images(a, b) for a, b in right))
    assert 920 <= hits <= 975


def test_one_seed_has_no_interval():
    assert math.isnan(paired_over_seeds([0.5], [0.4]).low)


@given(st.integers(2, 12), st.integers(1, 200), st.integers(0, 10**6))
def test_more_against_scikit_learn(k, n, seed):
    rng = np.random.default_rng(seed)
    y, z, counts = rng.integers(0, k, n), rng.normal(0, 3, (n, k)), rng.integers(1, 300, k)
    s = score(None, y, counts, logits=z)
    p = z.argmax(1)
    assert math.isclose(s.macro_f1, f1_score(y, p, labels=np.unique(y), average="macro", zero_division=0)), (
        "macro-F1 as WILDS computes it"
    )
    assert (confusion(p, y, k) == confusion_matrix(y, p, labels=range(k))).all()
    assert math.isclose(s.nll, log_loss(y, np.exp(log_softmax(z)), labels=range(k)), rel_tol=1e-6)
    tail, top = thirds(counts)["last_third"], thirds(counts)["top_third"]
    of_tail = np.isin(y, tail)
    assert (
        math.isnan(s.tail_to_head)
        if not of_tail.any()
        else math.isclose(s.tail_to_head, np.isin(p[of_tail], top).mean())
    )
    assert math.isclose(s.worst_tenth, np.sort(s.per_class[np.isfinite(s.per_class)])[: math.ceil(k / 10)].mean())
    flow = confusion_flow(p, y, counts)
    for i, t in enumerate(THIRDS):
        rows = np.isin(y, thirds(counts)[t])
        if rows.any():
            assert math.isclose(flow[i].sum(), (p != y)[rows].mean(), abs_tol=1e-12)


@given(st.integers(2, 6), st.integers(1, 120), st.integers(0, 10**6))
def test_ece_against_its_formula(k, n, seed):
    rng = np.random.default_rng(seed)
    p, y = rng.dirichlet(np.ones(k) / 2, n), rng.integers(0, k, n)
    sure, right, ece = p.max(1), p.argmax(1) == y, 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = [(c, r) for c, r in zip(sure, right, strict=True) if low < c <= high]
        if inside:
            ece += len(inside) / n * abs(np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside]))
    assert math.isclose(calibration(p, y).ece, ece, abs_tol=1e-9)


def test_calibrated_answers_have_no_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 40000)
    y = (rng.random((40000, 1)) > p.cumsum(1)).sum(1)
    assert calibration(p, y).ece < 0.01 < 0.3 < calibration(p, (y + 1) % 4).ece
    with pytest.raises(DataError, match="softmax"):
        calibration(p * 2, y)
    with pytest.raises(DataError, match="finite"):
        score(None, np.array([0]), np.array([5, 5]), logits=np.array([[np.nan, 1]]))
    with pytest.raises(UsageError, match="neither"):
        score(None, np.array([0]), np.array([5, 5]))


def test_extreme_logits_and_empty_classes():
    s = score(None, np.array([0, 1]), np.array([9, 9, 9]), logits=np.array([[1e5, 0, -1e5], [0, -1e5, 1e5]]))
    assert (
        s.all == 0.5
        and np.isfinite(s.nll)
        and np.isnan(s.per_class[2])
        and np.isnan(s.bands["many"])
        and s.bands["few"] == 0.5
    )
    assert np.isnan(worst(np.array([np.nan]), 3)) and all(b in s.to_row() for b in (*BANDS, "macro_f1", "ece"))


def test_p_values():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.5, 0.1, (2, 7))
    assert math.isclose(paired_over_seeds(a, b).p, ttest_rel(a, b).pvalue)
    assert paired_over_seeds(a, a).p == 1.0 and paired_over_seeds(a, a - 0.1).p < 1e-6
    right = rng.random((400, 2, 200)) < 0.8
    assert 0.01 <= np.mean([paired_over_images(x, z).p < 0.05 for x, z in right]) <= 0.07, (
        "equal methods are told apart in at most 5 of 100 cases"
    )
    assert paired_over_images(np.r_[np.ones(60), np.zeros(40)], np.r_[np.zeros(30), np.ones(30), np.zeros(40)]).p < 1e-6
    with pytest.raises(DataError, match="same images"):
        paired_over_images(np.ones(3), np.ones(4))


def test_bootstrap_agrees_with_the_formula():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 2000)
    a, b = (np.where(rng.random(2000) < q, y, (y + 1) % 3) for q in (0.8, 0.75))
    low, high = bootstrap(lambda p, t: (p == t).mean(), a, y)
    se = math.sqrt((a == y).mean() * (a != y).mean() / 2000)
    assert abs((high - low) - 2 * 1.96 * se) < 0.15 * 2 * 1.96 * se
    d, e = paired_bootstrap(lambda p, t: (p == t).mean(), a, b, y), paired_over_images(a == y, b == y)
    assert math.isclose(d.mean, e.mean) and abs(d.low - e.low) < 0.004 and abs(d.high - e.high) < 0.004
    assert bootstrap(lambda p, t: (p == t).mean(), a, y) == (low, high), "the draws are seeded"
    assert all(map(math.isnan, bootstrap(lambda p: math.nan, a)))
    with pytest.raises(DataError, match="together"):
        bootstrap(lambda a, b: 0, np.ones(3), np.ones(4))


def test_mean_sd():
    assert (
        mean_sd([0.5, 0.7]) == pytest.approx((0.6, 0.02**0.5))
        and math.isnan(mean_sd([0.5])[1])
        and math.isnan(mean_sd([np.nan])[0])
    )


def test_generative_scores_against_their_formulas():
    pytest.importorskip("torch_fidelity", reason='pip install "ltnb[eval]"')
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    real, made = rng.normal(0, 1, (300, 6)), rng.normal(0.5, 1.3, (250, 6))
    s = generative_scores(real, made, "test")
    c1, c2 = np.cov(real.T), np.cov(made.T)
    fid = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert math.isclose(s.fid, fid, rel_tol=1e-6) and (s.n_real, s.n_made, s.extractor) == (300, 250, "test")
    same = generative_scores(real, rng.normal(0, 1, (250, 6)), "test")
    assert same.fid < s.fid / 3 and abs(same.kid) < s.kid / 5 and same.precision > s.precision
    assert generative_scores(real, np.repeat(real[:1], 50, 0), "test").recall < 0.1

    def ball(x):
        return np.sort(np.linalg.norm(x[:, None] - x, axis=-1), 1)[:, 3]

    def inside(a, b):
        return (np.linalg.norm(a[:, None] - b, axis=-1) <= ball(b)).any(1).mean()

    assert math.isclose(s.precision, inside(made, real), abs_tol=1e-6) and math.isclose(
        s.recall, inside(real, made), abs_tol=1e-6
    )


def test_generative_scores_by_band():
    pytest.importorskip("torch_fidelity", reason='pip install "ltnb[eval]"')
    rng = np.random.default_rng(0)
    y, m = np.repeat([0, 1, 2], 20), np.repeat([0, 1], [30, 3])
    rows = generative_by_band(rng.normal(size=(60, 4)), y, rng.normal(size=(33, 4)), m, np.array([200, 50, 5]), "noise")
    assert [(r.group, r.n_real, r.n_made) for r in rows] == [
        ("all", 60, 33),
        ("many", 20, 30),
        ("medium", 20, 3),
        ("few", 20, 0),
    ]
    assert (
        np.isfinite(rows[2].fid)
        and math.isnan(rows[2].precision)
        and math.isnan(rows[3].fid)
        and math.isnan(rows[3].kid)
    )
    with pytest.raises(DataError, match="finite"):
        generative_scores(np.full((5, 2), np.nan), np.ones((5, 2)), "x")
    with pytest.raises(DataError, match=r"\(N, d\)"):
        generative_scores(np.ones((5, 2)), np.ones((5, 3)), "x")


def test_without_the_extra(monkeypatch):
    import sys

    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LtnbError, match=r"ltnb\[eval\]"):
        generative_scores(np.ones((5, 2)), np.ones((5, 2)), "x")
    with pytest.raises(LtnbError, match=r"ltnb\[eval\]"):
        inception_features(np.zeros((1, 3, 8, 8), np.uint8))


def test_inception_offline(tmp_path, monkeypatch):
    "The real network with untrained weights from a file; without a file and a network, a sentence"
    pytest.importorskip("torch_fidelity", reason='pip install "ltnb[eval]"')
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    monkeypatch.setattr(
        inception, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(LtnbError, match="give their file"):
        inception_features(np.zeros((1, 3, 8, 8), np.uint8))
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda self, d, *a, **k: None if not d else load(self, d, *a, **k)
    )
    torch.save({}, tmp_path / "w.pth")
    z = inception_features(
        np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8), str(tmp_path / "w.pth"), bs=2
    )
    assert z.shape == (3, 2048) and np.isfinite(z).all()


def test_pictures_take_axes_and_return_them():
    from matplotlib.figure import Figure

    y = np.array([0, 1, 2, 2])
    rows = [{"method": m, "seed": s, "all": 0.5 + s / 10} for m in ("label shift", "a", "$b$") for s in range(2)]
    for draw in (
        lambda ax: plot_by_rank(
            {"a": [0.5, 0.2, np.nan], "b": [[0.5, 0.2, 0.1]] * 2}, np.array([200, 30, 4]), ("x", "$y$", "z"), ax=ax
        ),
        lambda ax: plot_flow(y, y, np.array([200, 30, 4]), ax=ax),
        lambda ax: plot_reliability(calibration(np.full((4, 3), 1 / 3), y), ax=ax),
        lambda ax: plot_confusion(confusion(y, y, 3), ("x", "$y$", "z"), ax=ax),
        lambda ax: plot_methods(rows, ax=ax, kinds={"a": "synthetic"}),
        lambda ax: plot_distribution({"few": [1.0, 2.0, np.nan], "other": [0.5]}, "score", 1.5, ax=ax),
    ):
        ax = Figure().subplots()
        assert draw(ax) is ax and (ax.lines or ax.patches or ax.collections)
        ax.figure.savefig("/dev/null", format="png")


def test_bars_of_methods_say_what_the_rows_say():
    "Their length is the mean, their whisker Student's interval, none for one seed; a colour for each kind"
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    rows = [{"method": "a", "seed": s, "all": v} for s, v in enumerate((0.5, 0.6, 0.7))]
    rows += [{"method": "b", "seed": 0, "all": 0.4}, {"method": "c", "seed": 0, "all": None}]
    ax = plot_methods(rows, ax=Figure().subplots(), kinds={"a": "synthetic", "b": "real"})
    bars = {round(p.get_y() + p.get_height() / 2): p for p in ax.patches if p.get_width()}
    assert bars[0].get_width() == pytest.approx(60) and bars[1].get_width() == pytest.approx(40) and 2 not in bars
    assert [to_rgb(bars[i].get_facecolor()) for i in (0, 1)] == [
        to_rgb(METHOD_COLORS[k]) for k in ("synthetic", "real")
    ]
    whiskers = [line.get_xdata() for line in ax.lines if np.isfinite(line.get_xdata()).all() and len(line.get_xdata())]
    low, high = interval_over_seeds(np.array([50, 60, 70]))
    assert len(whiskers) == 1 and np.allclose((min(whiskers[0]), max(whiskers[0])), (low, high))


def test_confusion_picture_shows_shares_of_true_classes():
    from matplotlib.figure import Figure

    ax = plot_confusion(np.array([[3, 1], [0, 0]]), ("a", "b"), ax=Figure().subplots())
    assert [t.get_text() for t in ax.texts] == ["75", "25"], "a class without images has no shares"


def test_distribution_has_an_area_of_one_for_each_group():
    from matplotlib.figure import Figure

    ax = plot_distribution({"many": np.arange(1000.0), "few": [1.0, 2.0]}, "score", 5.0, ax=Figure().subplots())
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["many (1,000)", "few (2)", "threshold 5"]
