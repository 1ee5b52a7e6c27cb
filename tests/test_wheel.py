"What a user gets from `pip install`: a small wheel that runs outside the repository."
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, TINY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "src", ignore=shutil.ignore_patterns(".git", "runs", "_proc", "_docs", "*.egg-info", ".venv", "build", "results", ".gpu"), symlinks=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "src")], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        notebooks = [n for n in names if n.endswith(".ipynb")]
        assert notebooks == ["ltnb/nbs/61_run_ldmlr.ipynb"], "entry notebooks, and no other"
        assert not [o for c in json.loads(z.read(notebooks[0]))["cells"] for o in c.get("outputs", [])], "without outputs"
        assert {f"ltnb/{p.name}" for p in (ROOT / "ltnb").glob("*.py")} <= set(names)
        assert not [n for n in names if n.startswith(("tests", "nbs"))]
        meta = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Apache-2.0" in meta and "Requires-Python: >=3.11" in meta
    assert "nbdev" not in "".join(l for l in meta.split("\n") if l.startswith("Requires-Dist") and "extra" not in l), "nbdev is a dev tool"


def test_runs_outside_the_repository(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run([sys.executable, "-c", "import ltnb; print(ltnb.__file__)"], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert str(tmp_path) in where
    done = subprocess.run([sys.executable, "-m", "ltnb", "run", "ldmlr", *TINY, "--out", "run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "label shift" in done.stdout and (tmp_path / "run" / "61_run_ldmlr.ipynb").exists()
