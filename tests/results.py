"""nbs/results.ipynb is results/README.md with its tables: `python tests/results.py` writes it, a test compares the two

Each folder of results/ is one run: its files, and `about.json`, which says what was run, where, when, at which commit.
A line `[Table: KIND of FOLDER](../nbs/results.ipynb)` in results/README.md stands for a table that is worked out from
the folder's files; KIND is a key of TABLES.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from ltnb.core import read_json
from ltnb.metrics import BASELINE, difference, methods, paired_over_seeds, percent, show_difference, values
from ltnb.page import markdown_table, markdown_text
from ltnb.ranks import cannot_say, compare_with_controls, say_comparison, show_points

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "nbs" / "results.ipynb"
ONLINE = "https://github.com/ltnb/ltnb/blob/main/results"
MARK = re.compile(r"^\[Table: ([a-z ]+) of ([\w-]+)\]\(\.\./nbs/results\.ipynb\)$", re.M)


# reading
def abouts():
    "Folder -> what is said about it, in the order of sets and titles"
    found = {p.parent.name: read_json(p) for p in sorted(RESULTS.glob("*/about.json"))}
    return dict(sorted(found.items(), key=lambda kv: (kv[1]["set"], kv[1]["title"], kv[0])))


def rows_of(folder):
    "Rows of its scores.json; methods that were measured again are replaced"
    about, rows = read_json(RESULTS / folder / "about.json"), read_json(RESULTS / folder / "scores.json")
    if "instead" not in about:
        return rows
    again = {(r["method"], r["seed"]): r for r in read_json(RESULTS / about["instead"])}
    return [again.get((r["method"], r["seed"]), r) for r in rows]


def main_rows(folder):
    return [r for r in rows_of(folder) if "ablation" not in r]


def swept_rows(folder):
    return [r for r in rows_of(folder) if "ablation" in r]


# writing
WORDS = {"method", "AID loss", "form", "command", "note", "best control"}  # columns of text


def unbroken(cell):
    "A mean with its spread, or a difference with its interval, stays on one line"
    return cell.replace(" ", "\u00a0") if re.search(r"\d ± \d|\d \[-?\d", cell) else cell


def markdown(head, lines):
    "A table; numbers stand to the right"
    rule = ["---" if i == 0 or h in WORDS else "---:" for i, h in enumerate(head)]
    return "\n".join("| " + " | ".join(map(unbroken, line)) + " |" for line in (head, rule, *lines))


def without_empty(head, lines):
    "Columns in which anything was measured"
    keep = [i for i in range(len(head)) if i == 0 or any(line[i] not in ("–", "") for line in lines)]
    return [head[i] for i in keep], [[line[i] for i in keep] for line in lines]


def columns(rows, names):
    "Lines of the table of methods"
    keys = {"all": "all", BASELINE: f"vs {BASELINE}", "scratch_all": "all, from scratch"}
    keys |= {k: k.replace("_", " ") for k in ("many", "medium", "few", "last_third", "ece")}

    def cell(m, k):
        return show_difference(difference(rows, m)) if k == BASELINE else percent(values(rows, m, k))

    return ["method", *keys.values()], [[markdown_text(m), *(cell(m, k) for k in keys)] for m in names]


def methods_table(folder):
    "Every method of a run"
    rows = main_rows(folder)
    return markdown(*without_empty(*columns(rows, methods(rows))))


ABOVE = {  # recipe -> the rows of its own that are repeated above what is changed
    "diffult": ("label shift", "generation", "aid loss"),
    "ldmlr": ("ldmlr + label shift",),
    "discl": ("cross-entropy", "real repeated", "discl"),
}


def changes_table(folder):
    "What is changed in a run, below what it changes"
    rows, swept = rows_of(folder), methods(swept_rows(folder))
    config = read_json(RESULTS / folder / "config.json")
    return markdown(*without_empty(*columns(rows, [*ABOVE[config["recipe"]], *swept])))


def cells_table(cells):
    "A table of the package, as Markdown"
    head, *lines = [[markdown_text(c) for c in line] for line in cells]
    return markdown(head, lines)


def images_table(folder):
    "What ChatDiff made"
    from ltnb.chatdiff import made_table

    return cells_table(made_table(rows_of(folder)))


def generators_table(folder):
    "What DiffuLT's generators made"
    from ltnb.diffult_ablations import generator_table

    return cells_table(generator_table(rows_of(folder)))


def differences_list(folder):
    "The pairs of a recipe, in words"
    from ltnb.chatdiff import ChatDiff
    from ltnb.discl import DisCL
    from ltnb.discl_adaptive import DisCLAdaptive

    config = read_json(RESULTS / folder / "config.json")
    discl = DisCLAdaptive if config.get("tuned") == "clip" else DisCL
    recipe = {"chatdiff": ChatDiff, "discl": discl}[config["recipe"]]
    return "\n".join(f"- {markdown_text(s)}" for s in recipe().verdict(rows_of(folder)))


def shifted_table(folder):
    "Macro-F1 on a test set and on one of other conditions"
    from ltnb.discl_adaptive import f1_table

    return cells_table(f1_table(main_rows(folder)))


def spectrum_table(folder):
    "What the first seed's spectrum holds, level by level"
    from ltnb.spectrum import levels_table

    config = read_json(RESULTS / folder / "config.json")
    return cells_table(levels_table(read_json(RESULTS / folder / f"levels-seed-{config['seed']}.json")))


def judged_table(folder):
    "What the judge sees in images"
    rows = rows_of(folder)
    head = ["images", "recognised", "many", "medium", "few", "copies", "copies, few", "distance"]
    keys = ["all", "many", "medium", "few", "copies", "copies_few"]

    def line(m):
        distance = values(rows, m, "distance")
        return [
            *(percent(values(rows, m, k)) for k in keys),
            "–" if np.isnan(distance).all() else f"{np.nanmean(distance):.2f}",
        ]

    return markdown(head, [[m, *line(m)] for m in methods(rows)])


# the five forms of the AID-biased loss: cells.json is kind of CBDM -> seed -> form -> numbers
FORMS = ("none", "calibrated", "per-time", "x0-band", "feature-match")
KINDS = {"prediction": "yes", "none": "no"}


def aid_values(cells, kind, form, key):
    return np.array([of[form].get(key, np.nan) for _, of in sorted(cells[kind].items())], dtype=float)


def plus_minus(v, factor=100, digits=1):
    return f"{v.mean() * factor:.{digits}f} ± {v.std(ddof=1) * factor:.{digits}f}"


def forms_table(folder):
    "Each form's images and classifiers"
    cells = read_json(RESULTS / folder / "cells.json")
    shares = {k: k for k in ("id", "aid", "ood", "recognised")} | {
        "recognised_few": "recognised, few",
        "copies": "copies",
    }
    head = ["CBDM", "AID loss", *(s.upper() if len(s) < 4 else s for s in shares.values()), "diversity", "distance"]
    real = {k: aid_values(cells, "prediction", "real", k) for k in (*shares, "all images")}
    said = ["–" if np.isnan(real[k]).all() else plus_minus(real[k]) for k in shares]
    lines = [
        ["–", "(unseen real images)", *said, "1.00", "–", f"{plus_minus(real['all images'])} (cross-entropy)", "–"]
    ]
    for kind, said in KINDS.items():
        for form in FORMS:
            v = {
                k: aid_values(cells, kind, form, k)
                for k in (*shares, "diversity", "judge_distance", "all images", "filter + weight")
            }
            line = [plus_minus(v[k]) for k in shares] + [
                plus_minus(v[k], 1, 2) for k in ("diversity", "judge_distance")
            ]
            lines.append([said, form, *line, plus_minus(v["all images"]), plus_minus(v["filter + weight"])])
    return markdown([*head, "all images", "filter + ω"], lines)


def form_gains_table(folder):
    "Each form against no AID loss, paired over seeds"
    cells, lines = read_json(RESULTS / folder / "cells.json"), []
    keys = ("id", "aid", "ood", "diversity", "all images", "filter + weight")
    for kind, said in KINDS.items():
        for form in FORMS[1:]:
            line = []
            for k in keys:
                d = paired_over_seeds(aid_values(cells, kind, form, k), aid_values(cells, kind, "none", k))
                plain = f"{d.mean:+.2f} [{d.low:.2f}, {d.high:.2f}]"
                line.append(plain if k == "diversity" else show_difference(d))
            lines.append([said, form, *line])
    return markdown(["CBDM", "form", "ID", "AID", "OOD", "diversity", "all images", "filter + ω"], lines)


def comparison_table(folder):
    "Methods over sets and seeds, as `ltnb compare` leaves them"
    rows = [r for r in rows_of(folder) if r.get("asked", True)]  # of all rows, those that were asked for
    said = [say_comparison(c) for c in compare_with_controls(rows)] + cannot_say(rows)
    return markdown_table(rows) + "\n" + "\n".join(f"- {markdown_text(s)}" for s in said)


def costs_table(folder):
    "Seconds of each cell of a comparison, summed over seeds, and what others had made"
    cells = read_json(RESULTS / folder / "costs.json")["cells"]
    names = dict.fromkeys(c["cell"] for c in cells)

    def total(name, key):
        return f"{sum(c[key] for c in cells if c['cell'] == name):,.0f}"

    lines = [[name, total(name, "seconds"), total(name, "saved")] for name in names]
    return markdown(["run", "seconds", "of them reused"], lines)


# over all folders
def budget_of(folder, about):
    "What the run was allowed, from its settings"
    known = RESULTS / folder / "config.json"
    if "budget" in about or not known.exists():
        return about.get("budget", "–")
    c = read_json(known)
    said = [f"{c['seeds']} {'seed' if c['seeds'] == 1 else 'seeds'}"]
    if c.get("features"):
        said.append("features given")
    elif c.get("arch"):
        said.append(f"{c['arch']} for {c['n_epochs']} epochs")
    if c.get("n_steps"):
        kind = f"U-Net {c['unet']}" if c.get("unet") else "feature diffusion"
        said.append(f"{kind}, {c['n_steps']} steps of {c['diff_bs']}")
    return "; ".join(said)


def scored(about):
    "Folders with a table of methods, by set"
    by_set = {}
    for folder, a in about.items():
        if (RESULTS / folder / "scores.json").exists() and a.get("overview", True):
            by_set.setdefault(a["set"], []).append(folder)
    return by_set


def overview_lines(folder, about):
    "Cross-entropy, label shift, the best control, and the methods of a run"
    rows = main_rows(folder)
    found = {c.method: c for c in compare_with_controls(rows)}
    names = dict.fromkeys(["cross-entropy", BASELINE, *(c.control for c in found.values()), *found] if found else [])
    lines = []
    for m in (n for n in names if n in methods(rows)):
        gain = [show_points(found[m].difference), found[m].control] if m in found else ["", ""]
        cells = [percent(values(rows, m, k)) for k in ("all", "many", "medium", "few")]
        lines.append(["" if lines else about["title"], markdown_text(m), *cells, *gain])
    return lines


def budget_line(folder, about):
    "A run's budget, time, date and commit"
    seconds = f"{about['seconds']:,} s, " if about["seconds"] else ""
    return f"- {about['title']}: {budget_of(folder, about)}; {seconds}{about['date']}, `{about['commit']}`, `{folder}`"


def set_tables(_):
    "One table a set, with the budget of each run below it"
    about, out = abouts(), []
    head = ["run", "method", "all", "many", "medium", "few", "points", "best control"]
    for name, folders in scored(about).items():
        lines = {f: overview_lines(f, about[f]) for f in folders}
        folders = [f for f in folders if lines[f]]
        if folders:
            table = markdown(*without_empty(head, [line for f in folders for line in lines[f]]))
            budgets = "\n".join(budget_line(f, about[f]) for f in folders)
            out.append(f"### {name}\n\n{table}\n\nBudgets:\n\n{budgets}")
    return "\n\n".join(out)


def runs_table(_):
    "What was run, where and when"
    lines = []
    for folder, a in abouts().items():
        seconds = f"{a['seconds']:,} s" if a["seconds"] else "–"
        commit = f"`{a['commit']}`" if a["commit"] else "–"
        lines.append([f"`{folder}`", f"`{a['command']}`", a["date"], commit, seconds, a.get("note", "")])
    return markdown(*without_empty(["folder", "command", "date", "commit", "wall time", "note"], lines))


def found_difference(f):
    "A difference that index.json asks for, as fractions, and over how many seeds"
    folder, method, against = f["folder"], f["method"], f["against"]
    if "cbdm" in f:
        cells = read_json(RESULTS / folder / "cells.json")
        a, b = (aid_values(cells, f["cbdm"], form, "all images") for form in (method, against))
        return paired_over_seeds(a, b), len(a)
    rows = main_rows(folder)
    return difference(rows, method, baseline=against), len(values(rows, method))


def findings_list(_):
    "The few lines that index.json puts first"
    out = []
    for f in read_json(RESULTS / "index.json")["found"]:
        d, n = found_difference(f)
        how = "a gain" if d.low > 0 else "a loss" if d.high < 0 else "no clear difference"
        seeds = f"{n} {'seed' if n == 1 else 'seeds'}"
        out.append(f"- {f['words']}: **{show_difference(d)}** points, {how} ({seeds}; `{f['folder']}`).")
    return "\n".join(out)


TABLES = {
    "methods": methods_table,
    "changes": changes_table,
    "images": images_table,
    "generators": generators_table,
    "differences": differences_list,
    "judged images": judged_table,
    "spectrum": spectrum_table,
    "both test sets": shifted_table,
    "forms": forms_table,
    "gains": form_gains_table,
    "comparison": comparison_table,
    "costs": costs_table,
    "findings": findings_list,
    "sets": set_tables,
    "runs": runs_table,
}


# the page
def filled(text):
    "README's text with its tables, and with links from where the page lies"

    def table(found):
        kind, folder = found.groups()
        if kind not in TABLES:
            raise SystemExit(f"results/README.md asks for a table of {kind!r}: give one of {', '.join(TABLES)}.")
        return TABLES[kind](folder)

    return MARK.sub(table, text).replace("](../nbs/", "](").replace("](references/", f"]({ONLINE}/references/")


def notebook():
    "The page: a Markdown cell a section"
    text = filled((RESULTS / "README.md").read_text(encoding="utf-8"))
    # nbdev takes a page's first cell for its head, and drops whatever else stands in it
    title, rest = re.match(r"(# [^\n]+\n+> [^\n]+)\n+(.+)", text, re.S).groups()
    parts = [title, *(p.strip() for p in re.split(r"(?m)^(?=## )", rest))]
    cells = [
        {
            "cell_type": "markdown",
            "id": hashlib.sha256(p.split("\n")[0].encode()).hexdigest()[:8],
            "metadata": {},
            "source": p.splitlines(keepends=True),
        }
        for p in parts
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def written(nb):
    "As nbdev-clean leaves it"
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(written(notebook()), encoding="utf-8")
