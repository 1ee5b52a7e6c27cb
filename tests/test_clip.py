"CLIP: a model asked and saved, the QuickGELU trap, offline errors, a small one trained, and the keep rules."

import json
import shutil
import time
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings, strategies as st
from ltnb.clip import (
    Clip,
    class_embeddings,
    encode_set,
    resized,
    offline,
    open_clip_model,
    prepared,
    quick_gelu_of,
    texts_of,
    zero_shot_accuracy,
)
from ltnb.clip_training import ClipTraining, clip_config, draw_groups, encode_tokens, group_loss, new_clip, train_clip
from ltnb.core import DataError, LtnbError, UsageError, generator
from ltnb.data import ImageSet, LongTail
from ltnb.discriminator import (
    RULES,
    Thresholds,
    acceptance,
    acceptance_table,
    acceptance_warnings,
    calibrated_thresholds,
    clip_column,
    clip_score,
    compare_rules,
    confusable,
    keep_rule,
    kept_by,
    measure_thresholds,
    ranking,
    score_id,
    sweep,
)
from ltnb.baseline import BaselineConfig
from ltnb.draw import draw_until, score_items
from ltnb.heads import Features
from ltnb.jobs import make_plan
from ltnb.knowledge import Knowledge, knowledge_of
from ltnb.prompts import captions, class_texts
from ltnb.runs import Run
from ltnb.synthetic import make_synthetic
from ltnb.team import Where
from PIL import Image

SMALL = ClipTraining(layers=1, width=32, embed_dim=16)


@pytest.fixture(scope="module")
def data():
    return LongTail.digits()


@pytest.fixture(scope="module")
def known(data):
    return knowledge_of("digits", data.class_names)


@pytest.fixture(scope="module")
def clip():
    "A tiny model with random weights, of images of 16 pixels"
    return new_clip(clip_config(16, SMALL), 0.3, 0.4, "tiny")


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    clip.save(tmp_path_factory.mktemp("clip") / "model")
    return tmp_path_factory.getbasetemp() / "clip0" / "model"


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (6, 3, 40, 31), dtype=np.uint8)


# a model
def test_saved_it_is_the_same_model_for_us_and_for_open_clip(clip, folder, photos):
    again = Clip.load(folder)
    assert again.id == clip.id and again.config == clip.config and again.scale == clip.scale
    assert torch.equal(again.images(photos), clip.images(photos))
    for name in (str(folder), f"local-dir:{folder}"):
        assert open_clip_model(name).id == clip.id
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    text = ["a photo of a handwritten digit three", "a three"]
    with torch.no_grad():
        x = torch.stack([transform(Image.fromarray(x.transpose(1, 2, 0))) for x in photos])
        z = model.eval().encode_image(x, normalize=True)
        t = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(text), normalize=True)
    assert (z - clip.images(photos)).abs().max() < 2e-2 and (t - clip.texts(text)).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("shape", [(40, 31), (8, 8), (16, 50)])
