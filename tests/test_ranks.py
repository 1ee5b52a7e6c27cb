"Comparing over sets and seeds: what a table may claim, held against numbers worked out by hand and in print"

import csv
import io
import json
import math
import re

import numpy as np
import pytest
from fastcore.test import test_close as close
from ltnb.core import DataError, UsageError
from ltnb.page import latex_table, markdown_table, markdown_text, tex_text, write_tables
from ltnb.ranks import (
    average_ranks,
    best_control,
    cannot_say,
    cliques,
    compare_with_controls,
    critical_difference,
    explain,
    friedman,
    holm,
    kind_of,
    paired_on_shared_seeds,
    plot_ranks,
    rank_methods,
    say_comparison,
    say_explanation,
    sets_of,
    table_cells,
    table_records,
)

# Demšar (2006), Table 6: ranks of C4.5, +m, +cf and +m+cf on 14 data sets
DEMSAR = """4 3 2 1;1 2 3 4;4 1 2 3;4 1 3 2;4 2 3 1;1 2.5 4 2.5;3 2 4 1;2.5 2.5 4 1;4 3 2 1;2.5 2.5 2.5 2.5;4 2.5 1 2.5;
3 2 4 1;4 1 2 3;3 1 4 2"""
DEMSAR = np.array([[float(x) for x in line.split()] for line in DEMSAR.split(";")])


def rows(accuracy, name="digits", **more):
    "Rows of one set from method -> accuracies, a seed each"
    return [
        {"set": name, "method": m, "seed": s, "all": a, **more} for m, v in accuracy.items() for s, a in enumerate(v)
    ]


