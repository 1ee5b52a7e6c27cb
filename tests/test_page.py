"The page of a comparison: what it holds, that nothing is loaded or read as markup, and that its table can be clicked"

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser

import numpy as np
import pytest
from ltnb.core import DataError, UsageError
from ltnb.page import EXTRAS, PAGE_SCRIPT, html_image, kept_and_dropped, write_page
from ltnb.report import write_report

BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if b), None)
NAME = "<b>R&D</b> \"'&amp;<script>alert(1)</script>$x$"
ACCURACY = {"cross-entropy": 0.5, "label shift": 0.62, "aid loss": 0.6, "diffult": 0.66, NAME: 0.58}


def rows(sets=("digits", "b<i>rds"), seeds=2):
    return [
        dict(set=s, method=m, cell=m, seed=k, all=a + k / 50 + i / 100, few=None if m == "aid loss" else a / 2)
        | dict(seconds=10.0 * len(m), ece=a / 10)
        for i, s in enumerate(sets)
        for m, a in ACCURACY.items()
        for k in range(seeds)
    ]


def extras(folder):
    from PIL import Image

    photo = np.random.default_rng(0).integers(0, 255, (300, 200, 3)).astype(np.uint8)
    Image.fromarray(photo).save(folder / "photo.png")
    bins, images = np.linspace(0.05, 0.95, 10), np.zeros((30, 1, 8, 8), np.uint8)
    accuracy = {"cross-entropy": [[0.9, 0.5, None]], "diffult": [[0.9, 0.6, 0.4]], NAME: [[0.8, 0.7, 0.1]]}
    return {
        "title": NAME,
        "lead": NAME,
        "per_class": {"digits": {"class_names": [NAME, "b", "c"], "counts": [30, 9, 2], "methods": accuracy}},
        "samples": {NAME: {"kept": images, "dropped": [folder / "photo.png"]}},
        "calibration": {"digits": {"diffult": (bins, [None, *bins[1:]], [0, *range(1, 10)])}},
        "reused": [{"part": NAME, "made_by": "baseline", "used_by": ["diffult", NAME], "seconds_saved": 61}],
        "failed": [{"cell": NAME, "sentence": NAME}],
        "budget": {NAME: "400 steps"},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, rows(), extras(folder))