def test_images_are_resized_as_open_clip_does_it(mode, size, shape):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (2, 3, 5, 5), dtype=np.uint8)
    images = resized(torch.from_numpy(coarse), shape, "squash")
    cfg = PreprocessCfg(size=size, resize_mode=mode, fill_color=7)
    one = image_transform_v2(cfg, is_train=False)
    theirs = torch.stack([one(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
    ours = prepared(images, vars(cfg))
    assert ours.shape == theirs.shape and (ours - theirs).abs().mean() < 0.03


def test_a_batch_is_its_images_one_by_one(clip, photos):
    whole = clip.images(photos)
    single = torch.cat([clip.images(photos[i : i + 1]) for i in range(len(photos))])
    assert (whole - single).abs().max() < 1e-5 and torch.allclose(whole.norm(dim=1), torch.ones(len(photos)))
    assert (clip.images(photos, bs=4) - whole).abs().max() < 1e-5
    bf16 = clip.images(photos, Where(precision="bf16"))
    assert bf16.dtype == torch.float32 and (bf16 - whole).abs().max() < 0.05


def test_grey_images_are_three_equal_channels(clip, data):
    grey = data.test.images[:5]
    assert torch.allclose(clip.images(grey), clip.images(grey.repeat(3, 1)), atol=1e-5)
    assert torch.equal(clip.images(data.test.take(np.arange(5))), clip.images(torch.from_numpy(grey)))
    assert clip.images(grey[:0]).shape == (0, 16)
    for wrong in (grey.astype(np.float32), grey[:, 0], np.zeros((2, 2, 8, 8), np.uint8)):
        with pytest.raises(DataError, match="uint8 images of shape"):
            clip.images(wrong)


def test_a_text_is_encoded_once(folder, monkeypatch):
    clip, asked = Clip.load(folder), []
    tokenizer = clip.tokenizer
    clip.tokenizer = lambda texts: asked.extend(texts) or tokenizer(texts)
    a = clip.texts(["a cat", "a dog", "a cat"])
    b = clip.texts(["a dog", "a bird"])
    assert asked == ["a cat", "a dog", "a bird"] and torch.equal(a[1], b[0]) and torch.equal(a[0], a[2])
    assert clip.texts([]).shape == (0, 16)


def test_class_vectors_are_means_of_their_texts(clip, known):
    z, texts = class_embeddings(clip, known), class_texts(known[3])
    mean = clip.texts(texts).mean(0)
    assert torch.allclose(z[3], mean / mean.norm(), atol=1e-6) and z.shape == (10, 16)


# folders that are none
def altered(folder, path, change):
    shutil.copytree(folder, path)
    cfg = json.loads((path / "open_clip_config.json").read_text())
    change(cfg)
    (path / "open_clip_config.json").write_text(json.dumps(cfg))
    return path


def test_wrong_folders_are_data_errors(folder, tmp_path):
    def wider(cfg):
        cfg["model_cfg"]["vision_cfg"]["width"] = 64

    def finer(cfg):
        cfg["model_cfg"]["vision_cfg"]["image_size"] = 32

    def nothing(cfg):
        cfg.clear()

    with pytest.raises(DataError, match="size mismatch"):
        Clip.load(altered(folder, tmp_path / "a", wider))
    with pytest.raises(DataError, match="damaged"):  # open_clip alone would stretch the positions, and say nothing
        Clip.load(altered(folder, tmp_path / "b", finer))
    with pytest.raises(DataError, match="describes no CLIP model"):
        Clip.load(altered(folder, tmp_path / "c", nothing))
    shutil.copytree(folder, tmp_path / "d")
    (tmp_path / "d" / "open_clip_model.safetensors").unlink()
    with pytest.raises(DataError, match="no CLIP model that open_clip can open"):
        Clip.load(tmp_path / "d")
    with pytest.raises(DataError, match="no open_clip_config.json"):
        open_clip_model(f"local-dir:{tmp_path}")


# QuickGELU
@pytest.fixture(scope="module")
def files(clip, tmp_path_factory):
    "The same weights as a plain file, as OpenAI's files have them, and an architecture that open_clip knows by name"
    path = tmp_path_factory.mktemp("weights")
    state = clip.model.state_dict()
    torch.save(state, path / "plain.pt")
    sizes = {k: torch.tensor(v) for k, v in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408))}
    torch.save(state | sizes, path / "theirs.pt")
    (path / "ltnb-tiny.json").write_text(json.dumps(clip.config["model_cfg"]))
    open_clip.add_model_config(path / "ltnb-tiny.json")
    return path


def test_the_activation_is_chosen_where_it_can_be_told(files, photos, capsys):
    plain, theirs = (open_clip_model(f"ltnb-tiny:{files / n}.pt") for n in ("plain", "theirs"))
    assert "was trained with QuickGELU, which is used" in capsys.readouterr().err
    asked = open_clip_model(f"ltnb-tiny-quickgelu:{files / 'plain.pt'}")
    assert theirs.config["model_cfg"]["quick_gelu"] and "quick_gelu" not in plain.config["model_cfg"]
    assert torch.equal(asked.images(photos), theirs.images(photos))
    assert (plain.images(photos) - theirs.images(photos)).abs().max() > 1e-4
    assert len({plain.fingerprint, theirs.fingerprint}) == 2 and asked.fingerprint == theirs.fingerprint
    assert quick_gelu_of("ViT-B-32", "openai") and quick_gelu_of("ViT-B-32", "laion2b_s34b_b79k") is False
    assert quick_gelu_of("ViT-B-32", str(files / "plain.pt")) is None


def test_saved_the_activation_stays(files, photos, tmp_path):
    theirs = open_clip_model(f"ltnb-tiny:{files / 'theirs.pt'}")
    theirs.save(tmp_path / "m")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'm'}")
    assert torch.equal(Clip(model, None, theirs.config).images(photos), theirs.images(photos))