def test_holm_by_hand():
    close(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])  # 3 x .01, max(.06, .04), 2 x .03, 4 x .005
    close(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([]).shape == (0,)


def test_holm_counts_only_comparisons_that_have_a_p_value():
    found = holm([0.02, math.nan, 0.04])
    close(found[[0, 2]], [0.04, 0.04])
    assert math.isnan(found[1])


def test_ranks_share_ties_and_begin_with_the_highest():
    assert average_ranks([[0.9, 0.8, 0.8, 0.7], [0.5, 0.5, 0.5, 0.5]]).tolist() == [[1, 2.5, 2.5, 4], [2.5] * 4]
    with pytest.raises(DataError, match="with NaN"):
        average_ranks([[0.9, math.nan]])


def test_ranks_and_critical_difference_as_published():
    ranks = average_ranks(-DEMSAR)  # ranks as scores: the smallest is best
    assert (ranks == DEMSAR).all()
    close(ranks.mean(0), [3.143, 2.0, 2.893, 1.964], eps=5e-4)
    n, k = ranks.shape
    plain = 12 * n / (k * (k + 1)) * ((ranks.mean(0) ** 2).sum() - k * (k + 1) ** 2 / 4)
    close(plain, 9.28, eps=0.01)  # printed without the correction for ties
    ties = 3 * (2**3 - 2) + (4**3 - 4)  # three pairs, and four methods that are all equal
    close(friedman(-DEMSAR)[0], plain / (1 - ties / (n * (k**3 - k))), eps=1e-9)
    assert abs(critical_difference(4, 14) - 1.25) < 0.006 and abs(critical_difference(4, 14, 0.10) - 1.12) < 0.006


@pytest.mark.parametrize(
    "alpha, published",  # Demšar (2006), Table 5 (a): q of the Nemenyi test, 2 to 10 methods
    [
        (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
        (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
    ],
)
def test_critical_values_as_published(alpha, published):
    for k, q in enumerate(published, 2):
        n = k * (k + 1) / 6  # so that the root is one
        assert abs(critical_difference(k, n * 4, alpha) * 2 - q) < 0.002


def test_friedman_says_nothing_of_too_little():
    assert all(map(math.isnan, friedman(np.ones((1, 4))))) and all(map(math.isnan, friedman(np.ones((5, 2)))))
    assert friedman(np.full((4, 3), 0.5)) == (0.0, 1.0)


def test_best_control_is_chosen_on_the_seeds_that_are_shared():
    r = rows({"label shift": [0.5, 0.9, 0.9], "balanced softmax": [0.6, 0.6, 0.6]}) + rows({"mine": [0.7]})
    of = sets_of(r)["digits"]
    assert best_control(of, "mine") == "balanced softmax", "label shift is better only where mine was not run"
    assert best_control(of, "label shift") == "balanced softmax", "a control is not its own control"


def test_a_control_with_all_seeds_goes_before_a_luckier_one_with_fewer():
    r = rows({"mine": [0.7, 0.7], "label shift": [0.8, 0.6], "focal": [0.9]})
    assert best_control(sets_of(r)["digits"], "mine") == "label shift"


def test_paired_interval_ignores_the_luck_that_both_share():
    luck = np.array([0.0, 0.1, -0.1, 0.05])
    r = rows({"label shift": 0.6 + luck, "mine": 0.6 + luck + [0.02, 0.03, 0.02, 0.03]})
    (c,) = compare_with_controls(r)
    d = np.array([0.02, 0.03, 0.02, 0.03])
    half = 3.182446 * d.std(ddof=1) / 2  # t of 3 degrees of freedom
    close([c.difference.mean, c.difference.low, c.difference.high], [0.025, 0.025 - half, 0.025 + half], eps=1e-6)
    from scipy.stats import ttest_rel

    close(c.difference.p, ttest_rel(0.6 + luck + d, 0.6 + luck).pvalue, eps=1e-9)
    assert c.p_holm == c.difference.p and c.n_seeds == 4 and "a gain" in say_comparison(c)


def test_only_shared_seeds_are_compared():
    r = rows({"label shift": [0.5, 0.6, 0.7]}) + [
        {"set": "digits", "method": "mine", "seed": s, "all": 0.8} for s in (1, 2, 9)
    ]
    (c,) = compare_with_controls(r)
    assert c.n_seeds == 2 and abs(c.difference.mean - 0.15) < 1e-12


def test_one_seed_has_no_interval_and_no_p_value():
    (c,) = compare_with_controls(rows({"label shift": [0.5], "mine": [0.6]}))
    assert abs(c.difference.mean - 0.1) < 1e-12
    assert all(map(math.isnan, (c.difference.low, c.difference.high, c.difference.p, c.p_holm)))
    assert "one seed" in say_comparison(c) and "a gain" not in say_comparison(c)


def test_one_seed_keeps_the_interval_over_test_images_without_a_p_value():
    r = rows({"label shift": [0.5]}) + rows({"mine": [0.6]}, se={"label shift": 0.01})
    (c,) = compare_with_controls(r)
    close([c.difference.low, c.difference.high], [0.6 - 0.5 - 0.0196, 0.1196], eps=1e-4)
    assert math.isnan(c.p_holm) and "test images" in say_comparison(c) and "no p-value" in say_comparison(c)


def test_equal_differences_are_no_certainty():
    "On 600 test images two seeds often differ by the same number of images"
    (c,) = compare_with_controls(rows({"label shift": [0.5, 0.25], "mine": [0.625, 0.375]}))
    assert math.isnan(c.difference.p)
    (c,) = compare_with_controls(rows({"label shift": [0.5, 0.25], "mine": [0.5, 0.25]}))
    assert c.difference.p == 1


def test_test_images_can_make_a_p_value_larger_never_smaller():
    r = rows({"label shift": [0.5, 0.6, 0.7], "mine": [0.521, 0.62, 0.719]})
    small = compare_with_controls(r)[0].difference.p
    r = [x | {"se": {"label shift": 0.02}} if x["method"] == "mine" else x for x in r]
    c = compare_with_controls(r)[0]
    assert small < 0.01 and c.difference.p > 0.2 and c.difference.over == "test images"


def test_all_sets_are_one_family():
    r = [x for n in range(4) for x in rows({"label shift": [0.5, 0.6, 0.7], "mine": [0.52, 0.63, 0.72]}, f"set {n}")]
    assert [round(c.p_holm / c.difference.p, 6) for c in compare_with_controls(r)] == [4] * 4


def test_parts_of_a_method_claim_nothing():
    r = rows({"label shift": [0.5, 0.6], "aid loss": [0.7, 0.8], "diffult": [0.6, 0.65]})
    assert [c.method for c in compare_with_controls(r)] == ["diffult"]
    assert "aid loss" not in rank_methods(r + rows({"label shift": [1], "diffult": [1]}, "b")).methods


def test_kinds_by_name_or_as_said():
    names = "label-shift, balanced_softmax, Cross-Entropy, equal iterations + label shift, level 50, tau-norm"
    assert {kind_of({"method": m}) for m in names.split(", ")} == {"control"}
    assert kind_of({"method": "diffult, balanced softmax"}) == "method"
    assert kind_of({"method": "label shift", "kind": "method"}) == "method"
    with pytest.raises(DataError, match="control, part, method"):
        kind_of({"method": "a", "kind": "winner"})


def test_cells_that_agree_are_merged_and_others_named():
    r = [
        *rows({"cross-entropy": [0.5, 0.6]}, cell="a"),
        *rows({"cross-entropy": [0.5, 0.6, 0.7]}, cell="b"),
        *rows({"real repeated": [0.4]}, cell="a"),
        *rows({"real repeated": [0.3]}, cell="b"),
        *rows({"mine": [0.7]}, cell="b", se={"real repeated": 0.1}),
    ]
    of = sets_of(r)["digits"]
    names = [x["method"] for x in of]
    assert names.count("cross-entropy") == 3 and {"real repeated (a)", "real repeated (b)"} <= set(names)
    assert of[-1]["se"] == {"real repeated (b)": 0.1}


def test_a_cell_is_named_without_its_set_and_cells_stay_apart():
    r = rows({"tau-norm": [0.4]}, cell="digits/a") + rows({"tau-norm": [0.3]}, cell="digits/b")
    assert [x["method"] for x in sets_of(r)["digits"]] == ["tau-norm (a)", "tau-norm (b)"]


def test_a_control_that_two_cells_share_is_one_control():
    "The second cell's differences to it are kept, and its ladder finds it"
    shared = dict(macro_f1=0.7, ece=0.1, nll=0.9)
    r = [rows({"balanced softmax": [a]}, cell=c, **shared)[0] for c, a in (("a", 0.79), ("b", 0.78), ("c", 0.79))]
    r += rows({"cross-entropy": [0.6]}, cell="a") + rows({"chatdiff": [0.7]}, cell="c", se={"balanced softmax": 0.004})
    assert [x["method"] for x in sets_of(r)["digits"]] == [
        *(f"balanced softmax ({c})" for c in "ab"),
        *("cross-entropy", "chatdiff"),
    ]
    (found,) = compare_with_controls(r)
    assert found.control == "balanced softmax (a)" and found.difference.high < 0
    chance = [x | {"nll": 0.8} if x["cell"] == "c" else x for x in r if x["cell"] != "b"]
    assert "balanced softmax (c)" in [x["method"] for x in sets_of(chance)["digits"]], "the same accuracy by chance"


def test_rows_that_nobody_asked_for_claim_nothing():
    r = (
        rows({"label shift": [0.4, 0.5]}, asked=False)
        + rows({"mine": [0.6, 0.7]})
        + rows({"more": [0.9, 0.9]}, asked=False)
    )
    assert [c.method for c in compare_with_controls(r)] == ["mine"] and len(table_records(r)) == 3


def test_costs_have_no_spread_and_no_best():
    r = rows({"label shift": [0.4, 0.5], "mine": [0.6, 0.7]}, gpu_seconds=0.0)
    r = [x | {"seconds": 10.0 + 1000 * x["seed"]} for x in r]
    head, lines = table_cells(r)
    assert "GPU s" not in head and {line[head.index("s")] for line in lines} == {("510", False)}


def test_each_cell_is_explained_by_its_own_controls():
    r = rows({"cross-entropy": [0.5]}, cell="shared")
    for cell, again in (("diffult", 0.55), ("chatdiff", 0.45)):
        r += rows({"real repeated": [again], cell: [0.6]}, cell=cell)
    steps = {e.method: e.parts[0][1].mean for e in explain(r)}
    close([steps["diffult"], steps["chatdiff"]], [0.05, -0.05])


def test_an_explanation_adds_up_whatever_was_measured():
    ladder = {"cross-entropy": 0.5, "equal iterations": 0.52, "generation": 0.6, "aid loss": 0.58, "diffult": 0.61}
    rng = np.random.default_rng(0)
    for left_out in (None, "equal iterations", "aid loss"):
        r = rows({m: a + rng.normal(0, 0.01, 3) for m, a in ladder.items() if m != left_out})
        (e,) = explain(r)
        close(e.total.mean, sum(d.mean for _, d in e.parts))
        assert len(e.parts) == (4 if left_out is None else 3) and "is left to the method" in say_explanation(e)


def test_without_a_ladder_the_best_control_explains():
    (e,) = explain(rows({"cross-entropy": [0.5], "label shift": [0.6], "mine": [0.65]}))
    assert [words for words, _ in e.parts] == ["its best control, label shift", "what is left to the method"]
    assert not explain(rows({"label shift": [0.6], "mine": [0.65]})), "nothing to begin from"


def test_a_method_with_label_shift_climbs_over_the_method():
    (_, e) = explain(
        rows({"cross-entropy": [0.5], "generation": [0.6], "diffult": [0.63], "diffult + label shift": [0.7]})
    )
    close([d.mean for _, d in e.parts], [0.1, 0.03, 0.07])


def test_numbers_may_be_missing():
    r = rows({"label shift": [0.5, 0.6], "mine": [0.7, None]}, few=None, nll=math.nan) + [{"method": "bare"}]
    head, lines = table_cells(r)
    assert "few" not in head and "NLL" not in head
    (c,) = [c for c in compare_with_controls(r) if c.method == "mine"]
    assert c.n_seeds == 1
    (bare,) = [x for x in table_records(r) if x["method"] == "bare"]
    assert bare["set"] == "data" and bare["seeds"] == 0 and bare["all"] is None
    assert any("no accuracy was measured" in s for s in cannot_say([{"method": "bare"}]))


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "a", "all": "0.5"},
        {"method": "a", "seed": 1.5},
        {"method": ""},
        {},
        "a",
        {"method": "a", "all": True},
    ],
)
def test_rows_that_are_none_are_refused(bad):
    with pytest.raises(DataError):
        sets_of([bad])


