"""The site in numbers, without Quarto: `python tests/pages.py [FOLDER]` prints what a reader would stumble over

FOLDER holds pages that nbdev has processed (`_proc`); without it, they are processed in a temporary copy.
`python tests/pages.py --write` brings the sidebar and the tables of lessons and methods up to date.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

import house

ROOT = Path(__file__).resolve().parent.parent
CODE_COLUMNS, TEXT_COLUMNS = 90, 80  # what a page should show without wrapping
FEW = 16  # lines on the whole site may be wider: strings that cannot be broken


# pages, as nbdev hands them to Quarto
STAGE = """
import sys
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
if __name__ == "__main__":
    refresh_quarto_yml()
    proc_nbs(file_re=sys.argv[1])
"""
LEFT_OUT = (".git", ".gpu", "runs", "_proc", "_docs", "*.egg-info", ".venv", "build", "results", "benchmarks")


def stage(folder, only=""):
    "Copy the project to `folder`, and process its pages (those whose names match `only`) there; gives `_proc`"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    for command in (["setup.py", "-q", "egg_info"], ["-c", STAGE, only]):  # the first: symbols link to their source
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            raise RuntimeError(f"{command[0]} {command[1]}: {done.stderr[-2000:]}")
    return Path(folder) / "_proc"


@dataclass
class Page:
    "A processed notebook"

    name: str  # 40_latent
    cells: list

    @property
    def prose(self):
        "Sources of its markdown cells"
        return ["".join(c["source"]) for c in self.cells if c["cell_type"] == "markdown"]

    @property
    def boxes(self):
        "Markdown of its API boxes"
        shown = [c for c in self.cells if c["cell_type"] == "code" and re.search(r"^show_doc\(", source(c), re.M)]
        return [text for c in shown for o in c.get("outputs", ()) if (text := said(o, "text/markdown"))]

    @property
    def code(self):
        "Code cells that a reader sees"
        shown = [c for c in self.cells if c["cell_type"] == "code"]
        return [c for c in shown if "echo: false" not in source(c) and source(c).strip()]

    @property
    def texts(self):
        "Outputs that are shown as plain text"
        found = []
        for c in self.code:
            for o in c.get("outputs", ()):
                rich = any(k != "text/plain" for k in o.get("data", {}))
                found += [] if rich else ["".join(o.get("text", "")) or said(o, "text/plain")]
        return found

    @property
    def figures(self):
        "(first line of the cell, its alt text or None) of every figure"
        found = []
        for c in self.cells:
            kinds = [k for o in c.get("outputs", ()) for k in o.get("data", {})]
            alt = re.search(r"^#\|\s*fig-alt:\s*(.+)", source(c), re.M)
            if any(k.startswith("image/") for k in kinds):
                found.append(((house.lines_of(source(c)) or [""])[0], alt and alt[1]))
        return found

    @property
    def anchors(self):
        "Names that a link may end in, as Pandoc makes them of headings"
        lines = without_code("\n".join([*self.prose, *self.boxes])).splitlines()
        titles = [m[1] for line in lines if (m := re.match(r"#+ (.+)", line))]
        given = {m[1] for t in titles if (m := re.search(r"\{#([\w-]+)", t))}
        return given | {anchor(t) for t in titles}


def source(cell):
    return "".join(cell["source"])


def said(output, kind):
    return "".join(output.get("data", {}).get(kind, ""))


def anchor(title):
    "Pandoc's name of a heading"
    kept = re.sub(r"[^\w\s.-]", "", re.sub(r"\]\(.*?\)|[`*]", "", title)).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept))


def without_code(text):
    return re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.S | re.M)


def pages(proc):
    "Name -> page"
    texts = {p.stem: p.read_text("utf-8") for p in sorted(Path(proc).glob("*.ipynb"))}
    return {name: Page(name, json.loads(text)["cells"]) for name, text in texts.items()}


# what a reader stumbles over
def missing_settings(proc):
    "What nbdev's settings leave empty: without them there is no link to the repository"
    site = yaml.safe_load((Path(proc).parent / "nbs" / "nbdev.yml").read_text())["website"]
    return [k for k in ("title", "site-url", "description", "repo-url") if len(site.get(k) or "") < 2]


LINK = re.compile(r"(?<!`)(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def links(page):
    "(is it a picture?, target) of everything that the page points to"
    text = re.sub(r"`[^`\n]*`", "", without_code("\n\n".join([*page.prose, *page.boxes])))
    return [(bool(m[1]), m[2]) for m in LINK.finditer(text)]


def dead_links(proc, site_url=""):
    "Links and pictures that lead nowhere on the site"
    known = pages(proc)
    html = {f"{re.sub(r'^[0-9]+_', '', n)}.html": n for n in known}  # as nbdev names them
    dead = []
    for page in known.values():
        for picture, target in links(page):
            if site_url and target.startswith(site_url):
                target = target.removeprefix(site_url).lstrip("/")
            elif re.match(r"[a-z]+:", target):
                continue
            path, _, at = target.partition("#")
            to = html.get(path, Path(path).stem) if path else page.name
            there = to in known if not path or path.endswith((".ipynb", ".html")) else is_file(proc, path)
            if not there or (at and not picture and to in known and at not in known[to].anchors):
                dead.append(f"{page.name}: {target}")
    return dead


def is_file(proc, path):
    "Whether the site will hold that file: what is above its folder, it does not"
    proc, file = Path(proc).resolve(), (Path(proc) / path).resolve()
    return file.is_relative_to(proc) and file.is_file()


PRIVATE = re.compile(r"(^|\.)_(?!_)")


def lost_words(path):
    "What stands below title and subtitle in a notebook's first cell: nbdev takes the cell for the page's head"
    first = next(
        "".join(c["source"]) for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "markdown"
    )
    return re.sub(r"\A# .+\n+> .+", "", first.strip()).strip()


def nested_links(page):
    "Links in the words of a link: Markdown shows their brackets"
    return [
        f"{page.name}: {s}" for t in page.prose for s in re.findall(r"\[[^\[\]\n]*\[`[^`]+`\]\([^)]*\)[^\[\]]*\]\(", t)
    ]


def private_boxes(page):
    titles = [m[1].replace("\\", "") for box in page.boxes if (m := re.search(r"^#+ (.+)", box, re.M))]
    return [f"{page.name}: {t}" for t in titles if PRIVATE.search(t)]


def broken_boxes(page):
    "Sentences of API boxes in which Markdown would find emphasis, tags or formulas"
    found = []
    for box in page.boxes:
        text = re.sub(r"`[^`\n]*`|\\.", "", without_code(box))
        for line in text.splitlines():
            if line.startswith(("#", "[source", ":::", "---", "|")):
                continue
            line = re.sub(r"\]\([^)]*\)(\{[^}]*\})?", "]", line)
            line = re.sub(r"^\*([^*]*)\*$", r"\1", line.strip())  # nbdev's own italics
            if re.search(r"[*$~]|<[a-zA-Z/]|(^|\W)_\w|\w_(\W|$)", line):
                found.append(f"{page.name}: {line[:90]}")
    return found


def wide(source):
    "Lines of code, wider than a page"
    return [s for s in house.lines_of(source) if len(s) > CODE_COLUMNS]


def wide_lines(page):
    "Lines of shown code and of boxes, wider than a page"
    boxes = [m for b in page.boxes for m in re.findall(r"^```python\n(.*?)^```", b, re.S | re.M)]
    return [s for text in [*(source(c) for c in page.code), *boxes] for s in wide(text)]


def wide_texts(page):
    "Lines of printed outputs, wider than a page"
    return [s for text in page.texts for s in text.splitlines() if len(s) > TEXT_COLUMNS]


def has(page, words):
    "How often words are in the page's boxes and outputs"
    return sum(t.count(words) for t in [*page.boxes, *page.texts, *page.prose])


def crowded(page):
    "Shown exported cells with more than one public definition"
    cells = [source(c) for c in page.code if "#| exports" in source(c)]
    names = [re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", s, re.M) for s in cells]
    return [f"{page.name}: {', '.join(n)}" for n in names if len(n) > 1]


def words(text):
    "Number of words of Markdown that a reader reads: no code, no pictures, no targets of links"
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<[^>]+>", "", without_code(text))
    text = re.sub(r"\]\([^)]*\)|[#>*|`\[\]]|:?-{3,}:?|:::.*", " ", text)
    return len([w for w in text.split() if re.search(r"\w", w)])


# what is written from the notebooks
WORDS, LINES = 200, 15  # that a reader takes in a minute
START = {"index": "Front page", "learn": "Learn", "guide": "Run", "results": "Results"}


def minutes(book):
    "How long a reader needs, to five minutes"
    shown = [s for s in book.sources() if not house.directives(s) & house.HIDDEN]
    lines = sum(len(house.lines_of(s)) for s in shown)
    return max(5, 5 * round((sum(map(words, book.sources("markdown"))) / WORDS + lines / LINES) / 5))


def duration(n):
    return f"{n} min" if n < 90 else f"{n / 60:.0f} h" if n >= 300 else f"{n / 60:.1f} h".replace(".0 ", " ")


def heading(book):
    "(title, subtitle)"
    found = re.search(r"^# (.+)\n+> (.+)", book.sources("markdown")[0], re.M)
    return found[1], found[2]


def sections():
    "Floor -> its name, as the site's sidebar has them"
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    names = [e["section"] for e in site if "section" in e]
    return {int(n[0]): n for n in names if n[0].isdigit()}


def sidebar():
    "The list of pages in _quarto.yml: those without a number first, then the floors"
    books = house.notebooks()
    lines = ["      - section: Start", "        contents:"]
    lines += [f'          - {{text: "{text}", href: {n}.ipynb}}' for n, text in START.items() if n in names(books)]
    for floor, name in sections().items():
        lines += [f'      - section: "{name}"', "        contents:"]
        for b in books:
            if b.number is not None and b.number // 10 == floor:
                title = heading(b)[0].replace('"', "'")
                lines.append(f'          - {{text: "{b.name[:2]} {title}", href: {b.name}.ipynb}}')
    return "\n".join(lines)


def names(books):
    return {b.name for b in books}


def lessons(before=""):
    "The tables of all lessons; what a table `before` says of a lesson is kept"
    said = dict(re.findall(r"^\| \[(\w+)\]\(\w+\.ipynb\) \| (.+?) \| [\d.]+ (?:min|h) \|$", before, re.M))
    parts = []
    for floor, name in sections().items():
        books = [b for b in house.notebooks() if b.number is not None and b.number // 10 == floor]
        rows = [f"| [{b.name}]({b.name}.ipynb) | {said.get(b.name, heading(b)[1])} | {minutes(b)} min |" for b in books]
        total = duration(sum(map(minutes, books)))
        parts += [f"### {name}: {total}", "\n".join(["| lesson | what it explains | time |", "|---|---|---|", *rows])]
    return "\n\n".join(parts)


def timed(table):
    "The table of methods, with the time of the floor of each lesson that it names"
    books = house.notebooks()

    def row(m):
        floor = int(m[2]) // 10
        total = sum(minutes(b) for b in books if b.number is not None and b.number // 10 == floor)
        return f"{m[1]}{duration(total)} |"

    return re.sub(r"^(\|.*\]\((\d+)_\w+\.ipynb\).*\| )[\d.]+ (?:min|h) \|$", row, table, flags=re.M)


def save(path, nb):
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, encoding="utf-8")


def edit(path, change):
    "Change the markdown cells of a notebook"
    nb = json.loads(path.read_text("utf-8"))
    for c in nb["cells"]:
        if c["cell_type"] == "markdown":
            c["source"] = change(source(c)).splitlines(keepends=True)
    save(path, nb)


def is_lessons(text):
    return text.startswith("### 0 ")


def write():
    "Bring the sidebar and the tables of lessons and methods up to date"
    nbs, site = ROOT / "nbs", ROOT / "_quarto.yml"
    text = site.read_text("utf-8")
    site.write_text(re.sub(r"(?<=    contents:\n)      - .*?(?=\n\n)", lambda _: sidebar(), text, count=1, flags=re.S))
    edit(nbs / "learn.ipynb", lambda s: lessons(s) if is_lessons(s) else s)
    edit(nbs / "index.ipynb", timed)


def figures(proc):
    "Name -> what was found"
    known, books = pages(proc), house.notebooks()
    every = list(known.values())
    alts = [a for p in every for _, a in p.figures]
    shown = [b.shown for b in books]
    shares = {b.name: b.shown[0] / b.shown[1] for b in books if b.shown[1]}
    least = min(shares, key=shares.get)
    texts = [t for p in every for t in p.texts]
    part, whole = (sum(v) for v in zip(*shown, strict=True))
    return {
        "pages": len(every),
        "settings left empty": missing_settings(proc),
        "dead links and pictures": dead_links(proc, site_url(proc)),
        "links in links": [x for p in every for x in nested_links(p)],
        "words that nbdev drops": [p.stem for p in sorted((ROOT / "nbs").glob("*.ipynb")) if lost_words(p)],
        "links to a symbol's source": sum(b.count("{target=") for p in every for b in p.boxes),
        "API boxes": sum(len(p.boxes) for p in every),
        "`__main__.` in pages": sum(has(p, "__main__.") for p in every),
        "` at 0x` in pages": sum(has(p, " at 0x") for p in every),
        "boxes of something private": [x for p in every for x in private_boxes(p)],
        "boxes that Markdown breaks": [x for p in every for x in broken_boxes(p)],
        "exported cells of several public definitions": sum(len(crowded(p)) for p in every),
        "figures": len(alts),
        "figures without alt text": sum(not a for a in alts),
        "code cells shown": house.percent(part, whole),
        "least shown": f"{100 * shares[least]:.0f} % ({least})",
        "code cells": sum(len(p.code) for p in every),
        LINES_OF_CODE: [f"{p.name}: {s.strip()[:90]}" for p in every for s in wide_lines(p)],
        "printed outputs": len(texts),
        LINES_OF_TEXT: [f"{p.name}: {s[:90]}" for p in every for s in wide_texts(p)],
        "words on the front page": words("\n\n".join(known["index"].prose)),
    }


LINES_OF_CODE = f"lines of code wider than {CODE_COLUMNS}"
LINES_OF_TEXT = f"printed lines wider than {TEXT_COLUMNS}"
NONE = (  # `--strict`: of these there may be none
    "settings left empty",
    "dead links and pictures",
    "links in links",
    "words that nbdev drops",
    "`__main__.` in pages",
    "` at 0x` in pages",
    "boxes of something private",
    "boxes that Markdown breaks",
    "figures without alt text",
)


def site_url(proc):
    return yaml.safe_load((Path(proc).parent / "nbs" / "nbdev.yml").read_text())["website"]["site-url"].rstrip("/")


def show(found):
    "A figure a line, and the first findings below it"
    for name, value in found.items():
        print(f"{name:46}", len(value) if isinstance(value, list) else value)
        for x in value[:12] if isinstance(value, list) else ():
            print("   ", x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="processed pages")
    parser.add_argument("--strict", action="store_true", help="fail where something is dead, empty, private or silent")
    parser.add_argument("--write", action="store_true", help="sidebar, lessons, methods")
    args = parser.parse_args()
    if args.write:
        return write()
    with tempfile.TemporaryDirectory() as tmp:
        found = figures(args.folder or stage(Path(tmp) / "site"))
    show(found)
    if args.strict and (bad := [name for name in NONE if found[name]]):
        raise SystemExit(f"there should be none: {', '.join(bad)}")
    if args.strict and (bad := [name for name in (LINES_OF_CODE, LINES_OF_TEXT) if len(found[name]) > FEW]):
        raise SystemExit(f"there should be at most {FEW}: {', '.join(bad)}")


if __name__ == "__main__":
    main()
