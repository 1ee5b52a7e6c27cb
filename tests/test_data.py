"Cuts, sources and their refusals."

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb import data, files
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.labels import read_class_names
from ltnb.listings import read_list
from ltnb.files import ImageFiles, decode_image
from ltnb.data import (
    BANDS,
    CIFAR_LT,
    ImageSet,
    LongTail,
    bands,
    duplicates,
    gini,
    longtail_counts,
    longtail_indices,
    thirds,
)
from ltnb.sources import DataConfig, load_data
from PIL import Image


@given(st.integers(2, 200), st.integers(1, 5000), st.floats(1, 500))
def test_profile_falls_from_n_max_to_its_share(k, n_max, ratio):
    counts = longtail_counts(n_max, k, ratio)
    assert counts[0] == n_max and (np.diff(counts) <= 0).all()
    assert abs(counts[-1] - n_max / ratio) <= 1


def test_profile_ends_at_one_image_for_every_whole_ratio():
    assert all(longtail_counts(n, 10, n)[-1] == 1 for n in range(1, 3000))


@pytest.mark.parametrize(
    "name, totals",
    [
        ("cifar10", {10: 20431, 50: 13996, 100: 12406, 200: 11203}),
        ("cifar100", {10: 19573, 50: 12608, 100: 10847, 200: 9502}),
    ],
)
def test_official_cifar_subsets(name, totals):
    "Index for index, the subsets of the LDAM-DRW code"
    z = np.load(shared("cifar_lt_splits.npz"))
    for ratio, total in totals.items():
        kept = longtail_indices(z[f"{name}_label"], ratio)
        assert len(kept) == total
        assert (np.sort(kept) == np.sort(z[f"{name}_ldam_seed0_if{ratio}"])).all()


RANKS = {
    (5000, 10): {10: "e3a258939eb7e47c", 50: "717691597970d50c", 100: "0cade81afac40f05", 200: "c4d59c6acc8de788"},
    (500, 100): {10: "bbf87c161c2527cc", 50: "d79d512b028438f2", 100: "1c349a74a54aeb40", 200: "e842944e17b9d3ac"},
}


def rank_hash(labels, kept):
    "A hash that does not depend on where the images of a class stand, only on which of them are kept"
    place = np.empty(len(labels), np.int64)
    for k in range(labels.max() + 1):
        place[labels == k] = np.arange((labels == k).sum())
    return hashlib.sha256(
        np.concatenate([np.sort(place[kept][labels[kept] == k]) for k in range(labels.max() + 1)])
        .astype("<i8")
        .tobytes()
    ).hexdigest()[:16]


@pytest.mark.parametrize("n, k", RANKS)
def test_official_subsets_without_the_files(n, k):
    "Which images of each class the official subsets keep, as hashes: all balanced sets of this size share them"
    labels = np.tile(np.arange(k), n)
    for ratio, want in RANKS[n, k].items():
        assert rank_hash(labels, longtail_indices(labels, ratio)) == want, ratio


@pytest.mark.parametrize("name, key", [("cifar10", (5000, 10)), ("cifar100", (500, 100))])
def test_hashes_are_those_of_the_official_subsets(name, key):
    z = np.load(shared("cifar_lt_splits.npz"))
    for ratio, want in RANKS[key].items():
        official = z[f"{name}_ldam_seed0_if{ratio}"]
        assert rank_hash(z[f"{name}_label"], official) == want
        assert (
            CIFAR_LT[hashlib.sha256(np.sort(official).astype("<i8").tobytes()).hexdigest()[:16]]
            == f"CIFAR-{key[1]}-LT, ratio {ratio}"
        )


@given(st.lists(st.integers(1, 3000), min_size=3, max_size=60))
def test_bands_and_thirds_partition(counts):
    for groups in (bands(counts), thirds(counts)):
        assert sorted(np.concatenate(list(groups.values()))) == list(range(len(counts)))
    assert all(counts[k] > 100 for k in bands(counts)["many"]) and all(counts[k] < 20 for k in bands(counts)["few"])


@pytest.mark.parametrize("seed", range(3))
def test_digits(seed):
    data = LongTail.digits(seed=seed)
    assert data.counts.tolist() == longtail_counts(114, 10, 100).tolist() and data.test.counts.tolist() == [60] * 10
    assert not set(data.train.ids) & set(data.test.ids), "train and test share an image"
    assert sorted(data.class_names) == [str(i) for i in range(10)]
    from sklearn.datasets import load_digits

    raw = {
        x.tobytes(): t
        for x, t in zip(np.round(load_digits().images * 255 / 16).astype(np.uint8), load_digits().target, strict=True)
    }
    for part in (data.train, data.test):
        assert all(data.class_names[y] == str(raw[x.tobytes()]) for x, y in zip(part.images, part.labels, strict=True))