def test_what_cannot_be_said_is_said():
    one = rows({"label shift": [0.5], "mine": [0.6]})
    said = " ".join(cannot_say(one))
    assert "digits: one seed" in said and "One set" in said
    two = one + rows({"label shift": [0.5], "mine": [0.6]}, "cifar")
    assert "no two methods can be told apart by ranks" in " ".join(cannot_say(two))
    assert "no control" in " ".join(cannot_say(rows({"mine": [0.5, 0.6]})))
    assert "different seeds" in " ".join(cannot_say(rows({"mine": [0.5, 0.6], "label shift": [0.5, 0.6, 0.7]})))
    assert "Not ranked, for want of a set: theirs" in " ".join(cannot_say(two + rows({"theirs": [0.5]})))
    many = [
        x
        for n in range(20)
        for x in rows({"label shift": [0.5, 0.51], "focal": [0.4, 0.41], "mine": [0.6, 0.61]}, f"s{n}")
    ]
    assert cannot_say(many) == []


def test_ranks_over_sets():
    gains = {"cross-entropy": 0.0, "label shift": 0.1, "mine": 0.2}
    r = [x for n in range(12) for x in rows({m: [n / 50 + g] for m, g in gains.items()}, f"s{n}")]
    found = rank_methods(r)
    assert found.methods == ("mine", "label shift", "cross-entropy") and found.mean.tolist() == [1, 2, 3]
    assert found.p < 0.001 and found.cd < 1 and found.tells and cliques(found) == []
    assert math.isnan(rank_methods(r[:3]).cd)
    with pytest.raises(UsageError, match="two methods on two sets, got 3 on 1"):
        plot_ranks(rank_methods(r[:3]))


