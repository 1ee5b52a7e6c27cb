"What the tests share: the command as a process, the demo (run once), and data beside the project, where it exists."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LTNB_SHARED", ROOT.parent / "shared"))


def ltnb(*args, cwd=None, env=None, timeout=300):
    "Run `python -m ltnb` as a user would; gives the finished process with its text output"
    return subprocess.run([sys.executable, "-m", "ltnb", *map(str, args)], cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout, capture_output=True, text=True)


def shared(name):
    "A file beside the project, or a skip that says so"
    path = SHARED / "data" / name
    if not path.exists(): pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    "A finished `ltnb demo`, and what it printed"
    out = tmp_path_factory.mktemp("demo") / "run"
    done = ltnb("demo", "--out", out, env={"COLUMNS": "150"})
    assert done.returncode == 0, done.stderr
    return out, done


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


TINY = ["--n-epochs", "3", "--n-steps", "60", "--per-class", "20", "--head-steps", "10", "--scratch-steps", "10", "--device", "cpu", "--precision", "fp32"]
