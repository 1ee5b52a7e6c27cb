"results/ is a registry: each folder says what it is, and the page is worked out from its files"

import json
import re

import pytest
from conftest import ROOT

import results

pytestmark = pytest.mark.skipif(not results.RESULTS.exists(), reason="results/ is not part of a wheel")
FOLDERS = sorted(p.name for p in results.RESULTS.iterdir() if p.is_dir()) if results.RESULTS.exists() else []
NEEDED = {"title", "set", "command", "commit", "date", "hardware", "seconds"}


@pytest.fixture(scope="module")
def page():
    return json.loads(results.PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(page):
    return "\n\n".join("".join(c["source"]) for c in page["cells"])


def test_the_page_is_what_the_files_say():
    assert results.PAGE.read_text(encoding="utf-8") == results.written(results.notebook()), (
        "run: python tests/results.py"
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is(folder):
    about = json.loads((results.RESULTS / folder / "about.json").read_text(encoding="utf-8"))
    assert set(about) >= NEEDED and not set(about) - NEEDED - {"budget", "note", "instead", "overview"}
    assert about["commit"] is None or re.fullmatch("[0-9a-f]{7}", about["commit"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", about["date"]) and (about["seconds"] is None or about["seconds"] > 0)
    assert "instead" not in about or (results.RESULTS / about["instead"]).exists()


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (results.RESULTS / f / "scores.json").exists()])
def test_every_run_with_scores_has_a_table(folder):
    readme = (results.RESULTS / "README.md").read_text(encoding="utf-8")
    assert folder in {f for _, f in results.MARK.findall(readme)}


def test_every_folder_is_on_the_page(text):
    assert [f for f in FOLDERS if f"`{f}`" not in text] == []
    assert "[Table:" not in text and len(text) < 300_000


def test_the_page_begins_with_what_was_found(page):
    heads = ["".join(c["source"]).split("\n")[0] for c in page["cells"]]
    assert heads[0] == "# Results"
    assert heads[2:5] == ["## What was found", "## Tables by data set", "## Runs"]
    assert len("".join(page["cells"][2]["source"])) < 2500, "a few lines"
    assert len({c["id"] for c in page["cells"]}) == len(heads)


def test_tables_are_tables(text):
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().split("\n")}
        assert len(cells) == 1, block[:200]


def test_links_of_the_page_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert re.match(r"\w+:", target) or (ROOT / "nbs" / target).exists(), target


def test_the_first_sentence_is_still_true():
    "`on none of these sets has a diffusion model clearly beaten the best control that needs none`"
    winners = [
        (folder, c.method)
        for folder, about in results.abouts().items()
        if (results.RESULTS / folder / "scores.json").exists() and about.get("overview", True)
        for c in results.compare_with_controls(results.main_rows(folder))
        if c.difference.low > 0
    ]
    assert not winners, f"results/README.md says otherwise: {winners}"


def test_numbers_are_those_of_the_files(text):
    "Worked out once more, by hand, from one run"
    rows = json.loads((results.RESULTS / "diffult-digits-cpu" / "scores.json").read_text())
    all_of = [r["all"] for r in rows if r["method"] == "balanced softmax"]
    mean = sum(all_of) / len(all_of)
    sd = (sum((a - mean) ** 2 for a in all_of) / (len(all_of) - 1)) ** 0.5
    assert f"| balanced softmax | {100 * mean:.1f} ± {100 * sd:.1f} |" in text.replace("\u00a0", " ")
