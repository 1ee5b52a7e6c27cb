"The training engine: batches, views, resume, averages, stops, several seeds at once, several processes."

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, everywhere
from ltnb import core, team, training
from ltnb.augment import Augment
from ltnb.baseline import BaselineConfig, run
from ltnb.core import DataError, LtnbError, UsageError, generator, load_tensors, read_jsonl
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.files import ImageFiles
from ltnb.data import LongTail
from ltnb.losses import build_loss
from ltnb.models import build_model
from ltnb.classifier import Classifier, pixel_stats
from ltnb.batches import Batches, balanced_indices, epoch_order, held_out
from ltnb.team import Team, Where, train_step
from ltnb.checkpoint import Averages
from ltnb.training import LR_SCHEDULES, fit, lr_factor, view
from ltnb.together import fit_seeds
from warm import Command


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)


DATA = LongTail.digits(imb_ratio=10, seed=1)


def fresh(arch="convnet", seed=0, channels=1, **more):
    return Classifier(
        build_model(arch, 10, channels, seed, **more),
        DATA.class_names,
        (channels, *DATA.train.images.shape[2:]),
        *pixel_stats(DATA.train.images.repeat(channels, 1)),
        arch,
    )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def distance(a, b):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a.values(), b.values(), strict=True))


def test_schedules():
    assert [lr_factor("ldam", e, 200, 5) for e in (0, 3, 5, 159, 160, 180)] == pytest.approx(
        [0.2, 0.8, 1, 1, 0.01, 0.0001]
    )
    assert [lr_factor("multistep", e, 10) for e in (0, 4.9, 5, 7.5)] == pytest.approx([1, 1, 0.1, 0.01])
    assert (
        lr_factor("cosine", 5, 10) == pytest.approx(0.5)
        and lr_factor("cosine", 9.999, 10) < 1e-5
        and lr_factor("constant", 3, 10) == 1
    )
    assert all(lr_factor(s, e, 10) <= 1 for s in LR_SCHEDULES for e in range(10))


def test_views_mix_what_they_say():
    clf, x = fresh(), torch.from_numpy(DATA.train.images[:40])
    for kind in ("mixup", "cutmix"):
        a, parts = view(clf, x, ("k", 3), None, **{kind: 1.0})
        assert sum(float(s) for s, _ in parts) == pytest.approx(1) and torch.equal(
            a, view(clf, x, ("k", 3), None, **{kind: 1.0})[0]
        )
        (lam, own), (_, partner) = parts
        plain = clf.prepare(x)
        if kind == "mixup":
            assert torch.allclose(a, lam * plain + (1 - lam) * plain[partner], atol=1e-6)
        else:
            assert ((a == plain) | (a == plain[partner])).all()
    kinds = {len(view(clf, x[:4], ("k", i), None, 1.0, 1.0)[1]) for i in range(9)}
    assert kinds == {2} and len(view(clf, x, ("k", 3))[1]) == 1


