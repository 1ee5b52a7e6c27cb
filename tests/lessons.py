"""What a lesson needs and how long it takes, and how large its pictures are shown

`python tests/lessons.py` lists it; with `--write` it goes into the notebooks: one line below each title,
and the width of each stored picture, so that all are shown at the same scale.
"""

import argparse
import base64
import json
import re
import struct
from pathlib import Path

import house

NBS = Path(__file__).resolve().parent.parent / "nbs"
WORDS, LINES = 200, 15  # read a minute: words of text, lines of code that the site shows
SCALE = 110  # dots an inch at which a picture is shown
SAID = {11: (), 20: (11,), 28: (21, 22), 35: (34,), 43: (42,), 55: (), 60: (31, 51), 74: (71,)}  # not in the opening
LINE = re.compile(r"\*(?:Needs (?P<needs>.+?)\. )?About (?P<minutes>\d+) minutes\.\*")
LINK = re.compile(r"\]\(((\d\d)_\w+)\.ipynb\)")


def lessons():
    "Notebooks with a number"
    return sorted(NBS.glob("[0-9][0-9]_*.ipynb"))


def read(path):
    return json.loads(path.read_text("utf-8"))


def source(cell):
    return "".join(cell["source"])


def is_head(cell):
    "Is it the line below the title?"
    return cell["cell_type"] == "markdown" and LINE.fullmatch(source(cell).strip()) is not None


def minutes(cells):
    "Minutes to read it: answers that are folded away do not count"
    texts = [source(c) for c in cells if c["cell_type"] == "markdown" and not is_head(c)]
    words = sum(len(re.sub(r"<details>.*?</details>", "", t, flags=re.S).split()) for t in texts)
    codes = [source(c) for c in cells if c["cell_type"] == "code"]
    lines = sum(len(house.lines_of(s)) for s in codes if not house.directives(s) & house.HIDDEN)
    return max(1, round(words / WORDS + lines / LINES))


def opening(cells):
    "Text before the first section"
    texts = []
    for c in cells:
        if c["cell_type"] == "markdown":
            if source(c).startswith("##"):
                break
            if not is_head(c):
                texts.append(source(c))
    return "\n".join(texts)


def needs(path, cells):
    "Rooms that its opening builds on: those with a lower number, the four nearest of them"
    own = int(path.name[:2])
    if own in SAID:
        return [next(NBS.glob(f"{number}_*.ipynb")).stem for number in SAID[own]]
    found = {int(number): name for name, number in LINK.findall(opening(cells)) if int(number) < own}
    return [found[n] for n in sorted(found)][-4:]


def head(path, cells):
    "The line below the title"
    links = ", ".join(f"[{name[:2]}]({name}.ipynb)" for name in needs(path, cells))
    return f"*{f'Needs {links}. ' if links else ''}About {minutes(cells)} minutes.*"


def size(png):
    "(width, dots an inch) of a picture, as its file says"
    at = png.find(b"pHYs")
    per_metre = struct.unpack(">I", png[at + 4 : at + 8])[0] if at > 0 else SCALE / 0.0254
    return struct.unpack(">I", png[16:20])[0], per_metre * 0.0254


def pictures(cells):
    "(output, width at which it should be shown) of each stored picture"
    for c in cells:
        for output in c.get("outputs", ()):
            if data := output.get("data", {}).get("image/png"):
                width, dots = size(base64.b64decode("".join(data)))
                yield output, round(width * SCALE / dots)


def shown(output):
    "The width that is stored with a picture, None without one"
    return output.get("metadata", {}).get("image/png", {}).get("width")


def write(path):
    "Put line and widths into a notebook; was anything changed?"
    nb = read(path)
    before, cells = json.dumps(nb), nb["cells"]
    text = head(path, cells)
    if (old := next((c for c in cells if is_head(c)), None)) is None:
        title = next(i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and source(c).startswith("# "))
        old = {"cell_type": "markdown", "id": f"head{path.name[:2]}00", "metadata": {}, "source": []}
        cells.insert(title + 1, old)
    old["source"] = [text]
    for output, width in pictures(cells):
        output["metadata"] = output.get("metadata", {}) | {"image/png": {"width": width}}
    if json.dumps(nb) == before:
        return False
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write it into the notebooks")
    asked = parser.parse_args()
    for path in lessons():
        changed = asked.write and write(path)
        print(f"{path.stem:24} {head(path, read(path)['cells'])}{'  written' if changed else ''}")


if __name__ == "__main__":
    main()
