"The site, without Quarto: pages lead somewhere and can be read; what is written from the notebooks is current"

import ast
import importlib
import json
import re
import struct
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

import house
import pages
from readme import readme

SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf-8"))
HTML, WEBSITE = SITE["format"]["html"], SITE["website"]
SMALL = "^(01_|02_|index|learn|guide|results)"  # pages that are processed without torch


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    "What `nbdev-docs` hands to Quarto, for a few pages"
    return pages.stage(tmp_path_factory.mktemp("site") / "site", SMALL)


# processed pages
def test_nbdev_knows_the_repository(processed):
    assert pages.missing_settings(processed) == []
    known = yaml.safe_load((processed / "nbdev.yml").read_text())["website"]
    assert {k: WEBSITE[k] for k in known} == known, "_quarto.yml and pyproject.toml say different things"


def test_what_pages_need_is_beside_them(processed):
    needed = [*HTML["theme"]["light"][1:], *HTML["theme"]["dark"][1:], HTML["css"], WEBSITE["favicon"]]
    needed += [WEBSITE["open-graph"]["image"], WEBSITE["twitter-card"]["image"], "404.qmd", "images/tail.png"]
    assert [n for n in needed if not (processed / n).is_file()] == []


def test_boxes_have_sources_and_no_secrets(processed):
    known = pages.pages(processed)
    boxes = [b for p in known.values() for b in p.boxes]
    assert len(boxes) > 30 and all("{target=" in b for b in boxes if b != "<!-- private -->")
    assert [x for p in known.values() for x in [*pages.private_boxes(p), *pages.broken_boxes(p)]] == []
    assert sum(pages.has(p, words) for p in known.values() for words in ("__main__.", " at 0x")) == 0


def test_definitions_stand_below_their_headings(processed):
    from ltnb._site import box_of, pieces

    source = "A = 1\n\n\ndef _help(): pass\n\n\ndef f(x): return x\n\n\n@patch\ndef g(self:C): return 2\nB = 2"
    found = pieces(source, {"f", "C.g"})
    assert [n for n, _ in found] == ["f", "C.g"] and found[0][1].startswith("A = 1") and "_help" in found[0][1]
    assert found[1][1].startswith("@patch") and found[1][1].endswith("B = 2")

    class Cell:
        def __init__(self, c):
            self.cell_type, self.source = c["cell_type"], "".join(c["source"])

    cells = [Cell(c) for c in pages.pages(processed)["01_config"].cells]
    below = [(box_of(a), b.source) for a, b in zip(cells, cells[1:], strict=False) if "#| exports" in b.source]
    named = [(name.split(".")[-1], code) for name, code in below if name]
    assert len(named) > 8 and all(re.search(rf"(def|class) {name}\b", code) for name, code in named)


def test_links_keep_their_words_and_lead_somewhere():
    from ltnb._site import unlink

    at = "https://ltnb.github.io/ltnb/a.html#x"
    text = f"see [the record [`Where`]({at}) of all](24_team.ipynb), [`_send`]({at}) and [`fit`]({at})"
    cell = SimpleNamespace(cell_type="markdown", source=text, get=lambda k, d=None: d)
    unlink(cell)
    assert cell.source == f"see [the record `Where` of all](24_team.ipynb), `_send` and [`fit`]({at})"


def test_printed_sentences_are_wrapped():
    from ltnb._site import fold, printed

    sentence = " ".join(["sentence"] * 20)
    assert max(map(len, fold(sentence).splitlines())) <= 80 and fold(sentence).split() == sentence.split()
    row = f"{'label shift':30}{'88.1 ± 2.9':>30}{'81.7 ± 5.9':>30}"
    assert fold(row) == row, "a row of numbers is no sentence"
    setting = f"  --flag{' ' * 20}text{' ' * 10}{sentence}"
    first, *others = fold(setting).splitlines()
    assert others and all(s.startswith(" " * setting.index("sentence")) for s in others)
    choices = printed(f"  --name  {'|'.join(['choice'] * 30)} a  {sentence}\n")
    assert max(map(len, choices.splitlines())) <= 80 and choices.endswith("sentence\n")
    assert printed(f"{sentence[:86]} (so\n  it is)") == f"{sentence[:80]}\n  {sentence[81:86]} (so it is)"


