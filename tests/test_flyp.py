"Fine-tuning CLIP: the given model stays, a killed training goes on, an order is followed, mixed weights have two ends."

from dataclasses import replace

import numpy as np
import pytest
import torch
from ltnb.baseline import BaselineConfig
from ltnb.clip import Clip, class_embeddings, text_embeddings
from ltnb.clip_training import ClipTraining, clip_config, new_clip
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.curriculum import Adaptive, Composition, CurriculumOrder, Pool, hold_out_sources
from ltnb.data import ImageSet, LongTail
from ltnb.files import ImageFiles
from ltnb.flyp import (
    FineTuning,
    class_captions,
    class_probabilities,
    copied_clip,
    ensembling_sweep,
    fine_tune_clip,
    mixed_clips,
    template_texts,
    watch_clip,
    zero_shot_scores,
)
from ltnb.knowledge import knowledge_of
from ltnb.metrics import macro_f1
from ltnb.prompts import class_texts
from ltnb.runs import Run
from sklearn.metrics import f1_score

HOW = FineTuning(n_epochs=2, bs=8, lr=1e-3, warmup=2, nudge=0.5)


@pytest.fixture(scope="module")
def data():
    data = LongTail.digits()
    rows = np.concatenate([np.flatnonzero(data.train.labels == k)[:4] for k in range(10)])
    return replace(data, train=data.train.take(rows), test=data.test.take(range(0, 600, 20)))


@pytest.fixture(scope="module")
def texts(data):
    return [class_texts(k) for k in knowledge_of("digits", data.class_names)]


@pytest.fixture(scope="module")
def start():
    return new_clip(clip_config(8, ClipTraining(layers=1, width=32, embed_dim=16)), 0.3, 0.4, "tiny")


@pytest.fixture(scope="module")
def given(data, texts):
    return data.train.images, data.train.labels, class_captions(data.train.labels, texts)


@pytest.fixture(scope="module")
def tuned(start, given):
    return fine_tune_clip(start, *given, HOW)


def weights(clip):
    return {k: v.clone() for k, v in clip.model.state_dict().items()}


# the training
def test_a_warm_start_leaves_the_model_alone_and_moves_both_networks(start, given, tuned):
    before = weights(start)
    again = fine_tune_clip(start, *given, HOW, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in weights(start).items())
    assert again.fingerprint == tuned.fingerprint != start.fingerprint and not again.model.training
    moved = {k for k, v in weights(tuned).items() if not torch.equal(v, before[k])}
    assert {"text_projection", "logit_scale", "visual.proj"} <= moved
    assert fine_tune_clip(start, *given, HOW, seed=1).fingerprint != tuned.fingerprint


def test_it_learns_what_the_captions_say(start):
    y = np.arange(24) % 3
    images = (np.random.default_rng(0).integers(0, 40, (24, 1, 8, 8)) + 100 * y[:, None, None, None]).astype(np.uint8)
    texts = [["a dark thing"], ["a grey thing"], ["a bright thing"]]
    clip = fine_tune_clip(start, images, y, class_captions(y, texts), n_epochs=12, bs=6, lr=3e-3, warmup=2)
    tests = {"train": ImageSet(images, y, ("dark", "grey", "bright"))}
    after = zero_shot_scores(clip, texts, tests)["train"]["accuracy"]
    assert after > 0.8 > zero_shot_scores(start, texts, tests)["train"]["accuracy"]  # chance is 0.33