def test_bars_join_what_lies_within_the_critical_difference():
    class R:
        methods, mean, cd = "abcde", np.array([1.0, 1.5, 3.0, 3.2, 5.0]), 1.6

    assert cliques(R) == [(0, 1), (1, 2), (2, 3)]
    R.cd = 2.0
    assert cliques(R) == [(0, 2), (1, 3), (2, 4)], "a bar inside another one is left out"


def test_the_figure_names_each_method_and_draws_each_bar():
    r = [
        x
        for n in range(6)
        for x in rows({m: [g + n] for m, g in (("$a$", 0.3), ("b", 0.2), ("label shift", 0.1))}, f"s{n}")
    ]
    from ltnb.pictures import new_figure

    _, ax = new_figure()
    found = rank_methods(r)
    plot_ranks(found, ax)
    texts = " ".join(t.get_text() for t in ax.texts)
    assert r"\$a\$" in texts and "label shift" in texts and f"{found.cd:.2f}" in texts
    assert sum(line.get_linewidth() == 3.5 for line in ax.lines) == len(cliques(found))
    ax.figure.canvas.draw()


AWKWARD = "a_b & 100 % {x} \\ ~ ^ # $ <i> | *"


def test_latex_holds_no_command_but_ours():
    r = rows({AWKWARD: [0.5, 0.6], "label shift": [0.4, 0.5]}, name="R&D_1")
    text = latex_table(r)
    bare = re.sub(r"\\(textbf|textbackslash|textasciitilde|textasciicircum|textbar|textquotedbl)\b", "", text)
    bare = re.sub(r"\\[&%$#_{}]", "", bare)
    body = bare[bare.index("\\toprule") : bare.index("\\bottomrule")]
    assert set(re.findall(r"\\[a-z]+", body)) == {"\\toprule", "\\midrule", "\\pm"}
    assert not set("#_^~%") & set(body) and body.count("{") == body.count("}")
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
    lines = [x for x in re.sub(r"\\&", "", text).split("\n") if x.endswith(r"\\")]
    assert len(lines) == 3 and all(x.count("&") == len(columns) - 1 for x in lines)
    assert text.count("\\midrule") == 1 and text.count("\\begin") == text.count("\\end") == 2


