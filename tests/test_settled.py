"Settings that follow the images, the memory and the run: chosen before anything is decoded, and kept."

import json

import numpy as np
import pytest
import torch
from ltnb import files
from ltnb import generate, generator, memory
from ltnb.core import LtnbError, read_json, write_json
from ltnb.progress import Progress
from ltnb.data import ImageSet, LongTail
from ltnb.diffult import DiffuLTConfig
from ltnb.noise import NoiseModel, build_objective, diffusion_loss, noisy_batch
from ltnb.diffusion import build_unet
from ltnb.memory import activation_bytes, check_side, fit_memory, training_bytes
from ltnb.generator_steps import resolve_generator
from ltnb.generator import Diffusion, DiffusionConfig
from ltnb.generate import GenerateConfig, as_the_run, images_folder, same_precision
from ltnb.pictures import plot_by_rank
from PIL import Image

GB = 10**9
FOLDER = dict(dataset="folder", data_root="photos")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


def images(side, channels=3, n=20, k=4):
    "A set of blank images"
    x, y = np.zeros((n, channels, side, side), np.uint8), np.arange(n) % k
    s = ImageSet(x, y, tuple("abcdefghij"[:k]))
    return LongTail(s, s, "blank")


def album(root, side, n=3):
    "Class folders of photographs"
    for part in ("train", "test"):
        for k in range(2):
            (root / part / f"c{k}").mkdir(parents=True)
            for i in range(n):
                x = np.full((side, side, 3), 40 * i + k, np.uint8)
                Image.fromarray(x).save(root / part / f"c{k}" / f"{i}.png")
    return root


# memory
def test_count_is_that_of_a_real_step():
    "What autograd keeps of a real forward pass on the CPU, at small sizes, is what was counted without data"
    for unet, side, channels in (("tiny", 8, 1), ("tiny", 16, 3), ("medium", 8, 3)):
        net, kept, bs = build_unet(unet, side, channels, 4).train(), {}, 2
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(v, weights=weights, kept=kept):
            s = v.untyped_storage()
            if s.data_ptr() not in weights:
                kept[s.data_ptr()] = (s.nbytes(), v)
            return v

        objective, g = build_objective("v"), torch.Generator().manual_seed(0)
        x = torch.zeros(bs, channels, side, side, dtype=torch.uint8)
        batch = noisy_batch(objective, x, torch.zeros(bs).long(), 4, g)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
            loss = diffusion_loss(NoiseModel(net, objective, 4), batch).sum()
        real = sum(n for n, _ in kept.values()) / bs
        counted, weights = activation_bytes(unet, side, channels, 4)
        assert weights == sum(p.numel() for p in net.parameters())
        assert 0.9 < counted / real < 1.25, (unet, side, counted, real)
        loss.backward()


def test_memory_grows_with_pixels_batch_and_second_pass():
    each = {side: activation_bytes("cifar", side, 3, 10)[0] for side in (32, 64)}
    assert 3 < each[64] / each[32] < 4.2 and each[32] > 10**7

    def need(**more):
        return training_bytes(DiffusionConfig(**{"unet": "cifar", "diff_bs": 64, **more}), (3, 32, 32), 10)

    assert need(diff_bs=128) > 1.6 * need() and need(cb_tau=1.0) > 1.6 * need() > need(cb_tau=1.0, cb_share=0.25)
    assert training_bytes(DiffusionConfig(unet="cifar", diff_bs=512), (3, 224, 224), 10) > 300 * GB


@pytest.mark.parametrize(
    "side, channels, config, want",
    [
        (8, 1, dict(dataset="digits"), ("tiny", 64)),
        (12, 3, FOLDER, ("tiny", 512)),
        (32, 3, FOLDER, ("cifar", 512)),
        (32, 3, dict(dataset="cifar10"), ("cifar", 512)),
        (64, 3, FOLDER, ("cifar", 128)),
        (48, 3, FOLDER, ("cifar", 128)),
    ],
)
def test_usual_choice_on_a_large_machine(side, channels, config, want):
    "As before up to 32 pixels; smaller batches above"
    got = fit_memory(DiffusionConfig(**config), images(side, channels), 200 * GB)
    same = fit_memory(DiffusionConfig(**config), images(side, channels), None)
    assert (got.unet, got.diff_bs) == want == (same.unet, same.diff_bs)


@pytest.mark.parametrize("free", [4, 8, 16, 32])
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_choice_fits_the_memory_and_is_the_largest(side, free, tau):
    cfg = DiffusionConfig(**FOLDER, cb_tau=tau)
    got = fit_memory(cfg, images(side), free * GB)
    shape = (3, side, side)
    assert training_bytes(got, shape, 4) <= free * GB
    usual = fit_memory(cfg, images(side), None)
    if (got.unet, got.diff_bs) != (usual.unet, usual.diff_bs) and got.unet == "cifar":
        twice = DiffusionConfig(**{**got.to_dict(), "diff_bs": 2 * got.diff_bs})
        assert training_bytes(twice, shape, 4) > 0.8 * free * GB