def test_a_name_that_sounds_like_quickgelu_is_warned_of(files, folder, tmp_path, capsys):
    shutil.copy(files / "plain.pt", tmp_path / "vit_openai.pt")
    open_clip_model(f"ltnb-tiny:{tmp_path / 'vit_openai.pt'}")
    assert "warning: vit_openai.pt sounds like" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "clip-openai")
    (tmp_path / "clip-openai" / "ltnb.json").unlink()
    Clip.load(tmp_path / "clip-openai")
    assert "warning: clip-openai sounds like" in capsys.readouterr().err


def test_weights_of_another_architecture(files, clip, tmp_path):
    other = new_clip(clip_config(16, ClipTraining(layers=2, width=32, embed_dim=16)), 0.5, 0.5, "other")
    torch.save(other.model.state_dict() | {"vocab_size": torch.tensor(1)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="another architecture"):
        open_clip_model(f"ltnb-tiny:{tmp_path / 'w.pt'}")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="no CLIP model"):
        open_clip_model(f"ltnb-tiny:{tmp_path / 'torn.pt'}")


# names
@pytest.mark.parametrize(
    "name", ["ViT-B-32:laion2b_s34b_b79k", "ViT-B-32:openai", "hf-hub:nobody/has-this", "RN50:yfcc15m"]
)
def test_offline_it_is_one_sentence_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("reached for the network"))
    start = time.monotonic()
    with pytest.raises(UsageError, match="not on this machine: add --download"):
        open_clip_model(name)
    assert time.monotonic() - start < 5


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(LtnbError, match="cannot be reached"):
        open_clip_model("ViT-B-32:openai", download=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        open_clip_model("hf-hub:nobody/has-this", download=True)
    assert time.monotonic() - start < 10


def test_offline_ends_with_its_block():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), offline():
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert constants.HF_HUB_OFFLINE == before


@pytest.mark.parametrize(
    "name, said",
    [
        ("ViT-B-32", "names no weights"),
        ("VitB32:openai", "Did you mean 'ViT-B-32'"),
        ("ViT-B-32:laion2b", "Did you mean 'laion2b"),
        ("local-dir:/nowhere", "/nowhere is no folder of a CLIP model"),
    ],
)
def test_wrong_names(name, said):
    with pytest.raises(LtnbError, match=said):
        open_clip_model(name)


# training
def few(data, n=3):
    "Some images of four classes"
    at = np.concatenate([np.flatnonzero(data.train.labels == c)[: n + c] for c in (2, 8, 4, 9)])
    return data.train.images[at], data.train.labels[at]


def test_groups_hold_a_class_once():
    y = torch.tensor([0] * 9 + [2] * 3 + [3])
    at = draw_groups(y, 200, 3, 0.0, generator("groups"))
    assert at.shape == (200, 3) and (y[at].sort(1).values == torch.tensor([0, 2, 3])).all()
    assert set(at.flatten().tolist()) == set(range(13))
    balanced, natural = (torch.bincount(y[draw_groups(y, 2000, 2, p, generator("p"))].flatten()) for p in (0.0, 1.0))
    assert 1200 < balanced[0] < 1470 and natural[0] > natural[2] > natural[3] > 0 and natural[1] == 0


def test_the_loss_is_open_clips(clip):
    from open_clip.loss import ClipLoss

    g = generator("loss")
    z, t = (torch.nn.functional.normalize(torch.randn(3, 5, 8, generator=g), dim=-1) for _ in range(2))
    parts = [ClipLoss()(a, b, torch.tensor(9.0)) for a, b in zip(z, t, strict=True)]
    assert torch.isclose(group_loss(z, t, torch.tensor(9.0)), torch.stack(parts).mean())
    tokens = clip.tokenizer(["a three", "a photo of a handwritten digit three, on paper, seen straight on"])
    with torch.no_grad():
        assert torch.allclose(encode_tokens(clip.model, tokens), clip.model.encode_text(tokens), atol=1e-5)


@pytest.fixture(scope="module")
def trained(data, known):
    "A small CLIP of Digits-LT"
    own = [class_texts(known[c]) for c in data.train.labels]
    return train_clip(data.train.images, data.train.labels, own, n_steps=50, bs=40, lr=3e-3, nudge=0.0)


