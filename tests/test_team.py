"Several processes: they take the same way, end with the same state, and none waits for ever."

import threading
import time

import numpy as np
import pytest
import torch
from conftest import SMALL_UNET
from ltnb.core import DataError, LtnbError, UsageError, read_json, read_jsonl
from ltnb.team import Team, TeamError, _patience, join_team
from PIL import Image
from warm import Command, pair

DIFFULT = [
    "run",
    "diffult",
    "--plain",
    "--quiet",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--imb-ratio",
    "10",
    "--n-steps",
    "2",
    "--diff-bs",
    "16",
    "--n-epochs",
    "1",
    "--target-per-class",
    "16",
    "--sample-steps",
    "2",
    "--cap",
    "2",
    "--pipelines",
    "false",
    "--judge-epochs",
    "1",
]


# meetings, among threads that share a store
def together(act, size=2, patience=20.0):
    "What each of several pretended processes comes to: a value, or an error"
    store, said = torch.distributed.HashStore(), {}

    def go(rank):
        try:
            with Team(rank, size, store, patience) as team:
                said[rank] = act(team)
        except Exception as e:
            said[rank] = e

    threads = [threading.Thread(target=go, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(said) == size, "somebody still waits"
    return [said[r] for r in range(size)]


def test_the_first_process_decides():
    def act(team):
        time.sleep(0.02 * team.rank)
        team.wait("a start")
        return [team.told("a number", team.rank + n) for n in range(3)]

    assert together(act, 3) == [[0, 1, 2]] * 3


def test_another_value_is_refused():
    first, other = together(lambda team: team.agree("training set", "abc"[team.rank]))
    assert first == "a" and isinstance(other, LtnbError)
    assert "rank 1 has another training set than rank 0 ('b', not 'a')" in str(other)


def test_processes_that_went_apart_say_where():
    def act(team):
        team.wait("the images" if team.rank else "the scores")

    for e in together(act):
        assert isinstance(e, TeamError) and "rank 0 is at 'the scores', rank 1 at 'the images'" in str(e)


@pytest.mark.parametrize(
    "error, text",
    [
        (DataError("b.png cannot be read."), "b.png cannot be read."),
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit("SIGTERM"), "told to"),
    ],
)
def test_an_error_ends_the_others_at_once(error, text):
    start = time.monotonic()

    def act(team):
        if team.rank == 1:
            raise error
        team.wait("the images")

    def all_of(team):  # SystemExit would end a thread in silence
        try:
            act(team)
        except SystemExit as e:
            team.__exit__(SystemExit, e, None)
            raise TeamError("was told to") from e

    said = together(all_of, 3, patience=60.0)
    assert all(isinstance(e, LtnbError | KeyError) for e in said) and time.monotonic() - start < 10
    for e in (said[0], said[2]):
        assert "rank 1 of 3 processes has stopped" in str(e) and text in str(e)


def test_no_wait_is_for_ever():
    start = time.monotonic()
    first, other = together(lambda team: None if team.rank else team.wait("the images"), patience=0.3)
    assert other is None and isinstance(first, TeamError) and time.monotonic() - start < 10
    assert str(first).startswith("rank 0 of 2 processes has waited 0.3 seconds for rank 1 at: the images.")
    assert "LTNB_TEAM_TIMEOUT" in str(first)


def test_one_process_asks_nobody():
    x, team = torch.arange(6), Team()
    with team:
        team.wait()
    team.share([x])
    assert team.told("x", 3) == 3 and team.agree("x", 4) == 4 and team.whole(x, 6) is x and team.mine(x) is x


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan"])
def test_a_wrong_timeout_is_refused(monkeypatch, given):
    monkeypatch.setenv("LTNB_TEAM_TIMEOUT", given)
    with pytest.raises(UsageError, match="number of seconds"):
        _patience()


def test_a_launcher_that_left_something_out(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TeamError, match="start all of them with torchrun"):
        join_team()


# two processes that train
WORKER = """
import hashlib, json, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from ltnb import diffusion
from ltnb.baseline import BaselineConfig
from ltnb.core import DataError, LtnbError
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.files import ImageFiles
from ltnb.data import ImageSet, LongTail
from ltnb.models import build_model
from ltnb.classifier import Classifier
from ltnb.team import in_memory_together, join_team, ready_together
from ltnb.training import fit

Progress.quiet, folder, said = True, Path(sys.argv[1]), {}
digits, team = LongTail.digits(10.), join_team("cpu")
held = digits.test.images[:90], digits.test.labels[:90]
print_of = lambda net: hashlib.sha256(b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()

def dropping(norm="batch"):
    clf = Classifier(build_model("convnet", 10, 1, norm=norm), digits.class_names, (1, 8, 8), arch="convnet")
    clf.net.fc = nn.Sequential(nn.Dropout(.5), clf.net.fc)
    return clf

def train(name, stop=None, **more):
    run = Run(BaselineConfig(out=str(folder / name)))
    if team.writes: run.open().start(BaselineConfig(), "cpu", "fp32")
    def end(epoch):
        if epoch + 1 == stop: raise InterruptedError
    try: return fit(dropping(), digits.train.images, digits.train.labels, n_epochs=4, bs=128, run=run, save_every=0.,
                    held_out=held, after_epoch=end, team=team, **more).net
    except InterruptedError: return None
    finally:
        run.close()
        team.wait("the end of a training")

with team:
    order = lambda epoch, g: torch.randperm(len(digits.train), generator=g)[:200 + 90 * epoch + team.rank]
    ordered = dict(order=order, optimizer=torch.optim.AdamW, lr=.01) # one that differs between the processes
    for name, how in (("plain", {}), ("averaged", dict(ema=.8)), ("best", dict(patience=9)), ("ordered", ordered)):
        said[name] = print_of(train(name, **how))
        train(f"{name}-cut", stop=2, **how)
        said[f"{name}, cut"] = print_of(train(f"{name}-cut", **how))
    small = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=.3, norm_num_groups=4, attention=False)
    diffusion.UNETS["small"], real = small, (digits.train.images, digits.train.labels)
    model = diffusion.train_diffusion(*real, 10, unet="small", n_steps=3, diff_bs=15, team=team)
    said["diffusion"] = model.fingerprint

    decoded, one = [], ImageFiles._one
    def counted(self, i):
        decoded.append(self.paths[i])
        return one(self, i)
    ImageFiles._one = counted
    files = ImageFiles(folder / "photos", [f"{i}.png" for i in range(11)], 8, cache_mb=0)
    y = np.arange(11) % 3
    clf = Classifier(build_model("convnet", 3, 3, norm="group"), "abc", (3, 8, 8), arch="convnet")
    fit(clf, files, y, n_epochs=2, bs=4, lr=.01, mixup=.5, team=team, workers=0)
    said["files"] = float(sum(p.detach().double().abs().sum() for p in clf.net.parameters()))
    said["decoded"] = len(decoded)
    decoded.clear()
    part = ImageSet(files, y, ("a", "b", "c"))
    photos = LongTail(part, part, "photos")
    there = in_memory_together(photos, team)
    said |= {"pixels": int(there.train.images.sum()), "decoded for memory": len(decoded)}
    said["same"] = there.fingerprint() == photos.fingerprint()
    shares = .5, 0. if team.rank else .5, .5 if team.rank else 0.
    said["ready"] = [ready_together(photos, team, share).train.on_disk for share in shares]
    (folder / f"{team.rank}.json").write_text(json.dumps(said))
    try:
        if team.rank: raise DataError("b.png cannot be read.")
        team.sum(torch.ones(3)) # what the other never adds to
    except LtnbError as e:
        print(e, flush=True)
        raise
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two processes without a launcher that train, decode, and end with an error of the second: what each said"
    folder = tmp_path_factory.mktemp("two")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    for i, x in enumerate(pixels):
        Image.fromarray(x).save(folder / "photos" / f"{i}.png")
    both = pair(folder, program=WORKER)
    assert all((folder / f"{r}.json").exists() for r in (0, 1)), "".join(p.stderr[-3000:] for p in both)
    return [read_json(folder / f"{r}.json") for r in (0, 1)], [p.stdout for p in both], [p.returncode for p in both]


@pytest.mark.slow_process
def test_every_process_ends_with_the_state_of_the_first(two):
    "With BatchNorm, dropout, averages, and the best epoch on held-out images"
    (first, other), *_ = two
    for name in ("plain", "averaged", "best", "ordered", "diffusion"):
        assert first[name] == other[name], name


@pytest.mark.slow_process
def test_two_killed_processes_go_on_bit_for_bit(two):
    (first, other), *_ = two
    for name in ("plain", "averaged", "best", "ordered"):
        assert first[f"{name}, cut"] == other[f"{name}, cut"] == first[name], name


@pytest.mark.slow_process
def test_each_process_decodes_its_part(two, tmp_path):
    (first, other), *_ = two
    assert first["decoded"] + other["decoded"] == 22, "two epochs of 11"
    assert abs(first["decoded"] - other["decoded"]) <= 6
    assert sorted([first["decoded for memory"], other["decoded for memory"]]) == [10, 12], "train and test images"
    assert first["same"] and other["same"]
    assert first["files"] == other["files"] and first["pixels"] == other["pixels"]
    assert first["ready"] == other["ready"] == [False, False, True], "the first one says whether they fit"


@pytest.mark.slow_process
def test_one_process_trains_what_two_train_on_photographs(two):
    from ltnb.models import build_model
    from ltnb.classifier import Classifier
    from ltnb.training import fit

    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8).transpose(0, 3, 1, 2)
    clf = Classifier(build_model("convnet", 3, 3, norm="group"), "abc", (3, 8, 8), arch="convnet")
    fit(clf, pixels, np.arange(11) % 3, n_epochs=2, bs=4, lr=0.01, mixup=0.5)
    total = float(sum(p.detach().double().abs().sum() for p in clf.net.parameters()))
    assert total == pytest.approx(two[0][0]["files"], rel=1e-6) and int(pixels.sum()) == two[0][0]["pixels"]


@pytest.mark.slow_process
def test_an_error_in_one_process_is_a_sentence_in_the_other(two):
    _, (first, other), codes = two
    assert "b.png cannot be read." in other and "rank 1 of 2 processes has stopped: b.png cannot be read." in first
    assert codes == [1, 1]


# the command
SMALLER = f"""
import sys
from dataclasses import replace
from functools import partial
from ltnb import aid_loss, diffult
from ltnb.cli import main
from ltnb.diffusion import UNETS
UNETS["tiny"] = {SMALL_UNET}
aid_loss.Draws, extractor = partial(aid_loss.Draws, n=64), diffult.extractor
diffult.extractor = lambda s: extractor(replace(s, cfg=replace(s.cfg, n_epochs=4))) # it alone has to know something
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def diffult(tmp_path_factory):
    "DiffuLT by one process and by two, with BatchNorm: two run directories"
    folder = tmp_path_factory.mktemp("diffult")
    two = pair(*DIFFULT, "--out", folder / "two", program=SMALLER)
    assert [p.returncode for p in two] == [0, 0], "".join(p.stdout[-1000:] + p.stderr[-3000:] for p in two)
    assert "".join(p.stdout for p in two).count("run directory") == 1, "the table is printed once"
    one = Command(*DIFFULT, "--out", folder / "one", program=SMALLER).done()
    assert one.returncode == 0, one.stderr[-3000:]
    return folder / "one", folder / "two"


def ids(path):
    return {r["id"] for r in read_jsonl(path / "manifest.jsonl")}


@pytest.mark.slow_process
def test_diffult_with_two_processes_ends(diffult):
    "BatchNorm's statistics are those of half a batch, so numbers differ; files, rows and what is made do not"
    one, two = diffult
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in diffult]
    same = [[f for f in names if not f.startswith("made/") or "shard-" not in f] for names in files]
    assert same[0] == same[1]
    rows = [read_json(run / "scores.json") for run in diffult]
    assert [[r["method"] for r in r] for r in rows][0] == [r["method"] for r in rows[1]]
    for kind in ("cbdm-seed-0", "aid-seed-0"):
        made = [ids(run / "made" / kind) for run in diffult]
        wanted = min(made, key=len)
        assert wanted and wanted <= made[0] | made[1] and {i[:5] for i in made[0]} == {i[:5] for i in made[1]}


@pytest.mark.slow_process
def test_what_two_processes_kept_is_one_model(diffult):
    from ltnb.aid import Extractor
    from ltnb.diffusion import DiffusionModel
    from ltnb.classifier import Classifier

    _, two = diffult
    model, phi = DiffusionModel.load(two / "generator"), Extractor(Classifier.load(two / "phi"))
    rows = read_jsonl(two / "made" / "aid-seed-0" / "manifest.jsonl")
    assert {r["model"] for r in rows} == {model.fingerprint} and len({r["scores"]["aid_by"] for r in rows}) == 1
    assert len(phi.fingerprint) == 16 and (two / "model" / "model.safetensors").exists()
