"The two commands of image diffusion: a run that a kill does not harm, and images that come out byte for byte the same."

import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, copy_before
from ltnb import diffusion
from ltnb import generator, synthetic
from ltnb.core import LtnbError, read_json, read_jsonl
from ltnb.progress import Progress
from ltnb.data import LongTail
from ltnb.diffusion import DiffusionModel
from ltnb.judge import Judge, references, train_judge
from ltnb.generator_steps import make_images, train_model
from ltnb.generator import Diffusion, DiffusionConfig, run
from ltnb.generate import GenerateConfig, describe, find_model, generate, plan_images
from ltnb.jobs import JobFolder, make_plan
from ltnb.synthetic import Synthetic
from warm import Command, pair

pytestmark = pytest.mark.usefixtures("small_unet")
QUICK = dict(n_steps=12, diff_bs=16, sample_every=6, sample_steps=3, per_class=3, judge_epochs=1)
FLAGS = [f for k, v in QUICK.items() for f in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


STAGES = {
    "train": (generator, "sample_grid"),
    "save": (diffusion, "write_json"),
    "sample": (JobFolder, "finish"),
    "judge": (generator, "references"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_unet):
    "A finished run of a few steps; beside it, its directory as a power cut in each stage would have left it"
    Progress.quiet, folder = True, tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as m:
        for stage, (place, name) in STAGES.items():
            copy_before(m, place, name, folder / "run", folder / f"cut-{stage}")
        return run(DiffusionConfig(**QUICK, out=str(folder / "run")))


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, small_unet):
    "A run on photographs of three classes, one with a single image and one that only the test set has"
    from PIL import Image

    Progress.quiet, root, rng = True, tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, counts in (("train", (9, 1)), ("test", (3, 3))):
        for k, n in enumerate(counts):
            (root / "data" / part / f"class {k}").mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(
                    root / "data" / part / f"class {k}" / f"{i}.png"
                )
    return run(
        DiffusionConfig(
            **QUICK,
            dataset="folder",
            data_root=str(root / "data"),
            image_size=12,
            diff_flip=True,
            diff_nudge=0.5,
            cb_tau=1.0,
            out=str(root / "run"),
        )
    )


def files(path):
    "Bytes of all files of a folder"
    there = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(path)): p.read_bytes() for p in there}


def same_for_all_time(path):
    "The files of a run that hold no time, host or path"
    return {k: v for k, v in files(path).items() if k not in ("environment.json", "timing.jsonl")}


# the run
def test_what_a_run_leaves(trained):
    rows = trained.scores()
    assert [r["method"] for r in rows] == ["diffusion", "noise", "training images repeated", "test images"]
    assert {"seed", "all", "many", "medium", "few", "per_class", "copies", "copies_few", "distance"} <= set(rows[0])
    assert rows[1]["copies"] == 0 and rows[2]["copies"] == 1 and abs(rows[3]["copies"] - 0.05) < 0.01
    assert rows[3]["distance"] < rows[2]["distance"] < rows[1]["distance"]
    names = set(files(trained.path))
    assert {
        "model/config.json",
        "model/ltnb.json",
        "model/diffusion_pytorch_model.safetensors",
        "judge/model.json",
        "report.html",
        "figures/samples.png",
        "figures/samples-000006.png",
        "figures/samples-000012.png",
    } <= names
    assert not [n for n in names if n.startswith("checkpoints")]
    again = (trained.path / "scores.json").stat().st_mtime_ns
    run(trained.config)
    assert (trained.path / "scores.json").stat().st_mtime_ns == again
    assert [r["step"] for r in read_jsonl(trained.path / "metrics.jsonl") if r["stage"] == "diffusion"] == [12]


