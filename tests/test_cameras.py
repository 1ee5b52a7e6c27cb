"Digits through cameras: what is done to an image depends on it alone, and the second test has cameras of its own."

import numpy as np
import pytest
from ltnb.cameras import CAMERAS, UNSEEN, Camera, cameras_of, seen_by, through_cameras
from ltnb.core import DataError, UsageError
from ltnb.data import ImageSet, LongTail
from ltnb.knowledge import knowledge_of
from ltnb.sources import DataConfig, load_data


@pytest.fixture(scope="module")
def clean():
    return LongTail.digits()


@pytest.fixture(scope="module")
def wild():
    return load_data(DataConfig(dataset="camera_digits"), 0)


def test_what_a_camera_does_to_an_image_depends_on_nothing_else(clean):
    part = clean.train.take(range(40))
    names = cameras_of(part.ids, CAMERAS)
    whole = seen_by(part.images, part.ids, names, CAMERAS)
    order = np.random.default_rng(0).permutation(40)[:17]
    own = part.take(order)
    assert np.array_equal(seen_by(own.images, own.ids, cameras_of(own.ids, CAMERAS), CAMERAS), whole[order])
    assert len(seen_by(part.images[:0], [], [], CAMERAS)) == 0
    assert len({seen_by(part.images[:1], part.ids[:1], [n], UNSEEN).tobytes() for n in UNSEEN}) == len(UNSEEN)


def test_each_fault_grows_with_its_severity(clean):
    x, ids = clean.test.images[::20], clean.test.ids[::20]
    for fault in vars(Camera()):
        far = []
        for severity in (0.0, 0.3, 1.0):
            seen = seen_by(x, ids, ["one"] * len(x), {"one": Camera(**{fault: severity})})
            assert seen.dtype == np.uint8 and seen.shape == x.shape
            far.append(np.abs(seen.astype(float) - x).mean())
        assert far[0] == 0 and far[0] < far[1] < far[2], fault
    for size in ((3, 5, 9), (1, 1, 1), (3, 32, 32)):  # of any size
        some = np.full((2, *size), 200, np.uint8)
        assert seen_by(some, ["a", "b"], ["bush"] * 2, UNSEEN).shape == some.shape


def test_digits_in_the_wild_are_digits(clean, wild):
    rows = np.arange(600) % 60 < 30
    assert np.array_equal(wild.test.images, clean.test.images[rows])  # clean, and their own pixels
    assert wild.test.counts.tolist() == wild.shifted.counts.tolist() == [30] * 10
    assert np.array_equal(wild.train.labels, clean.train.labels) and wild.subset_hash == clean.subset_hash
    names = cameras_of(clean.train.ids, CAMERAS)
    same = np.array([np.array_equal(a, b) for a, b in zip(wild.train.images, clean.train.images, strict=True)])
    assert same[np.array(names) == "gate"].all() and not same[np.array(names) != "gate"].any()
    assert [wild.groups[i] for i in wild.train.ids] == names and set(names) == set(CAMERAS)
    assert {wild.groups[i] for i in wild.shifted.ids} == set(UNSEEN) and not set(UNSEEN) & set(CAMERAS)
    hidden = set(clean.test.take(~rows).ids)
    assert not hidden & set(wild.test.ids) and not hidden & set(clean.train.ids)


def test_a_set_with_shifted_images_is_another_set(clean, wild):
    assert LongTail(clean.train, clean.test, clean.name, kept=clean.kept).fingerprint() == clean.fingerprint()
    assert clean.shifted is None and list(clean.parts) == ["train", "test"]
    more = LongTail(clean.train, clean.test, clean.name, kept=clean.kept, shifted=wild.shifted)
    assert len({more.fingerprint(), clean.fingerprint(), wild.fingerprint()}) == 3
    again = load_data(DataConfig(dataset="camera_digits"), 0)
    assert again.fingerprint() == wild.fingerprint() == wild.in_memory(2).fingerprint()
    assert load_data(DataConfig(dataset="camera_digits"), 1).class_names != wild.class_names
    assert wild.describe()["images"] == {"train": 278, "test": 300, "shifted": 300}
    assert "300 test images under other conditions" in wild.card(compare=False)
    assert wild.ready().shifted is wild.shifted
    other = ImageSet(np.zeros((2, 1, 4, 4), np.uint8), [0, 1], clean.class_names)
    with pytest.raises(DataError, match="shifted images"):
        LongTail(clean.train, clean.test, clean.name, shifted=other)


def test_settings_of_the_set():
    data = load_data(DataConfig(dataset="camera_digits", imb_ratio=20, n_max=100), 3)
    assert data.counts.max() == 100 and data.imb_ratio == 20 and data.name == "camera-digits-lt20"
    assert [k.name for k in knowledge_of("camera_digits", data.class_names)] == list(data.class_names)
    for change, word in ((dict(val_per_class=2), "too small for a validation set"), (dict(data_root="x"), "bundled")):
        with pytest.raises(UsageError, match=word):
            load_data(DataConfig(dataset="camera_digits", **change), 0)
    with pytest.raises(DataError, match="between 0 and 1"):
        Camera(blurred=1.5)
    odd = LongTail.digits(n_test=15)
    with pytest.raises(DataError, match="an odd number"):
        through_cameras(odd, "odd")
