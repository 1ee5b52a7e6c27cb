"Devices by any name, what fp32 means on a GPU, and what is chosen because there is one; none is needed."

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import everywhere
from ltnb import baseline, core, diffult_ablations, diffusion
from ltnb import generate as generate_room
from ltnb import generator as generator_room
from ltnb.baseline_steps import BaselineConfig, side_by_side
from ltnb.core import (
    UsageError,
    autocast,
    choose_device,
    choose_precision,
    device_type,
    full_fp32,
    generator,
    read_json,
    tf32_in_use,
)
from ltnb.runs import environment
from ltnb.data import LongTail
from ltnb.noise import build_objective
from ltnb.diffusion import DiffusionModel, build_unet, on_device
from ltnb.samplers import sample_images
from ltnb.diffult import DiffuLT, DiffuLTConfig
from ltnb.generator_steps import make_images
from ltnb.generate import GenerateConfig
from ltnb.latent import sample_features, train_latent
from ltnb.jobs import make_plan
from ltnb.recipe import Stage
from ltnb.team import Team, Where

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("cuda", "cuda:0", "cuda:1", torch.device("cuda"), torch.device("cuda", 1))


@pytest.fixture
def gpu(monkeypatch):
    "What torch says where there is a GPU; nothing can be computed on it"
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"a GPU, asked as {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: asked.append(device) or (9, 0))
    monkeypatch.delenv("LTNB_PRECISION", raising=False)
    everywhere(monkeypatch, "cpu_flags", list)  # so that a CPU would answer fp32
    return asked


def model():
    "An untrained diffusion model of 4 classes"
    unet = build_unet("tiny", 8, 1, 4).eval()
    return DiffusionModel(unet, build_objective("v"), tuple("abcd"), (1, 8, 8), np.array([9, 6, 3, 1]))


@pytest.mark.parametrize("device", NAMES, ids=repr)
def test_a_gpu_by_any_name(device, gpu):
    assert device_type(device) == "cuda" and choose_device(device) == str(device)
    assert choose_precision("auto", device) == "bf16" and gpu == [device], "the GPU that is meant is asked"
    assert autocast(device, "fp32").device == "cuda"
    assert environment(device)["gpu"] == f"a GPU, asked as {device}" and environment(device)["device"] == str(device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=repr)
def test_a_cpu_by_any_name(device, gpu):
    assert device_type(device) == "cpu" and choose_device(device) == str(device)
    assert choose_precision("auto", device) == "fp32" and gpu == []
    assert autocast(device, "bf16").device == "cpu" and "gpu" not in environment(device)


def test_a_device_that_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="give auto, cpu or cuda"):
        choose_device("gpu")
    for device in NAMES:
        with pytest.raises(UsageError, match="torch sees no CUDA device"):
            choose_device(device)
    assert choose_device("auto") == "cpu"


def test_no_module_compares_a_device_with_a_name():
    "`device == 'cuda'` is false for 'cuda:0': `device_type(device) == 'cuda'` is what is meant"
    wrong = re.compile(r"""(?<![\w)])(?:\w+\.)*device\s*[!=]=\s*["']|["'](?:cuda|cpu)["']\s*[!=]=""")
    found = [
        f"{p.name}: {line.strip()[:80]}"
        for p in sorted((ROOT / "ltnb").glob("*.py"))
        for line in p.read_text().splitlines()
        if wrong.search(line) and 'device == "auto"' not in line
    ]
    assert not found


@pytest.fixture
def roundings():
    "The parts whose rounding is set; what the process had set is put back"
    full_fp32()  # else a test before this one decides what is put back
    yield list(core._roundings().values())
    full_fp32()


def torch_reads_them_all():
    "PyTorch refuses to read a mixture of the older and the newer way to say it, and reads both here and there itself"
    old = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    assert old == (False, False, "highest") and torch.backends.cudnn.fp32_precision == "ieee"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=None, fp32_precision=None):
        pass


def newer():
    for part in core._roundings().values():
        part.fp32_precision = "tf32"


def older():
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")


def coarser():
    torch.backends.cudnn.fp32_precision = "tf32"