def arrays(**changes):
    rng = np.random.default_rng(0)
    d = dict(
        train_images=rng.integers(0, 256, (30, 8, 8, 3), np.uint8),
        train_labels=np.repeat([0, 1, 2], 10),
        test_images=rng.integers(0, 256, (6, 8, 8, 3), np.uint8),
        test_labels=np.array([0, 0, 1, 1, 2, 2]),
    )
    return {k: v for k, v in {**d, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(train_labels=None), "lacks train_labels"),
        (dict(train_labels=np.repeat([0, 2], 15)), "class '1' .number 1. has no training image"),
        (dict(train_labels=np.full(30, -1)), "0 or more"),
        (dict(class_names=np.array(["a", "b"])), "0 to 1 for 2 classes"),
        (dict(train_labels=np.zeros(29, int)), "30 images need 30 labels"),
        (dict(train_images=np.zeros((30, 8, 8, 3))), "uint8"),
        (dict(test_images=np.zeros((6, 9, 9, 3), np.uint8)), "shape"),
        (dict(train_labels=np.array(["a"] * 30)), "whole numbers"),
        (dict(train_images=np.zeros((30, 8), np.uint8)), "must be"),
        (dict(train_labels=np.array([{}] * 30)), "damaged or no .npz"),
        (dict(test_labels=np.array([0, 0, 1, 1, 2, 2**33])), "cannot fill"),
        (dict(class_names=np.array("abc")), "list of texts"),
        (dict(class_names=np.array([["a"], ["b"], ["c"]])), "list of texts"),
        (dict(val_labels=np.zeros(3, int)), "no val_images"),
    ],
)
def test_npz_refuses(tmp_path, changes, word):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(DataError, match=word):
        LongTail.npz(tmp_path / "a.npz")


def test_npz_variants(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        **arrays(train_labels=np.repeat([0, 1, 2], 10)[:, None], class_names=np.array(["x", "y", "z"])),
    )
    data = LongTail.npz(tmp_path / "a.npz", imb_ratio=5)
    assert data.counts.tolist() == [10, 4, 2] and data.kept.shape == (16,) and data.class_names == ("x", "y", "z")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"):
        LongTail.npz(tmp_path / "a.npz")


def test_cut_that_would_empty_a_class(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(UsageError, match="use at most 10"):
        LongTail.npz(tmp_path / "a.npz", imb_ratio=100)


@pytest.mark.slow_process
def test_real_cifar(tmp_path):
    "The pack beside the project, through the layout that users have"
    out = tmp_path / "c.npz"
    subprocess.run(
        [sys.executable, shared("load.py"), shared("cifar10_lt.npz"), "--out", out], check=True, capture_output=True
    )
    data = LongTail.npz(out)
    assert (
        data.counts.tolist() == longtail_counts(5000, 10, 100).tolist()
        and len(data.test) == 10000
        and data.class_names[0] == "airplane"
    )


def test_torchvision_cifar(tmp_path, monkeypatch):
    "torchvision's own reader on files in the official layout"
    from torchvision.datasets import CIFAR10

    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, obj):
        (folder / name).write_bytes(pickle.dumps(obj))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(n):
        return {"data": rng.integers(0, 256, (n, 3072), np.uint8), "labels": list(np.arange(n) % 10)}

    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(1000))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(50))])
    name, md5 = write("batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    data = LongTail.cifar10(tmp_path, imb_ratio=100)
    assert data.counts.tolist() == longtail_counts(100, 10, 100).tolist() and data.train.images.shape[1:] == (3, 32, 32)
    (folder / "test_batch").write_bytes(b"torn")
    with pytest.raises(UsageError, match="--download"):
        LongTail.cifar10(tmp_path)


def test_a_download_that_fails_is_not_told_to_download(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", [(tmp_path / "empty").as_uri() + "/"])
    with pytest.raises(UsageError, match="Error downloading.*put its files there") as said:
        LongTail.fashion_mnist(tmp_path, download=True)
    assert "add --download" not in str(said.value)


def test_sources_by_config():
    assert load_data(DataConfig(imb_ratio=20), 0).imb_ratio == 114 / 5
    with pytest.raises(UsageError, match="at most"):
        LongTail.digits(n_max=1000)
    for cfg, word in (
        (DataConfig(download=True), "--download"),
        (DataConfig(dataset="npz"), "--data-root"),
        (DataConfig(data_root="x"), "npz"),
        (DataConfig(dataset="cifar10", data_root="nowhere"), "--download"),
    ):
        with pytest.raises(LtnbError, match=word):
            load_data(cfg, 0)
    assert list(BANDS) == list(bands([1]))


@given(st.integers(2, 60), st.integers(1, 3000), st.floats(1, 300), st.sampled_from(data.PROFILES))
def test_every_profile_goes_from_n_max_to_its_share(k, n_max, ratio, profile):
    counts = longtail_counts(n_max, k, ratio, profile)
    assert counts[0] == n_max and (np.diff(counts) <= 0).all() and abs(counts[-1] - n_max / ratio) <= 1


def test_step_and_pareto():
    assert longtail_counts(100, 5, 10, "step").tolist() == [100, 100, 10, 10, 10]
    real = shared_lists("ImageNet_LT_train_counts.txt")
    real = np.sort(np.array([int(l.split()[1]) for l in real.splitlines()]))[::-1]
    ours = longtail_counts(1280, 1000, 256, "pareto")
    assert abs(ours.sum() / real.sum() - 1) < 0.05 and np.abs(np.log(ours / real)).mean() < 0.06, (
        "the Pareto profile is ImageNet-LT's"
    )
    with pytest.raises(UsageError, match="pareto"):
        longtail_counts(10, 3, 2, "paretto")


def test_n_max():
    labels = np.repeat([0, 1, 2], [50, 40, 20])
    assert np.bincount(labels[longtail_indices(labels, 4)]).tolist() == [20, 10, 5]
    assert np.bincount(labels[longtail_indices(labels, 4, n_max=50)]).tolist() == [50, 25, 12]
    with pytest.raises(UsageError, match="asks for 35 images of class 2, which has 20"):
        longtail_indices(np.repeat([0, 1, 2], [70, 60, 20]), 2, n_max=70)


@given(st.lists(st.integers(1, 500), min_size=2, max_size=40))
def test_gini_against_its_definition(n):
    n = np.array(n, float)
    assert abs(gini(n) - np.abs(n[:, None] - n).sum() / (2 * len(n) ** 2 * n.mean())) < 1e-9


def shared_lists(name):
    with tarfile.open(shared("long_tail_lists.tar.xz")) as tar:
        return tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(name))).read().decode()


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    with tarfile.open(shared("long_tail_lists.tar.xz")) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_places_lt(lists):
    data = LongTail.lists(
        None,
        lists / "Places_LT_train.txt",
        lists / "Places_LT_test.txt",
        lists / "Places_LT_val.txt",
        lists / "Places_LT_classnames.txt",
    )
    assert (len(data.train), data.n_classes, data.counts.max(), data.counts.min(), len(data.test), len(data.val)) == (
        62500,
        365,
        4980,
        5,
        36500,
        7300,
    )
    assert data.class_names[:2] == ("airfield", "airplane_cabin") and "62,500 images" in data.card(compare=False)
    with pytest.raises(UsageError, match="--data-root"):
        data.train[0]


