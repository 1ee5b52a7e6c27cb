"Folders that another version of ltnb wrote: today's are read, others refused by one sentence, nothing touched"

import json

import numpy as np
import pytest

from ltnb import __version__
from ltnb.core import DataError, generator, read_json, read_jsonl, write_json, write_jsonl


def tree(path):
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file()}


def contents(path):
    return {name: data for name, (_, data) in tree(path).items()}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    "A folder of `Classifier.save`"
    from ltnb.classifier import Classifier
    from ltnb.models import build_model

    folder = tmp_path_factory.mktemp("classifier")
    Classifier(build_model("convnet", 2, 1), ["a", "b"], (1, 8, 8), [0.5], [0.2], "convnet").save(folder)
    return folder


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory):
    "A folder of `DiffusionModel.save`"
    from ltnb.diffusion import train_diffusion

    images = np.random.default_rng(0).integers(0, 256, (4, 1, 4, 4), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("diffusion")
    train_diffusion(images, np.array([0, 0, 1, 1]), 2, n_steps=1, diff_bs=2).save(folder)
    return folder


@pytest.fixture
def folders(classifier, generator_folder, tmp_path):
    "Kind -> (a copy to be changed, name of the file that says the format, what loads it)"
    import shutil

    from ltnb.classifier import Classifier
    from ltnb.diffusion import DiffusionModel

    shutil.copytree(classifier, tmp_path / "classifier")
    shutil.copytree(generator_folder, tmp_path / "diffusion")
    return {
        "classifier": (tmp_path / "classifier", "model.json", Classifier.load),
        "diffusion": (tmp_path / "diffusion", "ltnb.json", DiffusionModel.load),
    }


OTHERS = [  # what is changed, what is left out, how the sentence goes on
    ({"format": 0, "ltnb": "0.0.0"}, (), "was written by ltnb 0.0.0 in format 0, "),
    ({"format": 2, "ltnb": "0.7.0"}, (), "was written by ltnb 0.7.0 in format 2, "),
    ({"format": "one", "ltnb": "0.7.0"}, (), "was written by ltnb 0.7.0 in format 'one', "),
    ({"ltnb": "0.0.0"}, ("format", "classes"), "was written by ltnb 0.0.0 in an older layout, without classes, "),
]


def changed(path, change, without):
    known = {k: v for k, v in read_json(path).items() if k not in without}
    write_json(path, {**known, **change})


def commands(kind, folder, tmp_path):
    "The commands that take such a folder; what they read beside it need not exist"
    if kind == "diffusion":
        return [("generate", "--model", folder, "--per-class", 2, "--out", tmp_path / "made")]
    (tmp_path / "photos").mkdir(exist_ok=True)
    return [
        ("predict", "--model", folder, "--images", tmp_path / "photos", "--out", tmp_path / "made.csv"),
        ("export", "--model", folder, "--out", tmp_path / "made.onnx"),
    ]


@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
@pytest.mark.parametrize("change, without, says", OTHERS)
def test_a_model_of_another_format_is_refused_by_its_version(main, folders, tmp_path, kind, change, without, says):
    folder, name, load = folders[kind]
    changed(folder / name, change, without)
    before = tree(tmp_path)
    with pytest.raises(DataError, match="was written by ltnb"):
        load(folder)
    for args in commands(kind, folder, tmp_path):
        code, out, err = main(*args)
        assert code == 1 and f"{name} {says}this is ltnb" in err.replace("and this", "this"), err
        assert err.count("\n") == 1 and not out and ("upgrade ltnb" in err) == ("format 2" in says), err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["classifier", "diffusion"])
def test_a_model_says_its_version_and_one_that_does_not_is_read(folders, kind):
    folder, name, load = folders[kind]
    assert read_json(folder / name)["ltnb"] == __version__
    changed(folder / name, {}, ("ltnb",))
    load(folder)
    (folder / name).write_text('{"model_type": "vit"}')
    with pytest.raises(DataError, match=f"{name} was not written by ltnb"):
        load(folder)


# --- generation directories
def make(part):
    import torch

    return torch.stack([torch.randint(0, 256, (1, 4, 4), generator=generator(*r), dtype=torch.uint8) for r in part])


def job(folder, n=3, **changes):
    from ltnb.jobs import make_plan
    from ltnb.synthetic import make_synthetic

    return make_synthetic(folder, make_plan([n, n]), make, "m", shard_size=2, **changes)


def rewritten(folder, change, without=()):
    header, *rows = read_jsonl(folder / "shards.jsonl")
    write_jsonl(folder / "shards.jsonl", [{k: v for k, v in (header | change).items() if k not in without}, *rows])


@pytest.mark.parametrize("other", ["remake", "refuse"])
@pytest.mark.parametrize(
    "change, without, says",
    [*OTHERS[:3], ({"ltnb": "0.0.0"}, ("settings",), "ltnb 0.0.0 in an older layout, without settings, ")],
)
def test_a_job_of_another_format_is_refused_by_its_version(tmp_path, change, without, says, other):
    from ltnb.synthetic import Synthetic, made_rows

    job(tmp_path)
    rewritten(tmp_path, change, without)
    before = tree(tmp_path)
    for ask in (lambda: job(tmp_path, other=other), lambda: Synthetic.open(tmp_path), lambda: made_rows(tmp_path, "m")):
        with pytest.raises(DataError, match=says) as e:
            ask()
        assert "shards.jsonl" in str(e.value) and "choose another folder" in str(e.value)
    assert tree(tmp_path) == before


def test_a_job_says_its_version_and_one_that_does_not_goes_on(tmp_path):
    "As today's code wrote it: opened, continued, and bytes of shards and manifest as without the version"
    from ltnb.synthetic import Synthetic, made_rows

    job(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "shards.jsonl").read_text().splitlines()[0])["ltnb"] == __version__
    job(tmp_path / "old", 2)
    rewritten(tmp_path / "old", {}, ("ltnb",))
    before = contents(tmp_path / "old")
    job(tmp_path / "old", 2, other="refuse")
    assert contents(tmp_path / "old") == before and len(made_rows(tmp_path / "old", "m")) == 4
    assert len(Synthetic.open(tmp_path / "old").manifest) == 4
    (tmp_path / "old" / "shard-00001.safetensors").unlink()
    assert len(job(tmp_path / "old", 3, other="refuse").manifest) == 6
    assert contents(tmp_path / "old")["manifest.jsonl"] == contents(tmp_path / "new")["manifest.jsonl"]
    rewritten(tmp_path / "new", {"ltnb": "0.0.0"})  # the format counts, not the version
    before = contents(tmp_path / "new")
    job(tmp_path / "new", other="refuse")
    assert contents(tmp_path / "new") == before


def test_generate_refuses_a_folder_of_another_format(main, generator_folder, tmp_path):
    from ltnb.diffusion import DiffusionModel

    args = ("generate", "--model", generator_folder, "--per-class", 1, "--out", tmp_path / "made", "--device", "cpu")
    fingerprint = DiffusionModel.load(generator_folder).fingerprint
    (tmp_path / "made").mkdir()
    known = {"format": 3, "ltnb": "1.2.0", "model": fingerprint, "seed": 0, "settings": {}}
    write_jsonl(tmp_path / "made" / "shards.jsonl", [known])
    before = tree(tmp_path)
    code, out, err = main(*args)
    assert code == 1 and "was written by ltnb 1.2.0 in format 3" in err and err.count("\n") == 1, (code, err)
    assert tree(tmp_path) == before
