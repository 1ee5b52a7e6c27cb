"The table of comparisons with the authors' code: what it says is what it measures, where that code is at hand."

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import references as R  # noqa: E402

TABLE = ROOT / "results" / "references" / "README.md"
PEERS = os.environ.get("LTNB_PEERS")  # a folder of their repositories, as benchmarks/references.py takes it


def test_nothing_there_is_said_and_not_an_error(tmp_path):
    rows, skipped, commits = R.measure(tmp_path)
    assert rows == [] and commits == {} and len(skipped) == len(R.ROOMS)
    assert all("fetch it to" in s and str(tmp_path) not in s for s in skipped)
    assert "0 quantities" in R.page(rows, skipped, commits) and "Skipped:" in R.page(rows, skipped, commits)


def test_a_difference_is_seen():
    "The measure itself: of values, of gradients, and what counts as rounding"
    x = torch.arange(3.0)
    assert R.both(lambda v: v**2, lambda v: v**2 + 1, x) == (1.0, 0.0, 5.0)
    assert R.both(lambda v: v, lambda v: 2 * v - v.detach(), x)[:2] == (0.0, 1.5)
    assert R.Row("q", "o", "r", "t", 1e-3, None, 100.0).agrees and not R.Row("q", "o", "r", "t", 0.0, 1e-3, 1.0).agrees


@pytest.mark.skipif(not TABLE.exists(), reason="results/ is not part of a wheel")
def test_every_row_that_parts_says_how():
    lines = [re.split(r" \| ", line.strip("| \n")) for line in TABLE.read_text().splitlines() if line.startswith("|")]
    rows = [c for c in lines if len(c) >= 6 and c[5].strip() in ("yes", "no")]
    said = int(re.search(r"(\d+) quantities", TABLE.read_text())[1])
    assert len(rows) == said >= 60
    assert all(len(c) == 7 and len(c[6]) > 20 for c in rows if c[5] == "no"), "a row without a reason"


def test_the_authors_code_still_agrees():
    "All rows again; only those that the table says so may part"
    if not PEERS:
        pytest.skip("LTNB_PEERS names no folder of the authors' repositories")
    rows, skipped, _ = R.measure(Path(PEERS))
    assert rows, skipped
    assert all(r.agrees or len(r.note) > 20 for r in rows), [r for r in rows if not r.agrees and not r.note]
