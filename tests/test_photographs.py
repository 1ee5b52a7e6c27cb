"Which files of a folder are photographs, which folders are classes, and that nothing is left out without a word."

import csv
import errno
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from ltnb import folders, pictures
from ltnb.core import DataError, UsageError
from ltnb.progress import Progress
from ltnb.core import valid_text
from ltnb.folders import Photographs, find_split, image_suffixes, is_ltnb_output, split_role
from ltnb.labels import ordered
from ltnb.sources import LongTail, Photos
from ltnb.pictures import figure_names
from PIL import Image

TRAIN = ["run", "baseline", "--plain", "--n-epochs", "1", "--bs", "4", "--heads", "false", "--device", "cpu"]
TRAIN += ["--dataset", "folder", "--data-root"]


def photo(path, k=0, size=16):
    "An image of its own at a path; the suffix says the kind, PNG where it says none"
    path = os.fsencode(path) if isinstance(path, str) else path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(list(os.fsencode(path)))
    a = rng.integers(0, 60, (size, size, 3), np.uint8)
    a[..., k % 3] += 150
    kind = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}.get(
        os.path.splitext(os.fsdecode(path))[1].lower(), "PNG"
    )
    with open(path, "wb") as f:
        Image.fromarray(a).save(f, kind)


def photos(root, sizes=(("cat", 10), ("dog", 6)), suffix="png"):
    for k, (name, n) in enumerate(sizes):
        for i in range(n):
            photo(f"{root}/{name}/{i:02}.{suffix}", k)
    return root


def said(data):
    return " ".join(data.notes)


# files


def test_hidden_and_helper_folders_are_not_entered(tmp_path):
    root = photos(tmp_path / "p")
    plain = LongTail.folder(root)
    for helper in (
        ".ipynb_checkpoints",
        ".thumbnails",
        "@eaDir/00.png",
        "__MACOSX",
        "__MACOSX/cat",
        ".git/x",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "#recycle",
    ):
        for at in (root, root / "cat"):
            photo(f"{at}/{helper}/copy.jpg")
    for name in ("._00.png", ".DS_Store", "Thumbs.db", "desktop.ini", "00.png:Zone.Identifier"):
        (root / "cat" / name).write_bytes(b"x")
    data = LongTail.folder(root)
    assert (
        data.train.ids == plain.train.ids
        and data.fingerprint() == plain.fingerprint()
        and data.class_names == ("cat", "dog")
    )
    assert "hidden folders and those of helper programs" in said(data) and "no photographs" not in said(data)


def test_every_suffix_that_pillow_opens_and_no_other(tmp_path):
    root = photos(tmp_path / "p")
    for i, suffix in enumerate((".jfif", ".jpe", ".JPG", ".bmp", ".webp", ".apng")):
        photo(f"{root}/cat/more{i}{suffix}")
    for name in ("a.pdf", "a.mpg", "a.h5", "notes.txt", "model.eps", "icon.ico"):
        (root / "cat" / name).write_bytes(b"x")
    for name in ("a.heif", "b.NEF", "c.cr2", "d.dng"):
        (root / "dog" / name).write_bytes(b"x")
    found = Photographs(root)
    assert len(found.paths) == 22 and len(found.left["other"]) == 6 and len(found.left["closed"]) == 4
    text = " ".join(found.notes())
    assert "pillow-heif" in text and "4 files (dog/a.heif" in text and "6 files (cat/a.h5" in text
    assert {".tif", ".jp2", ".pgm", ".pfm"} <= set(image_suffixes()) and not {
        ".pdf",
        ".mpg",
        ".hdf",
        ".txt",
        ".eps",
    } & set(image_suffixes())


