"Trainings that neither hang nor crash: workers that die or fall silent, and batches too small for BatchNorm."

import faulthandler
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, everywhere
from ltnb import batches as room
from ltnb import team
from ltnb.baseline import BaselineConfig
from ltnb.core import DataError, LtnbError, UsageError
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.files import ImageFiles
from ltnb.data import LongTail
from ltnb.ldmlr_published import encode_as_coded
from ltnb.models import build_model
from ltnb.classifier import Classifier, pixel_stats
from ltnb.batches import Batches
from ltnb.team import least_batch, smallest_map, split_order
from ltnb.training import fit
from warm import pair
from ltnb.together import fit_seeds
from torch import nn


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setattr(Progress, "quiet", True)
    monkeypatch.setattr(Batches, "failed", False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "30 PNG files of 16 pixels: (the images, their ImageFiles)"
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), np.uint8)
    for i, x in enumerate(images):
        Image.fromarray(x.transpose(1, 2, 0)).save(folder / f"{i:02}.png")
    return images, ImageFiles(folder, [f"{i:02}.png" for i in range(30)], 16)


def killed(index):  # in a worker: what the system does to a process that takes too much memory
    if 13 in index:
        os.kill(os.getpid(), signal.SIGKILL)
    return room._FILES[index]


def bus_error(index):
    faulthandler.disable()  # pytest's
    if 13 in index:
        os.kill(os.getpid(), signal.SIGBUS)
    return room._FILES[index]


def silent(index):
    if 13 in index:
        os.kill(os.getpid(), signal.SIGSTOP)
    return room._FILES[index]


def no_memory(index):
    if 13 in index:
        raise MemoryError
    return room._FILES[index]


def none_left():
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "fault, says",
    [
        (killed, "was killed"),
        (bus_error, "was killed"),
        (no_memory, "MemoryError"),
        (silent, "gave nothing for 1 seconds"),
    ],
)
def test_a_failing_worker_changes_nothing(photos, monkeypatch, capsys, fault, says):
    "The batches are those of no workers, from the very one that did not come; it is said once, and no process is left"
    images, files = photos
    monkeypatch.setattr(room, "_decode", fault)
    batches = Batches(files, workers=2, wait=1.0 if fault is silent else 60.0)
    for _ in range(2):  # the second epoch starts none
        got = list(batches.follow(torch.arange(30).split(4)))
        assert [len(b) for b in got] == [4] * 7 + [2] and np.array_equal(torch.cat(got), images)
    err = capsys.readouterr().err
    assert says in err and "--workers 0" in err and err.count("note:") == 1
    none_left()


def test_workers_that_cannot_start(photos, monkeypatch, capsys):
    "A full /dev/shm has no room for a semaphore"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "ProcessPoolExecutor", full)
    assert np.array_equal(torch.cat(list(Batches(photos[1]).follow(torch.arange(30).split(8)))), photos[0])
    assert "No space left" in capsys.readouterr().err


def test_a_training_outlives_its_workers(photos, monkeypatch):
    "Weights, bit for bit, of a training from memory"
    images, files = photos
    monkeypatch.setattr(room, "_decode", killed)
    nets = []
    for x in (images, files):
        clf = Classifier(build_model("convnet", 3), "abc", (3, 16, 16), *pixel_stats(images), "convnet")
        nets.append(fit(clf, x, np.arange(30) % 3, n_epochs=2, bs=8).net.state_dict())
    assert Batches.failed and all(map(torch.equal, *(n.values() for n in nets)))


def test_a_bad_photograph_is_no_failing_worker(photos, tmp_path, capsys):
    "It ends the training with its own sentence, from a worker as from this process"
    for p in photos[1].paths:
        shutil.copy(photos[1].root + f"/{p}", tmp_path)
    (tmp_path / "13.png").write_bytes(b"no image")
    for workers in (2, 0):
        batches = Batches(ImageFiles(tmp_path, photos[1].paths, 16), workers=workers)
        with pytest.raises(DataError, match="13.png"):
            list(batches.follow(torch.arange(30).split(8)))
    assert not capsys.readouterr().err and not Batches.failed