def test_a_wide_table_becomes_several():
    from ltnb._site import printed

    head, row = "method" + "      accuracy" * 8, "ours  " + "          1.25" * 8
    text = f"before\n\n{head}\n{'-' * len(head)}\n{row}\n"
    first, second, third = printed(text).split("\n\n")
    assert first == "before" and max(map(len, printed(text).splitlines())) <= 80
    assert {t.split()[0] for t in (second, third)} == {"method"} and third.endswith("1.25\n")
    assert second.count("1.25") + third.count("1.25") == 8 and second.split("\n")[1] == "-" * len(second.split("\n")[0])
    narrow = "a   b\n------------\n1   2"
    assert printed(narrow) == narrow


def laid_out(source):
    "Code as its page shows it"
    from ltnb._site import fit_code

    cell = SimpleNamespace(cell_type="code", source=source)
    fit_code(cell)
    return cell.source


def test_long_comments_move_above_their_lines():
    said = "a comment that says much " * 4
    source = f'def f(a:int, # {said}\n      b:str="#", # {said}\n     ): # short\n    return "# no comment"'
    lines = laid_out(source).split("\n")
    assert lines[0] == "def f(" and lines[1].startswith("      # a comment") and "      a:int," in lines
    assert lines[-3:] == ['      b:str="#",', "     ): # short", '    return "# no comment"']
    assert laid_out(f"def f(a): return a # {said}").endswith("\ndef f(a): return a")
    assert {s[:8] for s in laid_out(f"if a:\n    # {said}\n    pass").split("\n")[1:-1]} == {"    # a ", "    # th"}


def test_only_wide_statements_are_laid_out_anew():
    wide, own = f"x = f({'number, ' * 12}1)", "y  = [1,2]\nif a: b = x[i:i+1]"
    lines = laid_out(f"#| exports\n{own}\n{wide}").split("\n")
    assert lines[0] == "#| exports" and "\n".join(lines[1:4]) == f"{own}\nx = f(" and lines[-1] == ")"
    between = f'{wide}\n#| fig-alt: "{"a picture " * 12}"\n{wide}'
    assert [s for s in between.split("\n") if "fig-alt" in s] == [
        s for s in laid_out(between).split("\n") if "fig-alt" in s
    ]
    guard = f"if {'a' * 40}: raise ValueError({'b' * 40})"
    assert laid_out(guard) == guard.replace(": raise", ":\n    raise")
    assert laid_out(f"{wide};")[-2:] == ");", "a cell that shows no value"
    assert laid_out(f"%time {wide}") == f"%time {wide}", "a magic"
    clauses = f"try: a = 1\nexcept E:\n    a = 2\n{wide}"  # black loses what stands between such clauses
    assert meaning(laid_out(clauses)) == meaning(clauses)
    doc = "words of a docstring " * 5
    assert pages.wide(laid_out(f'def f():\n    "{doc.strip()}"')) == []


def meaning(source):
    "A syntax tree; docstrings by their words"
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0].value.value = " ".join(ast.get_docstring(node).split())
    return ast.dump(tree)


def test_pages_show_the_code_that_runs():
    "In every notebook, of the cells with wide lines every eighth means the same on its page, and fits"
    left = []
    for book in house.notebooks():
        shown = [s for s in book.sources() if not house.directives(s) & house.HIDDEN and pages.wide(s)]
        for source in shown[::8]:
            page = laid_out(source)
            assert meaning(page) == meaning(source), book.name
            left += pages.wide(page)
    assert len(left) <= pages.FEW // 2, left


# boxes, without processing
def _public():
    for module in house.modules():
        for name in house.public_names((ROOT / "ltnb" / f"{module}.py").read_text("utf-8")):
            yield module, name


@pytest.mark.parametrize("part", range(4))
def test_boxes_can_be_read(part):
    "A quarter of the public names, as their pages show them"
    from ltnb._site import Box

    for module, name in list(_public())[part::16]:
        sym = getattr(importlib.import_module(f"ltnb.{module}"), name)
        if not callable(sym):
            continue  # tables of constants have no box
        box = Box(sym)._repr_markdown_()
        page = pages.Page(module, [{"cell_type": "code", "source": "show_doc()", "outputs": [_as_output(box)]}])
        assert page.boxes and pages.broken_boxes(page) + pages.private_boxes(page) == []
        assert " at 0x" not in box and "__main__." not in box


def _as_output(text):
    return {"output_type": "display_data", "data": {"text/markdown": text}}