def test_links_are_followed_once_and_not_around(tmp_path):
    root = photos(tmp_path / "p")
    other = photos(tmp_path / "other", (("x", 5), ("y/z", 2)))
    os.symlink(other / "x", root / "cat" / "a link")
    os.symlink(other / "y", root / "eel")
    os.symlink(root, root / "cat" / "up")
    os.symlink(tmp_path, root / "cat" / "higher")
    os.symlink(root / "cat", other / "y" / "z" / "back")
    os.symlink("self", root / "cat" / "self")
    os.symlink(root / "dog", root / "a dog again")
    os.symlink(root / "dog" / "00.png", root / "cat" / "linked file.png")
    os.symlink("nothing.png", root / "cat" / "nothing.png")
    found = Photographs(root)
    classes = folders.class_folders(found)
    assert {c: len(p) for c, p in classes.items()} == {"cat": 16, "dog": 6, "eel": 2}
    assert sorted(found.left["again"]) == ["a dog again", "cat/higher", "cat/up", "eel/z/back"] and sorted(
        found.left["broken"]
    ) == ["cat/nothing.png", "cat/self"]
    data = LongTail.folder(root)
    assert "already by another path: 4" in said(data) and "links to nothing: 1 .png and 1 other files" in said(data)
    whole = photos(tmp_path / "linked" / "real", (("cat", 3), ("dog", 3)))
    for c in ("cat", "dog"):
        (tmp_path / "set" / "train").mkdir(parents=True, exist_ok=True)
        os.symlink(whole / c, tmp_path / "set" / "train" / c)
    os.symlink(photos(tmp_path / "t"), tmp_path / "set" / "test")
    assert LongTail.folder(tmp_path / "set").counts.tolist() == [3, 3]
    os.symlink("test", tmp_path / "set" / "val")
    data = LongTail.folder(tmp_path / "set")
    assert len(data.val) == len(data.test) == 16, "a part that is a link to another part is both"


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, main):
    root, scan = photos(tmp_path / "p", (("cat", 10), ("dog", 6), ("dog/young", 6))), os.scandir

    def locked(path):
        if str(path).endswith("young"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    for call in (lambda: LongTail.folder(root), lambda: Photographs(root)):
        with pytest.raises(DataError, match="dog/young cannot be read .Permission denied"):
            call()
    code, _, err = main("data", "--dataset", "folder", "--data-root", root)
    assert code == 1 and "dog/young" in err


def test_loose_and_closed_files_are_counted(tmp_path, main):
    root = photos(tmp_path / "p")
    for i in range(2):
        photo(f"{root}/loose{i}.jpg")
    for i in range(3):
        (root / "dog" / f"h{i}.heic").write_bytes(b"....ftypheic")
    photo(f"{root}/cat/.hidden.png")
    code, out, err = main("data", "--dataset", "folder", "--data-root", root)
    assert (
        code == 0
        and "3 .heic files (dog/h0.heic" in out
        and "loose, beside the class folders: 2 .jpg files" in out
        and "hidden: 1 .png file" in out
    ), out
    code, _, err = main(*TRAIN, root, "--out", tmp_path / "run")
    assert code == 0 and "note: left out, cannot be opened here" in err and "note: left out, loose" in err, err
    assert any(".heic" in n for n in json.loads((tmp_path / "run" / "config.json").read_text())["data"]["notes"])


def test_class_folders_without_photographs_are_named(tmp_path):
    root = photos(tmp_path / "p")
    (root / "eel").mkdir()
    with pytest.raises(DataError, match="'eel' holds no photograph .it is empty"):
        LongTail.folder(root)
    (root / "eel" / "a.heic").write_bytes(b"x")
    (root / "eel" / "readme.md").write_bytes(b"x")
    with pytest.raises(
        DataError,
        match="'eel' holds no photograph .in it: 1 .heic file .eel/a.heic. that cannot be opened here; 1 .md file",
    ):
        LongTail.folder(root)
    split = photos(tmp_path / "s" / "train").parent
    photos(split / "test")
    shutil.rmtree(split / "test" / "dog")
    (split / "test" / "dog").mkdir()
    assert "the class folder 'test/dog' holds no photograph (it is empty)." in LongTail.folder(split).notes


# what ltnb wrote

RUN = {"config.json": json.dumps({"recipe": "baseline", "given": {}}), "scores.json": "[]", "figures/counts.png": ""}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        RUN,
        {"run.lock": ""},
        {"92_run_ldmlr.ipynb": "{}"},
        {"manifest.jsonl": "", "shard-000.safetensors": "", "png/cat/1.png": ""},
        {"shards.jsonl": ""},
        {
            "card.json": json.dumps({"bands": {}, "imb_ratio": 1}),
            "kept.txt": "",
            "figures/counts.png": "",
            "figures/images.png": "",
        },
    ],
)
@pytest.mark.parametrize("at", ["runs/x", "out", "cat/deep/out"])
def test_outputs_are_no_classes(tmp_path, files, at):
    root = photos(tmp_path / "p")
    before = LongTail.folder(root)
    write(root / at, files)
    data = LongTail.folder(root)
    assert (
        is_ltnb_output(root / at)
        and data.class_names == ("cat", "dog")
        and data.fingerprint() == before.fingerprint()
        and data.train.ids == before.train.ids
    )
    assert "what ltnb wrote: 1" in said(data)