def test_killed_it_goes_on_to_the_same_weights(start, given, tmp_path, monkeypatch):
    import ltnb.clip_training as room
    from ltnb.flyp import _TuningRun

    monkeypatch.setattr(room, "LOOK_EVERY", 3)  # a checkpoint every three steps, in the middle of an epoch too
    asked = []

    def order(epoch, g):
        asked.append(epoch)
        return torch.randperm(len(given[1]), generator=g)[: 20 + 10 * epoch]

    how = dict(order=order, save_every=0.0, n_epochs=3)
    with Run(BaselineConfig(out=str(tmp_path / "whole"))) as run:
        whole = fine_tune_clip(start, *given, HOW, run=run, **how)
        rows = (run.path / "metrics.jsonl").read_text()
    assert asked == [0, 1, 2]
    step = _TuningRun.step

    def cut(self, at):
        if at == 5:  # in epoch 2, whose positions are kept
            raise KeyboardInterrupt
        return step(self, at)

    with Run(BaselineConfig(out=str(tmp_path / "cut"))) as run:
        monkeypatch.setattr(_TuningRun, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            fine_tune_clip(start, *given, HOW, run=run, **how)
        monkeypatch.setattr(_TuningRun, "step", step)
        asked.clear()
        again = fine_tune_clip(start, *given, HOW, run=run, **how)
        assert (run.path / "metrics.jsonl").read_text() == rows and '"stage": "tuned"' in rows
        done = fine_tune_clip(start, *given, HOW, run=run, **how)  # finished: nothing is trained
    assert again.fingerprint == whole.fingerprint == done.fingerprint
    assert 2 in asked and 0 not in asked


def test_an_order_is_followed(data, start, given, monkeypatch):
    from ltnb.flyp import _TuningRun

    shown, over = [], []
    told = _TuningRun.told
    monkeypatch.setattr(_TuningRun, "told", lambda self, at, g: shown.append(at.tolist()) or told(self, at, g))
    wanted = [[3, 1, 4, 1, 5, 9], list(range(17))]
    fine_tune_clip(start, *given, HOW, order=lambda epoch, g: wanted[epoch], after_epoch=over.append)
    assert [shown[0], sum(shown[1:], [])] == wanted and over == [0, 1]
    assert [len(x) for x in shown] == [6, 8, 9]  # a last batch of one is joined to the one before
    shown.clear()
    fine_tune_clip(start, *given, HOW, n_epochs=1)
    assert sorted(sum(shown, [])) == list(range(len(given[1])))
    for bad in ([0], [0, 99], "all"):
        with pytest.raises(UsageError, match="order"):
            fine_tune_clip(start, *given, HOW, order=lambda epoch, g, bad=bad: bad)


def test_a_curriculum_asks_the_model_that_is_trained(data, start, given, texts, tmp_path):
    n = len(given[1])
    hard = given[1] < 2
    made = np.flatnonzero(hard)
    images, labels = np.concatenate([given[0], given[0][made]]), np.concatenate([given[1], given[1][made]])
    ids = np.array([*data.train.ids, *np.array(data.train.ids)[made]], dtype=object)
    levels, is_hard = np.r_[np.full(n, 100), np.full(len(made), 50)], np.r_[hard, np.zeros(len(made), bool)]
    pool, held = hold_out_sources(Pool(labels, ids, levels, is_hard), (50, 100), 2)
    own = copied_clip(start)
    with Run(BaselineConfig(out=str(tmp_path / "run"))) as run:
        watch = watch_clip(own, images, labels, texts, held)
        order = CurriculumOrder(pool, Adaptive((50, 100), 2), Composition(1.0, "all made"), watch)
        new = fine_tune_clip(start, images, labels, class_captions(labels, texts), HOW, order=order, into=own, run=run)
    first, second = watch.kept
    assert new is own and first.shape == (2, 2) and not np.array_equal(first, second)  # the weights had moved
    p = class_probabilities(start, images, text_embeddings(start, texts))
    assert np.allclose(first[0], p[held[50], labels[held[50]]], atol=1e-6)
    with pytest.raises(UsageError, match="copied_clip"):
        fine_tune_clip(start, *given, HOW, into=start)


def test_photographs_on_disk_are_fine_tuned_on_too(data, start, texts, tmp_path):
    from PIL import Image

    rows = range(0, 33, 3)
    for i in rows:
        Image.fromarray(data.train.images[i, 0]).save(tmp_path / f"{i}.png")
    files = ImageFiles(str(tmp_path), [f"{i}.png" for i in rows], 8)
    y = data.train.labels[::3]
    caps = class_captions(y, texts)
    a, b = (fine_tune_clip(start, x, y, caps, HOW, n_epochs=1, workers=0) for x in (files, np.asarray(files)))
    assert a.fingerprint == b.fingerprint


# the head and the scores
def test_class_probabilities_are_a_softmax_of_scaled_cosines(data, start, texts):
    known = knowledge_of("digits", data.class_names)
    head = text_embeddings(start, texts)
    assert torch.equal(head, class_embeddings(start, known))
    p = class_probabilities(start, data.test, head)
    z = start.scale * start.images(data.test).double().numpy() @ head.double().numpy().T
    e = np.exp(z - z.max(1, keepdims=True))
    assert p.shape == (len(data.test), 10) and np.allclose(p, e / e.sum(1, keepdims=True), atol=1e-5)


def test_macro_f1_is_that_of_wilds():
    rng = np.random.default_rng(0)
    for absent in (None, 2):
        y, said = rng.integers(0, 5, (2, 200))
        y[y == absent] = 0
        assert np.isclose(macro_f1(y, said), f1_score(y, said, average="macro", labels=np.unique(y)))
    # two classes of two images; a wrong answer names a class that has none: F1 of 2/3 and 1, and class 2 is left out
    assert np.isclose(macro_f1([0, 0, 1, 1], [0, 2, 1, 1]), 5 / 6)
    assert macro_f1([0, 1], [1, 0]) == 0 and macro_f1([3, 4], [3, 4]) == 1


# weights in between
def test_the_ends_are_the_models_themselves(data, start, tuned, texts):
    assert mixed_clips(start, tuned, 0).fingerprint == start.fingerprint
    assert mixed_clips(start, tuned, 1).fingerprint == tuned.fingerprint
    half, a, b = weights(mixed_clips(start, tuned, 0.25)), weights(start), weights(tuned)
    assert all(torch.allclose(v, 0.75 * a[k] + 0.25 * b[k], atol=1e-6) for k, v in half.items())
    tests = {"test": data.test, "train": data.train}
    rows = ensembling_sweep(start, tuned, (0, 0.5, 1), texts, tests)
    assert [r["alpha"] for r in rows] == [0.0, 0.5, 1.0]
    for row, clip in zip(rows[::2], (start, tuned), strict=True):
        assert {k: row[k] for k in tests} == zero_shot_scores(clip, texts, tests)
    other = new_clip(clip_config(8, ClipTraining(layers=2, width=32, embed_dim=16)), 0.3, 0.4, "other")
    with pytest.raises(DataError, match="can be mixed"):
        mixed_clips(start, other, 0.5)
    for bad in (-0.1, 1.01):
        with pytest.raises(UsageError, match="alpha must be between 0 and 1"):
            mixed_clips(start, tuned, bad)
        with pytest.raises(UsageError, match="alpha must be between 0 and 1"):
            ensembling_sweep(start, tuned, (0, bad), texts, tests)


def test_what_is_forgotten_is_encoded_again(start):
    clip = copied_clip(start)
    was, name = clip.texts(["a three"]), clip.fingerprint
    with torch.no_grad():
        clip.model.text_projection.add_(1)
    assert torch.equal(clip.texts(["a three"]), was)  # known
    clip.forget()
    assert not torch.equal(clip.texts(["a three"]), was) and clip.fingerprint != name
    assert isinstance(clip, Clip) and start.fingerprint == name


# bad input
def test_what_cannot_be_fine_tuned(data, start, given, texts):
    images, labels, captions = given
    n = len(images)
    for change, said in [
        (dict(labels=labels[:3]), "need as many labels"),
        (dict(labels=labels - 1), "class numbers from 0"),
        (dict(labels=labels + 0.5), "class numbers from 0"),
        (dict(images=images.astype(float)), "uint8"),
        (dict(images=images[:1], labels=labels[:1], captions=captions[:1]), "at least 2 images"),
        (dict(captions=captions[:3]), "lists of captions"),
        (dict(captions=["a digit"] * n), "a list of texts for each image"),
        (dict(captions=[[]] * n), "at least one text"),
        (dict(captions=[["a digit", " "]] * n), "one is empty"),
        (dict(n_epochs=0), "n_epochs must be at least 1"),
        (dict(bs=1), "bs at least 2"),
        (dict(lr=0.0), "lr above 0"),
    ]:
        with pytest.raises(LtnbError, match=said):
            fine_tune_clip(start, **(dict(images=images, labels=labels, captions=captions) | change))
    with pytest.raises(DataError, match="the label 9 has no class"):
        class_captions(labels, texts[:9])
    with pytest.raises(DataError, match="the label 9 has no class"):
        watch_clip(start, images, labels, texts[:9], {100: np.arange(2)})
    high = ImageSet(images, labels, data.class_names)
    with pytest.raises(DataError, match="has no class"):
        zero_shot_scores(start, texts[:9], {"test": high})
    with pytest.raises(UsageError, match="in the place of the class"):
        template_texts(["owl"], ["a photo"])
    assert template_texts(["owl"]) == [["a photo of owl.", "owl in the wild."]]
