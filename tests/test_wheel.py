"What a user gets from `pip install`: a small wheel that runs outside the repository."

import json
import subprocess
import sys
import zipfile

from conftest import ROOT


def test_contents(wheel):
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        notebooks = [n for n in names if n.endswith(".ipynb")]
        assert sorted(notebooks) == [
            "ltnb/nbs/91_run_baseline.ipynb",
            "ltnb/nbs/92_run_ldmlr.ipynb",
            "ltnb/nbs/93_run_diffult.ipynb",
            "ltnb/nbs/94_run_chatdiff.ipynb",
            "ltnb/nbs/95_run_discl.ipynb",
            "ltnb/nbs/96_run_diffusion.ipynb",
        ], "entry notebooks, and no other"
        assert not [o for c in json.loads(z.read(notebooks[0]))["cells"] for o in c.get("outputs", [])], (
            "without outputs"
        )
        assert {f"ltnb/{p.name}" for p in (ROOT / "ltnb").glob("*.py")} <= set(names)
        assert {f"ltnb/known/{p.name}" for p in (ROOT / "ltnb/known").glob("*.json")} <= set(names)
        assert not [n for n in names if n.startswith(("tests", "nbs"))]
        meta = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entries = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "ltnb = ltnb.cli:main" in entries and "[nbdev]\nltnb = ltnb._modidx:d" in entries
    assert "Project-URL: Repository, https://github.com/" in meta and "Project-URL: Documentation, https://" in meta
    assert "Apache-2.0" in meta and "Requires-Python: >=3.11" in meta
    assert "nbdev" not in "".join(l for l in meta.split("\n") if l.startswith("Requires-Dist") and "extra" not in l), (
        "nbdev is a dev tool"
    )


def test_runs_outside_the_repository(through_papermill):
    "The run of the other tests came from the wheel"
    out, printed, _, env = through_papermill
    where = subprocess.run(
        [sys.executable, "-c", "import ltnb; print(ltnb.__file__)"],
        cwd=out.parent,
        env=env,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert where.startswith(env["PYTHONPATH"])
    assert "label shift" in printed
    assert json.loads((out / "92_run_ldmlr.ipynb").read_text())["metadata"]["papermill"]["input_path"].startswith(
        env["PYTHONPATH"]
    )
