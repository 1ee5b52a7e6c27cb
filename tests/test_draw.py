"Drawing until enough pass: any score, the same files after every kill, and refusals."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ltnb import draw
from ltnb.core import UsageError
from ltnb.jobs import Plan, make_plan
from ltnb.synthetic import add_scores, make_synthetic
from ltnb.draw import ItemScore, draw_until


def image(part):  # stand-ins that depend on the item alone
    pairs = np.asarray(part)
    h = (pairs[:, :1] * 1_000_003 + pairs[:, 1:]) * 2_654_435_761 + np.arange(1, 193) * 40_503_001
    return torch.from_numpy((h >> 9).astype(np.uint8).reshape(-1, 3, 8, 8))


def chance(items, rows):
    return {"chance": [int(r["sha"][:6], 16) / 16**6 for r in rows]}


LUCK = ItemScore("chance", chance, by="of the bytes", bs=5)


def lucky(row):
    return row["scores"]["chance"] < 0.4


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_every_class_gets_what_it_wants_or_its_cap(tmp_path):
    f = draw_until(tmp_path, [20, 0, 5], image, "m", LUCK, lucky, cap=20, shard_size=16)
    passed = [r["scores"]["chance"] < 0.4 for r in f.made.manifest]
    for d in f.classes:
        own = [r["k"] for r, ok in zip(f.made.manifest, passed, strict=True) if ok and r["class"] == d["class"]]
        kept = [r["k"] for r in f.kept.manifest if r["class"] == d["class"]]
        assert kept == own[: d["wanted"]] and d["kept"] == d["wanted"] and d["drawn"] == kept[-1] + 1
        assert not d["capped"] and not d["bad"]
    assert [d["class"] for d in f.classes] == [0, 2] and len(f.table("abc", [1, 2, 3])) == 3
    assert {tuple(r["scores"]) for r in f.made.manifest} == {("chance", "chance_by")}
    capped = draw_until(tmp_path / "c", [10, 10], image, "m", LUCK, lambda row: False, cap=1.5)
    assert [(d["drawn"], d["kept"], d["capped"]) for d in capped.classes] == [(15, 0, True)] * 2


def test_a_constant_accepts_the_first_ones(tmp_path):
    f = draw_until(tmp_path, [3, 4], image, "m", ItemScore("any", lambda items, rows: {}), lambda row: True)
    assert [[r["class"], r["k"]] for r in f.kept.manifest] == make_plan([3, 4]).tolist() and len(f.made) == 7


def test_killed_anywhere_it_gives_the_same_files(tmp_path, monkeypatch):
    "Cut before and after each part of the loop, with a score that is not of DiffuLT"

    class Stop(Exception):
        "A stand-in for a power cut"

    moments, at = [], 0

    def tick():
        moments.append(1)
        if len(moments) == at:
            raise Stop

    def watched(f):
        def call(*args, **more):
            tick()
            out = f(*args, **more)
            tick()
            return out

        return call

    def run(folder, make=image):
        return draw_until(folder, [12, 7], make, "m", LUCK, lucky, cap=9, shard_size=8)

    whole = run(tmp_path / "whole")
    while at <= len(moments):
        at += 1
        moments.clear()
        with monkeypatch.context() as m:
            for f in (make_synthetic, add_scores):
                m.setattr(draw, f.__name__, watched(f))
            try:
                run(tmp_path / f"cut-{at}", watched(image))
            except Stop:
                pass
        again = run(tmp_path / f"cut-{at}")
        assert files(tmp_path / f"cut-{at}") == files(tmp_path / "whole")
        assert again.classes == whole.classes and again.at.tolist() == whole.at.tolist()
    assert at > 12