def test_imagenet_and_inaturalist_lists(lists):
    names = read_class_names(lists / "ImageNet_LT_classnames.txt", *read_list(lists / "ImageNet_LT_val.txt"))
    assert len(names) == 1000 and names[:3] == ("tench", "goldfish", "great white shark")
    paths, labels = read_list(lists / "iNaturalist18_val.txt")
    assert len(paths) == 24426 and np.bincount(labels).tolist() == [3] * 8142
    assert len(read_class_names(lists / "iNaturalist18_categories.json")) == 8142
    assert read_class_names(lists / "iwildcam_labels.csv")[:2] == ("empty", "tayassu pecari")


def write_image(path, mode="RGB", size=(40, 30), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = (
        np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
        .integers(0, 256, (size[1], size[0], len(Image.new(mode, (1, 1)).getbands())), np.uint8)
        .squeeze()
    )
    im = Image.fromarray(a, mode if mode in ("RGB", "RGBA", "L", "CMYK", "LA") else "L")
    (im if im.mode == mode else im.convert(mode)).save(path, **save)
    return path


def folders(root, sizes=(("cat", 12), ("dog", 6), ("eel", 3)), parts=("train", "test")):
    for part in parts:
        for name, n in sizes:
            for i in range(n):
                write_image(root / part / name / f"{part}{i}.png")
    return root


def test_real_photographs_as_class_folders(tmp_path):
    "Imagenette's tail: 2,105 JPEG files of 224 pixels, 850 down to 8 a class"
    for part, file in (("train", "imagenette_lt100_train.npz"), ("test", "imagenette_val1000.npz")):
        z = dict(np.load(shared(file)))  # read once: an archive reads an array anew each time it is asked
        for i, (a, b) in enumerate(zip(z["offset"][:-1], z["offset"][1:], strict=True)):
            out = tmp_path / "photos" / part / str(z["classname"][z["label"][i]]) / f"{i}.jpg"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(z["data"][a:b].tobytes())
    data = load_data(DataConfig(dataset="folder", data_root=str(tmp_path / "photos")), 0)
    assert (
        len(data.train) == 2105
        and sorted(data.counts.tolist())[::9] == [8, 850]
        and data.test.counts.tolist() == [100] * 10
    )
    assert data.train.images.shape[1:] == (3, 224, 224) and data.train[7][0].std() > 10
    facts = data.describe()
    assert facts["duplicates"] == {"train and test": 0, "within train": 0}
    small = load_data(DataConfig(dataset="folder", data_root=str(tmp_path / "photos"), image_size=32), 0)
    assert np.asarray(small.test.take(slice(0, 40)).images).shape == (40, 3, 32, 32)


def test_folder_layouts(tmp_path):
    data = LongTail.folder(folders(tmp_path / "a"))
    assert (
        data.counts.tolist() == [12, 6, 3]
        and data.class_names == ("cat", "dog", "eel")
        and data.train.images.size == 30
        and data.train.ids[0] == "train/cat/train0.png"
    )
    val = LongTail.folder(folders(tmp_path / "b", parts=("train", "val")))
    assert (
        val.val is None
        and len(val.test) == 21
        and "val is the test set" in val.notes[0]
        and val.test.ids[0].startswith("val/")
    )
    three = LongTail.folder(folders(tmp_path / "c", parts=("train", "val", "test")))
    assert len(three.val) == len(three.test) == 21
    plain = LongTail.folder(folders(tmp_path / "d", parts=("",)), test_fraction=0.5)
    assert (
        plain.counts.tolist() == [6, 3, 2]
        and plain.test.counts.tolist() == [6, 3, 1]
        and duplicates(plain.train, plain.test) == []
    )
    again = LongTail.folder(tmp_path / "d", test_fraction=0.5)
    assert (
        again.train.ids == plain.train.ids
        and again.fingerprint()
        == plain.fingerprint()
        != LongTail.folder(tmp_path / "d", test_fraction=0.5, seed=1).fingerprint()
    )
    assert LongTail.folder(tmp_path / "a", imb_ratio=2).counts.tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda r: [p.unlink() for p in (r / "train" / "dog").iterdir()], "'dog'.*no training image but 6 test images"),
        (lambda r: write_image(r / "test" / "fox" / "a.png"), "class 'fox', which .*train lacks"),
        (lambda r: shutil.rmtree(r / "test"), "neither test nor val"),
        (lambda r: [p.unlink() for p in (r / "test").rglob("*.png")], "test set is empty"),
        (
            lambda r: [shutil.rmtree(r / p / c) for p in ("train", "test") for c in ("dog", "eel")],
            "at least 2 are needed",
        ),
    ],
)
def test_folder_refuses(tmp_path, change, word):
    root = folders(tmp_path / "a")
    change(root)
    with pytest.raises(DataError, match=word):
        LongTail.folder(root)


