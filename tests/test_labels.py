"Names files, tables of labels, groups, archives, one class, and data that moved."

import csv
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ltnb.core import DataError, LtnbError, UsageError, share_of
from ltnb.labels import read_class_names, read_common_names
from ltnb.data import ImageSet, LongTail
from ltnb.sources import DataConfig, check_source, load_data
from ltnb.labels import unique_names
from ltnb.listings import Columns, group_split, leak, read_table
from PIL import Image

WANT = ("cat", "dog", "great owl")
PATHS, LABELS = [f"train/n0{k + 1}/{i}.png" for k in range(3) for i in range(3)], np.repeat([0, 1, 2], 3)


def names(tmp_path, text, kind="txt", paths=PATHS, labels=LABELS):
    path = tmp_path / f"names.{kind}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_class_names(path, paths, labels)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("txt", "cat\ndog\ngreat owl"),
        ("txt", "2 great owl\n0 cat\n1 dog\n"),
        ("txt", "cat 0\ndog 1\ngreat owl 2"),
        ("txt", "great owl\t2\ncat\t0\ndog\t1"),
        ("txt", "0: cat\n1: dog\n2: great owl"),
        ("txt", "2,great owl\n1,dog\n0,cat"),
        ("txt", "[2] great owl\n[0] cat\n[1] dog"),
        ("txt", "0. cat\n1. dog\n2. great owl"),
        ("txt", "0 - cat\n2 - great owl\n1 - dog"),
        ("txt", "2 = great owl\n1 = dog\n0 = cat"),
        ("txt", "002 great owl\n000 cat\n001 dog"),
        ("txt", "'0' 'cat'\n'1' 'dog'\n'2' 'great owl'"),
        ("txt", b"\xef\xbb\xbf2 great owl\r\n0 cat\r\n1 dog\r\n\r\n  \r\n"),
        ("txt", "# number, name\n2 great owl\n0 cat\n1 dog"),
        ("txt", "n03 great owl\nn01 cat\nn02 dog"),
        ("txt", "id name\n2 great owl\n0 cat\n1 dog"),
        ("txt", "wnid, class\nn03, great owl\nn01, cat\nn02, dog"),
        ("txt", "n03: great owl\nn01: cat\nn02: dog"),
        ("txt", "n03\tgreat owl\nn01\tcat\nn02\tdog"),
        ("txt", "n99 fox\nn03,great owl\nn01,cat\nn02,dog\nn98 eel"),
        ("txt", "great owl n03\ncat n01\ndog n02"),
        ("txt", "n03 2 great owl\nn01 0 cat\nn02 1 dog"),
        ("txt", "2 n03 great owl\n0 n01 cat\n1 n02 dog"),
        ("txt", "n03 1 great owl\nn01 2 cat\nn02 3 dog"),
        ("csv", "id,name\n2,great owl\n0,cat\n1,dog\n"),
        ("csv", "name,id\ngreat owl,2\ncat,0\ndog,1\n"),
        ("csv", "wnid,name\nn03,great owl\nn01,cat\nn02,dog\n"),
        ("csv", "2,great owl\n0,cat\n1,dog\n"),
        ("csv", '"n03","great owl"\r\n"n01","cat"\r\n"n02","dog"\r\n'),
        ("csv", "label;class\n2;great owl\n0;cat\n1;dog"),
        ("csv", "y,category_id,name\n0,1,cat\n1,2,dog\n2,0,great owl\n99999,3,nothing"),
        ("csv", "name\ncat\ndog\ngreat owl\n"),
        ("csv", "cat\ndog\ngreat owl\n"),
        ("tsv", "n03\tgreat owl\nn01\tcat\nn02\tdog"),
        ("json", '["cat", "dog", "great owl"]'),
        ("json", '{"1": "dog", "0": "cat", "2": "great owl"}'),
        ("json", '{"great owl": 2, "cat": 0, "dog": 1}'),
        ("json", '{"n03": "great owl", "n01": "cat", "n02": "dog"}'),
        ("json", '{"0": ["n01", "cat"], "2": ["n03", "great owl"], "1": ["n02", "dog"]}'),
        ("json", '[{"id": 2, "name": "great owl"}, {"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]'),
        ("json", '{"id2label": {"1": "dog", "0": "cat", "2": "great owl"}, "other": 3}'),
        ("json", '{"0": {"name": "cat"}, "2": {"name": "great owl"}, "1": {"name": "dog"}}'),
        ("json", '[["n03", "great owl"], ["n01", "cat"], ["n02", "dog"]]'),
    ],
)
def test_names_are_mapped_by_what_the_file_says(tmp_path, kind, text):
    assert names(tmp_path, text, kind) == WANT