def test_diffusers_opens_the_folder_of_a_run(trained):
    from diffusers import DDIMScheduler, UNet2DModel

    net, scheduler = (
        UNet2DModel.from_pretrained(trained.path / "model"),
        DDIMScheduler.from_pretrained(trained.path / "model"),
    )
    assert net.config.num_class_embeds == 11 and scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_goes_on(trained, stage):
    "Cut in each of its stages, it ends with the same bytes"
    cut = trained.path.with_name(f"cut-{stage}")
    assert not (cut / "scores.json").exists()
    again = run(DiffusionConfig(**QUICK, out=str(cut)))
    assert same_for_all_time(again.path) == same_for_all_time(trained.path)


def test_photographs_with_a_class_of_one(folder_run):
    row = folder_run.scores()[0]
    assert row["per_class"][1] is not None and folder_run.scores()[2]["copies"] == 1
    config = read_json(folder_run.path / "config.json")
    assert config["unet"] == "tiny" and config["noise_schedule"] == "cosine" and config["imb_ratio"] is None


def test_without_a_judge(tmp_path):
    r = run(DiffusionConfig(**{**QUICK, "judge_epochs": 0}, out=str(tmp_path / "run")))
    assert r.scores()[0]["all"] is None and r.scores()[0]["copies"] is not None and not (r.path / "judge").exists()
    assert "–" in Diffusion().summary(r) and "report.html" in files(r.path)


@pytest.mark.parametrize(
    "args,text",
    [
        (["--unet", "tinny"], "Did you mean 'tiny'"),
        (["--objective", "edm", "--min-snr", "5"], "own weights"),
        (["--n-steps", "0"], "at least 1"),
        (["--label-drop", "2"], "at most 1"),
        (["--sampler", "dpm+"], "Did you mean 'dpm++'"),
        (["--per-class", "1"], "at least 2"),
        (["--guidance", "2"], "--guidance-scale"),
    ],
)
def test_wrong_settings_stop_before_anything_runs(tmp_path, main, args, text):
    code, _, err = main("run", "diffusion", "--plain", *args, "--out", tmp_path / "run")
    assert code == 2 and text in err and not list(tmp_path.rglob("*.safetensors"))


def test_images_that_cannot_be_halved(tmp_path, main):
    np.savez(
        tmp_path / "odd.npz",
        train_images=np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8),
        train_labels=[0, 0, 0, 0, 1, 1],
        test_images=np.zeros((2, 20, 20, 3), np.uint8),
        test_labels=[0, 1],
    )
    code, _, err = main(
        "run",
        "diffusion",
        "--plain",
        "--dataset",
        "npz",
        "--data-root",
        tmp_path / "odd.npz",
        "--out",
        tmp_path / "run",
    )
    assert code == 2 and "16 or 24 pixels" in err, err


# the command
@pytest.mark.slow_process
def test_killed_twice_and_resumed(tmp_path, trained):
    "The command is killed at random moments; the manifest has the same bytes as that of an undisturbed one"
    args = [
        "generate",
        "--model",
        trained.path,
        "--per-class",
        "12",
        "--sample-steps",
        "20",
        "--shard-size",
        "8",
        "--quiet",
    ]
    whole = Command(*args, "--out", tmp_path / "whole", cwd=ROOT).done()
    assert whole.returncode == 0 and "120 images" in whole.stdout, whole.stderr
    for kill in range(2):
        p = Command(*args, "--out", tmp_path / "cut", cwd=ROOT)
        while p.poll() is None and len(list((tmp_path / "cut").glob("shard-*.safetensors"))) < 4 + 4 * kill:
            time.sleep(0.02)
        assert p.poll() is None, "it was to be killed at work"
        p.kill()
        assert p.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard-*.safetensors")}
    assert Command(*args, "--out", tmp_path / "cut", cwd=ROOT).wait() == 0
    for p, t in times.items():
        assert (tmp_path / "cut" / p).stat().st_mtime_ns == t, "what was made is not made again"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.slow_process