def test_what_is_given_wins_and_what_cannot_fit_says_so():
    small = images(64)
    assert fit_memory(DiffusionConfig(**FOLDER, unet="cifar", diff_bs=512), small, GB).diff_bs == 512
    assert fit_memory(DiffusionConfig(**FOLDER, diff_bs=48), small, 100 * GB).unet == "cifar"
    assert fit_memory(DiffusionConfig(**FOLDER, unet="tiny"), small, 4 * GB).unet == "tiny"
    with pytest.raises(LtnbError, match=r"images of 64 pixels takes .* GB of memory even with unet='medium' and 8"):
        fit_memory(DiffusionConfig(**FOLDER), small, GB // 10)


def test_free_memory_of_the_device_is_asked(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 8 * GB)
    assert resolve_generator(DiffusionConfig(**FOLDER, device="cpu"), images(32)).diff_bs < 512
    monkeypatch.setattr(memory, "free_memory", lambda: 400 * GB)
    assert resolve_generator(DiffusionConfig(**FOLDER, device="cpu"), images(32)).diff_bs == 512
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GB, 80 * GB))
    assert memory.device_memory("cuda") == 3 * GB


def test_bf16_and_processes_on_gpus_keep_less(monkeypatch):
    def share(precision, device):
        return memory.kept_share(DiffusionConfig(**FOLDER, precision=precision), device)

    assert (
        share("fp32", "cpu") == share("fp32", "cuda") == 1
        and share("bf16", "cpu") == 0.5
        and share("bf16", "cuda") == 0.8
    )
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert share("bf16", "cuda") == 0.2 and share("bf16", "cpu") == 0.5, "processes of one machine share its memory"
    cfg = DiffuLTConfig(**FOLDER)
    got = fit_memory(cfg, images(32), 80 * GB, 0.8)
    assert (got.unet, got.diff_bs) == ("cifar", 512), "CBDM in bf16 on a GPU of 80 GB, as before"


# size
@pytest.mark.parametrize("name", ["diffusion", "diffult"])
@pytest.mark.parametrize("more", [["--image-size", "96"], []])
def test_photographs_are_refused_before_one_is_decoded(name, more, tmp_path, main, monkeypatch):
    root, decoded = album(tmp_path / "photos", 260), []
    monkeypatch.setattr(files, "read_image", lambda *a, **k: decoded.append(a))
    where = ["--dataset", "folder", "--data-root", root, "--out", tmp_path / "run"]
    code, _, err = main("run", name, "--plain", *where, *more)
    side = more[1] if more else "224"
    assert code == 2 and f"these images have {side} pixels a side" in err and "--image-size 64" in err
    assert "text-to-image" in err and len(err.splitlines()) == 1
    assert not decoded and not (tmp_path / "run").exists()


