"What the tests share: the command as a process, the demo (run once), and data beside the project, where it exists."

import io
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; subprocesses inherit it
ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--n-epochs",
    "3",
    "--n-steps",
    "60",
    "--diff-width",
    "16",
    "--diff-bs",
    "32",
    "--per-class",
    "20",
    "--head-steps",
    "10",
    "--scratch-steps",
    "10",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]
SMALL_UNET = dict(block_out_channels=(8, 16), layers_per_block=1, dropout=0.0, norm_num_groups=4, attention=False)
SHARED = Path(os.environ.get("LTNB_SHARED", ROOT.parent / "shared"))


def ltnb(*args, cwd=None, env=None, timeout=900):
    "Run `python -m ltnb` as a user would; gives the finished process with its text output"
    return subprocess.run(
        [sys.executable, "-m", "ltnb", *map(str, args)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def shared(name):
    "A file beside the project, or a skip that says so"
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def cifar(name, part, choose=lambda labels: slice(None)):
    "Real CIFAR images (N, 32, 32, 3), labels, names of classes: of the pack beside the project, what `choose` takes"
    import numpy as np
    from PIL import Image

    with np.load(shared(f"{name}_lt.npz")) as z:
        blob, ends, names = z[f"{part}_webp"], z[f"{part}_offsets"], [str(c) for c in z["class_names"]]
        labels = (z["test_labels"] if part == "test" else z["train_labels_full"][z["train_index"]]).ravel()
    at = np.arange(len(labels))[choose(labels)]
    files = (io.BytesIO(blob[ends[i] : ends[i + 1]].tobytes()) for i in at)
    return np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]), labels[at], names


def everywhere(patch, name, value):
    "Replace what a name stands for in every room that has imported it (`patch`: a MonkeyPatch)"
    rooms = [m for n, m in sorted(sys.modules.items()) if n.startswith("ltnb.") and hasattr(m, name)]
    assert rooms, f"no room knows {name}"
    for room in rooms:
        patch.setattr(room, name, value)


def copy_before(patch, place, name, source, to):
    "As a power cut at the first call of `place.name` leaves it: `source` is copied then, and the work goes on"
    real = getattr(place, name)

    def first_copy(*args, **more):
        if not to.exists():
            shutil.copytree(source, to)
        return real(*args, **more)

    patch.setattr(place, name, first_copy)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    "What a test writes need not outlast a power cut: `fsync` waits some milliseconds each time, thousands of times"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True)
def same_draws():
    "What a test draws without a seed of its own does not depend on the tests that its worker ran before"
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)


def once(tmp_path_factory, name, make):
    "Make a folder once for all workers; the others wait for it"
    from ltnb.runs import locked

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with locked(folder.with_suffix(".lock"), wait=1200):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "A finished `ltnb demo`: (run directory, stdout, stderr)"

    def make(folder):
        done = ltnb("demo", "--out", folder / "run", env={"COLUMNS": "150"})
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)

    folder = once(tmp_path_factory, "demo", make)
    return folder / "run", (folder / "stdout").read_text(), (folder / "stderr").read_text()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the project"

    def make(folder):
        shutil.copytree(
            ROOT,
            folder / "src",
            ignore=shutil.ignore_patterns(
                ".git", "runs", "_proc", "_docs", "*.egg-info", ".venv", "build", "results", ".gpu", "data"
            ),
            symlinks=True,
        )
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "-q",
                "--no-deps",
                "--no-build-isolation",
                "-w",
                str(folder),
                str(folder / "src"),
            ],
            check=True,
            capture_output=True,
        )

    return next(once(tmp_path_factory, "wheel", make).glob("*.whl"))


