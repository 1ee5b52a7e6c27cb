"ChatDiff from end to end, on models trained on the spot"

import numpy as np
import pytest
from ltnb import chatdiff
from ltnb.chatdiff import ChatDiff, ChatDiffConfig
from ltnb.clip import Clip, class_embeddings
from ltnb.core import LtnbError, UsageError, read_json, read_jsonl
from ltnb.data import LongTail
from ltnb.knowledge import Knowledge, knowledge_of, shipped, write_knowledge
from ltnb.progress import Progress
from ltnb.synthetic import Synthetic
from tiny_pipelines import saved, stable_diffusion

FEW = dict(imb_ratio=10.0, n_max=30)
TINY = dict(**FEW, n_steps=3, diff_bs=8, sample_steps=2, target_per_class=5, cap=2.0, n_epochs=1)
TINY |= dict(clip_steps=4, judge_epochs=1, device="cpu", precision="fp32")
ROWS = ["cross-entropy", "label shift", "equal iterations", "balanced softmax", "real repeated", "noise images"]
ROWS += ["generation", "name only", "shuffled knowledge", "knowledge", "random filter", "chatdiff"]
ROWS += ["chatdiff + label shift"]


pytestmark = pytest.mark.usefixtures("tiny_clip")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


def go(folder, **more):
    return ChatDiff().run(ChatDiffConfig(**{**TINY, **more}, out=str(folder)))


def files(folder):
    "What two equal runs share"
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("environment.json", "timing.jsonl"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_clip):
    before, Progress.quiet = Progress.quiet, True
    try:
        return go(tmp_path_factory.mktemp("chatdiff") / "run").path
    finally:
        Progress.quiet = before


def manifest(path, what):
    return read_jsonl(path / "made" / f"{what}-seed-0" / "manifest.jsonl")


def test_every_control_has_its_row(whole):
    rows = read_json(whole / "scores.json")
    assert [r["method"] for r in rows] == ROWS
    assert set(next(r for r in rows if r["method"] == "chatdiff")["se"]) >= set(chatdiff.ChatDiff.compared)


def test_the_words_differ_and_nothing_else(whole):
    known = shipped("digits")
    own, name, other = (manifest(whole, w) for w in ("knowledge", "name-only", "shuffled-knowledge"))
    assert {r["model"] for r in own} == {r["model"] for r in name} == {r["model"] for r in other}
    names = LongTail.digits(**FEW).class_names
    for rows, mine in ((own, True), (name, False), (other, False)):
        for r in rows:
            k = known[names[r["class"]]]
            assert k.called in r["prompt"]
            assert any(f in r["prompt"] for f in k.features) == mine
    assert not any(f in r["prompt"] for r in name for k in known.values() for f in k.features)
    assert all(any(f in r["prompt"] for k in known.values() for f in k.features) for r in other)


def test_the_lot_keeps_as_many_of_as_many(whole):
    rows = {r["method"]: r for r in read_json(whole / "scores.json")}
    assert rows["random filter"]["kept"] == rows["chatdiff"]["kept"]
    assert rows["random filter"]["drawn"] == rows["chatdiff"]["drawn"] >= rows["chatdiff"]["kept"]
    wanted = int(np.maximum(5 - LongTail.digits(**FEW).counts, 0).sum())
    assert rows["knowledge"]["kept"] == rows["name only"]["kept"] == rows["generation"]["kept"] == wanted
    classes = read_json(whole / "classes-seed-0.json")
    assert sum(c["kept"] or 0 for c in classes) == rows["chatdiff"]["kept"]
    assert all(c["kept"] <= c["wanted"] <= c["drawn"] or c["capped"] for c in classes if c["wanted"])


def test_kept_is_what_the_rule_says(whole):
    made = Synthetic.open(whole / "made" / "knowledge-seed-0")
    clip = Clip.load(whole / "clip")
    known = knowledge_of("digits", LongTail.digits(**FEW).class_names)
    z = clip.images(made.items[:])
    own = (z * class_embeddings(clip, known)[made.labels]).sum(1).numpy()
    said = [r["scores"]["clip"] for r in made.manifest]
    assert np.abs(own - said).max() < 1e-3
    rules = {r["rule"]: r for r in read_json(whole / "rules-seed-0.json")}
    assert set(rules) == set(chatdiff.RULES) and rules["cosine"]["kept"] >= rules["prob"]["kept"]


def test_it_says_that_it_is_a_reconstruction(whole):
    page = (whole / "report.html").read_text()
    assert "reconstruction" in page and "abstract" in page and "published" not in page.lower()
    text = ChatDiff().summary(chatdiff.Run(ChatDiffConfig(**TINY, out=str(whole))))
    assert "chatdiff against random filter" in text