@pytest.mark.parametrize(
    "kind, text, word",
    [
        ("txt", "1 cat\n2 dog\n3 owl", "go from 1 to 3, and classes are numbered from 0"),
        ("csv", "id,name\n1,cat\n2,dog\n3,owl", "go from 1 to 3"),
        ("json", '{"1": "cat", "2": "dog", "3": "owl"}', "go from 1 to 3"),
        ("json", '{"cat": 1, "dog": 2, "owl": 3}', "go from 1 to 3"),
        ("txt", "0 cat\n1 dog\n1 owl", "1 stands there more than once"),
        ("txt", "0 cat\n1 dog\n3 owl", "2 is missing"),
        ("txt", "0 cat\n1 dog\nowl", "2 of its 3 lines have a class number in front"),
        ("txt", "cat\ndog: 1\nowl", "1 of its 3 lines have a class number behind"),
        ("txt", "cat\ndog", "it has 2 names for 3 classes"),
        ("txt", "cat\ndog\nowl\nfox", "it has 4 names for 3 classes"),
        ("txt", "0 cat\n1 dog", "it has 2 names for 3 classes"),
        ("txt", "n01 cat\nn02 dog\nowl", "begin with a folder"),
        ("txt", "n02\nhound\nowl", "is the folder 'n02' of class 1"),
        ("txt", "n03 0 cat\nn01 1 dog\nn02 2 owl", "'n03' the number 0"),
        ("txt", "0 apollo 1\n1 apollo 2\n2 apollo 0", "two numbers"),
        ("txt", "2\n0\n1", "numbers, but no names"),
        ("txt", "0 cat\ndog\nowl", "1 of its 3 lines have a class number in front"),
        ("txt", "class2 owl\nclass0 cat\nclass1 dog", "class numbers in another order"),
        *(("txt", t, "class numbers in another order") for t in ("2/owl\n0/cat\n1/dog", "2)owl\n0)cat\n1)dog")),
        *(("txt", t, "class numbers in another order") for t in ("3_owl\n1_cat\n2_dog", "#2 owl\n#0 cat\n#1 dog")),
        ("txt", "N03: owl\nN01: cat\nN02: dog", "folder of the images, in another order"),
        ("txt", "n03_owl\nn01_cat\nn02_dog", "folder of the images, in another order"),
        ("txt", "n03/owl\nn01/cat\nn02/dog", "folder of the images, in another order"),
        ("txt", "", "it is empty"),
        ("txt", "Boeing 707\nBoeing 717\nAirbus 320", "every line has a number behind"),
        ("csv", "wnid,name\nn01,cat\nn02,dog\nn09,owl", "no column"),
        ("json", '{"0": "cat", "1": "dog", "1": "owl"}', "'1' stands twice"),
        ("json", '{"0": "cat"', "JSON"),
        ("json", '{"0": null, "1": "dog", "2": "owl"}', "no name or number"),
        ("json", "3", "TypeError"),
    ],
)
def test_names_that_say_nothing_certain_are_refused(tmp_path, kind, text, word):
    with pytest.raises(DataError, match=word) as e:
        names(tmp_path, text, kind)
    assert f"names.{kind} holds no class names that can be relied on" in str(e.value)
    assert "0: cat" in str(e.value), "and the way on is said"


@pytest.mark.parametrize(
    "text, want",
    [
        ("7 spot ladybird\nBoeing 747\nf-16", ("7 spot ladybird", "Boeing 747", "f-16")),
        ("3M\n2-toed sloth\n80s music", ("3M", "2-toed sloth", "80s music")),
        ("747-400\n707-320\n2CV", ("747-400", "707-320", "2CV")),
        ("0/cat\n1/dog\n2/owl", ("0/cat", "1/dog", "2/owl")),
        ("0: Boeing 747\n1: 7 spot ladybird\n2: f-16", ("Boeing 747", "7 spot ladybird", "f-16")),
        ("1,Boeing 707\n0,Boeing 717\n2,Boeing 727", ("Boeing 717", "Boeing 707", "Boeing 727")),
        ("0: apollo 2\n1: apollo 1\n2: apollo 0", ("apollo 2", "apollo 1", "apollo 0")),
        ("n02: 3 toed sloth\nn01: 7 spot ladybird\nn03: 3M", ("7 spot ladybird", "3 toed sloth", "3M")),
        (
            "n01: tench, Tinca tinca\nn02: goldfish, Carassius auratus\nn03: great white",
            ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white"),
        ),
        ("grade 0\ngrade 1\ngrade 2", ("grade 0", "grade 1", "grade 2")),
        ("grade 2\ngrade 0\ngrade 1", ("grade 0", "grade 1", "grade 2")),
        ("grade 1\ngrade 2\ngrade 3", ("grade 1", "grade 2", "grade 3")),
        ("0\n1\n2", ("0", "1", "2")),
        ("n01 0\nn02 1\nn03 2", ("n01", "n02", "n03")),
        ("n03\nn01\nn02", ("n01", "n02", "n03")),
        ("#1 dad mug\n#2 pencil\nhash", ("#1 dad mug", "#2 pencil", "hash")),
    ],
)
def test_digits_that_belong_to_a_name_stay(tmp_path, text, want):
    assert names(tmp_path, text) == want


