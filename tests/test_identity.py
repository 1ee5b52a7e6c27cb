"What an image and a set are called: the same before and after decoding, in every recipe, for every source."

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ltnb.baseline import BaselineConfig
from ltnb.core import DataError, read_json
from ltnb.progress import Progress
from ltnb.data import ImageSet, LongTail, duplicates
from ltnb.sources import load_data
from ltnb.controls import real_repeated
from ltnb.diffult import DiffuLTConfig
from ltnb.generator_steps import load_small
from ltnb.generator import DiffusionConfig
from ltnb.ldmlr import LDMLRConfig
from ltnb.classifier import new_encoder, pixel_stats, set_stats
from ltnb.jobs import make_plan
from ltnb.synthetic import make_synthetic
from ltnb.copies import flag_copies
from PIL import Image

CONFIGS = {"baseline": BaselineConfig, "ldmlr": LDMLRConfig, "diffusion": DiffusionConfig, "diffult": DiffuLTConfig}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


def photographs(root, counts=(5, 3, 2), n_test=2, side=8):
    "Class folders of small photographs; class k is as bright as its number says"
    rng = np.random.default_rng(0)
    for part, sizes in (("train", counts), ("test", [n_test] * len(counts))):
        for k, n in enumerate(sizes):
            (root / part / f"class {k}").mkdir(parents=True)
            for i in range(n):
                x = rng.integers(0, 60, (side, side, 3), dtype=np.uint8) + np.uint8(60 * k)
                Image.fromarray(x).save(root / part / f"class {k}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "Settings of four sources; the last three are the same photographs as folders, as lists and decoded as an archive"
    root = photographs(tmp_path_factory.mktemp("photos") / "set")
    data = LongTail.folder(root, image_size=8)
    for part, s in data.parts.items():
        lines = [f"{p} {y}" for p, y in zip(s.ids, s.labels, strict=True)]
        (root.parent / f"{part}.txt").write_text("\n".join(lines) + "\n")
    arrays = {
        f"{p}_{n}": v
        for p, s in data.parts.items()
        for n, v in (("images", np.asarray(s.images).transpose(0, 2, 3, 1)), ("labels", s.labels))
    }
    np.savez(root.parent / "set.npz", **arrays)
    lists = {f"{p}_list": str(root.parent / f"{p}.txt") for p in ("train", "test")}
    return {
        "digits": dict(dataset="digits"),
        "folder": dict(dataset="folder", data_root=str(root), image_size=8),
        "lists": dict(dataset="lists", data_root=str(root), image_size=8, **lists),
        "npz": dict(dataset="npz", data_root=str(root.parent / "set.npz")),
    }


@pytest.mark.parametrize("source", ["digits", "folder", "lists", "npz"])
@pytest.mark.parametrize("cut", [{}, {"val_per_class": 1}])
def test_every_recipe_calls_the_same_data_the_same(sources, source, cut):
    "However a recipe holds its images: read on demand, decoded where there is room, or decoded always"
    if source == "digits" and cut:
        pytest.skip("Digits-LT takes no validation images")
    seen = set()
    for config in CONFIGS.values():
        data = load_data(config(**sources[source], **cut), 0)
        for held in (data, data.ready(), data.in_memory(2), data.in_memory().in_memory()):
            ids = {p: s.ids for p, s in held.parts.items()}
            seen.add((held.fingerprint(), json.dumps(ids), json.dumps(held.describe(), default=str)))
    assert len(seen) == 1
    assert load_small(DiffusionConfig(**sources[source], **cut), 0).in_memory().fingerprint() == next(iter(seen))[0]


def test_decoded_photographs_keep_their_names(sources):
    data = load_data(DiffuLTConfig(**sources["folder"]), 0)
    held = data.in_memory()
    assert not held.train.on_disk and held.train.ids == data.train.ids and held.train.ids[0] == "train/class 0/0.png"
    assert (np.asarray(data.train.images) == held.train.images).all()
    assert {r["source_id"] for r in real_repeated(held, np.array([1, 1, 2])).manifest} <= set(data.train.ids)


def test_manifest_names_the_photograph(sources, tmp_path):
    "An image that copies a training image says which file it is"
    data = load_data(DiffusionConfig(**sources["folder"]), 0).in_memory()
    copied = data.train.images[[0, 6]]

    def make(rows, attempt=0):
        return torch.from_numpy(copied), [{}] * 2

    make_synthetic(tmp_path, make_plan([2, 0, 0]), make, "model", settings={})
    rows = flag_copies(tmp_path, data.train).manifest
    assert [r["scores"]["nearest_id"] for r in rows] == [data.train.ids[0], data.train.ids[6]]


def test_equal_files_have_equal_fingerprints_wherever_they_are_listed(sources):
    "A folder and lists of its files are the same images; an archive holds pixels, and says so"
    folder, lists = (load_data(BaselineConfig(**sources[s]), 0) for s in ("folder", "lists"))
    assert folder.train.ids == lists.train.ids
    npz = load_data(BaselineConfig(**sources["npz"]), 0)
    assert npz.train.ids == npz.train.hashes == folder.in_memory().train.hashes
    assert npz.fingerprint() != folder.fingerprint()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.booleans())
