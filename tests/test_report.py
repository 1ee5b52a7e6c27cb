"The report opens offline, in a parser and in a browser, and its table says what the rows say."

import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import numpy as np
import pytest
from fastcore.xml import Li, P, Pre, Safe, Sub, Ul
from ltnb.metrics import difference, percent, show_difference
from ltnb.report import html_figure, html_table, in_lines, render, table, verdict, write_report

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if b), None)


class Page(HTMLParser):
    "Collects tags, and what a page would load"

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.loads, self.bad = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append((tag, a))
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)
        for key in ("src", "href", "srcset", "data", "action", "poster"):
            if key in a and tag != "a":
                self.loads.append(a[key])
        self.bad += [k for k in a if k.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_report_is_one_self_contained_page(demo):
    text = (demo[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not page.bad
    assert all(u.startswith("data:") for u in page.loads) and "@import" not in text and "url(" not in text
    assert not [t for t, _ in page.tags if t in ("script", "iframe", "object", "embed")]
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) == 4 and all(len(a["alt"]) > 20 and len(a["src"]) > 5000 for a in images)
    assert dict(page.tags)["html"]["lang"] == "en" and len(text) < 2_000_000
    for words in (
        "Training images per class",
        "Real and generated features",
        "Accuracy per class",
        "from scratch",
        "garbage",
        "no clear difference",
    ):
        assert words in text, words
    assert not re.search(r"/(home|tmp|root)/", text)


def browse(path, picture=None):
    "Open a page in headless Chromium; gives what its console said"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                BROWSER,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--enable-logging=stderr",
                "--log-level=0",
                "--window-size=1100,3400",
                f"--screenshot={picture}",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stderr[-1000:]
    return [line for line in done.stderr.split("\n") if ":CONSOLE" in line]


@pytest.mark.slow_process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the report was not opened in a browser")
def test_report_in_a_browser(demo, tmp_path):
    (tmp_path / "broken.html").write_text("<script>console.error('seen'); missing()</script>")
    assert len(browse(tmp_path / "broken.html", tmp_path / "b.png")) == 2, "this test would see a console error"
    assert browse(demo[0] / "report.html", tmp_path / "report.png") == []
    from matplotlib.image import imread

    picture = imread(tmp_path / "report.png")[..., :3]
    assert picture.shape[0] > 3000 and picture[:2500].std() > 0.05, "the page is not blank"
    colours = {tuple((c * 255).astype(int)) for c in picture[::3, ::3].reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours, "the charts are drawn"


def rows(seeds, **methods):
    rng = np.random.default_rng(0)
    base = rng.normal(0.8, 0.02, seeds)
    return [
        {
            "method": m,
            "seed": s,
            "all": base[s] + g,
            "few": None,
            "se": {"label shift": 0.004},
            "per_class": [base[s] + g],
        }
        for m, g in methods.items()
        for s in range(seeds)
    ]


def test_verdict_follows_the_interval():
    for gain, word in ((0.05, "wins"), (-0.05, "loses"), (0.0, "no clear difference")):
        r = rows(1, **{"label shift": 0.0, "ldmlr + label shift": gain})
        assert word in verdict(r)[0] and "test images" in verdict(r)[0]
    noisy = rows(3, **{"label shift": 0.0, "ldmlr + label shift": 0.01})
    assert "test images" in verdict(noisy)[0], "seeds that agree do not make test images certain"
    noisy[3]["all"] += 0.1
    assert "over seeds" in verdict(noisy)[0]


@pytest.mark.parametrize("width", (10, 40, 88))
def test_sentences_are_folded_between_words(width):
    said = ["ldmlr + label shift against label-shift wins: +1.3 [0.0, 2.6] points.", "Fitted from scratch, it loses."]
    lines = in_lines(said, width).split("\n")
    assert " ".join(" ".join(lines).split()) == " ".join(said)
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    assert sum(not line.startswith(" ") for line in lines) == len(said)


def test_missing_seeds_have_no_difference():
    r = rows(3, **{"label shift": 0.0, "a": 0.1})
    assert difference([x for x in r if (x["method"], x["seed"]) != ("a", 2)], "a") is None


def test_numbers_as_printed():
    assert (
        percent(np.array([0.72494])) == "72.49"
        and percent(np.array([0.5, 0.6])) == "55.0 ± 7.1"
        and percent(np.array([np.nan, np.nan])) == "–"
    )
    assert show_difference(None) == "–"
    cells = table(rows(2, **{"label shift": 0.0, "a": 0.1}))
    assert all(len(line) == len(cells[0]) for line in cells)
    for width in (40, 80, 200):
        text = render(cells, width)
        assert all(text.count(f"{line[1]}") for line in cells[1:])


class Texts(HTMLParser):
    "Collects what a page shows: texts, alternative texts, tags"

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.texts += [v for k, v in attrs if k == "alt"]

    def handle_data(self, data):
        self.texts.append(data)


def test_report_escapes(tmp_path):
    "A class may be called anything: its name is shown as it is and never read as markup, wherever it stands"
    name = "<b>R&D</b> \"'&amp;<script>"
    (tmp_path / "a.png").write_bytes(b"picture")
    sections = [
        (name, name),
        ("table", html_table([["class", name], [name, name]])),
        ("figure", html_figure(tmp_path / "a.png", name)),
        ("several", [name, P(name), Pre(name), Ul(Li(name))]),
    ]
    write_report(tmp_path / "r.html", name, name, sections)
    page = Texts((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts.count(name) == 3 + 2 + 3 + 1 + 4  # title twice and lead; heading and text; table; figure; several
    assert not {"b", "script"} & set(page.tags) and page.tags.count("p") == 1 + 1 + 1 + 2


def test_marked_markup_is_kept(tmp_path):
    write_report(tmp_path / "r.html", "t", "l", [("a", Safe("<i>as it is</i>")), ("b", P("in ", Sub("0")))])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<i>as it is</i>" in text and "<p>in <sub>0</sub></p>" in text and text.startswith("<!doctype html>")
    with pytest.raises(TypeError):
        "<p>text</p>" + html_table([["a"]])  # text and elements stand beside one another in a list