def test_folders_that_are_numbers(tmp_path):
    "Folders 1, 2, 3 of the classes 0, 1, 2 are folders; folders 0, 2, 1 contradict the numbers 0, 1, 2"
    paths = [f"{f}/{i}.png" for f in (1, 2, 3) for i in range(2)]
    assert names(tmp_path, "3 owl\n1 cat\n2 dog", paths=paths, labels=np.repeat([0, 1, 2], 2)) == ("cat", "dog", "owl")
    paths = [f"{f}/{i}.png" for f in (0, 2, 1) for i in range(2)]
    with pytest.raises(DataError, match="'1' the number 1"):
        names(tmp_path, "0 cat\n1 dog\n2 owl", paths=paths, labels=np.repeat([0, 1, 2], 2))


def test_places_folders_of_two_levels(tmp_path):
    paths, labels = ["d/a/abbey/1.jpg", "d/a/bar/1.jpg", "d/b/abbey/outdoor/1.jpg"], [0, 1, 2]
    assert names(tmp_path, "/b/abbey/outdoor 2\n/a/abbey 0\n/a/bar 1", paths=paths, labels=labels)[2].endswith(
        "outdoor"
    )
    text = "b/abbey/outdoor ruin\na/abbey church\nbar pub"
    assert names(tmp_path, text, paths=paths, labels=labels) == ("church", "pub", "ruin")


TEXTS = st.lists(
    st.text("ab -7", min_size=1, max_size=6).map(lambda s: "x" + s.strip() + "y"), min_size=2, max_size=6, unique=True
)


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.randoms(use_true_random=False),
    st.sampled_from(["{k}: {n}", "{k}\t{n}", "{k},{n}", "{n},{k}", "{n}\t{k}", "{f}: {n}", "{f}\t{n}"]),
)
def test_any_order_gives_each_class_its_name(tmp_path_factory, texts, random, form):
    lines = [form.format(k=k, n=n, f=f"f{k:02}z") for k, n in enumerate(texts)]
    random.shuffle(lines)
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text("\n".join(lines))
    assert read_class_names(path, [f"f{k:02}z/0.png" for k in range(len(texts))], range(len(texts))) == tuple(texts)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["txt", "csv", "tsv", "json"]),
    st.one_of(st.text(max_size=80), st.text("0123 ,:;\t\nab\"'[]{}", max_size=60)),
)
def test_fuzzed_names(tmp_path_factory, kind, text):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for more in ((), (["a/1.png", "b/1.png"], [0, 1])):
        try:
            read_class_names(path, *more)
        except LtnbError as e:
            assert len(str(e)) < 1000


@given(st.lists(st.sampled_from(["a", "a (0)", "a (1)", "b", "a (0) (0)"]), min_size=1, max_size=8))
def test_unique_names(names_):
    out = unique_names(names_)
    assert len(set(out)) == len(out) == len(names_) and unique_names(out) == out
    assert all(o.startswith(n) for o, n in zip(out, names_, strict=True))