def test_two_processes_share_a_plan(tmp_path, trained):
    args = ["--model", trained.path, "--per-class", "20", "--shard-size", "16", "--quiet"]
    one = Command("generate", *args, "--out", tmp_path / "one", cwd=ROOT).done()
    assert one.returncode == 0, one.stderr
    ranks = [{"RANK": str(r), "WORLD_SIZE": "2"} for r in range(2)]
    both = [Command("generate", *args, "--out", tmp_path / "two", cwd=ROOT, env=env) for env in ranks]
    said = [p.done() for p in both]
    assert [p.returncode for p in said] == [0, 0], said
    assert "200 images" in said[0].stdout and said[1].stdout == "", "the first process alone speaks"
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.slow_process
def test_two_processes_train_one_model(tmp_path, trained, small_unet, monkeypatch):
    args = ["run", "diffusion", "--plain", "--quiet", "--precision", "fp32", *FLAGS]
    both = pair(*args, "--out", tmp_path / "run", program=None, cwd=ROOT)
    assert [p.returncode for p in both] == [0, 0], "".join(p.stderr[-2000:] for p in both)
    assert (
        "".join(p.stdout for p in both).count("run directory") == 1
        and files(tmp_path / "run").keys() == files(trained.path).keys()
    )
    monkeypatch.setitem(diffusion.UNETS, "tiny", small_unet)  # as it is in the command
    data = LongTail.digits()
    one, two = (
        train_model(Diffusion().resolve(DiffusionConfig(**QUICK), data), data, 0).unet.state_dict(),
        DiffusionModel.load(tmp_path / "run" / "model").unet.state_dict(),
    )
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 2e-3, (
        "the same up to the order of sums; the first weights are 0.013 away, those of half the batch 0.023"
    )


def test_a_finished_folder_is_left_alone_and_another_job_refused(tmp_path, trained, main):
    args = [
        "generate",
        "--model",
        trained.path / "model",
        "--per-class",
        "4",
        "--sample-steps",
        "3",
        "--out",
        tmp_path / "g",
    ]
    assert main(*args)[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "g").rglob("*")}
    code, out, _ = main(*args)
    assert code == 0 and "40 images" in out and before == {p: p.stat().st_mtime_ns for p in (tmp_path / "g").rglob("*")}
    for more, text in (
        (["--guidance-scale", "3"], "guidance_scale"),
        (["--seed", "1"], "seed"),
        (["--sampler", "ddim"], "sampler"),
    ):
        code, _, err = main(*args, *more)
        assert code == 2 and text in err and "another folder" in err


def test_a_lost_shard_of_a_finished_folder_is_made_again(tmp_path, trained, main):
    args = [
        "generate",
        "--model",
        trained.path,
        "--per-class",
        "4",
        "--sample-steps",
        "3",
        "--shard-size",
        "16",
        "--out",
        tmp_path / "g",
    ]
    assert main(*args)[0] == 0
    before = files(tmp_path / "g")
    (tmp_path / "g" / "shard-00001.safetensors").unlink()
    assert main(*args)[0] == 0 and files(tmp_path / "g") == before


def test_without_out_the_same_settings_find_their_folder(tmp_path, trained, main, monkeypatch):
    monkeypatch.setenv("LTNB_RUNS", str(tmp_path / "runs"))
    for more in ([], [], ["--seed", "1"]):
        assert main("generate", "--model", trained.path, "--per-class", "2", "--sample-steps", "2", *more)[0] == 0
    assert len(list((tmp_path / "runs").glob("generate-run-*"))) == 2


def test_a_longer_plan_makes_nothing_again(tmp_path, trained, main):
    args = ["generate", "--model", trained.path, "--sample-steps", "3", "--out", tmp_path / "g"]
    assert main(*args, "--per-class", "4")[0] == 0
    shard = tmp_path / "g" / "shard-00000.safetensors"
    before, rows = shard.stat().st_mtime_ns, read_jsonl(tmp_path / "g" / "manifest.jsonl")
    assert main(*args, "--per-class", "6")[0] == 0
    after = {r["id"]: r for r in read_jsonl(tmp_path / "g" / "manifest.jsonl")}
    assert (
        shard.stat().st_mtime_ns == before and len(after) == 60 and all(after[r["id"]]["sha"] == r["sha"] for r in rows)
    )