def test_settings_are_a_table():
    from ltnb._site import Box
    from ltnb.ldmlr_settings import LatentConfig

    rows = re.findall(r"^\| <code>(\w+)</code> \| (.+?) \| (.+) \|$", Box(LatentConfig)._repr_markdown_(), re.M)
    known = {name: (default, said) for name, default, said in rows}
    assert known["kappa"][0] == "<code>4.0</code>" and "at least 0.01" in known["kappa"][1]
    assert "300 for digits" in known["n_steps"][0] and "<code>neighbours</code>" in known["pull"][1]
    assert all(len(said) > 8 for _, said in known.values())


# links, words, colours
def test_no_link_is_dead():
    assert pages.dead_links(ROOT / "nbs") == []


def test_menu_leads_to_pages():
    bar = [e["href"] for side in ("left", "right") for e in WEBSITE["navbar"][side]]
    listed = [c["href"] for e in WEBSITE["sidebar"]["contents"] for c in e["contents"]]
    assert sorted(listed) == sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb"))
    assert {h for h in bar if not h.startswith("http")} <= set(listed) and WEBSITE["repo-url"] in bar
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_nothing_below_a_subtitle_is_lost():
    lost = {p.stem: text[:60] for p in (ROOT / "nbs").glob("*.ipynb") if (text := pages.lost_words(p))}
    assert lost == {}, "move it to a cell of its own"


def test_pages_have_names_of_their_own():
    names = [re.sub(r"^\d+_", "", p.stem) for p in (ROOT / "nbs").glob("*.ipynb")]
    assert len(set(names)) == len(names), "nbdev drops the numbers"


def test_front_page_is_short():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text("utf-8"))
    text = "\n\n".join("".join(c["source"]) for c in index["cells"])
    assert 300 < pages.words(text) <= 600


def test_directives_are_not_in_the_readme():
    out = {"output_type": "stream", "name": "stdout", "text": "2"}
    cell = {"cell_type": "code", "source": '#| fig-alt: "a picture"\nprint(1 + 1)', "outputs": [out]}
    assert readme({"cells": [cell]}) == "```python\nprint(1 + 1)\n```\n\n```\n2\n```\n"


def _luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted(map(_luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read(theme):
    text = (ROOT / "nbs" / f"{theme}.scss").read_text()
    c = dict(re.findall(r"^\$([\w-]+): (#\w{6});", text, re.M))
    assert "scss:defaults" in text and len(c) >= 10
    on = {"code-color": "code-bg", "sidebar-fg": "sidebar-bg", "sidebar-hl": "sidebar-bg"}
    front = [n for n in c if not n.endswith("bg")]
    faint = {n: round(contrast(c[n], c[on.get(n, "body-bg")]), 1) for n in front}
    assert min(faint.values()) >= 4.5, faint
    bar = WEBSITE["navbar"]
    assert contrast(bar["background"], bar["foreground"]) >= 4.5


# what Quarto is told
def test_nothing_is_cut_off():
    assert HTML["code-overflow"] == "wrap" and HTML["grid"]["body-width"] == "1000px" and HTML["keep-md"] is True
    css = (ROOT / "nbs" / HTML["css"]).read_text()
    assert "overflow-x: auto" in css and "main table" in css and "mjx-container" in css


def test_quarto_is_pinned():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())
    step = next(s for s in flow["jobs"]["build"]["steps"] if "quarto" in s.get("uses", ""))
    assert re.fullmatch(r"\d+\.\d+\.\d+", step["with"]["version"])


def test_the_card_has_the_size_that_is_asked_for():
    head = (ROOT / "nbs" / WEBSITE["open-graph"]["image"]).read_bytes()[:24]
    assert struct.unpack(">II", head[16:24]) == (1200, 630)


# what is written from the notebooks: `python tests/pages.py --write`
def test_sidebar_is_current():
    assert pages.sidebar() in (ROOT / "_quarto.yml").read_text("utf-8"), "run: python tests/pages.py --write"


def test_times_of_lessons_are_about_right():
    "Every lesson is in the table of Learn; its time may lag behind by a third"
    nb = json.loads((ROOT / "nbs" / "learn.ipynb").read_text("utf-8"))
    table = next(t for c in nb["cells"] if pages.is_lessons(t := "".join(c["source"])))
    said = {n: int(m) for n, m in re.findall(r"^\| \[(\w+)\].*\| (\d+) min \|$", table, re.M)}
    real = {b.name: pages.minutes(b) for b in house.notebooks() if b.number is not None}
    assert said.keys() == real.keys(), "run: python tests/pages.py --write"
    off = {n: (said[n], real[n]) for n in real if abs(said[n] - real[n]) > max(10, real[n] / 3)}
    assert not off, f"run: python tests/pages.py --write; {off}"