def test_lists_and_archives_are_refused_too(tmp_path, main):
    root = album(tmp_path / "photos", 80)
    for part in ("train", "test"):
        lines = (f"{part}/c{k}/{i}.png {k}\n" for k in range(2) for i in range(3))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    lists = ["--data-root", root, "--train-list", tmp_path / "train.txt", "--test-list", tmp_path / "test.txt"]
    code, _, err = main("run", "diffult", "--plain", "--dataset", "lists", *lists)
    assert code == 2 and "these images have 80 pixels a side" in err and "--image-size 64" in err
    x, y = np.zeros((6, 96, 96, 3), np.uint8), [0, 1] * 3
    np.savez(tmp_path / "a.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)
    code, _, err = main("run", "diffusion", "--plain", "--dataset", "npz", "--data-root", tmp_path / "a.npz")
    assert code == 2 and "96 pixels" in err and "write the archive with images of 64 pixels" in err
    assert "--image-size" not in err, "an archive has no such setting"


def test_a_network_of_ones_own_is_taken_at_its_word():
    check_side(224, DiffusionConfig(unet="tiny", diff_bs=1))
    assert resolve_generator(DiffusionConfig(**FOLDER, unet="tiny", diff_bs=2), images(96)).unet == "tiny"


# a choice is made once
def test_choice_stays_on_another_day(tmp_path, monkeypatch):
    "Begun with little memory free, continued with much: the same network and batch, and the run goes on"
    root = album(tmp_path / "photos", 32)
    quick = dict(n_steps=2, sample_steps=1, per_class=2, judge_epochs=0, device="cpu", precision="fp32")
    cfg = DiffusionConfig(dataset="folder", data_root=str(root), unet="tiny", **quick, out=str(tmp_path / "run"))
    each = activation_bytes("tiny", 32, 3, 2)[0]
    monkeypatch.setattr(memory, "free_memory", lambda: int(each * 24 * 1.25 / 0.8) + 20 * 10**6)
    monkeypatch.setattr(generator, "train_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generator.run(cfg)
    assert read_json(tmp_path / "run" / "config.json")["diff_bs"] == 16
    monkeypatch.undo()
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setattr(memory, "free_memory", lambda: 400 * GB)
    assert generator.run(cfg).finished and read_json(tmp_path / "run" / "config.json")["diff_bs"] == 16


def test_smaller_choice_is_said(tmp_path, monkeypatch, capsys):
    from ltnb.runs import Run
    from ltnb.team import Team

    monkeypatch.setattr(Progress, "quiet", False)
    monkeypatch.setattr(memory, "free_memory", lambda: 8 * GB)
    cfg = DiffusionConfig(**FOLDER, device="cpu", out=str(tmp_path / "run"))
    out = Diffusion().settle(cfg, images(32), Run(cfg), Team())
    said = capsys.readouterr().err
    assert out.diff_bs < 512 and f"diff_bs={out.diff_bs}" in said and "512 images a step would take about" in said


# `ltnb generate` samples as the run did
@pytest.mark.parametrize(
    "known, want",
    [(dict(sampler="ddim", sample_steps=7, guidance_scale=2.0), ("ddim", 7, 2.0)), ({}, ("dpm++", 20, 1.5))],
)
@pytest.mark.parametrize("kind", ["model", "generator"])
def test_defaults_are_those_of_the_run(tmp_path, known, want, kind):
    (tmp_path / "run" / kind).mkdir(parents=True)
    write_json(tmp_path / "run" / kind / "ltnb.json", {})
    write_json(tmp_path / "run" / "config.json", {**known, "device": "cpu", "precision": "bf16"})
    for path in (tmp_path / "run", tmp_path / "run" / kind):
        got = as_the_run(GenerateConfig(model=str(path), per_class=1))
        assert (got.sampler, got.sample_steps, got.guidance_scale) == want
        assert as_the_run(got) == got
    mine = as_the_run(GenerateConfig(model=str(tmp_path / "run"), sampler="heun", guidance_scale=1.0))
    assert (mine.sampler, mine.guidance_scale, mine.sample_steps) == ("heun", 1.0, want[1])
    run = tmp_path / "run"
    assert same_precision(GenerateConfig(), run, "cpu") == "bf16"
    assert same_precision(GenerateConfig(precision="fp32"), run, "cpu") == "fp32"
    assert same_precision(GenerateConfig(), None, "cpu") in ("fp32", "bf16")
    said = dict(zip(("sampler", "sample_steps", "guidance_scale"), want, strict=True))
    named = [images_folder(GenerateConfig(model=str(run), per_class=1, **m)) for m in ({}, said)]
    assert named[0] == named[1], "the directory is named by what the images are made with"


def test_a_diffult_run_is_continued_with_its_guidance(tmp_path):
    "The whole way, with a model that was saved as DiffuLT saves it"
    from ltnb.diffusion import train_diffusion

    digits = LongTail.digits()
    names = digits.class_names
    model = train_diffusion(digits.train.images, digits.train.labels, 10, n_steps=1, diff_bs=8, class_names=names)
    model.save(tmp_path / "run" / "generator")
    known = DiffuLTConfig(sample_steps=2, precision="fp32", device="cpu")
    kept = {**known.identity(), "given": known.identity(), "data": {"train": "?"}}
    write_json(tmp_path / "run" / "config.json", kept)
    cfg = GenerateConfig(model=str(tmp_path / "run"), per_class=1, out=str(tmp_path / "g"), device="cpu")
    facts = generate.generate(cfg)
    assert facts["settings"]["guidance_scale"] == 2.0 and facts["settings"]["sample_steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "g" / "manifest.jsonl").read_text().splitlines()]
    assert {r["guidance_scale"] for r in rows} == {2.0} and "guidance 2, fp32" in generate.describe(facts, names, "g")
    assert generate.generate(cfg) == facts


# pictures and times
def test_every_method_is_drawn_and_looks_its_own_way():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plot_by_rank({f"m{i}": [0.5, 0.4, 0.3] for i in range(19)}, np.array([9, 4, 1]), ax=ax)
    lines = [line for line in ax.lines if line.get_label().startswith("m")]
    assert [line.get_label() for line in lines] == [f"m{i}" for i in range(19)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 19
    assert len(ax.get_legend().get_texts()) == 20


def test_reports_say_what_a_picture_leaves_out():
    from ltnb.pictures import drawn_and_not

    rows = [dict(method=m, seed=0) for m in ("a", "b", "c")]
    assert drawn_and_not(rows, ("a", "c", "z")) == "Drawn: a, c. Left out: b."
    assert drawn_and_not(rows, ("a", "b", "c")) == ""


def test_a_latent_time_is_below_one(monkeypatch):
    "The largest share of the last stratum, added in float32, is the whole"
    from ltnb import latent

    assert torch.tensor(511.0) + torch.tensor(1 - 2**-24) == 512
    seen = []
    monkeypatch.setattr(latent, "alpha_sigma", lambda t, f=latent.alpha_sigma: (seen.append(t), f(t))[1])
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full(a if isinstance(a[0], int) else a[0], 1 - 2**-24))
    net = latent.Denoiser(4, 2, width=8)
    latent.denoising_loss(net, torch.zeros(512, 4), torch.zeros(512).long(), torch.Generator().manual_seed(0))
    assert seen[0].max() < 1 and seen[0].min() >= 0
