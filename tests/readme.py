"README.md is nbs/index.ipynb as markdown: `python tests/readme.py` writes it and its picture, a test compares the two."

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "demo-digits-cpu"


def readme(nb):
    "The notebook's cells as markdown, with links that work from the project's root"
    parts = []
    for cell in nb["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", text)
            parts.append(text.replace("](images/", "](nbs/images/").replace("](../", "]("))
        elif not text.startswith("#| hide"):
            parts.append(f"```python\n{text}\n```")
            out = "".join(
                "".join(o.get("data", {}).get("text/plain", o.get("text", ""))) for o in cell["outputs"]
            ).strip()
            if out:
                parts.append(f"```\n{out}\n```")
    return "\n\n".join(parts) + "\n"


def picture(path):
    "The README's figure, from the recorded demo"
    from ltnb.data import longtail_counts
    from ltnb.pictures import new_figure, plot_counts, plot_per_class, plot_starts, save_figure

    rows = json.loads((RESULTS / "scores.json").read_text())
    counts = longtail_counts(114, 10, 100)
    fig, axes = new_figure(11, 3.2, 3)
    plot_counts(counts, None, "Digits-LT", ax=axes[0])
    plot_per_class(rows, None, counts, shown=("cross-entropy", "label shift"), ax=axes[1])
    plot_starts(rows, ax=axes[2])
    titles = "1. a long tail", "2. its last classes suffer", "3. extra features, judged from two starts"
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10, pad=22 if title[0] == "3" else None)
    save_figure(fig, path)


if __name__ == "__main__":
    picture(ROOT / "nbs" / "images" / "tail.png")
    (ROOT / "README.md").write_text(
        readme(json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))), encoding="utf-8"
    )