@pytest.mark.parametrize("before", [[], [newer], [older], [coarser], [older, newer], [newer, older], [full_fp32]])
def test_fp32_can_be_set_after_anything(before, roundings):
    for change in before:
        change()
    full_fp32()
    assert not any(tf32_in_use("cuda:1").values())
    torch_reads_them_all()


@pytest.mark.parametrize(
    "enter", [lambda: choose_device("cuda"), lambda: choose_device("auto"), lambda: autocast("cuda:0", "fp32")]
)
def test_fp32_is_fp32_on_a_gpu(enter, gpu, roundings):
    newer()
    assert all(environment("cuda:1")["tf32"].values()), "what is set is what is recorded"
    enter()
    assert tf32_in_use("cuda") == environment("cuda")["tf32"] == {"conv": False, "rnn": False, "matmul": False}
    torch_reads_them_all()


def test_a_cpu_leaves_the_settings_of_gpus_alone(gpu, roundings):
    newer()
    choose_device("cpu"), autocast("cpu", "fp32")
    assert all(tf32_in_use("cuda").values()) and not any(environment("cpu")["tf32"].values())


def test_compiling_after_fp32_was_set(roundings):
    torch._dynamo.reset()
    assert torch.compile(lambda x: (x @ x).sin(), backend="aot_eager")(torch.ones(2, 2)).shape == (2, 2)


class Placed(torch.nn.Linear):
    "Remembers how it was placed"

    def to(self, device, memory_format):
        self.at = (str(device), memory_format)
        return self


@pytest.mark.parametrize(
    "device, given, layout, compiled",
    [
        ("cpu", {}, torch.preserve_format, False),
        ("cuda:1", {}, torch.channels_last, True),
        (torch.device("cuda"), dict(compiled=False), torch.channels_last, False),
        ("cpu", dict(compiled=True), torch.preserve_format, True),
        ("cuda", dict(channels_last=False), torch.preserve_format, True),
    ],
    ids=str,
)
def test_one_rule_for_layout_and_compiling(device, given, layout, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net: ("compiled", net))
    net = Placed(1, 1)
    assert on_device(net, device, **given) == (("compiled", net) if compiled else net)
    assert net.at == (str(device), layout)


def test_training_and_sampling_ask_the_same_rule(monkeypatch, tmp_path):
    asked, real = [], diffusion.on_device

    def rule(net, device="cpu", compiled=None, channels_last=None):
        asked.append((device, compiled))
        return real(net, device, False, channels_last)

    everywhere(monkeypatch, "on_device", rule)
    m = model()
    m.save(tmp_path / "model")
    for given in ({}, {"compiled": True}):
        config = GenerateConfig(
            model=str(tmp_path / "model"),
            out=str(tmp_path / f"made{len(given)}"),
            per_class=2,
            sample_steps=2,
            shard_size=3,
            device="cpu",
            copies=False,
            **given,
        )
        generate_room.generate(config)
    assert asked == [("cpu", None), ("cpu", True)], "once for all shards, as the setting says"
    digits = LongTail.digits()
    cfg = generator_room.Diffusion().resolve(generator_room.DiffusionConfig(n_steps=1, diff_bs=2), digits)
    generator_room.train_model(cfg, digits, 0)
    assert asked[2] == ("cpu", None)


def test_a_compiled_sampler_makes_the_same_images(monkeypatch, tmp_path):
    made, plan = [], make_plan([3, 2, 0, 1])

    def compile(net):
        made.append(net)
        return lambda *args, **more: net(*args, **more)

    monkeypatch.setattr(torch, "compile", compile)
    m = model()
    one = make_images(m, plan, tmp_path / "a", sample_steps=2, shard_size=2)
    two = make_images(m, plan, tmp_path / "b", sample_steps=2, shard_size=2, compiled=True)
    assert made == [m.unet] and torch.equal(one.items, two.items)
    assert torch.equal(one.items, sample_images(m, plan, sample_steps=2)[0])