def test_escapes():
    assert tex_text("a_b") == r"a\_b" and tex_text("\\") == r"\textbackslash{}" and "\n" not in tex_text("a\nb")
    assert markdown_text("a|b<i>*") == r"a\|b\<i\>\*"


def test_best_is_bold_and_what_looks_equal_is_equally_bold():
    r = rows({"label shift": [0.5, 0.6], "mine": [0.50001, 0.6], "yours": [0.1, 0.2]}, ece=0.1)
    text = markdown_table(r)
    assert text.count("**55.0 ± 7.1**") == 2 and "**15.0" not in text and text.count("**10.0 ± 0.0**") == 3
    low = rows({"a": [0.5]}, ece=0.2) + rows({"b": [0.4]}, ece=0.1)
    assert "**10.00**" in markdown_table(low) and "**20.00**" not in markdown_table(low)


def test_a_markdown_table_has_as_many_cells_in_each_line():
    lines = markdown_table(rows({AWKWARD: [0.5, 0.6], "label shift": [0.4, 0.5]})).strip().split("\n")
    assert len({len(re.findall(r"(?<!\\)\|", x)) for x in lines}) == 1


@pytest.fixture
def mixed():
    return [
        x | {"seconds": 12.5, "per_class": [0.1, None], "drawn": 10}
        for n in ("digits", 'a,b"c')
        for x in rows({"label shift": [0.1 + 0.2, 0.6], AWKWARD: [None, 0.7]}, n)
    ]


def test_files_and_their_round_trip(tmp_path, mixed):
    paths = write_tables(mixed, tmp_path / "out")
    assert sorted(p.name for p in paths) == sorted(
        ["scores.csv", "scores.json", "table.csv", "table.json", "table.md", "table.tex"]
    )
    assert all(p.exists() for p in paths)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores == [{k: v for k, v in r.items() if k != "seconds"} for r in mixed]
    read = list(csv.DictReader(io.StringIO((tmp_path / "out" / "scores.csv").read_text())))
    assert [(r["set"], r["method"], int(r["seed"])) for r in read] == [
        (r["set"], r["method"], r["seed"]) for r in mixed
    ]
    assert [float(r["all"]) if r["all"] else None for r in read] == [r["all"] for r in mixed], "all digits are there"
    assert "per_class" not in read[0] and "seconds" not in read[0]
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert float(table[0]["all"]) == (0.1 + 0.2 + 0.6) / 2 and float(table[0]["seconds"]) == 12.5
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    assert len(data["methods"]) == len(table) == 4 and data["ranks"]["mean_rank"] and data["cannot_say"]


def test_equal_rows_give_equal_files_whatever_the_clock_said(tmp_path, mixed):
    write_tables(mixed, tmp_path / "a")
    write_tables([r | {"seconds": 99.0} for r in mixed], tmp_path / "b")
    for name in ("scores.csv", "scores.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    everything = "".join((tmp_path / "a" / p.name).read_text() for p in (tmp_path / "a").iterdir())
    assert str(tmp_path) not in everything and not re.search(r"20\d\d-\d\d-\d\d", everything)


def test_no_rows_give_empty_tables(tmp_path):
    assert table_records([]) == [] and compare_with_controls([]) == [] and explain([]) == []
    write_tables([], tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())["methods"] == []


def test_paired_on_shared_seeds_without_any():
    of = sets_of(rows({"a": [0.5]}) + [{"set": "digits", "method": "b", "seed": 7, "all": 0.5}])["digits"]
    assert paired_on_shared_seeds(of, "a", "b") is None