def test_another_model_is_refused(tmp_path, trained, main):
    assert (
        main("generate", "--model", trained.path, "--per-class", "2", "--sample-steps", "2", "--out", tmp_path / "g")[0]
        == 0
    )
    data = LongTail.digits()
    other = train_model(Diffusion().resolve(DiffusionConfig(**QUICK), data), data, 5)
    other.save(tmp_path / "other")
    code, _, err = main(
        "generate", "--model", tmp_path / "other", "--per-class", "2", "--sample-steps", "2", "--out", tmp_path / "g"
    )
    assert code == 2 and "another job" in err and other.fingerprint in err


def test_near_copies_are_in_the_manifest(tmp_path, trained, main):
    code, out, _ = main(
        "generate", "--model", trained.path, "--per-class", "5", "--sample-steps", "3", "--png", "--out", tmp_path / "g"
    )
    rows, facts = read_jsonl(tmp_path / "g" / "manifest.jsonl"), read_json(tmp_path / "g" / "generated.json")
    assert code == 0 and "near copies by pixel" in out and "near copies by feature" in out
    assert set(rows[0]["scores"]) == {"pixel_distance", "feature_distance", "nearest_id", "leak"}
    data = LongTail.digits()
    made, at = Synthetic.open(tmp_path / "g"), 7
    d = np.sqrt(((made.items[at].numpy().astype(float) - data.train.images.astype(float)) ** 2).mean((1, 2, 3)))
    assert (
        abs(d.min() - rows[at]["scores"]["pixel_distance"]) < 1e-3
        and data.train.ids[d.argmin()] == rows[at]["scores"]["nearest_id"]
    )
    share = np.mean([r["scores"]["pixel_distance"] <= facts["copies"]["thresholds"]["pixel_distance"] for r in rows])
    assert abs(share - facts["copies"]["pixel"]["all"]) < 1e-9
    from PIL import Image

    pngs = sorted((tmp_path / "g" / "png").rglob("*.png"))
    assert (
        len(pngs) == 50
        and (
            np.asarray(Image.open(next(p for p in pngs if p.stem == rows[at]["id"]))) == made.items[at][0].numpy()
        ).all()
    )


@pytest.mark.parametrize(
    "args,code,text",
    [
        (["--per-class", "3"], 2, "--model"),
        (["--model", "RUN"], 2, "one of --per-class"),
        (["--model", "RUN", "--out", "g", "--per-class", "3", "--target-per-class", "5"], 2, "one of --per-class"),
        (["--model", "RUN", "--out", "g", "--target-per-class", "1"], 2, "nothing to make"),
        (["--model", "nowhere", "--out", "g", "--per-class", "3"], 2, "nowhere does not exist"),
        (["--model", ".", "--out", "g", "--per-class", "3"], 2, "no diffusion model"),
        (["--model", "RUN", "--out", "g", "--per-class", "0"], 2, "at least 1"),
        (["--model", "RUN", "--out", "g", "--per-clas", "3"], 2, "--per-class"),
    ],
)
def test_wrong_use(tmp_path, trained, main, monkeypatch, args, code, text):
    monkeypatch.chdir(tmp_path)
    found, _, err = main("generate", *[str(trained.path) if a == "RUN" else a for a in args])
    assert (found, text in err) == (code, True), err
    assert not (tmp_path / "g").exists()


def test_a_damaged_model_is_refused(tmp_path, trained, main):
    import shutil

    shutil.copytree(trained.path / "model", tmp_path / "m")
    path = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    code, _, err = main("generate", "--model", tmp_path / "m", "--per-class", "2", "--out", tmp_path / "g")
    assert code == 1 and "damaged" in err and not (tmp_path / "g").exists()