def test_a_class_missing_from_test_is_told(tmp_path):
    root = folders(tmp_path / "a")
    shutil.rmtree(root / "test" / "dog")
    data = LongTail.folder(root)
    assert data.describe()["missing_from_test"] == ["dog"] and "accuracy is NaN" in data.card()


def test_image_kinds(tmp_path):
    grey = decode_image(write_image(tmp_path / "l.png", "L"))
    assert grey.shape == (3, 30, 40) and (grey[0] == grey[1]).all()
    assert decode_image(write_image(tmp_path / "p.png", "P")).shape == (3, 30, 40) and decode_image(
        write_image(tmp_path / "c.jpg", "CMYK")
    ).shape == (3, 30, 40)
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "rgba.png")
    seen = decode_image(tmp_path / "rgba.png")
    assert seen[:, 0, 0].tolist() == [10, 20, 30] and seen[:, 3, 3].tolist() == [255] * 3, (
        "transparent pixels lie over white"
    )
    deep = np.array([[0, 257, 65535], [32768, 128, 129]], np.uint16)
    for name in ("d.png", "d.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert decode_image(tmp_path / name)[0].tolist() == [[0, 1, 255], [128, 0, 1]], "16 bits to 8, rounded"
    exif = Image.Exif()
    exif[0x0112] = 6
    left_red = np.zeros((30, 40, 3), np.uint8)
    left_red[:, :20, 0] = 255
    Image.fromarray(left_red).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = decode_image(tmp_path / "turned.jpg")
    assert turned.shape == (3, 40, 30) and turned[0, :15].mean() > 200 > 50 > turned[0, -15:].mean(), (
        "a quarter turn brings left to top"
    )
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="floating-point"):
        decode_image(tmp_path / "f.tif")


