"What the tests share: the command as a process, the demo (run once), and data beside the project, where it exists."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n-epochs", "3", "--n-steps", "60", "--per-class", "20", "--head-steps", "10", "--scratch-steps", "10", "--device", "cpu", "--precision", "fp32"]
SHARED = Path(os.environ.get("LTNB_SHARED", ROOT.parent / "shared"))


def ltnb(*args, cwd=None, env=None, timeout=300):
    "Run `python -m ltnb` as a user would; gives the finished process with its text output"
    return subprocess.run([sys.executable, "-m", "ltnb", *map(str, args)], cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout, capture_output=True, text=True)


def shared(name):
    "A file beside the project, or a skip that says so"
    path = SHARED / "data" / name
    if not path.exists(): pytest.skip(f"{path} is not on this machine")
    return path


def cifar_pack():
    "Real CIFAR-10 images: the pack beside the project, through its own reader"
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location("load", shared("load.py"))
    spec.loader.exec_module(load := module_from_spec(spec))
    return load.load(shared("cifar10_lt.npz"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "A finished `ltnb demo`, and what it printed"
    out = tmp_path_factory.mktemp("demo") / "run"
    done = ltnb("demo", "--out", out, env={"COLUMNS": "150"})
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the project"
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "src", ignore=shutil.ignore_patterns(".git", "runs", "_proc", "_docs", "*.egg-info", ".venv", "build", "results", ".gpu"), symlinks=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "src")], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def through_papermill(wheel, tmp_path_factory):
    "A finished `ltnb run ldmlr`, from the installed wheel and outside the repository: (run directory, finished process, environment)"
    folder = tmp_path_factory.mktemp("papermill")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, capture_output=True)
    env = {"PYTHONPATH": str(folder / "site"), "COLUMNS": "150"}
    done = ltnb("run", "ldmlr", *TINY, "--out", "here", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return folder / "here", done, env


@pytest.fixture
def main(capsys):
    "The command in this process: (exit code, stdout, stderr)"
    from ltnb import cli
    from ltnb.core import Progress

    def call(*args):
        capsys.readouterr()
        try: code = cli.main([str(a) for a in args])
        finally: Progress.quiet = False
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