def test_a_stopped_epoch_leaves_no_process(photos):
    steps = Batches(photos[1]).follow(torch.arange(30).split(4))
    next(steps)
    steps.close()
    none_left()


SMALL = """
import os, signal, sys, multiprocessing, torch
from ltnb.files import ImageFiles
from ltnb.batches import Batches
files = ImageFiles(sys.argv[1], ["0.png"] * 12, 512)
steps = Batches(files).follow(torch.arange(12).split(4))
print(sum(len(b) for b in Batches(files).follow(torch.arange(12).split(4))), flush=True)
next(steps)
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow_process
def test_a_small_dev_shm_and_a_killed_parent(tmp_path):
    "Batches of 3 MB with 1 MB of /dev/shm, as in a container; and workers end with a parent that was killed"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(tmp_path / "0.png")
    command = [sys.executable, "-c", SMALL, str(tmp_path)]
    inside = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && "$@"', "-"]
    able = shutil.which("unshare") and subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    done = subprocess.run(
        [*(inside if able else []), *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "12" and "note:" not in done.stderr, done.stderr
    pids, end = lines[1].split(), time.monotonic() + 15
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    if not able:
        pytest.skip("no right to mount a small /dev/shm here: only the killed parent was tried")


def images(n, side):
    "n noisy images of 3 classes, and their labels"
    return np.random.default_rng(0).integers(0, 256, (n, 3, side, side), np.uint8), np.arange(n) % 3


def new(arch, x, seed=0, **more):
    return Classifier(build_model(arch, 3, x.shape[1], seed, **more), "abc", x.shape[1:], *pixel_stats(x), arch)


@pytest.fixture
def sizes(monkeypatch):
    "How many images each step of a training has"
    seen, step = [], team.train_step

    def watched(net, optimizer, loss, shown, *more):
        seen.append(len(shown[0]))
        return step(net, optimizer, loss, shown, *more)

    everywhere(monkeypatch, "train_step", watched)
    return seen


@pytest.mark.parametrize(
    "arch, n, side, bs, more, want",
    [
        ("resnet10", 9, 16, 8, {}, [9]),  # maps of one pixel: one value per channel
        ("resnet10", 9, 16, 8, dict(norm="group"), [8, 1]),  # no batch statistics
        ("convnet", 9, 8, 8, {}, [8, 1]),  # larger maps
        ("convnet", 5, 1, 2, {}, [2, 3]),
        ("resnet8", 5, 1, 4, {}, [5]),  # images of one pixel
        ("resnet10", 10, 16, 8, {}, [8, 2]),
        ("resnet10", 2, 16, 2, {}, [2]),
    ],
)  # two values are enough
def test_last_batches(sizes, arch, n, side, bs, more, want):
    x, y = images(max(n, 3), side)
    x, y = x[:n], y[:n] if n > 2 else np.array([0, 1])
    clf = new(arch, x, **more)
    if n == 2:
        clf = Classifier(build_model(arch, 2), "ab", x.shape[1:], arch=arch)
    fit(clf, x, y, n_epochs=2, bs=bs, lr=0.01)
    assert sizes == want * 2 and all(torch.isfinite(v).all() for v in clf.net.state_dict().values())


def test_a_joined_batch_is_mixed_and_logged_like_any(sizes, tmp_path):
    x, y = images(9, 16)
    with Run(BaselineConfig(out=str(tmp_path))) as run:
        run.start(BaselineConfig(), "cpu", "fp32")
        fit(new("resnet10", x), x, y, n_epochs=1, bs=8, lr=0.01, mixup=0.5, cutmix=0.5, run=run)
    assert sizes == [9] and (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_seeds_side_by_side_join_too():
    x, y = images(9, 1)
    alone = [fit(new("resnet8", x, s), x, y, n_epochs=2, bs=4, lr=0.01, seed=s) for s in (0, 1)]
    together = fit_seeds([new("resnet8", x, s) for s in (0, 1)], x, y, [0, 1], n_epochs=2, bs=4, lr=0.01)
    for a, b in zip(alone, together, strict=True):
        pairs = zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True)
        assert all(torch.allclose(p, q, atol=1e-3) for p, q in pairs)


def test_refused_before_the_first_step(sizes):
    x, y = images(5, 16)
    with pytest.raises(UsageError, match="bs=2 or more"):
        fit(new("resnet10", x), x, y, bs=1)
    with pytest.raises(UsageError, match="bs=2 or more"):
        fit_seeds([new("resnet10", x)], x, y, [0], bs=1)
    with pytest.raises(UsageError, match="bs=4 or more, fewer"):
        least_batch(new("resnet10", x), x.shape[1:], 3, size=2)
    body = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten())
    body.features, body.fc = body.forward, nn.Identity()
    clf = Classifier(body, "abc", (3, 4, 4), arch="own")
    with pytest.raises(UsageError, match="cannot take images of 4 x 4 pixels"):
        fit(clf, x[:, :, :4, :4], y, bs=2)
    assert not sizes


def test_the_rule():
    order = torch.arange(97)

    def lengths(*args):
        return [len(b) for b in split_order(*args)]

    assert lengths(order, 32) == [32, 32, 32, 1] and lengths(order, 32, 2) == [32, 32, 33]
    assert lengths(order[:1], 32, 2) == [1]
    assert torch.equal(torch.cat(split_order(order, 32, 4)), order)
    x = images(3, 16)[0]
    assert smallest_map(new("resnet10", x), x.shape[1:]) == 1 and smallest_map(new("convnet", x), x.shape[1:]) == 64
    group = new("resnet10", x, norm="group")
    assert smallest_map(group, x.shape[1:]) is None and least_batch(group, x.shape[1:], 1) == 1
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(new("resnet10", x))  # sees the whole batch
    assert least_batch(sync, x.shape[1:], 4, size=4) == 2


def test_other_processes_make_other_steps(tmp_path, monkeypatch):
    "A training whose last batch was joined is not continued as one with more steps an epoch"
    x, y = images(9, 16)

    def go(n_epochs):
        with Run(BaselineConfig(out=str(tmp_path))) as run:
            run.start(BaselineConfig(), "cpu", "fp32")
            return fit(new("resnet10", x), x, y, n_epochs=n_epochs, bs=8, lr=0.01, run=run, save_every=0.0)

    go(1)
    assert go(2) is not None
    everywhere(monkeypatch, "least_batch", lambda *a: 1)
    with pytest.raises(LtnbError, match="1 steps an epoch"):
        go(3)


def test_the_published_encoding_joins_too():
    data = LongTail.digits(10.0)
    few = np.concatenate([np.arange(10)] + [np.flatnonzero(data.train.labels == k)[:6] for k in range(10)])[:65]
    part = data.train.take(few)
    part = replace(part, images=np.ascontiguousarray(part.images[:, :, :1, :1]))
    one = replace(data, train=part, test=part)
    clf = Classifier(build_model("resnet8", 10, 1), data.class_names, (1, 1, 1), arch="resnet8")
    assert torch.isfinite(encode_as_coded(clf, one, augment=None)).all()


TWO = """
import os, sys, numpy as np, torch
from ltnb.progress import Progress
from ltnb.models import build_model
from ltnb.classifier import Classifier
from ltnb.team import join_team
from ltnb.training import fit
Progress.quiet, team = True, join_team("cpu")
for arch, side, n in (("resnet8", 4, 7), ("convnet", 8, 5)):
    x, y = np.random.default_rng(0).integers(0, 256, (n, 3, side, side), np.uint8), np.arange(n) % 3
    clf = Classifier(build_model(arch, 3), "abc", x.shape[1:], arch=arch)
    fit(clf, x, y, n_epochs=2, bs=4, lr=.01, team=team)
    print(arch, n, float(sum(p.detach().double().abs().sum() for p in clf.net.parameters())), flush=True)
"""


@pytest.mark.slow_process
def test_two_processes_share_a_small_last_batch():
    "Three images for two processes are too few where maps have one pixel; where they are larger, one may get none"
    both = pair(program=TWO)
    assert [p.returncode for p in both] == [0, 0], both[0].stderr[-2000:] + both[1].stderr[-2000:]
    said = [p.stdout for p in both]
    assert said[0] == said[1] and said[0].count("\n") == 2 and "nan" not in said[0]
