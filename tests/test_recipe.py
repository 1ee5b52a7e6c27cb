"The frame of a recipe: what is found once, rows of answers, a run that is stopped and goes on, settings left open."

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.cli import Parser, add_settings, help_of
from ltnb.config import Config, auto, limited
from ltnb.core import LtnbError, UsageError, read_json
from ltnb.data import ImageSet, LongTail
from ltnb.priors import class_prior
from ltnb.progress import Progress
from ltnb.recipe import Answer, Answers, Recipe, Stage
from ltnb.runs import Run
from ltnb.sources import DataConfig
from ltnb.team import Where
from test_team import together

COUNTS = np.array([120, 40, 5])


class Stop(Exception):
    "A stand-in for a power cut"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


@dataclass(frozen=True)
class ToyConfig(Config):
    "Settings of a recipe that throws dice"

    recipe: ClassVar[str] = "toy"
    not_identity: ClassVar[tuple] = ("out", "seeds", "threads")
    dataset: str = "toy"  # what is thrown
    n: int = limited(50, 1)  # test images
    # how sure a method is of what it knows, where nothing
    # else is said
    sure: float = auto(lambda cfg, data: cfg.n / data.n_classes, "a third of the images", low=0)
    twice: float = auto(lambda cfg, data: 2 * cfg.sure, "twice that")  # of another one
    side: Literal["left", "right"] = auto(digits="left", other="right")  # where they fall
    test_prior: str | None = None  # also correct to this class prior
    seed: int = limited(0, 0)  # the first seed
    seeds: int = limited(1, 1, 1000)  # how many seeds
    device: Literal["auto", "cpu"] = "cpu"  # where
    precision: Literal["auto", "fp32"] = "fp32"  # number format
    threads: str = "1"  # how many threads compute
    out: str | None = None  # run directory
    source_name: ClassVar[str] = "toy"

    def data_seed(self, seed):
        return seed


def toy_data(seed=0, n=50):
    "A long tail of blank images; the test labels follow the seed"
    labels = np.arange(3).repeat(COUNTS), np.random.default_rng(seed).integers(0, 3, n)
    parts = [ImageSet(np.zeros((len(y), 1, 4, 4), np.uint8), y, ("a", "b", "c")) for y in labels]
    return LongTail(*parts, "toy")


class Toy(Recipe):
    "Throws dice in two steps, each of which is kept"

    config, title, compared = ToyConfig, "Dice", ("label shift", "sure")
    log, stop_at = [], None

    def load(self, cfg, seed):
        return toy_data(seed, cfg.n)

    def step(self, s, name, scale):
        def find():
            if (s.seed, name) == self.stop_at:
                raise Stop
            self.log.append((s.seed, name))
            g = torch.Generator().manual_seed(17 * s.seed + len(name))
            z = torch.randn(s.cfg.n, 3, generator=g)
            z[torch.arange(s.cfg.n), torch.from_numpy(s.data.test.labels)] += scale
            return {"z": z}

        with s.timed(name):
            return s.once(name, find)["z"]

    def seed(self, s):
        z, sure = self.step(s, "dice", 1.0), self.step(s, "sure", s.cfg.sure)
        if s.first:
            (s.run.path / "first.txt").write_text(f"seed {s.seed}")
        return Answers({"cross-entropy": Answer(z, s.data.counts)}).corrected("cross-entropy") | {
            "sure": Answer(sure, s.data.counts, {"scale": s.cfg.sure})
        }

    def more(self, s, row):
        return {"first": s.first}


def toy(out, seeds=3, stop_at=None, **more):
    "A run of the toy, and the steps that it took"
    recipe = Toy()
    recipe.log, recipe.stop_at = [], stop_at
    cfg = ToyConfig(seeds=seeds, out=str(out), **more)
    try:
        return recipe.run(cfg), recipe.log
    except Stop:
        return None, recipe.log


def content(folder, leave=("environment.json", "timing.jsonl")):
    "Hashes of what two equal runs share"
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in leave)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# found once
def counted(log, value=1.0):
    def find():
        log.append(value)
        return {"x": torch.full((2,), value), "n": torch.arange(3)}

    return find