def test_photographs_stay_whatever_was_written_beside_them(tmp_path):
    root = photos(tmp_path / "p")
    before = LongTail.folder(root).fingerprint()
    write(
        root / "cat",
        {"card.json": json.dumps({"bands": {}, "imb_ratio": 1}), "figures/counts.png": "", "figures/images.png": ""},
    )
    write(root, RUN | {"run.lock": ""})
    assert (
        not is_ltnb_output(root) and not is_ltnb_output(root / "cat") and LongTail.folder(root).fingerprint() == before
    )
    (root / "dog" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert LongTail.folder(root).counts.tolist() == [8, 5]
    for name in ("figures", "model"):
        for i in range(2):
            photo(f"{root}/{name}/{i}.png")
    (root / "run.lock").unlink(), (root / "config.json").unlink(), (root / "91_run_baseline.ipynb").write_text("{}")
    assert LongTail.folder(root).class_names == ("cat", "dog", "figures", "model")
    split = photos(tmp_path / "s" / "train").parent
    photos(split / "test")
    write(split / "train", {"card.json": json.dumps({"bands": {}, "imb_ratio": 1})})
    write(split / "runs" / "a", RUN)
    assert LongTail.folder(split).counts.tolist() == [10, 6]


def test_the_same_command_twice_in_the_data_folder(main, tmp_path, monkeypatch):
    root = photos(tmp_path / "p")
    monkeypatch.chdir(root)
    monkeypatch.setenv("LTNB_RUNS", "runs")
    args = [*TRAIN, "."]
    code, _, err = main(*args)
    assert code == 0, err
    (run,) = (root / "runs").iterdir()
    first = json.loads((run / "config.json").read_text())["data"]["train"]
    (run / "scores.json").unlink()  # killed before its end
    (root / "91_run_baseline.ipynb").write_text("{}")
    code, _, err = main(*args)
    assert (
        code == 0 and "runs" in err and (run / "scores.json").exists() and LongTail.folder(root).fingerprint() == first
    ), err
    for out in ("card", ".", "cat"):
        code, _, err = main("data", "--dataset", "folder", "--data-root", ".", "--out", out)
        assert code == 2 and "--out" in err, "a card in the data would be read as a class"
    assert LongTail.folder(root).class_names == ("cat", "dog") and LongTail.folder(root).fingerprint() == first


def test_the_run_of_the_command_in_the_data_folder(main, tmp_path, monkeypatch):
    "Through the notebook: the default run directory lies in the data, and the same command finds it finished"
    root = photos(tmp_path / "p")
    monkeypatch.chdir(root)
    monkeypatch.setenv("LTNB_RUNS", "runs")
    args = [
        "run",
        "baseline",
        "--dataset",
        "folder",
        "--data-root",
        ".",
        "--n-epochs",
        "1",
        "--bs",
        "8",
        "--heads",
        "false",
    ]
    for _ in range(2):
        code, out, err = main(*args, "--device", "cpu")
        assert code == 0 and "cross-entropy" in out, err
    assert len(list((root / "runs").iterdir())) == 1 and LongTail.folder(root).class_names == ("cat", "dog")
    code, _, err = main(*args, "--device", "cpu", "--out", "cat/run")
    assert code == 2 and "--out" in err, "a directory that was typed is still tested"


def test_the_file_of_a_class_order_can_lie_elsewhere(main, tmp_path, monkeypatch):
    root = photos(tmp_path / "p")
    (tmp_path / "order.txt").write_text("dog\ncat\n")
    (tmp_path / "other.txt").write_text("cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    args = ["run", "baseline", "--plain", "--dataset", "folder", "--data-root", root, "--n-epochs", "1", "--bs", "8"]
    args += ["--heads", "false", "--device", "cpu", "--out", "run", "--class-order"]
    assert main(*args, "order.txt")[0] == 0 and main(*args, tmp_path / "order.txt")[0] == 0
    code, _, err = main(*args, "other.txt")
    assert code == 2 and "other data" in err


def test_folders_of_thumbnails_are_not_read_beside_photographs(tmp_path):
    root = photos(tmp_path / "p")
    before = LongTail.folder(root).counts.tolist()
    for name in ("thumbs", "Thumbnails", "_thumbnails"):
        photo(f"{root}/cat/{name}/1.png")
    assert LongTail.folder(root).counts.tolist() == before


# splits


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("training_set", "test_set"),
        ("TRAIN", "TEST"),
        ("train", "testing"),
        ("trainset", "testset"),
        ("Training Images", "Test Images"),
        ("images_train", "images_test"),
        ("TrainingSet", "TestSet"),
        ("train2017", "test2017"),
        ("train", "validation"),
        ("train", "dev"),
        ("seg_train", "seg_test"),
        ("train_data", "eval"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "dataset/"])
def test_splits_under_other_names(tmp_path, names, wrapper):
    for n, sizes in zip(names, ((("cat", 5), ("dog", 3)), (("cat", 2), ("dog", 2))), strict=True):
        photos(tmp_path / "p" / wrapper / n, sizes)
    data = LongTail.folder(tmp_path / "p")
    assert (
        data.class_names == ("cat", "dog")
        and data.counts.tolist() == [5, 3]
        and data.test.counts.tolist() == [2, 2]
        and data.name == "p"
    )
    assert names[1] in said(data) or names == ("train", "test")


def test_validation_and_what_lies_beside_a_split(tmp_path):
    for n in ("train", "valid", "test", "raw"):
        photos(tmp_path / "p" / n)
    write(tmp_path / "p" / "runs" / "x", RUN)
    photo(f"{tmp_path}/p/front.png")
    data = LongTail.folder(tmp_path / "p")
    assert len(data.val) == len(data.test) == 16 and "'valid' is the val set." in data.notes
    assert (
        "not used, beside 'test', 'train', 'valid': 'raw'." in data.notes
        and "loose, beside the class folders: 1 .png file (front.png)" in said(data)
    )


@pytest.mark.parametrize(
    "tree, words",
    [
        (("train/a", "train/b", "val/a", "val/b", "validation/a", "validation/b"), ("'val'", "'validation'")),
        (("train/a", "train/b", "Train/a", "Train/b", "test/a"), ("'train'", "'Train'")),
        (("Test/a", "Test/b", "Other/a", "Other/b"), ("'Test'",)),
        (("Test/a", "Test/b"), ("'Test'",)),
        (("fold1/a", "fold1/b", "fold2/a", "fold2/b"), ("'fold1'", "'fold2'")),
        (("train", "test"), ("'train'", "'test'")),
        (("cat/train", "cat/test", "dog/train", "dog/test"), ("'train'", "cat")),
        (("train1/a", "train2/a", "test/a"), ("'train1'", "'train2'")),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_names(tmp_path, main, tree, words):
    for at in tree:
        photos(tmp_path / "p", ((at, 5),))
    code, _, err = main("data", "--dataset", "folder", "--data-root", tmp_path / "p")
    assert code == 2 and all(w in err for w in words), err


def test_a_class_can_be_called_test(tmp_path):
    data = LongTail.folder(photos(tmp_path / "p", (("blood", 6), ("test", 6), ("urine", 6))))
    assert data.class_names == ("blood", "test", "urine") and "'test' is taken as a class" in said(data)
    data = LongTail.folder(
        photos(tmp_path / "q", (("bus", 6), ("train", 6), ("car", 6), ("test tube", 6), ("train station", 6)))
    )
    assert data.n_classes == 5 and "'train' is taken as a class" in said(data)
    nested = photos(tmp_path / "n", (("cat/indoor", 5), ("cat/outdoor", 5), ("dog/indoor", 5), ("dog/outdoor", 5)))
    assert LongTail.folder(nested).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "name, role",
    [
        ("train", "train"),
        ("Training-Set", "train"),
        ("VAL", "val"),
        ("testimages", "test"),
        ("cat", None),
        ("trainer", None),
        ("train_test", None),
        ("latest", None),
        ("Übertrain", None),
        ("contest", None),
    ],
)
def test_roles_of_names(name, role):
    assert (split_role(name) or (None,))[0] == role


def test_one_class_folder_names_the_way_on(tmp_path):
    photos(tmp_path / "p" / "photos")
    with pytest.raises(DataError, match="did you mean --data-root .*p/photos"):
        LongTail.folder(tmp_path / "p")
    assert find_split(tmp_path / "p")[1] == {}


# messages


def test_messages_about_folders(tmp_path, main):
    def fails(root, *words, code=1, more=()):
        got, _, err = main("data", "--dataset", "folder", "--data-root", root, *more)
        assert got == code and all(w in err for w in words), err

    for part in ("val", "test"):
        photos(tmp_path / part / "train")
        for i in range(3):
            photo(f"{tmp_path}/{part}/{part}/{i}.jpg")
        fails(tmp_path / part, f"/{part} holds photographs without class folders", "cat/")
    fails(
        photos(tmp_path / "few", (("a", 4), ("b", 3), ("c", 1))),
        "no class has 5 photographs",
        "--test-fraction",
        "0.25",
    )
    photos(tmp_path / "case" / "train")
    photos(tmp_path / "case" / "val", (("Cat", 3), ("dog", 3)))
    fails(tmp_path / "case", "case/val has the class 'Cat'", "Did you mean 'cat'?")
    bad = photos(tmp_path / "bad")
    for name in ("cat/00.png", "cat/02.png", "dog/03.png"):
        (bad / name).write_bytes(b"")
    fails(bad, "cat/00.png", "cat/02.png", "dog/03.png", "3 images cannot be read", more=["--check"])


# order of the classes


def test_how_photographs_are_read_is_one_record(tmp_path):
    root = photos(tmp_path / "p")
    by_name = LongTail.folder(root, image_size=8, bad_images="skip", imb_ratio=2, val_per_class=1)
    by_record = LongTail.folder(root, 2, photos=Photos(8, "skip"), val_per_class=1)
    assert by_name.fingerprint() == by_record.fingerprint() and by_name.train.images.shape[1:] == (3, 8, 8)
    assert LongTail.folder(root, photos=Photos(8), image_size=4).train.images.shape[1:] == (3, 4, 4)
    for call in (LongTail.folder, lambda root, **given: LongTail.lists(None, photo_list(tmp_path, root), **given)):
        with pytest.raises(UsageError, match="no setting 'image_sise'. Did you mean 'image_size'"):
            call(root, image_sise=8)


def photo_list(tmp_path, root):
    "A list file of class folders"
    lines = [f"{p.relative_to(root)} {k}" for k, c in enumerate(("cat", "dog")) for p in sorted((root / c).iterdir())]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return tmp_path / "list.txt"


def test_class_order(tmp_path, main):
    root = photos(tmp_path / "p", (("c1", 6), ("c10", 6), ("c2", 6)))
    by_name, natural = LongTail.folder(root), LongTail.folder(root, class_order="natural")
    assert by_name.class_names == ("c1", "c10", "c2") and natural.class_names == ("c1", "c2", "c10")
    assert (
        sorted(by_name.train.ids) == sorted(natural.train.ids)
        and LongTail.folder(root, class_order="name").fingerprint() == by_name.fingerprint() != natural.fingerprint()
    )
    (tmp_path / "order.txt").write_text("c2\nc1\nc10\n")
    data = LongTail.folder(root, class_order=str(tmp_path / "order.txt"))
    assert data.class_names == ("c2", "c1", "c10") and all(
        data.class_names[y] == i.split("/")[0] for i, y in zip(data.train.ids, data.train.labels, strict=True)
    )
    for text, word in (
        ("c2\nc1\n", "does not name 'c10'"),
        ("c2\nc1\nc10\nc3\n", "names 'c3'"),
        ("c2\nc1\nc10\nc1\n", "more than once"),
    ):
        (tmp_path / "order.txt").write_text(text)
        with pytest.raises(UsageError, match=word):
            LongTail.folder(root, class_order=str(tmp_path / "order.txt"))
    assert ordered(["b", "A2", "a10", "a1"], "natural") == ["a1", "A2", "a10", "b"]
    code, _, err = main("data", "--dataset", "folder", "--data-root", root, "--class-order", "naturel")
    assert code == 2 and "natural" in err
    code, out, _ = main("data", "--class-order", "natural")
    assert code == 2


# names

ODD = [os.fsdecode(b"caf\xe9"), "日本", "$x$", "two\nlines", "  ", "tab\there", "n" * 200]


def test_odd_names_work_everywhere(tmp_path, main):
    root = tmp_path / os.fsdecode(b"r\xf6ot")
    for k, name in enumerate(ODD):
        for i in range(6):
            photo(f"{root}/{name}/{os.fsdecode(bytes([0xFE, 0x30 + i]))}.png", k)
    photo(f"{root}/{os.fsdecode(bytes([0xFF]))}.png")
    data = LongTail.folder(root)
    assert (
        data.n_classes == len(ODD)
        and "caf\\xe9" in data.class_names
        and "日本" in data.class_names
        and data.in_memory().train.images.std() > 10
    )
    for text in (data.card(), json.dumps(data.describe(), ensure_ascii=False), *data.train.ids, *data.notes):
        text.encode()
    assert len(set(data.train.ids)) == len(data.train) and data.fingerprint()
    code, out, err = main("data", "--dataset", "folder", "--data-root", root, "--out", tmp_path / "card", "--check")
    assert code == 0, err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = main(*TRAIN, root, "--out", tmp_path / "run")
    assert code == 0, err
    code, out, err = main("predict", "--model", tmp_path / "run", "--images", root, "--out", tmp_path / "p.csv")
    assert code == 0 and "43 photographs" in out, err
    rows = list(csv.reader((tmp_path / "p.csv").open(encoding="utf-8", newline="")))
    assert len({r[0] for r in rows}) == 44 and "\\xff.png" in {r[0] for r in rows}
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["data_root"] == str(root), (
        "the name of the folder comes back as it was"
    )


def test_names_in_figures(tmp_path):
    from matplotlib.figure import Figure
    from ltnb.pictures import plot_counts

    texts, family = figure_names([*ODD, "\U0001f9ff", "עברית", "a_{b}"], 20)
    assert (
        all(t.isprintable() and t.strip() and len(t) < 220 for t in texts)
        and r"\$x\$" in texts
        and texts[4] == "'  '"
        and texts[3] == r"two\nlines"
    )
    assert texts[1] in ("日本", r"\u65e5\u672c") and family
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = Figure()
        plot_counts(np.arange(1, len(ODD) + 1), ODD, "日本 $", ax=fig.subplots())
        fig.savefig(tmp_path / "a.png")
    assert (
        valid_text("plain") == "plain"
        and valid_text(os.fsdecode(b"\xff")) == "\\xff"
        and valid_text("\ud800") == "\\ud800"
    )


def test_an_installed_font_is_used(tmp_path, monkeypatch):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    pen = TTGlyphPen(None)
    for go, at in ((pen.moveTo, (0, 0)), (pen.lineTo, (500, 0)), (pen.lineTo, (500, 500))):
        go(at)
    pen.closePath()
    glyph = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "a"])
    font.setupCharacterMap({0x65E5: "a"})
    font.setupGlyf({".notdef": glyph, "a": glyph})
    font.setupHorizontalMetrics({".notdef": (600, 0), "a": (600, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Ltnb Test", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "test.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    pictures._fonts_for.cache_clear()
    font_manager.fontManager.addfont(tmp_path / "test.ttf")
    texts, family = figure_names(["日", "本"])
    assert (
        texts[0] == "日"
        and (texts[1] == r"\u672c" or len(family) > 2)
        and (family[-1] == "Ltnb Test" or len(family) > 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from matplotlib.figure import Figure

        fig = Figure()
        fig.text(0.5, 0.5, texts[0], fontfamily=family)
        fig.savefig(tmp_path / "a.png")
    pictures._fonts_for.cache_clear()


# predict


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from ltnb.models import build_model
    from ltnb.classifier import Classifier

    folder = tmp_path_factory.mktemp("model")
    Classifier(build_model("convnet", 2), ("cat", "dog"), (3, 8, 8), [0.5] * 3, [0.25] * 3, "convnet").save(folder)
    return folder


def test_predict_says_what_it_did_not_take(tmp_path, main, model):
    root = photos(tmp_path / "p", (("a", 3), (".thumbnails", 3), ("deep/er", 2)))
    os.symlink(photos(tmp_path / "other", (("x", 4),)) / "x", root / "more")
    write(root / "runs" / "x", RUN)
    for name in ("a.heic", "b.heic", "notes.txt"):
        (root / name).write_bytes(b"x")
    photo(f"{root}/a/j.jfif")
    code, out, err = main("predict", "--model", model, "--images", root, "--out", tmp_path / "p.csv")
    assert code == 0 and "10 photographs, 0 left out" in out, err
    assert (
        "2 .heic files" in err and "1 .txt file" in err and "what ltnb wrote: 1" in err and "helper programs: 1" in err
    )
    shutil.rmtree(root / "a"), shutil.rmtree(root / "deep"), (root / "more").unlink()
    code, _, err = main("predict", "--model", model, "--images", root, "--out", tmp_path / "q.csv")
    assert code == 2 and "holds no image" in err and "2 .heic files" in err


def test_predict_one_file_and_bad_ones(tmp_path, main, model):
    Image.fromarray(np.linspace(0, 255, 256 * 256).astype(np.uint8).reshape(256, 256)).save(tmp_path / "one.jpg")

    def ask(images, *more):
        return main("predict", "--model", model, "--images", images, "--out", tmp_path / "p.csv", *more)

    def rows():
        return list(csv.reader((tmp_path / "p.csv").open(newline="")))

    code, out, err = ask(tmp_path / "one.jpg")
    assert (
        code == 0
        and [r[0] for r in rows()] == ["path", "one.jpg"]
        and rows()[0] == ["path", "class", "probability", "cat", "dog"]
    ), err
    album = tmp_path / "album"
    album.mkdir()
    whole = (tmp_path / "one.jpg").read_bytes()
    for name, raw in (("whole.jpg", whole), ("torn.jpg", whole[: len(whole) * 2 // 3]), ("none.jpg", b"")):
        (album / name).write_bytes(raw)
    code, out, err = ask(album)
    assert code == 0 and "1 photograph, 2 left out" in out and "left out none.jpg" in err and "left out torn.jpg" in err
    code, out, err = ask(album, "--bad-images", "tolerate")
    assert code == 0 and "2 photographs, 1 left out" in out and "1 truncated" in err, err
    assert rows()[0] == ["path", "class", "probability", "note", "cat", "dog"] and {
        r[0]: bool(r[3]) for r in rows()[1:]
    } == {"torn.jpg": True, "whole.jpg": False}
    code, _, err = ask(album, "--bad-images", "stop")
    assert code == 1 and "none.jpg cannot be decoded" in err
    code, _, err = ask(album / "none.jpg")
    assert code == 2 and "none.jpg" in err
    Progress.quiet = False


@pytest.mark.parametrize("names", [("test_a", "test_b"), ("entrenamiento", "prueba")])
def test_folders_that_may_be_parts_of_a_split_are_named(tmp_path, names):
    for n in names:
        photos(tmp_path / n)
    data = LongTail.folder(tmp_path)
    assert data.class_names == tuple(sorted(names)) and "parts of a split" in said(data) and names[0] in said(data)
    photo(f"{tmp_path}/{names[0]}/owl/1.png")
    assert "parts of a split" in said(LongTail.folder(tmp_path)), "a rare class may have no image in one part"
    for i in range(5):
        photo(f"{tmp_path}/{names[0]}/other{i}/1.png")
    assert "parts of a split" not in said(LongTail.folder(tmp_path)), "less than half of their folders are the same"
