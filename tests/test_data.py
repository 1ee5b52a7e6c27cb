"Cuts, sources and their refusals."
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.data import BANDS, DataConfig, LongTail, bands, load_data, longtail_counts, longtail_indices, thirds


@given(st.integers(2, 200), st.integers(1, 5000), st.floats(1, 500))
def test_profile_falls_from_n_max_to_its_share(k, n_max, ratio):
    counts = longtail_counts(n_max, k, ratio)
    assert counts[0] == n_max and (np.diff(counts) <= 0).all()
    assert abs(counts[-1] - n_max / ratio) <= 1


def test_profile_ends_at_one_image_for_every_whole_ratio():
    assert all(longtail_counts(n, 10, n)[-1] == 1 for n in range(1, 3000))


@pytest.mark.parametrize("name, totals", [("cifar10", {10: 20431, 50: 13996, 100: 12406, 200: 11203}), ("cifar100", {10: 19573, 50: 12608, 100: 10847, 200: 9502})])
def test_official_cifar_subsets(name, totals):
    "Index for index, the subsets of the LDAM-DRW code"
    z = np.load(shared("cifar_lt_splits.npz"))
    for ratio, total in totals.items():
        kept = longtail_indices(z[f"{name}_label"], ratio)
        assert len(kept) == total
        assert (np.sort(kept) == np.sort(z[f"{name}_ldam_seed0_if{ratio}"])).all()


def test_indices_by_hash():
    "The same without the files: a balanced toy set whose cut must never change"
    kept = longtail_indices(np.tile(np.arange(10), 500), 100)
    assert hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()[:16] == "1dcb3c7b51b2fb52"


@given(st.lists(st.integers(1, 3000), min_size=3, max_size=60))
def test_bands_and_thirds_partition(counts):
    for groups in (bands(counts), thirds(counts)): assert sorted(np.concatenate(list(groups.values()))) == list(range(len(counts)))
    assert all(counts[k] > 100 for k in bands(counts)["many"]) and all(counts[k] < 20 for k in bands(counts)["few"])


@pytest.mark.parametrize("seed", range(3))
def test_digits(seed):
    data = LongTail.digits(seed=seed)
    assert data.counts.tolist() == longtail_counts(114, 10, 100).tolist() and data.test.counts.tolist() == [60] * 10
    assert not set(data.train.ids) & set(data.test.ids), "train and test share an image"
    assert sorted(data.class_names) == [str(i) for i in range(10)]
    from sklearn.datasets import load_digits
    raw = {x.tobytes(): t for x, t in zip(np.round(load_digits().images * 255 / 16).astype(np.uint8), load_digits().target)}
    for part in (data.train, data.test): assert all(data.class_names[y] == str(raw[x.tobytes()]) for x, y in zip(part.images, part.labels))


def arrays(**changes):
    rng = np.random.default_rng(0)
    d = dict(train_images=rng.integers(0, 256, (30, 8, 8, 3), np.uint8), train_labels=np.repeat([0, 1, 2], 10), test_images=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), test_labels=np.array([0, 0, 1, 1, 2, 2]))
    return {k: v for k, v in {**d, **changes}.items() if v is not None}


@pytest.mark.parametrize("changes, word", [
    (dict(train_labels=None), "lacks train_labels"), (dict(train_labels=np.repeat([0, 2], 15)), "class '1' .number 1. has no training image"), (dict(train_labels=np.full(30, -1)), "0 or more"),
    (dict(class_names=np.array(["a", "b"])), "0 to 1 for 2 classes"), (dict(train_labels=np.zeros(29, int)), "30 images need 30 labels"), (dict(train_images=np.zeros((30, 8, 8, 3))), "uint8"),
    (dict(test_images=np.zeros((6, 9, 9, 3), np.uint8)), "shape"), (dict(train_labels=np.array(["a"] * 30)), "whole numbers"), (dict(train_images=np.zeros((30, 8), np.uint8)), "must be"),
    (dict(train_labels=np.array([{}] * 30)), "damaged or no .npz"), (dict(test_labels=np.array([0, 0, 1, 1, 2, 2**33])), "cannot fill"), (dict(class_names=np.array("abc")), "list of texts"),
    (dict(class_names=np.array([["a"], ["b"], ["c"]])), "list of texts"), (dict(val_labels=np.zeros(3, int)), "no val_images")])
def test_npz_refuses(tmp_path, changes, word):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(DataError, match=word): LongTail.npz(tmp_path / "a.npz")


def test_npz_variants(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(train_labels=np.repeat([0, 1, 2], 10)[:, None], class_names=np.array(["x", "y", "z"])))
    data = LongTail.npz(tmp_path / "a.npz", imb_ratio=5)
    assert data.counts.tolist() == [10, 4, 2] and data.class_names == ("x", "y", "z")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"): LongTail.npz(tmp_path / "a.npz")


def test_cut_that_would_empty_a_class(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(UsageError, match="use at most 10"): LongTail.npz(tmp_path / "a.npz", imb_ratio=100)


def test_real_cifar(tmp_path):
    "The pack beside the project, through the layout that users have"
    out = tmp_path / "c.npz"
    subprocess.run([sys.executable, shared("load.py"), shared("cifar10_lt.npz"), "--out", out], check=True, capture_output=True)
    data = LongTail.npz(out)
    assert data.counts.tolist() == longtail_counts(5000, 10, 100).tolist() and len(data.test) == 10000 and data.class_names[0] == "airplane"


def test_torchvision_cifar(tmp_path, monkeypatch):
    "torchvision's own reader on files in the official layout"
    from torchvision.datasets import CIFAR10
    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    write = lambda name, obj: (folder / name).write_bytes(pickle.dumps(obj)) and [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    batch = lambda n: {"data": rng.integers(0, 256, (n, 3072), np.uint8), "labels": list(np.arange(n) % 10)}
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(1000))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(50))])
    name, md5 = write("batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    data = LongTail.cifar10(tmp_path, imb_ratio=100)
    assert data.counts.tolist() == longtail_counts(100, 10, 100).tolist() and data.train.images.shape[1:] == (3, 32, 32)
    (folder / "test_batch").write_bytes(b"torn")
    with pytest.raises(UsageError, match="--download"): LongTail.cifar10(tmp_path)


def test_sources_by_config():
    assert load_data(DataConfig(imb_ratio=20), 0).imb_ratio == 114 / 5
    with pytest.raises(UsageError, match="at most"): LongTail.digits(n_max=1000)
    for cfg, word in ((DataConfig(download=True), "--download"), (DataConfig(dataset="npz"), "--data-root"), (DataConfig(data_root="x"), "npz"), (DataConfig(dataset="cifar10", data_root="nowhere"), "--download")):
        with pytest.raises(LtnbError, match=word): load_data(cfg, 0)
    assert list(BANDS) == list(bands([1]))