def test_it_learns_the_classes(trained, data, known):
    z, y = trained.images(data.test) @ class_embeddings(trained, known).T, data.test.labels
    assert zero_shot_accuracy(z, y) > 0.25  # chance is 0.1
    assert trained.name == "ltnb" and not trained.model.training and trained.scale > 1


def test_killed_it_goes_on_to_the_same_weights(data, known, tmp_path, monkeypatch):
    import ltnb.clip_training as room

    monkeypatch.setattr(room, "LOOK_EVERY", 3)  # a checkpoint every three steps
    images, labels = few(data)
    how = dict(layers=1, width=32, embed_dim=16, n_steps=7, bs=8, save_every=0.0)
    told = partial(captions, known, labels)
    with Run(BaselineConfig(out=str(tmp_path / "whole"))) as run:
        whole = train_clip(images, labels, told, run=run, **how)
        rows = (run.path / "metrics.jsonl").read_text()
    step = room._ClipRun.step

    def cut(self, at):
        if at == 5:
            raise KeyboardInterrupt
        return step(self, at)

    with Run(BaselineConfig(out=str(tmp_path / "cut"))) as run:
        monkeypatch.setattr(room._ClipRun, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train_clip(images, labels, told, run=run, **how)
        monkeypatch.setattr(room._ClipRun, "step", step)
        again = train_clip(images, labels, told, run=run, **how)
        assert (run.path / "metrics.jsonl").read_text() == rows and '"stage": "clip"' in rows
    assert again.fingerprint == whole.fingerprint


def test_a_seed_is_a_training_of_its_own(data):
    images, labels = few(data)
    a, b, c = (
        train_clip(images, labels, [["a digit"]] * len(images), SMALL, n_steps=1, bs=8, seed=s).fingerprint
        for s in (0, 0, 1)
    )
    assert a == b != c


def test_what_cannot_be_trained(data):
    images, labels = few(data)
    own = [["a digit"]] * len(images)
    for change, said in [
        (dict(labels=labels[:3]), "with N labels"),
        (dict(images=images.astype(float)), "uint8"),
        (dict(labels=np.zeros_like(labels)), "at least 2"),
        (dict(captions=own[:3]), "lists of captions"),
        (dict(captions=["a digit"] * len(images)), "a list of texts for each image"),
        (dict(width=40), "multiple of 32"),
        (dict(n_steps=0), "n_steps must be at least 1"),
    ]:
        given = dict(images=images, labels=labels, captions=own) | change
        with pytest.raises(LtnbError, match=said):
            train_clip(**given)


@pytest.mark.parametrize("side, size, patch", [(8, 8, 2), (28, 32, 4), (32, 32, 4), (30, 32, 4), (224, 64, 8)])
def test_patches_fit_the_images(side, size, patch):
    vision = clip_config(side, ClipTraining())["vision_cfg"]
    assert (vision["image_size"], vision["patch_size"]) == (size, patch)


# rules
def row(c, k, **scores):
    return {"id": f"{c}-{k}", "class": c, "k": k, "scores": {"clip_by": "m", **scores}}


SCORES = st.fixed_dictionaries(
    {
        "clip": st.floats(-1, 1),
        "clip_p": st.floats(0, 1),
        "clip_top1": st.integers(0, 2),
        "clip_margin": st.floats(-1, 1),
        "clip_object": st.floats(-1, 1),
    }
)
ROWS = st.lists(st.tuples(st.integers(0, 2), SCORES), min_size=1, max_size=20).map(
    lambda v: [row(c, k, **s) for k, (c, s) in enumerate(v)]
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 1), st.integers(0, 5))
def test_a_lower_threshold_keeps_a_superset(rows, low, more, share, seed):
    def kept(rule, **how):
        f = keep_rule(rule, n_classes=3, seed=seed, **how)
        return {r["id"] for r in rows if f(r)}

    for rule, name in (("cosine", "cosine"), ("prob", "cosine"), ("calibrated", "thresholds")):
        assert kept(rule, **{name: low + more}) <= kept(rule, **{name: low})
    assert kept("random", share=share) <= kept("random", share=min(share + more, 1))
    assert kept("prob", cosine=low) <= kept("cosine", cosine=low)
    assert kept("random", share=1.0) == {r["id"] for r in rows} and not kept("random", share=0.0)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_a_rule_is_what_its_name_says(rows):
    tau = np.array([-0.5, 0.0, 0.5])
    f = {r: keep_rule(r, n_classes=3, cosine=0.1, thresholds=tau, share=0.5) for r in RULES}
    for r in rows:
        s, c = r["scores"], r["class"]
        assert f["calibrated"](r) == (s["clip"] >= tau[c]) and f["top1"](r) == (s["clip_top1"] == c)
        assert f["confusable"](r) == (s["clip_margin"] >= 0) and f["contrast"](r) == (s["clip_object"] > 0)
        assert f["prob"](r) == (s["clip_p"] > 1 / 3 and s["clip"] >= 0.1)
        assert f["random"](r) == f["random"](row(c, r["k"]))  # of the item alone


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1)), min_size=1, max_size=60), st.floats(0, 1), st.floats(0, 1)
)
def test_calibrated_thresholds(pairs, a, b):
    y, own = np.array([c for c, _ in pairs]), np.array([v for _, v in pairs])
    low, high = (calibrated_thresholds(own, y, 5, q, least=8) for q in sorted((a, b)))
    assert (low <= high + 1e-12).all() and np.isclose(low[4], np.quantile(own, min(a, b)))  # a class without images
    for c in range(4):
        if (y == c).sum() >= 8:
            assert np.isclose(low[c], np.quantile(own[y == c], min(a, b)))