@pytest.mark.parametrize(
    "name, mode", [("a.jpg", "RGB"), ("a.png", "RGBA"), ("a.gif", "P"), ("a.webp", "RGB"), ("a.bmp", "L")]
)
def test_truncated_images_are_named(tmp_path, name, mode):
    path = write_image(tmp_path / name, mode, (64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(DataError, match=f"{name} cannot be decoded"):
        decode_image(path, 32)


def test_the_middle_square_like_torchvision(tmp_path):
    from torchvision.transforms import CenterCrop, Compose, Resize

    path = tmp_path / "a.png"
    Image.fromarray((np.indices((90, 120)).sum(0) % 256).astype(np.uint8)).convert("RGB").save(path)
    theirs = np.asarray(Compose([Resize(45), CenterCrop(45)])(Image.open(path))).transpose(2, 0, 1).astype(int)
    assert np.abs(decode_image(path, 45).astype(int) - theirs)[:, 1:-1, 1:-1].max() <= 2


def test_bad_images_stop_or_are_skipped(tmp_path):
    root = folders(tmp_path / "a")
    (root / "train" / "dog" / "train0.png").write_bytes(b"no image")
    data = LongTail.folder(root)
    with pytest.raises(DataError, match="dog/train0.png cannot be decoded.*--bad-images skip"):
        data.in_memory()
    data = LongTail.folder(root, bad_images="skip")
    assert (
        data.counts.tolist() == [12, 5, 3]
        and "left out 1 unreadable train image: train/dog/train0.png" in data.notes[0]
    )
    assert data.in_memory().train.images.shape == (20, 3, 30, 30)
    for p in (root / "train" / "dog").iterdir():
        p.write_bytes(b"")
    with pytest.raises(DataError, match="no training image"):
        LongTail.folder(root, bad_images="skip")


def test_cache_is_bounded_and_cannot_be_written_through(tmp_path):
    files = ImageFiles(tmp_path, [write_image(tmp_path / f"{i}.png").name for i in range(30)], 16, cache_mb=0.005)
    whole = np.asarray(files)
    assert whole.shape == files.shape and len(files._cache) <= 6
    x = files[4]
    x[:] = 0
    assert (
        (files[4] == whole[4]).all()
        and (files[np.array([9, 4])] == whole[[9, 4]]).all()
        and (files[-1] == whole[-1]).all()
    )
    assert (pickle.loads(pickle.dumps(files))[3] == whole[3]).all()
    with pytest.raises(IndexError):
        files[30]


def test_more_than_memory_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    monkeypatch.setattr(files, "free_memory", lambda: 1000)
    monkeypatch.setattr(data, "free_memory", lambda: 1000)
    with pytest.raises(LtnbError, match="--image-size"):
        np.asarray(ImageFiles(tmp_path, ["a.png"], 32))


def test_large_folder_opens_fast_and_flat(tmp_path):
    "20,000 links to one photograph; results/ has the figures for 100,000"
    import os
    import tracemalloc

    one = write_image(tmp_path / "one.png")
    for part, n in (("train", 180), ("test", 20)):
        for k in range(100):
            (tmp_path / "big" / part / f"c{k:03}").mkdir(parents=True)
            for i in range(n):
                os.link(one, tmp_path / "big" / part / f"c{k:03}" / f"{i}.png")
    tracemalloc.start()
    start = time.perf_counter()
    data = LongTail.folder(tmp_path / "big")
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) == 18000 and peak < 40e6, f"{seconds:.1f} s, {peak / 1e6:.0f} MB"


def test_duplicates_by_content(tmp_path):
    root = folders(tmp_path / "a")
    (root / "test" / "eel" / "copy.png").write_bytes((root / "train" / "cat" / "train3.png").read_bytes())
    (root / "train" / "eel" / "again.png").write_bytes((root / "train" / "eel" / "train1.png").read_bytes())
    data = LongTail.folder(root)
    ((i, j),) = duplicates(data.train, data.test)
    assert data.train.ids[i].endswith("cat/train3.png") and data.test.ids[j].endswith("eel/copy.png")
    assert data.describe()["duplicates"] == {"train and test": 1, "within train": 1}
    memory = data.in_memory()
    assert len(duplicates(memory.train, memory.test)) == 1 == len(duplicates(memory.train, data.test))
    pixels = ImageSet(np.asarray(memory.train.images), memory.train.labels, memory.class_names)
    with pytest.raises(UsageError, match="same way"):
        duplicates(pixels, data.test)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=30),
    st.lists(st.integers(0, 3), min_size=1, max_size=10),
)
def test_duplicates_against_pairs(a, b):
    def image(v):
        return np.full((1, 2, 2), v, np.uint8)

    x = ImageSet(np.stack([image(v) for v, _ in a]), np.array([y for _, y in a]), ("a", "b"))
    z = ImageSet(np.stack([image(v) for v in b]), np.zeros(len(b), int), ("a", "b"))
    assert {i for i, _ in duplicates(x, z)} == {i for i, (v, _) in enumerate(a) if v in b}
    assert len(duplicates(x)) == len(a) - len({v for v, _ in a})