def photo(path, k=0, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.RandomState(100 * k + i).randint(0, 80, (8, 8, 3)).astype(np.uint8)
    x[..., k % 3] += 150
    Image.fromarray(x).save(path)
    return path


def table(tmp_path, rows, name="all.csv", header="path,label"):
    (tmp_path / name).write_text("\n".join([header, *rows]))
    return tmp_path / name


def birds(tmp_path, n=(20, 12, 6), suffix=".png", cams=5):
    rows = []
    for k, (c, m) in enumerate(zip(("owl", "jay", "kiwi"), n, strict=True)):
        for i in range(m):
            photo(tmp_path / "img" / f"{c}{i}.png", k, i)
            part = ("train", "Val", "TEST", "train", "train", "train")[i % 6]
            rows.append(f"{c}{i}{suffix},{c},cam{i % cams},{part}")
    return rows


def test_a_table_gives_paths_text_labels_and_a_stratified_split(tmp_path):
    file = table(tmp_path, birds(tmp_path), header="File Name,Species,Camera,part")
    data = load_data(DataConfig(dataset="lists", data_root=str(tmp_path / "img"), train_list=str(file)), 0)
    assert data.class_names == ("jay", "kiwi", "owl")
    assert data.test.counts.tolist() == [2, 1, 4] and data.counts.tolist() == [10, 5, 16]
    assert "20% of each class, rounded down, is the test set (seed 0)" in data.notes[0]
    half = load_data(
        DataConfig(dataset="lists", data_root=str(tmp_path / "img"), train_list=str(file), test_fraction=0.5), 0
    )
    assert half.test.counts.tolist() == [6, 3, 10] and half.train[0][0].shape == (3, 8, 8)


def test_ids_without_a_suffix_are_found(tmp_path):
    file = table(tmp_path, birds(tmp_path, suffix=""), header="image_id,dx,Camera,part")
    root = tmp_path / "img"
    data = LongTail.lists(root, file)
    assert data.train.ids[0].endswith(".png") and len(data.train) + len(data.test) == 38
    photo(root / "owl3.jpg")
    with pytest.raises(DataError, match="'owl3' could be owl3.jpg or owl3.png"):
        LongTail.lists(root, file)
    (root / "owl3.jpg").unlink()
    (root / "owl3.png").unlink()
    with pytest.raises(
        DataError, match="1 of .* images of .*all.csv are not under .*'owl3', nor with a suffix.*--data-root"
    ):
        LongTail.lists(root, file)


def test_one_image_in_two_lists_is_found_without_its_suffix(tmp_path):
    for i in range(4):
        photo(tmp_path / "img" / f"{i}.png", i % 2, i)
    train = table(tmp_path, ["0,a", "1,b", "2,a"], "train.csv", "id,label")
    for same in ("1,b", "1.png,b"):
        with pytest.raises(DataError, match="share 1 paths, such as '1.png'"):
            LongTail.lists(tmp_path / "img", train, table(tmp_path, ["3,b", same], "test.csv", "id,label"))


def test_one_table_with_a_split_column(tmp_path):
    file = table(tmp_path, birds(tmp_path), header="path,label,camera,part")
    data = LongTail.lists(tmp_path / "img", file, columns=Columns(split="PART"))
    assert [len(s) for s in data.parts.values()] == [25, 7, 6] and not data.notes
    named = table(tmp_path, birds(tmp_path), "named.csv", "path,label,camera,split")
    assert "those of the split column" in LongTail.lists(tmp_path / "img", named).notes[0]
    only = table(tmp_path, [r.replace("TEST", "train") for r in birds(tmp_path)], "only.csv", "path,label,camera,split")
    assert any("val is the test set" in n for n in LongTail.lists(tmp_path / "img", only).notes)
    with pytest.raises(UsageError, match="has no column 'part'"):
        LongTail.lists(
            None, table(tmp_path, ["a,b,train"], "bad.csv", "path,label,Part."), columns=Columns(split="part")
        )
    with pytest.raises(DataError, match="'fold 3' in the column 'part' is no name of a split"):
        LongTail.lists(
            None, table(tmp_path, ["a,b,fold 3"], "bad.csv", "path,label,part"), columns=Columns(split="part")
        )
    folds = table(tmp_path, [f"{i},{i % 2},{i % 3}" for i in range(12)], "folds.csv", "path,label,split")
    notes = LongTail.lists(None, folds).notes
    assert "20% of each class" in notes[0], "a column that nobody named is no split if it holds folds"
    with pytest.raises(UsageError, match="leave out --test-list"):
        LongTail.lists(tmp_path / "img", file, file, columns=Columns(split="part"))


@pytest.mark.parametrize(
    "header, rows, word",
    [
        ("path,label,species", ["a.png,0,owl"], "'label' and 'species': say which one it is with --label-column"),
        ("picture,label", ["a.png,0"], "no column is known to hold the images' paths: name it with --path-column"),
        ("path,kind", ["a.png,0"], "--label-column"),
        ("a.png,0", ["b.png,1"], "its first line must name the columns"),
        ("path,label", ["a.png,owl", "b.png,"], "line 3: the label is missing"),
        ("path,label", ["a.png,owl", "a.png,jay"], "line 3: 'a.png' stands already in line 2"),
        ("path,label", ["a.png,owl", "b.png,jay,kiwi"], "line 3: 3 cells where the header has 2"),
        ("path,label", [], "lists no image"),
        ("path,label", ["a.png,-1", "b.png,0"], "labels are class numbers from 0"),
        ("path,label", ["a.png,0.5", "b.png,0"], "labels are class numbers from 0"),
        ("path,label", [f"{i}.png,{i % 2}" for i in range(4)], "--test-fraction"),
        ("path,label", [f"{i}.png,owl" for i in range(9)], "at least 2 are needed"),
    ],
)
def test_tables_are_refused(tmp_path, header, rows, word):
    with pytest.raises(LtnbError, match=word):
        LongTail.lists(None, table(tmp_path, rows, header=header))


def test_labels_of_train_and_test_must_be_of_one_kind(tmp_path):
    train = table(tmp_path, ["a.png,owl", "b.png,jay"], "train.csv")
    for rows, word in (
        (["c.png,Owl"], "'Owl', which no training image"),
        (["c.png,1"], "'1', which no training image"),
    ):
        with pytest.raises(DataError, match=word):
            LongTail.lists(None, train, table(tmp_path, rows, "test.csv"))
    with pytest.raises(DataError, match="are class numbers, but .*test.csv has 'owl'"):
        LongTail.lists(
            None, table(tmp_path, ["a.png,0", "b.png,1.0"], "train.csv"), table(tmp_path, ["c.png,owl"], "test.csv")
        )
    train = table(tmp_path, ["a.png,owl", "b.png,jay"], "train.csv")
    mixed = LongTail.lists(None, train, table(tmp_path, ["c.png,owl"], "test.csv"))
    assert mixed.test.labels.tolist() == [1] and mixed.train.labels.tolist() == [1, 0]


def test_names_for_text_labels(tmp_path):
    train = table(tmp_path, [f"{i}.png,n0{i % 2 + 1}" for i in range(10)])
    (tmp_path / "names.txt").write_text("0 n02\n1 n01")
    with pytest.raises(DataError, match="'n02' the number 0, but the images have it as class 1"):
        LongTail.lists(None, train, class_names=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("n02 dog\nn01 cat")
    assert LongTail.lists(None, train, class_names=tmp_path / "names.txt").class_names == ("cat", "dog")


def test_text_lists_without_a_test_list_and_columns_that_they_lack(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{k}/{i}.png {k}\n" for k in range(2) for i in range(10)))
    assert LongTail.lists(None, tmp_path / "list.txt").test.counts.tolist() == [2, 2]
    with pytest.raises(UsageError, match="--group-column needs a csv file"):
        LongTail.lists(None, tmp_path / "list.txt", columns=Columns(group="camera"))
    with pytest.raises(UsageError, match="leave out --test-fraction"):
        (tmp_path / "test.txt").write_text("0/t.png 0\n1/t.png 1\n")
        LongTail.lists(None, tmp_path / "list.txt", tmp_path / "test.txt", test_fraction=0.3)
    with pytest.raises(UsageError, match="group_column is for lists"):
        check_source(DataConfig(dataset="folder", data_root="x", group_column="camera"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=8, max_size=80),
    st.floats(0.1, 0.6),
    st.integers(0, 5),
)
def test_no_group_on_both_sides_and_every_class_in_train(rows, fraction, seed):
    labels, groups = np.array([k for k, _ in rows]), [f"g{g}" for _, g in rows]
    test = group_split(labels, groups, fraction, seed)
    assert leak(np.array(groups)[~test], np.array(groups)[test]) == (0, [])
    assert set(labels[~test]) == set(labels), "every class keeps training images"
    assert (test == group_split(labels, groups, fraction, seed)).all()


def test_a_group_split_comes_near_to_the_wanted_share():
    rng = np.random.RandomState(0)
    labels, groups = rng.choice(6, 3000, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01]), rng.randint(0, 100, 3000)
    share = np.bincount(labels[group_split(labels, groups, 0.2)], minlength=6) / np.bincount(labels)
    assert np.abs(share[:5] - 0.2).max() < 0.05 and 0 < share[5] < 0.5
    two = group_split(np.array([0, 1] * 10), ["a"] * 10 + ["b"] * 10, 0.2)
    assert two.sum() == 10, "of two large groups one is the test"


def test_shares_are_rounded_down_as_on_paper():
    import torch
    from ltnb.batches import held_out
    from ltnb.listings import random_split

    for n, fraction, want in ((100, 0.29, 29), (100, 0.299, 29), (5, 0.2, 1), (9, 0.1, 0)):
        assert share_of(n, fraction) == random_split(np.zeros(n, int), fraction).sum() == want
        held = held_out(torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(0), fraction)[1]
        assert len(held) == max(want, 1), "one at least"


def test_the_leak_of_a_random_split_is_said(tmp_path):
    file = table(tmp_path, birds(tmp_path), header="path,label,camera,part")
    data = LongTail.lists(tmp_path / "img", file, columns=Columns(group="camera"))
    camera = {r.split(",")[0]: r.split(",")[2] for r in birds(tmp_path)}
    sides = [{camera[i] for i in s.ids} for s in (data.train, data.test)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and (data.counts > 0).all()
    at_random = LongTail.lists(tmp_path / "img", file)
    shared = sum(camera[i] in {camera[j] for j in at_random.train.ids} for i in at_random.test.ids)
    said = f"split at random instead, {shared} of {len(at_random.test)} test images would share their group"
    assert shared > 0 and said in data.notes[1]
    given_ = LongTail.lists(tmp_path / "img", file, columns=Columns(split="part", group="camera"))
    assert any("test images come from" in n and "train has too" in n for n in given_.notes)
    alone = table(tmp_path, [f"{i}.png,{i % 2},cam{i % 2}" for i in range(20)], "alone.csv", "path,label,camera")
    with pytest.raises(DataError, match="no group can go to the test.*name another --group-column"):
        LongTail.lists(None, alone, columns=Columns(group="camera"))


def archive(path, **changes):
    x = np.random.RandomState(0).randint(0, 256, (8, 6, 6, 3)).astype(np.uint8)
    y = np.repeat([0, 1], 4)
    np.savez(path, **{"train_images": x, "train_labels": y, "test_images": x, "test_labels": y, **changes})
    return x


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype("f4") / 255,
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: (x / 255.0).transpose(0, 3, 1, 2),
        lambda x: x.astype(int),
        lambda x: x.astype(np.uint16) * 257,
        lambda x: x.astype(np.uint16) * 16 + x // 16,  # 12 bits
        lambda x: (x / 127.5 - 1).transpose(0, 3, 1, 2),
        lambda x: np.concatenate([x, x[..., :1]], -1),
    ],
)
def test_what_an_archive_is_told_to_do_works_in_one_go(tmp_path, change):
    x = change(archive(tmp_path / "a.npz"))
    archive(tmp_path / "a.npz", train_images=x, test_images=x)
    with pytest.raises(DataError) as e:
        LongTail.npz(tmp_path / "a.npz")
    code = str(e.value).split("save ")[1].split(" for x =")[0]
    mended = eval(code, {"x": x})
    original = archive(tmp_path / "a.npz", train_images=mended, test_images=mended)
    data = LongTail.npz(tmp_path / "a.npz")
    assert np.abs(data.train.images.transpose(0, 2, 3, 1).astype(int) - original).max() <= 1


def test_labels_of_archives(tmp_path):
    y, path = np.repeat([0, 1], 4), tmp_path / "a.npz"
    texts = np.array(["owl", "jay"])[y]
    for train, want in (
        (np.eye(2)[y], ("0", "1")),
        (np.eye(2, dtype=bool)[y], ("0", "1")),
        (y.astype(bool), ("0", "1")),
        (y.astype(str), ("0", "1")),
        (texts, ("jay", "owl")),
        (texts.astype("S"), ("jay", "owl")),
    ):
        archive(path, train_labels=train, test_labels=train)
        data = LongTail.npz(path)
        said = texts if want == ("jay", "owl") else y
        assert data.class_names == want and [data.class_names[k] for k in data.train.labels] == [str(t) for t in said]
    archive(path, train_labels=texts, test_labels=texts, class_names=np.array(["owl", "jay"]))
    assert LongTail.npz(path).train.labels.tolist() == y.tolist()
    for changes, word in (
        (dict(test_labels=np.array(["fox"] * 8), train_labels=texts), "'fox', which no training image"),
        (dict(train_labels=np.random.rand(8, 3)), "argmax"),
        (dict(train_labels=np.ones((8, 3))), "argmax"),
        (
            dict(train_labels=texts, test_labels=texts, class_names=np.array(["owl", "fox"])),
            "'jay' is none of its class_names",
        ),
        (dict(train_labels=y + 1, test_labels=y + 1), "subtract 1"),
    ):
        archive(path, **changes)
        with pytest.raises(DataError, match=word):
            LongTail.npz(path)


def test_class_names_of_an_archive_keep_their_order_unless_they_are_numbered(tmp_path):
    for given_, want in (
        (["0 owl", "1 jay"], ("0 owl", "1 jay")),
        (["1 jay", "0 owl"], ("owl", "jay")),
        (["1 owl", "2 jay"], ("1 owl", "2 jay")),
        (["owl", "owl"], ("owl (0)", "owl (1)")),
    ):
        archive(tmp_path / "a.npz", class_names=np.array(given_))
        assert LongTail.npz(tmp_path / "a.npz").class_names == want


def features(path, **changes):
    x = np.random.RandomState(0).randn(40, 6).astype("f4")
    y = np.repeat([0, 1, 1, 2], 10)
    np.savez(path, **{"train_features": x, "train_labels": y, "test_features": x, "test_labels": y, **changes})
    return path


def test_one_class_is_refused_everywhere(main, tmp_path):
    archive(tmp_path / "a.npz", train_labels=np.zeros(8, int), test_labels=np.zeros(8, int))
    features(tmp_path / "f.npz", train_labels=np.zeros(40, int), test_labels=np.zeros(40, int))
    for i in range(3):
        photo(tmp_path / "photos" / "cat" / f"{i}.png", 0, i)
    (tmp_path / "l.txt").write_text("".join(f"cat/{i}.png 0\n" for i in range(2)))
    (tmp_path / "t.txt").write_text("cat/2.png 0\n")
    wild = tmp_path / "wild"
    wild.mkdir()
    rows = [f"{s},0,{s}.jpg" for s in ("train", "val", "test")]
    (wild / "metadata.csv").write_text("\n".join(["split,y,filename", *rows]))
    lists = ["--data-root", tmp_path / "photos", "--train-list", tmp_path / "l.txt", "--test-list", tmp_path / "t.txt"]
    sources = {
        "npz": ["--data-root", tmp_path / "a.npz"],
        "folder": ["--data-root", tmp_path / "photos"],
        "iwildcam": ["--data-root", wild],
        "lists": lists,
    }
    commands = [["data", "--dataset", name, *args] for name, args in sources.items()]
    for recipe in ("baseline", "ldmlr", "diffult", "diffusion"):
        commands.append(["run", recipe, "--dataset", "npz", *sources["npz"], "--out", tmp_path / "out"])
    commands.append(["run", "ldmlr", "--features", tmp_path / "f.npz", "--out", tmp_path / "out"])
    for command in commands:
        code, _, err = main(*command)
        assert code == 1 and "at least 2 are needed" in err, (command, err)
    assert not (tmp_path / "out").exists()


def test_two_classes_with_one_name_stay_apart_in_the_csv(tmp_path):
    from ltnb.models import build_model
    from ltnb.classifier import Classifier, write_predictions

    clf = Classifier(build_model("convnet", 4, 3), ("crane", "owl", "crane", "path"), (3, 8, 8))
    write_predictions(tmp_path / "p.csv", clf.class_names, np.eye(4)[[0, 2]], ["a.png", "b.png"])
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [r["class"] for r in rows] == ["crane (0)", "crane (2)"]
    assert list(rows[0]) == ["path", "class", "probability", "crane (0)", "owl", "crane (2)", "path (3)"]
    s = ImageSet(np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1]), ("crane", "crane"))
    assert s.class_to_idx == {"crane (0)": 0, "crane (1)": 1}