def test_scores_by_another_are_refused(tmp_path):
    draw_until(tmp_path, [2, 2], image, "m", LUCK, lucky)
    before = files(tmp_path)
    with pytest.raises(UsageError, match="'chance' scores by 'of the bytes', not by 'else'"):
        draw_until(tmp_path, [2, 2], image, "m", ItemScore("chance", chance, by="else"), lucky)
    with pytest.raises(UsageError, match="cap must be at least 1"):
        draw_until(tmp_path, [2, 2], image, "m", LUCK, lucky, cap=0.5)
    with pytest.raises(UsageError, match="Did you mean 'shard_size'"):
        draw_until(tmp_path, [2, 2], image, "m", LUCK, lucky, shardsize=3)
    assert files(tmp_path) == before


def test_a_plan_to_draw_from(tmp_path):
    "Its items come in the order of k, and it is the cap"
    n = np.array([30, 8])
    pairs = make_plan(n)
    plan = Plan({"class": pairs[:, 0], "k": pairs[:, 1], "level": pairs[:, 1] % 2 * 40 + 20})
    f = draw_until(tmp_path / "a", [6, 6], image, "m", LUCK, lucky, cap=plan, shard_size=8)
    plain = draw_until(tmp_path / "b", [6, 6], image, "m", LUCK, lucky, cap=30)
    first = [(r["class"], r["k"]) for r in plain.kept.manifest if r["k"] < n[r["class"]]]
    assert [(r["class"], r["k"]) for r in f.kept.manifest] == first
    assert all(r["level"] == r["k"] % 2 * 40 + 20 and len(r["id"]) > 12 for r in f.made.manifest)
    assert f.classes[1]["drawn"] <= 8 and len(f.made) < len(plan)
    with pytest.raises(UsageError, match="without a gap"):
        draw_until(tmp_path / "c", [6, 6], image, "m", LUCK, lucky, cap=plan.take(slice(1, None)))


def test_what_a_filter_is_held_against_lies_in_the_same_folder(tmp_path):
    drawn = draw_until(tmp_path, [6, 0, 40], image, "model", LUCK, lucky, cap=2.0)
    short = {d["class"]: d["wanted"] - d["kept"] for d in drawn.classes}
    assert short[2] > 0  # the cap was reached
    assert drawn.unfiltered.counts(3).tolist() == [6, 0, 40]
    assert max(r["k"] for r in drawn.unfiltered.manifest if r["class"] == 2) == 39
    lots = [drawn.by_lot(s) for s in (0, 0, 1)]
    assert [x.counts(3).tolist() for x in lots] == [drawn.kept.counts(3).tolist()] * 3
    ids = [[r["id"] for r in x.manifest] for x in lots]
    assert ids[0] == ids[1] != ids[2]
    full = drawn.topped_up("chance")
    assert full.counts(3).tolist() == [6, 0, 40]
    added = {r["id"] for r in full.manifest} - {r["id"] for r in drawn.kept.manifest}
    left = {r["id"] for r in drawn.made.manifest} - {r["id"] for r in full.manifest}
    value = {r["id"]: r["scores"]["chance"] for r in drawn.made.manifest}
    own = [[value[i] for i in ids if i.startswith("00002")] for ids in (added, left)]
    assert min(own[0]) >= max(own[1])


def test_the_picture_shows_as_dropped_what_did_not_pass(tmp_path, monkeypatch):
    found = draw_until(tmp_path, [20, 0, 5], image, "m", LUCK, lucky, cap=20, shard_size=16)
    shown, real = [], draw.show_images
    monkeypatch.setattr(draw, "show_images", lambda images, **how: shown.append(images) or real(images, **how))
    data = SimpleNamespace(counts=np.array([9, 5, 1]), class_names=tuple("abc"))
    found.picture(data, tmp_path / "p.png", n=30)
    rows = shown[0].reshape(3, 61, 3, 8, 8)
    drawn, want = {d["class"]: d["drawn"] for d in found.classes}, {0: [], 1: [], 2: []}
    for i, r in enumerate(found.made.manifest):
        if r["k"] < drawn[r["class"]] and not lucky(r):
            want[r["class"]].append(found.made.items[i : i + 1][0].numpy())
    for c, row in enumerate(rows):
        dropped = [x for x in row[31:] if x.min() < 255]
        assert len(want[c]) < len(found.made.labels) and np.array_equal(np.array(dropped), np.array(want[c][:30]))