@pytest.mark.parametrize("all_find", [False, True])
def test_a_step_is_found_once(tmp_path, all_find):
    "By the first call; another seed and another name are others, and another process reads what is kept"
    log, cfg = [], ToyConfig(out=str(tmp_path))
    with Run(cfg) as run:
        run.start(cfg, "cpu", "fp32")
        s, other = (Stage(cfg, None, seed, Where(run=run)) for seed in (0, 1))
        first = s.once("step", counted(log, 1.0), all_find)
        again = s.once("step", counted(log, 2.0), all_find)
        assert log == [1.0] and all(torch.equal(first[k], again[k]) for k in first)
        assert other.once("step", counted(log, 3.0), all_find)["x"].eq(3).all()
        assert s.once("another", counted(log, 4.0), all_find)["x"].eq(4).all() and log == [1.0, 3.0, 4.0]
        assert s.first and not other.first
    names = sorted(p.name.split(".")[0] for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["another-seed-0", "step-seed-0", "step-seed-1"]
    with Run(cfg) as run:
        kept = Stage(cfg, None, 0, Where(run=run)).once("step", counted(log, 5.0), all_find)
    assert len(log) == 3 and kept["x"].eq(1).all() and kept["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("all_find", [False, True])
def test_a_step_is_the_same_in_every_process(tmp_path, all_find):
    "Found by the first one and told to the others, or by all of them; kept by the first; never found again"
    cfg, log = ToyConfig(out=str(tmp_path)), []

    def act(team):
        s = Stage(cfg, None, 0, Where(run=Run(cfg), team=team))

        def find():
            log.append(team.rank)
            return {"x": torch.full((2,), 7.0 if all_find else float(team.rank))}

        return [s.once("step", find, all_find)["x"].tolist() for _ in range(2)]

    want = [7.0, 7.0] if all_find else [0.0, 0.0]
    with Run(cfg):
        assert together(act, 3) == [[want] * 2] * 3
        assert sorted(log) == ([0, 1, 2] if all_find else [0])
        assert together(act, 2) == [[want] * 2] * 2 and len(log) == (3 if all_find else 1), "read back by another start"


def test_a_step_that_was_stopped_leaves_nothing_behind(tmp_path):
    cfg, log = ToyConfig(out=str(tmp_path)), []

    def stop():
        raise Stop

    with Run(cfg) as run:
        s = Stage(cfg, None, 0, Where(run=run))
        with pytest.raises(Stop):
            s.once("step", stop)
        assert s.once("step", counted(log))["x"].eq(1).all() and len(log) == 1


def test_processes_that_see_different_directories_are_told(tmp_path):
    "What one of them has kept and another has not cannot be gone on with together"

    def act(team):
        cfg = ToyConfig(out=str(tmp_path / str(team.rank)))
        with Run(cfg) as run:
            if team.rank:
                run.save("step-seed-0", {"x": torch.zeros(1)})
            return Stage(cfg, None, 0, Where(run=run, team=team)).once("step", counted([]), together=True)

    said = together(act)
    assert isinstance(said[1], LtnbError) and "rank 1 has another answer to whether step-seed-0 is there" in str(
        said[1]
    )


def test_a_block_is_timed_by_the_writer_alone(tmp_path):
    cfg = ToyConfig(out=str(tmp_path))

    def act(team):
        with Stage(cfg, None, 4, Where(run=Run(cfg), team=team)).timed("nothing"):
            team.wait("the end")

    with Run(cfg):
        together(act)
    lines = (tmp_path / "timing.jsonl").read_text().splitlines()
    assert len(lines) == 1 and '"seed": 4' in lines[0] and '"stage": "nothing"' in lines[0]


# answers
def logits(seed, n=50):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_answers_keep_their_order():
    a, b, c, d = (Answer(logits(i), COUNTS) for i in range(4))
    said = Answers({"a": a, "b": b})
    assert list(said.after("a", "new", c)) == ["a", "new", "b"] and list(said) == ["a", "b"]
    both = said | Answers({"d": d}) | {"e": a}
    assert isinstance(both, Answers) and list(both) == ["a", "b", "d", "e"] and both["d"] is d
    said |= {"c": c}
    assert isinstance(said, Answers) and list(said) == ["a", "b", "c"]


def test_corrected_takes_the_prior_out_once():
    "The row stands behind its method, is made once, and goes on to a given prior from the original logits"
    z, aim = logits(0), np.array([0.2, 0.3, 0.5])
    answer = Answer(z, torch.tensor([60.0, 30.0, 10.0]), {"scale": 2})
    said = Answers({"cross-entropy": Answer(z, COUNTS), "made": answer, "last": Answer(z, COUNTS)})
    got = said.corrected("made")
    assert list(got) == ["cross-entropy", "made", "made + label shift", "last"]
    prior = torch.tensor([0.6, 0.3, 0.1])
    torch.testing.assert_close(got["made + label shift"].logits, z - prior.log(), check_dtype=False)
    assert got["made + label shift"].facts == {"scale": 2} and got["made + label shift"].prior is answer.prior
    assert list(got.corrected("made")) == list(got), "once"
    toward = got.corrected("made", aim)
    assert list(toward)[1:4] == ["made", "made + label shift", "made + label shift, test prior"]
    want = z - prior.log() + torch.from_numpy(aim).log()
    torch.testing.assert_close(toward["made + label shift, test prior"].logits, want, check_dtype=False)
    assert list(said.corrected("cross-entropy", aim))[:3] == [
        "cross-entropy",
        "label shift",
        "label shift, test prior",
    ]


def slow_error(a, b):
    "Standard error of the mean of paired differences, one image after the other"
    d = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(d) / len(d)
    return (sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d)) ** 0.5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(2, 60))
