"""README.md is nbs/index.ipynb as markdown: `python tests/readme.py` writes it, a test compares the two

`--pictures` also draws its chart, the card that is shown where somebody links to the site, and the site's icon, from
the recorded demo; `--report PAGE` photographs the report of a run with chromium.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "demo-digits-cpu"


def readme(nb):
    "The notebook's cells as markdown, with links that work from the project's root"
    parts = []
    for cell in nb["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\((\w+\.ipynb(?:#[\w-]+)?)\)", r"](nbs/\1)", text)
            parts.append(text.replace("](images/", "](nbs/images/").replace("](../", "]("))
        elif not text.startswith("#| hide"):
            text = re.sub(r"^#\|.*\n", "", text, flags=re.M)  # `fig-alt` and others are for the site
            parts.append(f"```python\n{text}\n```")
            out = "".join(
                "".join(o.get("data", {}).get("text/plain", o.get("text", ""))) for o in cell["outputs"]
            ).strip()
            if out:
                parts.append(f"```\n{out}\n```")
    return "\n\n".join(parts) + "\n"


COUNTS = dict(n_max=114, n_classes=10, imb_ratio=100)  # of Digits-LT
COMPARED = "cross-entropy", "real refit", "garbage", "gaussian", "neighbour mixing", "ldmlr + label shift"
NAVY, BLUE, ORANGE = "#12324f", "#0072B2", "#D55E00"  # the site's, and two of the house's palette


def recorded():
    return json.loads((RESULTS / "scores.json").read_text())


def differences(rows, ax):
    "Each method against label shift, with the interval of the tables"
    from ltnb.metrics import difference

    for i, name in enumerate(COMPARED):
        d = difference(rows, name)
        color = ORANGE if "ldmlr" in name else "0.45" if name in ("cross-entropy", "garbage") else BLUE
        low, high = 100 * (d.mean - d.low), 100 * (d.high - d.mean)
        ax.errorbar(100 * d.mean, i, xerr=[[low], [high]], fmt="o", color=color, ms=5, lw=2, capsize=3)
    ax.axvline(0, color="k", lw=1, ls="--")
    ax.set(yticks=range(len(COMPARED)), yticklabels=COMPARED, xlabel="points, 95 % interval", xlim=(-11, 3))
    ax.invert_yaxis()


def chart(path):
    "The front page's figure"
    from ltnb.data import longtail_counts
    from ltnb.pictures import new_figure, plot_counts, plot_per_class, save_figure

    rows, counts = recorded(), longtail_counts(*COUNTS.values())
    fig, axes = new_figure(11, 3.2, 3)
    plot_counts(counts, None, "Digits-LT", ax=axes[0])
    plot_per_class(rows, None, counts, shown=("cross-entropy", "label shift"), ax=axes[1])
    differences(rows, axes[2])
    titles = "1. a long tail", "2. its last classes suffer", "3. methods against label shift"
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
    save_figure(fig, path)


def bars(ax, color):
    "The tail, as a sign"
    from ltnb.data import longtail_counts

    ax.bar(range(COUNTS["n_classes"]), longtail_counts(*COUNTS.values()) ** 0.5, color=color, width=0.8)
    ax.axis("off")


def card(path):
    "What is shown where somebody links to the site: 1200 x 630 pixels"
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, 6.3), dpi=100, facecolor=NAVY)
    bars(fig.add_axes((0.6, 0.18, 0.34, 0.6)), "#8ab4f8")
    fig.text(0.06, 0.62, "ltnb", color="white", fontsize=84, weight="bold")
    says = "Long-tailed image classification\nwith diffusion models,\nas notebooks, with every control"
    fig.text(0.06, 0.25, says, color="white", fontsize=24, linespacing=1.5)
    fig.savefig(path)


def icon(path):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(0.64, 0.64), dpi=100, facecolor=NAVY)
    bars(fig.add_axes((0.1, 0.12, 0.8, 0.76)), "white")
    fig.savefig(path)


def photograph(page, path, width=1340, height=910, shown=960):
    "The top of a run's report, wide enough for its table, as a small picture"
    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as tmp:
        shot, wide = f"{tmp}/shot.png", Path(tmp) / "wide.html"
        wide.write_text(Path(page).read_text("utf-8").replace("max-width:66rem", "max-width:90rem"), "utf-8")
        size = f"--window-size={width},{height}"
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={shot}"]
        subprocess.run([*command, wide.as_uri()], check=True, capture_output=True)
        image = Image.open(shot).convert("RGB")
        image = image.resize((shown, shown * image.height // image.width), Image.LANCZOS)
        image.quantize(64).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--report", metavar="PAGE")
    args = parser.parse_args()
    images = ROOT / "nbs" / "images"
    if args.pictures:
        chart(images / "tail.png")
        card(images / "card.png")
        icon(images / "favicon.png")
    if args.report:
        photograph(args.report, images / "report.png")
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(readme(index), encoding="utf-8")


if __name__ == "__main__":
    main()