def files(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 3, 16, 16), np.uint8)
    for i, x in enumerate(images):
        Image.fromarray(x.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    return images, ImageFiles(tmp_path, [f"{i}.png" for i in range(30)], 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_train_like_memory(tmp_path, workers):
    "A DataLoader that decodes files gives the weights of the same images in memory"
    images, on_disk = files(tmp_path)
    order = epoch_order(torch.arange(30), 1, generator("o")).split(8)
    assert all(
        torch.equal(a, b)
        for a, b in zip(Batches(images).follow(order), Batches(on_disk, workers=workers).follow(order), strict=True)
    )
    y, nets = np.arange(30) % 10, []
    for x in (images, on_disk):
        clf = Classifier(build_model("convnet", 10), DATA.class_names, (3, 16, 16), *pixel_stats(images), "convnet")
        nets.append(fit(clf, x, y, n_epochs=2, bs=8, augment=Augment("crop+flip"), workers=workers).net.state_dict())
    assert equal(*nets)


class Stop(Exception):
    "A stand-in for a power cut"


SETTINGS = dict(
    n_epochs=4, bs=64, mixup=0.3, augment=Augment("crop+cutout", size=3), ema=0.9, clip=5.0, schedule="cosine", warmup=1
)


def whole_fit(path, stop=None, monkeypatch=None):
    "One fit in a run; the power fails before optimiser step `stop`"
    clf, original, count = fresh(), team.train_step, [0]
    with Run(BaselineConfig(out=str(path))) as r:
        r.start(BaselineConfig(), "cpu", "fp32")
        if stop is not None:

            def step(*a, **k):
                if count[0] == stop:
                    raise Stop
                count[0] += 1
                return original(*a, **k)

            everywhere(monkeypatch, "train_step", step)
        try:
            fit(
                clf,
                DATA.train.images,
                DATA.train.labels,
                run=r,
                save_every=0.0,
                loss=build_loss("cross_entropy_drw", DATA.counts),
                **SETTINGS,
            )
        finally:
            monkeypatch and everywhere(monkeypatch, "train_step", original)
    return clf


def left(path):
    "Everything that a training leaves: weights, averages, momentum, metrics"
    tensors, meta = load_tensors(path / "checkpoints" / "classifier-seed-0.safetensors")
    return tensors, meta, (path / "metrics.jsonl").read_bytes()


def test_ten_power_cuts_end_bit_for_bit(tmp_path, monkeypatch):
    """Cuts at random steps, one inside a save and one right at an epoch boundary; weights, averages, optimizer and
    metrics are those of the undisturbed run"""
    reference = whole_fit(tmp_path / "whole")
    want, n_steps = left(tmp_path / "whole"), -(-len(DATA.train) // 64)
    assert any(k.startswith("ema.") for k in want[0]) and any(k.startswith("optimizer.") for k in want[0])
    path, rng, done = tmp_path / "cut", random.Random(0), 0
    for attempt in range(10):
        if attempt == 3:  # inside a save: the older checkpoint was moved, the new one not yet written
            original = core.save_tensors
            everywhere(monkeypatch, "save_tensors", lambda *a: (_ for _ in ()).throw(Stop()))
        try:
            whole_fit(path, n_steps if attempt == 5 else rng.randint(1, 3), monkeypatch)
        except Stop:
            done += 1
        if attempt == 3:
            everywhere(monkeypatch, "save_tensors", original)
    again = whole_fit(path)
    got = left(path)
    assert done > 5
    assert (
        want[0].keys() == got[0].keys()
        and all(torch.equal(want[0][k], got[0][k]) for k in want[0])
        and want[1:] == got[1:]
    )
    assert equal(reference.net.state_dict(), again.net.state_dict())


def test_work_is_not_repeated(tmp_path, monkeypatch):
    "After a cut in the middle of an epoch the next start does the steps that are left, no more"
    n_steps = -(-len(DATA.train) // 64)
    with pytest.raises(Stop):
        whole_fit(tmp_path, n_steps + 2, monkeypatch)
    count, original = [0], team.train_step
    everywhere(monkeypatch, "train_step", lambda *a, **k: count.__setitem__(0, count[0] + 1) or original(*a, **k))
    whole_fit(tmp_path)
    assert count[0] == 4 * n_steps - (n_steps + 2)


def test_torn_newest_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch, capsys):
    whole_fit(tmp_path / "whole")
    with pytest.raises(Stop):
        whole_fit(tmp_path / "cut", 9, monkeypatch)
    folder = tmp_path / "cut" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"classifier-seed-0.safetensors", "classifier-seed-0.1.safetensors"}, (
        "the last two are kept"
    )
    torn = folder / "classifier-seed-0.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    whole_fit(tmp_path / "cut")
    assert "classifier-seed-0.safetensors" in capsys.readouterr().err
    assert all(
        torch.equal(a, b)
        for a, b in zip(left(tmp_path / "whole")[0].values(), left(tmp_path / "cut")[0].values(), strict=True)
    )


def test_checkpoint_of_another_network(tmp_path, monkeypatch):
    with pytest.raises(Stop):
        whole_fit(tmp_path, 9, monkeypatch)
    clf = fresh("resnet8")
    with (
        Run(BaselineConfig(out=str(tmp_path))) as r,
        pytest.raises(LtnbError, match="belongs to another network.*--arch"),
    ):
        fit(clf, DATA.train.images, DATA.train.labels, run=r, **SETTINGS)


def test_other_settings_are_refused_with_the_difference(tmp_path):
    run(BaselineConfig(n_epochs=1, heads=False, out=str(tmp_path / "r")))
    with pytest.raises(UsageError, match="n_epochs: 1 there, 2 here"):
        run(BaselineConfig(n_epochs=2, heads=False, out=str(tmp_path / "r")))


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original, count = team.train_step, [0]

    def step(*a, **k):
        count[0] += 1
        return original(*a, **k) * (float("nan") if count[0] == 9 else 1)

    everywhere(monkeypatch, "train_step", step)
    n_steps = -(-len(DATA.train) // 64)
    with pytest.raises(
        LtnbError,
        match=f"the loss is nan at step {(9 - 1) % n_steps + 1} of epoch {(9 - 1) // n_steps + 1}: lower --lr",
    ):
        whole_fit(tmp_path)
    tensors, meta = load_tensors(tmp_path / "checkpoints" / "classifier-seed-0.safetensors")
    assert meta["step"] == 8 and all(torch.isfinite(v).all() for v in tensors.values() if v.is_floating_point())


def test_bad_settings():
    clf, x, y = fresh(), DATA.train.images, DATA.train.labels
    for more, word in (
        (dict(bs=5000), "bs=5000 is more than"),
        (dict(schedule="cosin"), "Did you mean 'cosine'"),
        (dict(patience=2), "held-out"),
        (dict(augment="flip"), "Augment"),
        (dict(mixup=-1.0), "at least 0"),
    ):
        with pytest.raises(UsageError, match=word):
            fit(clf, x, y, n_epochs=1, **{"bs": 32, **more})
    with pytest.raises(DataError, match="no training image"):
        fit(clf, x[y > 0], y[y > 0], n_epochs=1, bs=32)
    with pytest.raises(DataError, match="built on other counts"):
        fit(clf, x, y, n_epochs=1, bs=32, loss=build_loss("balanced_softmax", np.arange(1, 11)))
    with pytest.raises(UsageError, match="augmentation"):
        run(BaselineConfig(augment="flop"))
    for more, word in (
        (dict(side_by_side=True), "--seeds 2"),
        (dict(side_by_side=True, seeds=2, clip=1.0), "does not go with clip"),
        (dict(loss="ldam_drw", patience=3), "--patience"),
        (dict(loss="ldam", power=0.0), "--power"),
    ):
        with pytest.raises(UsageError, match=word):
            run(BaselineConfig(**more))


def test_out_of_memory_says_what_to_lower(monkeypatch):
    everywhere(
        monkeypatch, "train_step", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(LtnbError, match="lower --bs"):
        fit(fresh(), DATA.train.images, DATA.train.labels, n_epochs=1, bs=32)


def test_early_stop_keeps_the_best_epoch_on_held_out_images(tmp_path, monkeypatch):
    looks = iter([0.5, 0.7, 0.6, 0.65, 0.4, 0.9])
    states = []
    monkeypatch.setattr(
        training,
        "held_out_score",
        lambda clf, *a: (
            states.append({k: v.clone() for k, v in clf.net.state_dict().items()})
            or {"held_out_all": 0.0, "held_out_macro": next(looks), "held_out_nll": 0.0}
        ),
    )
    clf = fit(
        fresh(),
        DATA.train.images,
        DATA.train.labels,
        n_epochs=6,
        bs=64,
        held_out=(DATA.test.images, DATA.test.labels),
        patience=3,
    )
    assert len(states) == 5 and equal(clf.net.state_dict(), states[1])


def test_averages_are_a_moving_average():
    net = torch.nn.Linear(2, 1)
    a, want = Averages(net, 0.9), net.weight.detach().clone()
    for i in range(5):
        torch.nn.init.constant_(net.weight, i)
        a.update()
        want = 0.9 * want + 0.1 * i
    with a.used():
        assert torch.allclose(net.weight, want)
    assert (net.weight == 4).all()


def test_balanced_sampling_and_its_loss():
    y = torch.from_numpy(DATA.train.labels)
    assert np.bincount(y[balanced_indices(y, 20000, generator("b"))]).std() < 120
    fit(
        fresh(),
        DATA.train.images,
        DATA.train.labels,
        n_epochs=1,
        bs=64,
        power=0.0,
        loss=build_loss("cross_entropy", np.ones(10)),
    )
    with pytest.raises(DataError, match="built on other counts"):
        fit(
            fresh(),
            DATA.train.images,
            DATA.train.labels,
            n_epochs=1,
            bs=64,
            power=0.0,
            loss=build_loss("balanced_softmax", DATA.counts),
        )
    a, b = held_out(y, generator("h"), 0.2)
    assert sorted(torch.cat([a, b]).tolist()) == list(range(len(y))) and (torch.bincount(y[a]) > 0).all()


def fresh64(arch="convnet", seed=0):
    "A classifier in 64-bit numbers: rounding is 1e-16 of a value, and a few small steps cannot make much of it"
    clf = fresh(arch, seed)
    clf.net.double().register_forward_pre_hook(lambda net, x: (x[0].double(),))
    return clf


def apart(a, b, start):
    "How far two trained networks are apart, as a share of the way that the first one went; its buffers too"
    parts = [
        [torch.cat([v.detach().double().flatten() for v in values(c.net)]) for c in (a, b, start)]
        for values in (torch.nn.Module.parameters, torch.nn.Module.buffers)
    ]
    return max(((x - y).norm() / (x - first).norm()).item() for x, y, first in parts if len(x))


# Seen: below 1e-14 for twelve pairs of seeds; another order of the same images is 1e-2 of the way off, or more.
@pytest.mark.parametrize(
    "arch, settings",
    [("convnet", dict(ema=0.8, mixup=0.4)), ("resnet8", dict(augment=Augment("crop"), schedule="cosine", cutmix=1.0))],
)
def test_seeds_side_by_side_equal_each_alone(arch, settings):
    x, y, seeds = DATA.train.images, DATA.train.labels, [3, 4]
    alone = [fit(fresh64(arch, s), x, y, n_epochs=2, bs=128, seed=s, lr=0.005, **settings) for s in seeds]
    together = fit_seeds([fresh64(arch, s) for s in seeds], x, y, seeds, n_epochs=2, bs=128, lr=0.005, **settings)
    assert max(apart(a, b, fresh64(arch, s)) for a, b, s in zip(alone, together, seeds, strict=True)) < 1e-8
    assert apart(together[0], together[1], fresh64(arch, seeds[0])) > 1e-2


def test_seeds_side_by_side_with_balanced_draws():
    def loss():
        return build_loss("cross_entropy", np.ones(10))

    alone = fit(fresh64(), DATA.train.images, DATA.train.labels, n_epochs=1, bs=128, lr=0.005, power=0.0, loss=loss())
    one, _ = fit_seeds(
        [fresh64(seed=s) for s in (0, 1)],
        DATA.train.images,
        DATA.train.labels,
        [0, 1],
        n_epochs=1,
        bs=128,
        lr=0.005,
        power=0.0,
        losses=[loss(), loss()],
    )
    assert apart(alone, one, fresh64()) < 1e-8
    for power in (0.5, 0.0):
        fit(
            fresh(), DATA.train.images, DATA.train.labels, n_epochs=1, bs=128, power=power
        )  # the default loss knows what it sees


def test_a_batch_without_weight_changes_nothing():
    w = np.zeros(len(DATA.train), np.float32)
    w[DATA.train.labels < 10] = 1
    w[::2] = 0
    w[DATA.train.labels == 9] = 1
    clf = fit(fresh(), DATA.train.images, DATA.train.labels, n_epochs=1, bs=2, lr=0.01, weights=w)
    assert all(torch.isfinite(p).all() for p in clf.net.parameters())


def test_weights_that_are_no_numbers_are_not_kept(tmp_path, monkeypatch):
    original, count = team.train_step, [0]

    def step(net, *a, **k):
        value = original(net, *a, **k)
        count[0] += 1
        if count[0] == -(-len(DATA.train) // 64):
            net.fc.weight.data.fill_(float("nan"))
        return value

    everywhere(monkeypatch, "train_step", step)
    with pytest.raises(LtnbError, match="weights are no numbers, or beyond 1e.08, after the last step of epoch 1"):
        whole_fit(tmp_path)
    assert all(
        torch.isfinite(v).all()
        for v in load_tensors(tmp_path / "checkpoints" / "classifier-seed-0.safetensors")[0].values()
        if v.is_floating_point()
    )


def test_seeds_side_by_side_continue(tmp_path, monkeypatch):
    def go(path, stop=None):
        with Run(BaselineConfig(out=str(path))) as r:
            r.start(BaselineConfig(), "cpu", "fp32")
            original = r.log
            if stop:
                r.log = lambda **row: (_ for _ in ()).throw(Stop()) if row["step"] == stop else original(**row)
            return fit_seeds(
                [fresh(seed=s) for s in (0, 1)],
                DATA.train.images,
                DATA.train.labels,
                [0, 1],
                n_epochs=4,
                bs=128,
                run=r,
                save_every=0.0,
                ema=0.5,
            )

    want = go(tmp_path / "whole")
    with pytest.raises(Stop):
        go(tmp_path / "cut", 3)
    got = go(tmp_path / "cut")
    assert (
        all(equal(a.net.state_dict(), b.net.state_dict()) for a, b in zip(want, got, strict=True))
        and (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    )


def test_a_team_shares_one_mean():
    "Two pretended processes: their losses and gradients add up to those of one"
    clf, x, y = fresh(norm="group"), torch.from_numpy(DATA.train.images[:30]), torch.from_numpy(DATA.train.labels[:30])
    x, parts = view(clf, x, ("t",), None, 0.5)
    loss = build_loss("class_balanced", DATA.counts)

    class Half(Team):
        def sum(self, v):
            return v if v.requires_grad else v

    def gradients(team, weight=None):
        for p in clf.net.parameters():
            p.grad = None
        opt = torch.optim.SGD(clf.net.parameters(), lr=0.0)
        train_step(clf.net, opt, loss, (x, parts), y, where=Where(team=team))
        return [p.grad.clone() for p in clf.net.parameters()]

    whole = gradients(Team())
    totals = [loss.total(clf.net(x).float(), y[at])[1].detach() for _, at in parts]

    class Known(Half):
        def sum(self, v):
            if v.dim() == 0 and not hasattr(self, "done"):
                self.n = getattr(self, "n", -1) + 1
                return totals[self.n] if self.n < len(totals) else v
            return v

        def sum_gradients(self, parameters):
            pass

    halves = [gradients(Known(r, 2)) for r in (0, 1)]
    assert max((a + b - w).abs().max().item() for a, b, w in zip(*halves, whole, strict=True)) < 1e-6


def processes(n, out, *more):
    "`ltnb run baseline` in n processes; gives the finished launcher"
    args = [
        "-m",
        "ltnb",
        "run",
        "baseline",
        "--plain",
        "--quiet",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--norm",
        "group",
        "--n-epochs",
        "2",
        "--imb-ratio",
        "10",
        "--bs",
        "50",
        "--mixup",
        "0.5",
        "--loss",
        "class_balanced",
        "--out",
        str(out),
        *more,
    ]
    if n == 1:
        return Command(*args[2:]).done()
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]
    return subprocess.run(
        [sys.executable, *launcher, *args],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow_process
def test_two_processes_train_what_one_trains(tmp_path):
    "The same global batch without batch statistics: weights within 1e-5 after two epochs; one process writes"
    for n in (1, 2):
        done = processes(n, tmp_path / str(n))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("run directory") == 1, "the table is printed once"
    one, two = (load_tensors(tmp_path / str(n) / "model" / "model.safetensors")[0] for n in (1, 2))
    assert distance(one, two) < 1e-5

    def files(p):
        return sorted(str(f.relative_to(p)) for f in p.rglob("*") if f.is_file())

    assert files(tmp_path / "1") == files(tmp_path / "2")
    a, b = (read_jsonl(tmp_path / str(n) / "metrics.jsonl") for n in (1, 2))
    assert len(a) == len(b) and all(abs(r["loss"] - s["loss"]) < 1e-5 for r, s in zip(a, b, strict=True))


def test_several_processes_need_plain(main, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--plain" in main("run", "baseline")[2]
    assert "one process" in main("run", "ldmlr", "--plain")[2]


@pytest.mark.slow_process
def test_sigkill_of_the_command(tmp_path):
    "SIGKILL at random moments, then the same command: the files of an undisturbed run"
    args = [
        "run",
        "baseline",
        "--plain",
        "--quiet",
        "--n-epochs",
        "15",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--ema",
        "0.9",
    ]
    assert Command(*args, "--out", tmp_path / "whole").wait() == 0
    path, rng, kills = tmp_path / "cut", random.Random(1), 0
    for _ in range(4):
        process = Command(*args, "--out", path)
        while process.poll() is None and not (path / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        kills += process.wait() != 0
    assert Command(*args, "--out", path).wait() == 0 and kills
    for name in ("scores.json", "metrics.jsonl", "model/model.safetensors"):
        assert (path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("loss", ["cross_entropy", "balanced_softmax", "ldam_drw", "wcdas"])
def test_every_kind_of_head_ends_in_a_model(tmp_path, loss):
    few = dict(imb_ratio=10.0, n_max=40)
    test = LongTail.digits(**few).test
    r = run(BaselineConfig(**few, loss=loss, n_epochs=1, out=str(tmp_path / "r"), device="cpu", precision="fp32"))
    rows = r.scores()
    names = [x["method"] for x in rows]
    assert (
        ("label shift" in names) == (loss == "cross_entropy")
        and ("balanced softmax + label shift" not in names)
        and "nearest mean" in names
        and (("crt" in names) == (loss in ("cross_entropy", "balanced_softmax")))
    )
    clf = Classifier.load(r.path / "model")
    with torch.no_grad():
        said = clf(torch.from_numpy(test.images)).argmax(1).numpy()
    method = json.loads((r.path / "model" / "model.json").read_text())["method"]
    row = next(x for x in rows if x["method"] == method)
    assert (said == test.labels).mean() == pytest.approx(row["all"], abs=2e-3), "what was scored is what was saved"