def test_rows_against_a_slow_computation(seed, n):
    data = toy_data(seed, n)
    truth = data.test.labels
    said = Answers({m: Answer(logits(seed + i, n), COUNTS, {"i": i}) for i, m in enumerate(("a", "label shift", "b"))})
    aim = np.array([0.5, 0.25, 0.25])
    rows = said.rows(data, seed, ("label shift", "b", "absent"), aim, lambda row: {"double": 2 * row["all"]})
    assert [(r["method"], r["seed"], r["i"]) for r in rows] == [
        ("a", seed, 0),
        ("label shift", seed, 1),
        ("b", seed, 2),
    ]
    right = {m: [int(z.argmax()) == y for z, y in zip(a.logits, truth, strict=True)] for m, a in said.items()}
    for r in rows:
        m = r["method"]
        assert r["all"] == pytest.approx(sum(right[m]) / n) and r["double"] == 2 * r["all"]
        assert set(r["se"]) == {"label shift", "b"} - {m}, "none to itself, none to what is not there"
        for other, se in r["se"].items():
            assert se == pytest.approx(slow_error(right[m], right[other]), rel=1e-6, abs=1e-9)
        own = [[x for x, y in zip(right[m], truth, strict=True) if y == k] for k in range(3)]
        if all(own):
            want = sum(p * sum(v) / len(v) for p, v in zip(aim, own, strict=True))
            assert r["expected"] == pytest.approx(want)


def test_rows_say_what_to_expect_only_where_asked():
    rows = Answers({"a": Answer(logits(0), COUNTS)}).rows(toy_data(), 0)
    assert "expected" not in rows[0] and rows[0]["se"] == {}