def test_rules_refuse_what_they_cannot_use():
    with pytest.raises(UsageError, match="Did you mean 'top1'"):
        keep_rule("top-1", n_classes=3)
    with pytest.raises(UsageError, match="needs thresholds"):
        keep_rule("calibrated", n_classes=3)
    with pytest.raises(UsageError, match="needs share"):
        keep_rule("random", n_classes=3)
    with pytest.raises(UsageError, match="thresholds of the model other do not fit scores by m"):
        keep_rule("cosine", n_classes=3, by="other")(row(0, 0, clip=0.5))
    with pytest.raises(UsageError, match="no CLIP score"):
        keep_rule("cosine", n_classes=3)({"id": "a", "class": 0, "k": 0, "scores": {}})
    with pytest.raises(UsageError, match="from 0 to 1"):
        calibrated_thresholds(np.ones(3), np.zeros(3, int), 1, q=10)
    with pytest.raises(UsageError, match="real images"):
        calibrated_thresholds(np.ones(0), np.zeros(0, int), 1)


def test_who_a_class_is_held_against():
    known = [
        Knowledge(name="a", confused_with=["c", "unknown", "a"]),
        Knowledge(name="b"),
        Knowledge(name="c", confused_with=["a"]),
    ]
    assert confusable(known).int().tolist() == [[0, 0, 1], [1, 0, 1], [1, 0, 0]]


def test_acceptance():
    kept, y = np.array([1, 0, 0, 1, 1], bool), np.array([0, 0, 0, 2, 2])
    share = acceptance(kept, y, 3)
    assert np.isclose(share[[0, 2]], [1 / 3, 1]).all() and np.isnan(share[1])
    assert not acceptance_warnings(kept, y, "abc")
    (said,) = acceptance_warnings(np.zeros(5, bool), y, "abc")
    assert "'a' (0%), 'c' (0%)" in said and "'b'" not in said


@pytest.fixture(scope="module")
def made(trained, data, known, tmp_path_factory):
    "Test images as if they had been made, a third of them under a wrong class; scored"
    folder, y = tmp_path_factory.mktemp("made"), data.test.labels

    def make(part):
        at = [np.flatnonzero(y == (c + (k % 3 == 0)) % 10)[k] for c, k in np.asarray(part)]
        return torch.from_numpy(data.test.images[at])

    make_synthetic(folder, make_plan([30] * 10), make, "m")
    return score_items(folder, clip_score(trained, known))


def test_scores_are_in_the_manifest(made, trained, known):
    r = made.manifest[7]
    assert set(r["scores"]) == {"clip", "clip_p", "clip_top1", "clip_margin", "clip_object", "clip_by"}
    assert r["scores"]["clip_by"] == score_id(trained, known) and trained.id in r["scores"]["clip_by"]
    z = trained.images(made.items[:8])[7] @ class_embeddings(trained, known).T
    assert np.isclose(r["scores"]["clip"], z[r["class"]], atol=1e-3) and 0 <= r["scores"]["clip_p"] <= 1
    other = [k.model_copy(update={"called": f"{k.called}, drawn"}) for k in known]
    assert score_id(trained, other) != score_id(trained, known)
    with pytest.raises(UsageError, match="scores by"):
        score_items(made.items.paths[0].parent, clip_score(trained, other))