def test_compiling_is_no_part_of_what_was_asked_for(tmp_path):
    "A folder that was finished before the setting existed stays finished"
    model().save(tmp_path / "model")
    config, done = dict(model=str(tmp_path / "model"), out=str(tmp_path / "made")), tmp_path / "made" / "generated.json"
    config |= dict(per_class=1, sample_steps=1, device="cpu", copies=False)
    generate_room.generate(GenerateConfig(**config))
    assert "compiled" not in read_json(done)["settings"]
    before = done.stat().st_mtime_ns
    generate_room.generate(GenerateConfig(**config, compiled=True))
    assert done.stat().st_mtime_ns == before
    assert GenerateConfig(**config, compiled=True).digest() == GenerateConfig(**config).digest()


def test_seeds_train_one_after_the_other_unless_asked(tmp_path, capsys):
    data, run = LongTail.digits(), SimpleNamespace(path=tmp_path)
    several, asked = BaselineConfig(seeds=3), BaselineConfig(seeds=3, side_by_side=True)

    def at_once(cfg, team):
        return side_by_side(Stage(cfg, data, 0, Where(run=run, team=team)))

    assert not at_once(several, Team()) and at_once(asked, Team())
    assert not at_once(asked, Team(0, 2))
    assert "one after the other" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "classifier-seeds-0-2.safetensors").touch()
    assert at_once(several, Team()), "what was begun side by side goes on so"


def test_a_gpu_alone_trains_no_seeds_side_by_side(gpu, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyError("one seed")

    monkeypatch.setattr(baseline, "train_together", lambda *a: pytest.fail("not asked for"))
    monkeypatch.setattr(baseline, "trained", stop)
    config = BaselineConfig(seeds=2, device="cuda", out=str(tmp_path / "run"))
    with pytest.raises(KeyError, match="one seed"):
        baseline.run(config)
    assert read_json(tmp_path / "run" / "environment.json")["tf32"] == {"conv": False, "rnn": False, "matmul": False}


def test_features_are_the_same_wherever_they_are_sampled():
    "The model goes to the device; a model on the CPU is used as it is"
    z, y = torch.rand(20, 4), torch.arange(20) % 3
    m = train_latent(z, y, 3, n_steps=2, diff_bs=8, width=8, n_blocks=1)
    assert m.to("cpu") is m and m.to(torch.device("cpu")) is m
    moved = m.to("meta")
    assert {p.device.type for p in (*moved.net.parameters(), moved.mean, moved.sd)} == {"meta"}
    assert m.mean.device.type == next(m.net.parameters()).device.type == "cpu"
    assert sample_features(m, make_plan([2, 1, 1]), pull="none")[0].device.type == "cpu"


def test_a_budget_does_not_multiply_what_happens_once(monkeypatch):
    "By a clock of its own: a call of the network takes 1 second, and 100 more where it is compiled"
    now, compiled = [0.0], []

    def compile(net):
        compiled.append(net)
        waits = [100.0]

        def call(*args, **more):
            now[0] += 1 + (waits.pop() if waits else 0)
            return net(*args, **more)

        return call

    def fit(*args, after_epoch, **more):
        for epoch in range(6):
            now[0] += 3 + 50 * (epoch == 0)
            after_epoch(epoch)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(diffult_ablations, "fit", fit)
    monkeypatch.setattr(diffult_ablations, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    data = LongTail.digits()
    few = dict(n_steps=1000, n_epochs=2, diff_bs=4, sample_steps=1, pipelines=False, cb_tau=0.0, bs=500, compiled=True)
    cfg = DiffuLT().resolve(DiffuLTConfig(**few), data)
    _, training = diffult_ablations.seconds_a_run(cfg, data, Where())
    wanted = int(np.maximum(cfg.target_per_class - data.counts, 0).sum())
    n = len(data.train)  # fewer than 4 batches, so that an epoch of the measurement has all of them
    epochs = 2 * (n + 10 * (n + wanted)) / n
    assert len(compiled) == 2, "one training is enough to measure a step, and one sampler an image"
    assert training == pytest.approx(2.1 * 1000 * 1 + 3 * epochs)


def test_ticks_leave_out_the_first_units():
    ticks = diffult_ablations.Ticks("cpu", 2)
    ticks.at = [0.0, 10.0, 11.0, 12.5, 13.5]
    assert ticks.seconds == 1.0


def test_draws_name_their_device():
    assert generator(0, "a", device=torch.device("cpu")).initial_seed() == generator(0, "a").initial_seed()