def test_hold_out_and_its_cost():
    whole = LongTail(
        ImageSet(np.arange(600, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(4, 2), np.repeat(np.arange(3), 200), "abc"),
        ImageSet(np.zeros((3, 1, 4, 1), np.uint8), np.arange(3), "abc"),
        "toy",
    )
    data = whole.cut(50, val_per_class=20)
    assert (
        data.val.counts.tolist() == [20] * 3
        and data.counts.tolist() == [180, 25, 3]
        and "its smallest class 3 instead of 4" in data.notes[0]
    )
    assert len(set(data.kept)) == 208 and (whole.train.labels[data.kept] == data.train.labels).all()
    assert data.cut(None) is data and data.subset_hash != whole.cut(50).subset_hash
    with pytest.raises(UsageError, match="at most 3"):
        whole.cut(50).hold_out(4)
    with pytest.raises(UsageError, match="already has 60 validation"):
        data.hold_out(1)
    with pytest.raises(UsageError, match="imb_ratio"):
        whole.cut(None, n_max=5)


def write_lists(tmp_path, train, test=("a/9.png 0", "b/9.png 1"), names=None):
    (tmp_path / "train.txt").write_text("\n".join(train))
    (tmp_path / "test.txt").write_text("\n".join(test))
    return tmp_path / "train.txt", tmp_path / "test.txt"


@pytest.mark.parametrize(
    "train, test, word",
    [
        (["a/1.png,0", "b/1.png,1"], None, "line 1: .*not ','"),
        (["a/1.png 0", "b/1.png"], None, "line 2: expected 'path label'"),
        (["a/1.png 0", "b/1.png one"], None, "class number"),
        (["a/1.png 0", "b/1.png -1"], None, "class number"),
        (["a/1.png 0", "a/1.png 1"], None, "stands already in line 1"),
        ([], None, "lists no image"),
        (["a/1.png 0", "b/1.png 2"], None, "without gaps"),
        (["a/1.png 1", "b/1.png 1"], ["c.png 1"], "class '0'.*no training image"),
        (["a/1.png 0", "b/1.png 1"], ["c.png 2"], "cannot fill|no training image but 1 test"),
        (["a/1.png 0", "b/1.png 1"], ["a/1.png 0"], "share 1 paths"),
        (["a/1.png 0", "b/1.png 999999999"], None, "without gaps"),
        (["a/1.png 0", "b/1.png ²"], None, "class number"),
    ],
)
def test_lists_refuse(tmp_path, train, test, word):
    files = write_lists(tmp_path, train, test or ("a/9.png 0", "b/9.png 1"))
    with pytest.raises(DataError, match=word):
        LongTail.lists(None, *files)


def test_lists_with_images(tmp_path):
    for p in ("a/1 with space.png", "b/1.png", "a/9.png", "b/9.png"):
        write_image(tmp_path / p)
    files = write_lists(tmp_path, ["a/1 with space.png 0", "", "b/1.png\t1 "])
    data = LongTail.lists(tmp_path, *files)
    assert data.train[0][0].shape == (3, 30, 30) and data.class_names == ("0", "1") and data.name == "train"
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(DataError, match="1 of 2 images of .*train.txt are not under .*b/1.png"):
        LongTail.lists(tmp_path, *files)
    with pytest.raises(UsageError, match="does not exist"):
        LongTail.lists(tmp_path, tmp_path / "no.txt", files[1])
    for content, good in (
        ("cat\nblue fox", ("cat", "blue fox")),
        ("a cat\nb blue fox", ("cat", "blue fox")),
        ("a cat\nc blue fox", ("a cat", "c blue fox")),
    ):
        (tmp_path / "names.txt").write_text(content)
        assert read_class_names(tmp_path / "names.txt", ["a/1.png", "b/1.png"], [0, 1]) == good
    (tmp_path / "names.txt").write_text("cat")
    write_image(tmp_path / "b" / "1.png")
    with pytest.raises(DataError, match="has 1 names"):
        LongTail.lists(tmp_path, *files, class_names=tmp_path / "names.txt")


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=300),
        st.lists(st.tuples(st.text("ab/. ,\t", min_size=1, max_size=8), st.integers(-2, 4)), max_size=12).map(
            lambda r: "\n".join(f"{p} {k}" for p, k in r)
        ),
        st.binary(max_size=200),
    )
)
def test_fuzzed_text_files(tmp_path_factory, content):
    "Lists, class names and csv tables: a result or one of our own errors"
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    for name in ("list.txt", "names.json", "names.csv", "metadata.csv"):
        (folder / name).write_bytes(raw if name != "metadata.csv" else b"split,y,filename\n" + raw)
    for read in (
        lambda: read_list(folder / "list.txt"),
        lambda: read_class_names(folder / "list.txt"),
        lambda: read_class_names(folder / "names.json"),
        lambda: read_class_names(folder / "names.csv"),
        lambda: LongTail.lists(None, folder / "list.txt", folder / "list.txt"),
        lambda: LongTail.iwildcam(folder),
    ):
        try:
            read()
        except LtnbError as e:
            assert len(str(e)) < 1000


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_archives(tmp_path_factory, data):
    "Bytes of a good .npz changed, cut or replaced: a result or one of our own errors; pickles are never opened"
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(raw[: data.draw(st.integers(1, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        LongTail.npz(path)
    except LtnbError:
        pass


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_pickles_are_not_opened(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(class_names=np.array([Trap(), 1, 2], dtype=object)))
    with pytest.raises(DataError, match="plain arrays"):
        LongTail.npz(tmp_path / "a.npz")


def wild(root, rows, names="y,category_id,name\n0,0,empty\n1,2,peccary\n"):
    root.mkdir()
    (root / "metadata.csv").write_text("split,location,y,filename\n" + "\n".join(rows))
    if names:
        (root / "categories.csv").write_text(names)
    return root


def test_iwildcam(tmp_path):
    rows = [
        f"{s},{i},{y},{s}{i}{y}.jpg"
        for s in ("train", "val", "test", "id_val", "id_test")
        for y in (0, 1)
        for i in range(3 - y)
    ]
    root = wild(tmp_path / "w", [*rows, "train,1,99999,odd.jpg"])
    for s in ("train", "val", "test", "id_val", "id_test"):
        for y in (0, 1):
            for i in range(3 - y):
                write_image(root / "train" / f"{s}{i}{y}.jpg")
    ood, own = LongTail.iwildcam(root), load_data(DataConfig(dataset="iwildcam", data_root=str(root), domain="id"), 0)
    assert (
        ood.counts.tolist() == [3, 2]
        and ood.test.ids[0] == "train/test00.jpg"
        and own.test.ids[0] == "train/id_test00.jpg"
        and own.class_names == ("empty", "peccary")
    )
    assert "class 99999" in ood.notes[0] and ood.train[0][0].shape == (3, 30, 30)
    both = load_data(DataConfig(dataset="iwildcam", data_root=str(root), domain="both"), 0)
    assert own.shifted is None and (both.val.ids, both.test.ids) == (own.val.ids, own.test.ids)
    assert both.shifted.ids == ood.test.ids and len({d.fingerprint() for d in (ood, own, both)}) == 3
    assert both.in_memory().shifted.images.shape == (5, 3, 30, 30)
    assert LongTail.iwildcam(
        root.parent if root.name == "iwildcam_v2.0" else root.rename(tmp_path / "iwildcam_v2.0").parent
    ).counts.tolist() == [3, 2]


@pytest.mark.parametrize(
    "rows, names, word",
    [
        (["train,1,x,a.jpg"], None, "line 2: y must be a class number"),
        (["train,1,0,"], None, "filename"),
        (["train,1,0,a.jpg", "val,1,0,b.jpg"], None, "no row of the split 'test'"),
        (
            ["train,1,0,a.jpg", "val,1,0,b.jpg", "test,1,1,c.jpg"],
            "y,category_id,name\n0,0,empty\n1,2,peccary\n",
            "'peccary'.*no training image but 1 test",
        ),
        (
            ["train,1,0,a.jpg", "val,1,0,b.jpg", "test,1,2,c.jpg"],
            "y,category_id,name\n0,0,empty\n1,2,peccary\n",
            "has 2 names",
        ),
    ],
)
def test_iwildcam_refuses(tmp_path, rows, names, word):
    with pytest.raises(DataError, match=word):
        LongTail.iwildcam(wild(tmp_path / "w", rows, names))
    (tmp_path / "w" / "metadata.csv").write_text("split,location\n")
    with pytest.raises(DataError, match="lacks the column"):
        LongTail.iwildcam(tmp_path / "w")


def test_torchvision_fashion_mnist_and_imagenette(tmp_path):
    "torchvision's own readers on files in the official layout"
    import struct

    raw, rng = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, n in (("train", 400), ("t10k", 20)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 2051, n, 28, 28) + rng.integers(0, 256, n * 784, np.uint8).tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()
        )
    data = LongTail.fashion_mnist(tmp_path, imb_ratio=10)
    assert (
        data.counts.tolist() == longtail_counts(40, 10, 10).tolist()
        and data.train.images.shape[1:] == (1, 28, 28)
        and data.class_names[0] == "T-shirt/top"
    )
    wnids = [
        "n01440764",
        "n02102040",
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    ]
    folders(tmp_path / "imagenette2-160", [(w, 4) for w in wnids], ("train", "val"))
    data = load_data(DataConfig(dataset="imagenette", data_root=str(tmp_path), imb_ratio=4, image_size=16), 0)
    assert (
        data.class_names[:2] == ("tench", "English springer")
        and data.counts.tolist() == longtail_counts(4, 10, 4).tolist()
        and data.train[0][0].shape == (3, 16, 16)
        and len(data.test) == 40
    )
    with pytest.raises(UsageError, match="--download"):
        LongTail.imagenette(tmp_path / "no")


@pytest.mark.parametrize(
    "settings_, word",
    [
        (dict(image_size=32), "image_size is for"),
        (dict(dataset="npz", data_root="x", domain="id"), "domain is for iwildcam"),
        (dict(dataset="lists"), "--train-list"),
        (dict(dataset="folder"), "--data-root"),
        (dict(dataset="cifar10", train_list="x"), "train_list is for lists"),
        (dict(dataset="lists", train_list="a", test_list="b"), "--data-root"),
        (dict(val_per_class=5), "too small"),
    ],
)
def test_settings_that_a_source_does_not_use(settings_, word):
    with pytest.raises(UsageError, match=word):
        load_data(DataConfig(**settings_), 0)


def test_data_command(main, tmp_path):
    root = folders(tmp_path / "photos")
    code, out, err = main("data", "--dataset", "folder", "--data-root", root, "--out", tmp_path / "card", "--check")
    assert code == 0 and "12 of 'cat' down to 3 of 'eel'" in out and "every image can be read" in out and not err
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["bands"]["few"]["classes"] == 3 and {p.name for p in (tmp_path / "card" / "figures").iterdir()} == {
        "counts.png",
        "images.png",
    }
    (root / "test" / "cat" / "test0.png").write_bytes(b"")
    code, out, err = main("data", "--dataset", "folder", "--data-root", root, "--check")
    assert code == 1 and "1 image cannot be read" in err and "test0.png" in err and "classes" in out
    code, out, _ = main("data", "--imb-ratio", "20", "--out", tmp_path / "digits")
    assert (
        code == 0
        and "digits-lt20" in out
        and len((tmp_path / "digits" / "kept.txt").read_text().split()) == LongTail.digits(20).counts.sum()
    )
    for args, word in (
        (["--dataset", "folder"], "--data-root"),
        (["--dataset", "flder"], "folder"),
        (["--data-rot", "x"], "--data-root"),
        (["--n-epochs", "3"], "not an option"),
    ):
        code, _, err = main("data", *args)
        assert code == 2 and word in err, err


def test_data_command_reads_lists_alone(main, lists):
    code, out, _ = main(
        "data",
        "--dataset",
        "lists",
        "--train-list",
        lists / "Places_LT_train.txt",
        "--test-list",
        lists / "Places_LT_test.txt",
        "--class-names",
        lists / "Places_LT_classnames.txt",
    )
    assert (
        code == 0
        and "62,500 images: 4,980" in out
        and "365, images" in out
        and "71 classes with < 20" in out
        and "lists alone" in out
    )


def test_folder_through_the_recipe(main, tmp_path):
    folders(tmp_path / "photos", (("cat", 30), ("dog", 12), ("eel", 4)))
    code, out, err = main(
        "run",
        "ldmlr",
        "--plain",
        "--quiet",
        "--dataset",
        "folder",
        "--data-root",
        tmp_path / "photos",
        "--image-size",
        "8",
        "--n-epochs",
        "2",
        "--n-steps",
        "30",
        "--per-class",
        "10",
        "--head-steps",
        "5",
        "--scratch-steps",
        "5",
        "--out",
        tmp_path / "run",
    )
    assert code == 0 and "ldmlr + label shift" in out, err
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["classes"] == ["cat", "dog", "eel"]


@pytest.mark.parametrize("recipe", ["baseline", "ldmlr"])
def test_photographs_are_read_once_and_memory_does_not_change_what_they_are(tmp_path, monkeypatch, recipe):
    "Two seeds decode each file once; the fingerprint is that of the files, whether or not they fit into memory"
    from importlib import import_module

    root, module, seen = folders(tmp_path / "photos", (("cat", 30), ("dog", 12))), import_module(f"ltnb.{recipe}"), []
    original = files.decode_image
    monkeypatch.setattr(files, "decode_image", lambda path, size=None: seen.append(path) or original(path, size))
    config = getattr(module, {"baseline": "BaselineConfig", "ldmlr": "LDMLRConfig"}[recipe])
    small = dict(baseline=dict(heads=False), ldmlr=dict(n_steps=20, per_class=5, head_steps=2, scratch_steps=2))[recipe]
    r = module.run(
        config(
            dataset="folder",
            data_root=str(root),
            image_size=8,
            n_epochs=1,
            bs=16,
            seeds=2,
            out=str(tmp_path / "run"),
            device="cpu",
            precision="fp32",
            **small,
        )
    )
    assert len(seen) == len(set(seen)) == 84
    assert (
        json.loads((r.path / "config.json").read_text())["data"]["train"]
        == LongTail.folder(root, image_size=8).fingerprint()
    )


def test_what_was_left_out_is_said_and_kept(main, tmp_path):
    root = folders(tmp_path / "photos", (("cat", 30), ("dog", 12)))
    (root / "train" / "cat" / "train3.png").write_bytes(b"torn")
    args = [
        "run",
        "baseline",
        "--plain",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--image-size",
        "8",
        "--n-epochs",
        "1",
        "--bs",
        "16",
        "--heads",
        "false",
        "--out",
        tmp_path / "run",
    ]
    code, _, err = main(*args)
    assert code == 1 and "train3.png cannot be decoded" in err
    code, _, err = main(*args, "--bad-images", "skip")
    assert code == 0 and "note: left out 1 unreadable train image: train/cat/train3.png" in err, err
    assert "train3.png" in json.loads((tmp_path / "run" / "config.json").read_text())["data"]["notes"][0]