# what cannot be right
def test_a_class_without_images_is_left_out(tmp_path):
    data = LongTail.digits()
    keep = data.train.labels != 4
    images, labels = data.train.images[keep], data.train.labels[keep]
    model = diffusion.train_diffusion(images, labels, 10, n_steps=2, diff_bs=8, class_names=data.class_names)
    model.save(tmp_path / "m")
    facts = generate(GenerateConfig(model=str(tmp_path / "m"), out=str(tmp_path / "g"), per_class=3, sample_steps=2))
    assert facts["left_out"] == [4] and facts["items"] == 27
    said = describe(facts, model.class_names, "g")
    assert f"saw no image of them: {data.class_names[4]}" in said and "not looked for" in said


class Unlucky(torch.nn.Module):
    "A network that gives NaN for class 1, and for class 0 at its first try"

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, t, class_labels, return_dict=False):
        self.calls += 1
        p = self.net(x, t, class_labels=class_labels, return_dict=False)[0]
        bad = (class_labels == 1) | ((class_labels == 0) & (self.calls <= 2))
        return (torch.where(bad[:, None, None, None], float("nan"), p),)


def test_broken_samples_are_tried_again_counted_and_never_kept(tmp_path, trained):
    model, _ = find_model(trained.path)
    broken = DiffusionModel(Unlucky(model.unet), model.objective, model.class_names, model.image_shape, model.counts)
    made = make_images(broken, make_plan([3, 3, 3]), tmp_path / "g", sample_steps=2)
    assert made.counts(3).tolist() == [3, 0, 3] and [r["attempt"] for r in made.manifest] == [1] * 3 + [0] * 3
    assert [r["class"] for r in read_jsonl(tmp_path / "g" / "failed.jsonl")] == [1] * 3
    how = dict(sampler="dpm++", sample_steps=2, guidance_scale=1.0, precision="fp32")
    facts = {
        **synthetic.job_summary(tmp_path / "g"),
        "left_out": [],
        "copies": {"not_looked_for": "no"},
        "settings": how,
    }
    assert "3 made again" in describe(facts, model.class_names, "g") and "3 given up" in describe(
        facts, model.class_names, "g"
    )


def test_a_full_disk_in_the_middle(tmp_path, trained, monkeypatch):
    from ltnb import core, jobs

    real, calls = core.save_tensors, []

    def full(path, *a, **k):
        calls.append(path)
        if len(calls) == 3:
            raise LtnbError("writing shard: no space left on the disk")
        return real(path, *a, **k)

    config = GenerateConfig(
        model=str(trained.path), out=str(tmp_path / "g"), per_class=4, sample_steps=2, shard_size=8, copies=False
    )
    with monkeypatch.context() as m:
        m.setattr(jobs, "save_tensors", full)
        with pytest.raises(LtnbError, match="no space left"):
            generate(config)
    assert (
        len(list((tmp_path / "g").glob("shard-*.safetensors"))) == 2
        and not (tmp_path / "g" / "manifest.jsonl").exists()
    )
    assert generate(config)["items"] == 40


def test_the_judge_is_fair():
    "Real images of another draw are recognised, noise is not; copies of copies are copies"
    data = LongTail.digits()
    judge = Judge(train_judge(data, 8, 0), data)
    noise, repeated, test = references(judge, 10, 0)
    assert test["all"] > 0.95 and repeated["all"] > 0.95 and noise["all"] < 0.35
    assert noise["distance"] > 5 * repeated["distance"] and repeated["copies_few"] == 1
    row = judge(data.test.images, data.test.labels[::-1].copy(), "wrong labels", 0)
    assert row["all"] < 0.6, "the class that was asked for counts, not any class"


def test_target_fills_up(trained):
    model, _ = find_model(trained.path)
    plan, empty = plan_images(GenerateConfig(target_per_class=50), model)
    assert (np.bincount(plan[:, 0], minlength=10) + np.minimum(model.counts, 50) >= 50).all() and not empty


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    r = run(DiffusionConfig(**QUICK, device="cuda", compiled=False, out=str(tmp_path / "run")))
    assert (
        generate(GenerateConfig(model=str(r.path), out=str(tmp_path / "g"), per_class=3, device="cuda"))["items"] == 30
    )