def test_rules_side_by_side(made, trained, data, known):
    right = np.array([k % 3 != 0 for _, k in made.manifest.plan])
    t = measure_thresholds(trained, known, data.train)
    how = dict(n_classes=10, thresholds=t.per_class(), cosine=t.cosine, by=t.by)
    rules = {r: keep_rule(r, share=0.5, **how) for r in RULES}
    rows = {r["rule"]: r for r in compare_rules(made, rules, 10, right)}
    assert rows["top1"]["recognised_kept"] > rows["random"]["recognised_kept"]
    value = clip_column(made, "clip_p")
    assert ranking(value, right, made.labels) > 0.55 and ranking(right * 1.0, right, made.labels) == 1
    d = sweep(right * 1.0, right, made.labels, n=6)
    assert np.isclose(d["recognised_kept"][0], right.mean()) and d["recognised_kept"][-1] == 1
    lines = acceptance_table(made, kept_by(made, rules["calibrated"]), data.class_names, data.counts)
    assert len(lines) == 11 and len({len(v) for v in lines}) == 1


def test_thresholds_stay_with_their_model(trained, clip, data, known, tmp_path):
    t = measure_thresholds(trained, known, data.train)
    t.save(tmp_path / "t.json")
    again = Thresholds.load(tmp_path / "t.json")
    assert again.by == t.by == score_id(trained, known) and np.allclose(again.per_class(), t.per_class(), atol=1e-4)
    own = t.own >= t.per_class(0.1, least=1)[t.labels]
    big = np.isin(t.labels, np.flatnonzero(data.counts >= 20))
    assert 0.8 < own[big].mean() < 0.97
    assert Thresholds("m", t.own, t.labels, 10, "ViT-B-32:openai").cosine == 0.25 != t.cosine
    assert score_id(clip, known) != t.by


def test_drawing_until_enough_pass(trained, data, known, tmp_path):
    def make(part):
        return torch.from_numpy(data.test.images[[np.flatnonzero(data.test.labels == c)[k] for c, k in part]])

    score, rule = clip_score(trained, known), keep_rule("top1", n_classes=10)
    drawn = draw_until(tmp_path, [4, 4] + [0] * 8, lambda p: make(np.asarray(p)), "m", score, rule, cap=5.0)
    assert all(rule(r) for r in drawn.kept.manifest) and all(d["kept"] == 4 or d["capped"] for d in drawn.classes)


# encode
def test_encode_writes_features_and_zero_shot_scores(trained, data, tmp_path, capsys):
    from ltnb.cli import encode_command

    trained.save(tmp_path / "m")
    out = tmp_path / "f.npz"
    encode_command(["--dataset", "digits", "--arch", f"clip:local-dir:{tmp_path / 'm'}", "--out", str(out)])
    features, z = Features.npz(out), np.load(out)
    assert features.train.shape == (278, 64) and z["test_zero_shot"].shape == (600, 10) and str(z["clip"]) == trained.id
    right = (z["test_zero_shot"].argmax(1) == data.test.labels).mean()
    assert f"zero-shot accuracy on the test images: {right:.1%} (chance: 10.0%)" in capsys.readouterr().out


def test_encode_without_knowledge_takes_the_names(clip):
    images = np.zeros((4, 1, 8, 8), np.uint8)
    part = ImageSet(images, np.array([0, 1, 0, 1]), ("sea_lion", "owl"))
    texts = texts_of(LongTail(part, part, name="own"), "folder")
    assert texts == [["a photo of a sea lion"], ["a photo of a owl"]]
    features, more = encode_set(clip, LongTail(part, part, name="own"), texts)
    assert features.train.shape == (4, 16) and more["train_zero_shot"].shape == (4, 2)


def test_encode_refuses_before_the_data_is_read(tmp_path):
    from ltnb.cli import encode_command

    out = ["--out", str(tmp_path / "f.npz")]
    for typed, said in [
        (["--arch", "clip:ViT-B-32:laion2b_s34b_b79k"], "add --download"),
        (["--arch", "clip:local-dir:/nowhere"], "no folder of a CLIP model"),
        (["--arch", "clip:ViT-B-32:openai", "--knowledge", "no.json"], "--knowledge no.json"),
        (["--arch", "clip:ViT-B-32:openai", "--pretrained", "false"], "--pretrained"),
    ]:
        with pytest.raises(LtnbError, match=said):
            encode_command([*typed, *out])