@pytest.fixture(scope="session")
def through_papermill(wheel, tmp_path_factory):
    "A finished `ltnb run ldmlr`, from the installed wheel, elsewhere: (run, stdout, stderr, environment)"

    def make(folder):
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)],
            check=True,
            capture_output=True,
        )
        done = ltnb(
            "run",
            "ldmlr",
            *TINY,
            "--out",
            "here",
            cwd=folder,
            env={"PYTHONPATH": str(folder / "site"), "COLUMNS": "150"},
        )
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)

    folder = once(tmp_path_factory, "papermill", make)
    return (
        folder / "here",
        (folder / "stdout").read_text(),
        (folder / "stderr").read_text(),
        {"PYTHONPATH": str(folder / "site"), "COLUMNS": "150"},
    )


@pytest.fixture(scope="module")
def small_unet():
    "The tiny network is smaller yet, for whole runs of which nobody asks how good their images are; as it was"
    from ltnb.diffusion import UNETS

    usual = UNETS["tiny"]
    with pytest.MonkeyPatch.context() as m:
        m.setitem(UNETS, "tiny", SMALL_UNET)
        yield usual


@pytest.fixture(scope="module")
def few_draws():
    "What the AID-biased loss is measured on is few images, for whole runs of which nobody asks how well it is set"
    from ltnb import aid_loss

    with pytest.MonkeyPatch.context() as m:
        m.setattr(aid_loss, "Draws", partial(aid_loss.Draws, n=64))
        yield


@pytest.fixture(scope="module")
def tiny_clip():
    "A CLIP that is trained on the spot is smaller than usual, for whole runs of which nobody asks what it has learned"
    from ltnb import clip_training

    with pytest.MonkeyPatch.context() as m:
        small = partial(clip_training.ClipTraining, layers=1, width=32, embed_dim=16)
        m.setattr(clip_training, "ClipTraining", small)
        yield


@pytest.fixture
def main(capsys):
    "The command in this process: (exit code, stdout, stderr)"
    from ltnb import cli
    from ltnb.progress import Progress

    def call(*args):
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in args])
        finally:
            Progress.quiet = False
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


LONG = (  # what begins first, so that no worker waits for it at the end: CPU seconds fall down this list
    "test_cli.py",
    "test_models.py",
    "test_methods.py",
    "test_training.py",
    "test_compare.py",
    "test_seeds.py",
    "test_diffusion.py",
    "test_fake_cuda.py",
    "test_generate.py",
    "test_diffult.py",
    "test_terminal.py",
    "test_resume.py",
    "test_published.py",
    "test_team.py",
    "test_threads.py",
    "test_data.py",
    "test_synthetic.py",
    "test_photographs.py",
    "test_site.py",
    "test_project.py",
    "test_wheel.py",
    "test_report.py",
)
LESSONS = "51 41 29 75 40 90 62 63 85 87 22 79 64 86 44 84 21 83 60".split()  # 51, 75, 40: before those that share
PROCESSES = {"demo", "wheel", "through_papermill"}  # fixtures that start whole processes


def pytest_collection_modifyitems(items):
    "Long files first, then lessons, the long ones first; what builds on a whole process is marked so"

    def place(item):
        file, lesson = item.path.name, getattr(item, "callspec", None)
        if file == "test_notebooks.py" and "path" in (lesson.params if lesson else ()):
            name = lesson.params["path"].stem
            return 1, next((i for i, n in enumerate(LESSONS) if name.startswith(f"{n}_")), len(LESSONS))
        return (0, LONG.index(file)) if file in LONG else (2, 0)

    items.sort(key=place)  # stable: tests of a file keep their order
    for item in items:
        if PROCESSES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow_process)


def pytest_xdist_make_scheduler(config, log):
    "A file's tests stay in one worker, where they share its fixtures; every notebook may go to either"
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndNotebooks(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file

    return FilesAndNotebooks(config, log)


def pytest_terminal_summary(terminalreporter):
    "Whole sentences of the lessons that failed: the short summary cuts lines at the terminal's width"
    failed = [r for r in terminalreporter.stats.get("failed", ()) if "test_notebooks" in r.nodeid]
    if failed:
        terminalreporter.section("lessons that failed", sep="-")
    for r in failed:
        terminalreporter.write_line(f"{r.nodeid.split('::')[-1]}: {str(r.longrepr).splitlines()[-1]}")