# a run that is stopped, and goes on
@pytest.mark.parametrize("stop_at", [(1, "dice"), (1, "sure"), (2, "sure")])
def test_a_stopped_run_goes_on(tmp_path, stop_at):
    "Killed on its way through a later seed: every file is that of a run in one go, and no step is taken twice"
    whole, every = toy(tmp_path / "whole")
    assert every == [(seed, name) for seed in range(3) for name in ("dice", "sure")]
    stopped, before = toy(tmp_path / "cut", stop_at=stop_at)
    assert stopped is None and not (tmp_path / "cut" / "scores.json").exists()
    run, after = toy(tmp_path / "cut")
    assert before + after == every and run.scores() == whole.scores()
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_more_seeds_and_a_finished_run(tmp_path):
    one, _ = toy(tmp_path, 1)
    rows = one.scores()
    before = content(tmp_path)
    assert toy(tmp_path, 1)[1] == [] and content(tmp_path) == before, "a finished run is left as it is"
    two, now = toy(tmp_path, 2)
    assert now == [(1, "dice"), (1, "sure")] and two.scores()[: len(rows)] == rows
    with pytest.raises(UsageError, match="n: 50 there, 60 here"):
        toy(tmp_path, 2, n=60)


def test_rows_and_report_of_a_run(tmp_path):
    run, _ = toy(tmp_path, 2, test_prior="[1, 1, 2]")
    rows = run.scores()
    assert [(r["method"], r["first"]) for r in rows][:3] == [
        (m, True) for m in ("cross-entropy", "label shift", "sure")
    ]
    assert (
        not rows[3]["first"] and rows[2]["scale"] == run.config.n / 3 and set(rows[0]["se"]) == {"label shift", "sure"}
    )
    aim = class_prior("[1, 1, 2]", ("a", "b", "c"), COUNTS)
    assert rows[0]["expected"] == pytest.approx(float((np.array(rows[0]["per_class"], float) * aim).sum()))
    said, page = Toy().summary(run), (tmp_path / "report.html").read_text()
    assert "label shift" in said and f"run directory: {tmp_path}" in said
    assert "Dice on toy" in page and "2 seeds; 3 classes, 165 training images" in page


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    cfg = ToyConfig(test_prior="[1, 2]", out=str(tmp_path / "run"))
    for act in (Toy().check_inputs, Toy().run):
        with pytest.raises(LtnbError, match="2 numbers for 3 classes"):
            act(cfg)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(NotImplementedError, match="Bare has no method `seed`"):
        type("Bare", (Recipe,), {})().seed(None)


# settings that are left open
def test_open_settings_are_filled_from_the_top(tmp_path):
    "Each from one line; a rule sees what the ones above it came to, and what is given stays"
    data = toy_data()
    assert ToyConfig().sure is None and ToyConfig().twice is None
    cfg = Toy().resolve(ToyConfig(), data)
    assert (cfg.sure, cfg.twice, cfg.side) == (50 / 3, 100 / 3, "right")
    cfg = Toy().resolve(ToyConfig(sure=4, dataset="digits"), data)
    assert (cfg.sure, cfg.twice, cfg.side) == (4.0, 8.0, "left")
    assert Toy().resolve(cfg, data) == cfg
    run, _ = toy(tmp_path, 1)
    saved = read_json(tmp_path / "config.json")
    assert saved["sure"] == 50 / 3 and saved["twice"] == 100 / 3 and saved["given"]["sure"] is None
    with pytest.raises(UsageError, match="sure must be at least 0"):
        ToyConfig(sure=-1.0)
    with pytest.raises(UsageError, match="is not a choice"):
        ToyConfig(side="up")


def test_open_settings_say_their_rule():
    "In the help text: the comment, joined where it takes two lines, and the default in words"
    says = help_of(ToyConfig)
    assert says["sure"] == (
        "how sure a method is of what it knows, where nothing else is said (default: a third of the images)"
    )
    assert says["side"] == "where they fall (default: left for digits, else right)"
    assert says["n"] == "test images" and says["twice"] == "of another one (default: twice that)"
    parser = Parser()
    add_settings(parser, ToyConfig)
    text = " ".join(parser.format_help().split())
    assert "(default: a third of the images)" in text and "test images (default: 50)" in text


def test_the_usual_recipe_reads_sets_of_images():
    data = Recipe().load(DataConfig(), 0)
    assert data.name and Recipe().resolve(DataConfig(), data) == DataConfig(imb_ratio=100.0) and Recipe.shared