def test_parts_and_their_decoding_commute(sources, index, first):
    data = load_data(BaselineConfig(**sources["folder"]), 0)
    s, index = data.train, np.array(index)
    part = s.decoded().take(index) if first else s.take(index).decoded()
    assert part.ids == [s.ids[i] for i in index] and (part.images == np.asarray(s.images)[index]).all()
    hold = LongTail(s.take(np.arange(len(s))), data.test, "set")
    assert hold.fingerprint() == data.fingerprint() == hold.in_memory().fingerprint()


def test_held_out_images_keep_their_names(sources):
    data = load_data(BaselineConfig(**sources["folder"]), 0)
    a, b = data.in_memory().hold_out(1), data.hold_out(1)
    assert a.val.ids == b.val.ids and a.fingerprint() == b.fingerprint() == b.in_memory().fingerprint()


def test_a_changed_file_changes_the_fingerprint_and_nothing_held(tmp_path):
    root = photographs(tmp_path / "set")
    data = LongTail.folder(root, image_size=8)
    held = data.in_memory()
    before = held.fingerprint()
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(root / "train" / "class 0" / "0.png")
    assert LongTail.folder(root, image_size=8).fingerprint() != before == held.fingerprint()


def test_copies_are_found_by_content_after_decoding(tmp_path):
    root = photographs(tmp_path / "set")
    (root / "test" / "class 1" / "copy.png").write_bytes((root / "train" / "class 0" / "3.png").read_bytes())
    data = LongTail.folder(root, image_size=8)
    found = [(data.train.ids[i], data.test.ids[j]) for i, j in duplicates(data.train, data.test)]
    assert found == [("train/class 0/3.png", "test/class 1/copy.png")]
    held = data.in_memory()
    assert duplicates(held.train, held.test) == duplicates(data.train, data.test) == duplicates(held.train, data.test)
    assert held.describe()["duplicates"] == data.describe()["duplicates"]


def test_files_of_another_number_are_refused(sources):
    s = load_data(BaselineConfig(**sources["folder"]), 0).train
    with pytest.raises(DataError, match="3 images cannot come from 10 files"):
        ImageSet(np.asarray(s.images)[:3], s.labels[:3], s.class_names, s.images)


def test_run_and_generate_agree_about_the_training_images(sources, tmp_path):
    "The manifest of a run, and the copies of `ltnb generate`, name files; the data is found to be the same"
    from ltnb.generator import run
    from ltnb.generate import GenerateConfig, generate, training_data

    quick = dict(n_steps=2, diff_bs=4, sample_steps=1, per_class=2, judge_epochs=0, unet="tiny", device="cpu")
    r = run(DiffusionConfig(**sources["folder"], **quick, precision="fp32", out=str(tmp_path / "run")))
    data, why = training_data(r.path)
    assert why == "" and data.train.ids[0].endswith(".png")
    assert data.fingerprint() == read_json(r.path / "config.json")["data"]["train"]
    generate(GenerateConfig(model=str(r.path), out=str(tmp_path / "more"), per_class=1, device="cpu"))
    rows = [json.loads(line) for line in (tmp_path / "more" / "manifest.jsonl").read_text().splitlines()]
    assert {row["scores"]["nearest_id"] for row in rows} <= set(data.train.ids)


# normalisation by the whole set
def test_constants_of_a_file_set_are_not_those_of_its_head(tmp_path):
    "Files lie class by class: the first ones are the largest class, and no sample of the set"
    data = LongTail.folder(photographs(tmp_path / "set", counts=(12, 8, 4)), image_size=8)
    images, head = data.train.images, data.train.take(slice(0, 12)).images[:]
    whole, some, first = pixel_stats(np.asarray(images)), set_stats(images, n=12), pixel_stats(head)
    assert set_stats(images) == set_stats(images) == set_stats(images, 10**6)
    assert np.allclose(set_stats(images), whole), "as many files as are there: all of them"
    assert abs(some[0][0] - whole[0][0]) < abs(first[0][0] - whole[0][0]) / 2
    assert np.allclose([new_encoder("convnet", d, False).mean for d in (data, data.in_memory())], whole[0])


def test_encoder_normalises_by_all_images_of_an_archive(tmp_path):
    x, y = np.zeros((2400, 4, 4), np.uint8), np.repeat([0, 1], [2000, 400])
    x[2000:] = 255
    np.savez(tmp_path / "a.npz", train_images=x, train_labels=y, test_images=x[:2], test_labels=[0, 1])
    clf = new_encoder("convnet", LongTail.npz(tmp_path / "a.npz"), False)
    assert clf.mean == pytest.approx([1 / 6]) and clf.std == pytest.approx([np.std(y)])