SMALL = [
    "--plain",
    "--quiet",
    "--n-epochs",
    "1",
    "--bs",
    "8",
    "--heads",
    "false",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


def test_a_run_goes_on_after_its_data_moved(main, tmp_path):
    for k in range(2):
        for i in range(10):
            photo(tmp_path / "tree" / f"c{k}" / f"{i}.png", k, i)

    def run(root):
        at = ("--dataset", "folder", "--data-root", root, "--out", tmp_path / "run")
        return main("run", "baseline", *SMALL, *at)

    assert run(tmp_path / "tree")[0] == 0
    scores = (tmp_path / "run" / "scores.json").read_bytes()
    shutil.move(tmp_path / "tree", tmp_path / "new")
    code, text, err = run(tmp_path / "new")
    assert code == 0 and "run directory" in text, err
    (tmp_path / "run" / "scores.json").unlink()  # as if it had been stopped
    code, _, err = run(tmp_path / "new")
    assert code == 0 and (tmp_path / "run" / "scores.json").read_bytes() == scores, err
    assert str(tmp_path / "tree") in (tmp_path / "run" / "config.json").read_text(), "where it began stays on record"


def stages_of(cfg, name, done, folder, stop):
    "How a run loads its data, and its stages: they note the folder, and stop before the end if told to"
    from ltnb.ldmlr import LDMLR

    def load(seed):
        return LDMLR().load(cfg, seed) if name == "features" else load_data(cfg, seed)

    def one_seed(*a):
        done.append(folder)
        return []

    def finish(*a):
        if stop:
            raise InterruptedError

    return load, (lambda c, d: c, one_seed, finish)


@pytest.mark.parametrize("name", ["npz", "lists", "features"])
def test_every_source_may_move(tmp_path, name):
    from ltnb.baseline import BaselineConfig
    from ltnb.runs import Run
    from ltnb.ldmlr import LDMLRConfig

    table(tmp_path, birds(tmp_path), header="path,label,camera,part")
    archive(tmp_path / "a.npz")
    features(tmp_path / "f.npz")
    kinds = {
        "npz": (BaselineConfig, {"dataset": "npz"}, {"data_root": "a.npz"}),
        "lists": (BaselineConfig, {"dataset": "lists"}, {"data_root": "img", "train_list": "all.csv"}),
        "features": (LDMLRConfig, {}, {"features": "f.npz"}),
    }
    kind, more, paths = kinds[name]
    (tmp_path / "new").mkdir()
    done = []
    for folder in (tmp_path, tmp_path / "new"):
        if folder != tmp_path:
            for p in paths.values():
                shutil.move(tmp_path / p, folder / p)
        cfg = kind(**more, **{k: str(folder / p) for k, p in paths.items()}, out=str(tmp_path / "run"))
        load, stages = stages_of(cfg, name, done, folder, stop=folder == tmp_path)
        try:
            Run(cfg).carry_out(load, *stages)
        except InterruptedError:
            pass
        assert not list((tmp_path / "run").glob("run.lock"))
    assert Run(cfg).finished and done == [tmp_path], "the seed that was done is not done again"
    Run(cfg).carry_out(load, *stages)


def test_other_data_under_another_path_is_refused(main, tmp_path):
    archive(tmp_path / "a.npz")
    archive(tmp_path / "b.npz", train_labels=np.repeat([1, 0], 4))

    def run(name, *more):
        at = ("--dataset", "npz", "--data-root", tmp_path / name, "--out", tmp_path / "run")
        return main("run", "baseline", *SMALL, *at, *more)

    assert run("a.npz")[0] == 0
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    for finished in (True, False):
        if not finished:
            (tmp_path / "run" / "scores.json").unlink()
        code, _, err = run("b.npz")
        assert code == 2 and "begun with other data" in err and "a.npz" in err and "b.npz" in err, err
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == before
    archive(tmp_path / "a.npz", train_labels=np.repeat([1, 0], 4))
    code, _, err = run("a.npz")
    assert code == 1 and "begun with other data" in err


def test_settings_that_came_later_leave_old_digests_alone():
    old = DataConfig()
    assert old.digest() == DataConfig(path_column=None).digest() != DataConfig(group_column="camera").digest()
    assert not {"path_column", "group_column"} & set(k for k in old.identity() if k not in old.unknown_to({}))


def test_memory_does_not_change_the_fingerprint(tmp_path):
    for k in range(2):
        for i in range(10):
            photo(tmp_path / "tree" / f"c{k}" / f"{i}.png", k, i)
    data = LongTail.folder(tmp_path / "tree")
    copy = LongTail.folder(shutil.copytree(tmp_path / "tree", tmp_path / "copy"))
    assert data.in_memory().fingerprint() == data.fingerprint() == copy.in_memory().fingerprint()
    assert data.in_memory().cut(2).fingerprint() == data.in_memory().cut(2).fingerprint() != data.fingerprint()


def test_read_table_takes_what_spreadsheets_write(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeff"Image Path";"Class"\r\n"a, b.png";"owl"\r\n\r\nc.png;jay\r\n'.encode())
    t = read_table(tmp_path / "a.csv")
    assert t.paths == ["a, b.png", "c.png"] and t.labels == ["owl", "jay"]


# common names
@pytest.mark.parametrize(
    "name, text",
    [
        ("n.csv", "puma concolor,puma\ntayassu pecari,white-lipped peccary\n"),
        ("n.csv", "id,common name,scientific name\n7,puma,Puma concolor\n8,white-lipped peccary,Tayassu_pecari\n"),
        ("n.tsv", "scientific\tcommon\nPuma  concolor\tpuma\nTayassu pecari\twhite-lipped peccary\n\nx y\t\n"),
    ],
)
def test_common_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    wanted = {"tayassu pecari": "white-lipped peccary", "puma concolor": "puma"}
    assert read_common_names(tmp_path / name, ["empty", *wanted]) == wanted
    assert list(read_common_names(tmp_path / name, ["empty", *wanted])) == list(wanted)  # in the order of the classes


def test_common_names_that_are_none(tmp_path):
    for text, word in (("", "on each line"), ("puma\n", "on each line"), ("lynx lynx,lynx\n", "none of the 2 classes")):
        (tmp_path / "n.csv").write_text(text)
        with pytest.raises(DataError, match=word):
            read_common_names(tmp_path / "n.csv", ["empty", "puma concolor"])
    with pytest.raises(UsageError, match="does not exist"):
        read_common_names(tmp_path / "other.csv", ["empty"])
