"Every notebook runs from top to bottom, and reads as the rules of CONTRIBUTING.md ask."
import ast
import json
import re
import sys

import pytest
from conftest import ROOT
from ltnb.core import Progress

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
IDS = [p.stem for p in NOTEBOOKS]
source = lambda cell: "".join(cell["source"])


@pytest.fixture(params=NOTEBOOKS, ids=IDS)
def path(request): return request.param


@pytest.fixture
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_runs(path, tmp_path, monkeypatch):
    from nbdev.test import test_nb
    monkeypatch.setenv("LTNB_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Progress, "quiet", False) # and what the notebook does to it is undone
    ok, seconds = test_nb(path, skip_flags=["slow", "cuda"], basepath=ROOT)
    assert ok, "a cell failed: see the traceback above"
    assert seconds < 45 * 4, f"{seconds:.0f} s: a notebook takes at most 45 s on two idle cores; mark long cells #| slow"


def test_opening_and_end(cells):
    first = [c for c in cells if c["cell_type"] == "markdown"][0]
    assert re.match(r"# .+\n\n> .+", source(first)), "a notebook opens with a title and a subtitle"
    text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    if "# ltnb" not in source(first): assert "## Summary" in text and "### Exercises" in text


def test_cells_are_small(cells):
    for c in cells:
        if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", []):
            assert len(source(c).splitlines()) <= 40, f"a cell of {len(source(c).splitlines())} lines: {source(c)[:80]}"


def test_imports_stand_alone(cells):
    for c in (c for c in cells if c["cell_type"] == "code"):
        body = ast.parse(re.sub(r"^\s*[%!].*$", "", source(c), flags=re.M)).body
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body if not isinstance(n, ast.Expr) or not isinstance(n.value, ast.Constant)}
        assert len(kinds) < 2, f"imports and code share a cell: {source(c)[:80]}"


def test_stored_outputs(path, cells):
    code = [c for c in cells if c["cell_type"] == "code"]
    assert path.stat().st_size < 1_000_000
    assert any(c["outputs"] for c in code), "no stored output"
    kinds = {o["output_type"] for c in code for o in c["outputs"]}
    assert "error" not in kinds
    text = json.dumps([{k: v for k, v in o.get("data", {"text": o.get("text")}).items() if k.startswith("text")} for c in code for o in c["outputs"]])
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of a machine in an output"
    assert "it/s]" not in text, "a progress bar in an output"
    streams = [o for c in code for o in c["outputs"] if o["output_type"] == "stream" and o["name"] == "stderr"]
    assert not streams or path.stem == "90_cli", f"stderr in an output: {streams[0]['text']}"


def test_parameters_cell_only_where_it_belongs(path, cells):
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == (1 if re.match(r"6\d_run_", path.stem) else 0)