def test_what_is_left(whole):
    there = {p.name for p in whole.iterdir()}
    assert {"clip", "generator", "model", "made", "knowledge.json", "figures", "report.html"} <= there
    assert "checkpoints" not in there
    assert str(whole) not in (whole / "scores.json").read_text() + (whole / "metrics.jsonl").read_text()


class Stop(Exception):
    "A stand-in for a power cut"


def test_killed_twice_it_gives_the_same_files(whole, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", {"n": 0}
    real_train, real_draw = chatdiff.train_text_diffusion, chatdiff.draw_until

    def in_the_middle(*a, **k):
        raise Stop

    def at_the_third(*a, **k):
        calls["n"] += 1
        if calls["n"] == 3:
            raise Stop
        return real_draw(*a, **k)

    for name, stand_in in (("train_text_diffusion", in_the_middle), ("draw_until", at_the_third)):
        monkeypatch.setattr(chatdiff, name, stand_in)
        with pytest.raises(Stop):
            go(out)
        monkeypatch.setattr(chatdiff, "train_text_diffusion", real_train)
        monkeypatch.setattr(chatdiff, "draw_until", real_draw)
    go(out)
    mine, theirs = files(out), files(whole)
    del mine["config.json"], theirs["config.json"]  # they name their folders
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if mine[k] != theirs[k] and not k.endswith(".html")] == []


def test_other_knowledge_is_refused_when_a_run_goes_on(whole, tmp_path, monkeypatch):
    path, out = tmp_path / "k.json", tmp_path / "run"
    known = shipped("digits")
    write_knowledge(path, known)
    monkeypatch.setattr(chatdiff, "discriminator", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(out, knowledge=str(path))
    more = {n: k.model_copy(update={"features": [*k.features[:-1], "a small tail"]}) for n, k in known.items()}
    write_knowledge(path, more)
    with pytest.raises(UsageError, match="other things"):
        go(out, knowledge=str(path))


def test_classes_of_which_nothing_passes_are_reported(tmp_path):
    out = tmp_path / "run"
    rows = {r["method"]: r for r in go(out, rule="cosine", rule_cosine=1.0, cap=1.0, judge_epochs=0).scores()}
    assert rows["chatdiff"]["kept"] == rows["random filter"]["kept"] == 0 < rows["knowledge"]["kept"]
    assert all(c["capped"] for c in read_json(out / "classes-seed-0.json") if c["wanted"])
    assert "short" in (out / "report.html").read_text()


def test_a_pipeline_draws_for_small_images(tmp_path):
    saved(tmp_path / "sd", stable_diffusion())
    few = dict(hypernym="ink", features=["dots", "arcs"], scenes=["in red"], views=["near"])  # it spells its words
    write_knowledge(tmp_path / "k.json", {str(i): Knowledge(name=str(i), **few) for i in range(10)})
    where = dict(pipeline=str(tmp_path / "sd"), knowledge=str(tmp_path / "k.json"))
    run = go(tmp_path / "run", **where, target_per_class=5, cap=1.0, judge_epochs=0)
    assert [r["method"] for r in run.scores()] == [m for m in ROWS if m != "generation"]
    made = Synthetic.open(tmp_path / "run" / "made" / "knowledge-seed-0")
    assert tuple(made.items[:].shape[1:]) == (1, 8, 8) and "clip" in made.manifest[0]["scores"]


def test_a_name_that_no_prompt_can_hold_is_refused_before_anything_is_made(tmp_path):
    known = {n: k.model_copy(update={"called": "digit " * 90}) if n == "4" else k for n, k in shipped("digits").items()}
    write_knowledge(tmp_path / "k.json", known)
    with pytest.raises(UsageError, match="'4'.*77|77.*'4'"):
        ChatDiff().check_inputs(ChatDiffConfig(**TINY, knowledge=str(tmp_path / "k.json")))


@pytest.mark.parametrize(
    "given, word",
    [
        (dict(target_per_class=1), "nothing to draw"),
        (dict(sampler="own"), "pipeline"),
        (dict(syn_weight=0.0), "baseline"),
        (dict(pipeline="no/where"), "no/where"),
        (dict(clip="ViT-B-33:openai"), "ViT-B-33"),
        (dict(clip="hf-hub:nobody/nothing"), "download"),
        (dict(knowledge="no-such-file.json"), "no-such-file.json"),
        (dict(knowledge="cifar10"), "other classes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, given, word):
    out = tmp_path / "run"
    with pytest.raises((LtnbError, OSError), match=word):
        ChatDiff().check_inputs(ChatDiffConfig(**{**TINY, **given}, out=str(out)))
    assert not out.exists()


def test_the_name_of_a_shipped_set_is_no_path(tmp_path):
    assert "knowledge" not in ChatDiffConfig(knowledge="cifar10").path_names()
    assert "knowledge" in ChatDiffConfig(knowledge="k.json").path_names()