class Page(HTMLParser):
    "Tags, texts and addresses of a page"

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.loads, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("img", "meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_everything_and_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    p = Page(text)
    assert not p.open and p.loads and all(u.startswith("data:") for u in p.loads)
    assert "http" not in text and "@import" not in text and "url(" not in text
    heads = re.findall("<h2>(.*?)</h2>", text)
    assert heads == [
        "What the differences say",
        "The table",
        "What failed",
        "Ranks over data sets",
        "What each control explains",
        "Which classes gain",
        "Accuracy against cost",
        "Images that were kept and dropped",
        "Calibration",
        "What was reused",
        "Budget",
    ]
    images = [a for t, a in p.tags if t == "img"]
    assert len([a for a in images if len(a["alt"]) > 30 and len(a["src"]) > 4000]) == 6, "differences, ranks, costs…"
    assert all(a["alt"] for a in images) and len(text) < 1_000_000
    assert not re.search(r"/(home|tmp|root)/", text)


def test_names_are_shown_and_never_read(page):
    p = Page(page.read_text(encoding="utf-8"))
    tags = [t for t, _ in p.tags]
    assert "b" not in tags and "i" not in tags and tags.count("script") == 1
    assert sum(t == NAME for t in p.texts) >= 6, "title, lead, table, reuse, failure, budget"
    assert "b<i>rds" in p.texts


def test_sections_without_anything_to_show_are_left_out(tmp_path):
    bare = [{"method": "diffult", "all": 0.5}, {"method": "label shift", "all": 0.6}]
    text = write_page(tmp_path, bare).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == ["What the differences say", "The table"]
    assert "one seed" in text and "One set" in text and "set-filter" not in text.split("<script")[0]


def test_bad_extras_and_empty_comparisons(tmp_path):
    with pytest.raises(UsageError, match="'sample' is nothing a page shows.*samples"):
        write_page(tmp_path, rows(), {"sample": {}})
    with pytest.raises(UsageError, match="no cell has finished"):
        write_page(tmp_path, [])
    assert not list(tmp_path.iterdir())
    assert write_page(tmp_path, rows(("a",), 1), dict.fromkeys(EXTRAS)).exists(), "None is nothing to show"


def test_equal_rows_give_equal_pages(tmp_path):
    a, b = (write_page(tmp_path / n, rows()) for n in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_images_are_small_and_their_kinds_are_told_apart(tmp_path):
    big = np.random.default_rng(0).integers(0, 255, (3, 400, 300)).astype(np.uint8)
    assert "data:image/jpeg" in str(html_image(big, "a")) and len(str(html_image(big, "a"))) < 20_000
    for shape in ((1, 8, 8), (8, 8), (8, 8, 1), (3, 8, 8), (8, 8, 3)):
        assert "data:image/png" in str(html_image(np.zeros(shape, np.uint8), "a"))
    for bad in (np.zeros((8, 8)), np.zeros((2, 8, 8), np.uint8), np.zeros((1, 1, 8, 8), np.uint8)):
        with pytest.raises(DataError, match="must be uint8"):
            html_image(bad, "a")
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="no.png cannot be shown"):
        html_image(tmp_path / "no.png", "a")
    grid = kept_and_dropped("cell", {"kept": np.zeros((30, 1, 8, 8), np.uint8), "dropped": []}, most=5)
    assert "kept: 5 of 30" in str(grid) and "dropped" not in str(grid) and str(grid).count("data:image") == 5


def test_a_report_without_a_script_has_none(tmp_path):
    write_report(tmp_path / "r.html", "t", "l", [("a", "b")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text and "prefers-color-scheme:dark" in text


def test_the_script_is_plain():
    assert "</" not in PAGE_SCRIPT and "innerHTML" not in PAGE_SCRIPT and "eval" not in PAGE_SCRIPT


START = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, place in zip(high, (3, 4)): os.dup2(fd, place)
os.execv(sys.argv[3], sys.argv[3:])
"""  # the browser reads from 3 and writes to 4


class Browser:
    "A headless Chromium that is told what to do over a pipe (Chrome DevTools Protocol)"

    def __init__(self, width=1100, height=1400):
        self.profile, self.number, self.said = tempfile.mkdtemp(), 0, []
        from_us, self.write = os.pipe()
        self.read, from_it = os.pipe()
        flags = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [
            f"--user-data-dir={self.profile}",
            f"--window-size={width},{height}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        start = [sys.executable, "-c", START, str(from_us), str(from_it)]
        devnull = subprocess.DEVNULL
        self.process = subprocess.Popen([*start, *flags], pass_fds=(from_us, from_it), stdout=devnull, stderr=devnull)
        os.close(from_us)
        os.close(from_it)
        self.left = b""

    def __enter__(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.write)
        os.close(self.read)
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.profile, ignore_errors=True)

    def message(self):
        while b"\0" not in self.left:
            assert select.select([self.read], [], [], 60)[0], "the browser has said nothing for a minute"
            more = os.read(self.read, 1 << 16)
            assert more, "the browser has gone"
            self.left += more
        text, self.left = self.left.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **params):
        self.number += 1
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        message = {"id": self.number, "method": method, "params": params} | session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (got := self.message()).get("id") != self.number:
            self.said.append(got)
        assert "error" not in got, got
        return got["result"]

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        while self("document.readyState") != "complete":
            pass

    def __call__(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, script):
        "Click with the mouse in the middle of what the script finds"
        box = (
            f"(() => {{const e = {script}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
        )
        at = self(box + "return [r.x + r.width / 2, r.y + r.height / 2]})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def complaints(self):
        "What the console or the log said, and what was loaded over a network"
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        loads = [m["params"]["request"]["url"] for m in self.said if m.get("method") == "Network.requestWillBeSent"]
        return [m for m in self.said if m.get("method") in kinds], [
            u for u in loads if not u.startswith(("data:", "file:"))
        ]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page was not clicked")
LINES = "[...document.querySelectorAll('table.sortable tbody tr')].filter(r => !r.hidden)"
COLUMN = LINES + ".map(r => r.cells[{}].textContent)"


def heading(name):
    return f"[...document.querySelectorAll('table.sortable th button')].find(b => b.textContent === '{name}')"


@pytest.fixture(scope="module")
def browser():
    with Browser() as b:
        yield b


@pytest.mark.slow_process
@needs_browser
def test_a_click_sorts_by_number_and_what_is_missing_stays_last(browser, page):
    browser.open(page)
    before = browser(COLUMN.format(0))
    assert before == list(ACCURACY) * 2
    browser.click(heading("all"))
    numbers = [float(x.split(" ±")[0]) for x in browser(COLUMN.format(3))]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 10
    browser.click(heading("all"))
    numbers = [float(x.split(" ±")[0]) for x in browser(COLUMN.format(3))]
    assert numbers == sorted(numbers)
    assert browser(f"{heading('all')}.parentNode.getAttribute('aria-sort')") == "ascending"
    for _ in range(2):
        browser.click(heading("few"))
        few = browser(COLUMN.format(4))
        assert few[-2:] == ["–", "–"] and "–" not in few[:-2]
    browser.click(heading("method"))
    names = browser(COLUMN.format(0))
    assert names == browser(f"{json.dumps(names)}.sort((a, b) => a.localeCompare(b, 'en', {{numeric: true}}))")
    assert browser("document.querySelectorAll('th[aria-sort=none]').length") == browser(
        "document.querySelectorAll('table.sortable th').length - 1"
    )
    assert browser.complaints() == ([], [])


@pytest.mark.slow_process
@needs_browser
def test_typing_and_choosing_filter(browser, page):
    browser.open(page)
    assert browser("document.getElementById('shown').textContent") == "10 of 10 lines"
    browser.click("document.getElementById('method-filter')")
    browser.type("DIFF")
    assert browser(COLUMN.format(0)) == ["diffult"] * 2
    browser(
        "(() => {const s = document.getElementById('set-filter'); s.value = 'b<i>rds';"
        "s.dispatchEvent(new Event('input'))})()"
    )
    assert browser(COLUMN.format(1)) == ["b<i>rds"]
    assert browser("document.getElementById('shown').textContent") == "1 of 10 lines"
    browser.open(page)
    browser.click("document.querySelector('.kind-filter[value=control]')")
    browser.click("document.querySelector('.kind-filter[value=part]')")
    assert browser(COLUMN.format(0)) == ["diffult", NAME] * 2
    browser.click(heading("all"))
    assert browser(COLUMN.format(0))[0] == "diffult" and browser(f"{LINES}.length") == 4, "sorting keeps the filter"
    assert browser("window.alerted === undefined && document.querySelectorAll('b, i').length") == 0
    assert browser.complaints() == ([], [])


@pytest.mark.slow_process
@needs_browser
def test_on_a_phone_and_in_the_dark(browser, page):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.open(page)
    assert browser("document.documentElement.scrollWidth") <= 390, "the page itself does not scroll sideways"
    assert browser("document.querySelector('.scroll').scrollWidth > document.querySelector('.scroll').clientWidth")
    light = "getComputedStyle(document.body).{}.match(/[0-9]+/g).slice(0, 3).map(Number)"
    assert max(browser(light.format("backgroundColor"))) < 60 < 180 < min(browser(light.format("color")))
    cell = browser(
        "getComputedStyle(document.querySelector('.sortable td')).backgroundColor.match(/[0-9]+/g).map(Number)"
    )
    assert max(cell[:3]) < 60, "the column that stays in place is dark too"
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.slow_process
@needs_browser
def test_this_browser_would_notice(browser, tmp_path):
    (tmp_path / "broken.html").write_text("<script>console.error('seen'); missing()</script>")
    seen = len(browser.complaints()[0])
    browser.open(tmp_path / "broken.html")
    assert len(browser.complaints()[0]) == seen + 2
