"""What each form of the AID-biased loss is worth on Digits-LT: zones, recognised, copies, diversity, classifiers.

    python benchmarks/aid.py --seeds 5 --cbdm prediction,none,noise --out DIR
    python benchmarks/aid.py --table DIR [DIR ...]

Each cell (a seed, a kind of CBDM, a form) is kept in DIR when it is done, and not done again. One process does them in
order; several may share a DIR if each has other kinds or seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from ltnb.core import read_json, write_json
from ltnb.progress import Progress
from ltnb.classify import classify
from ltnb.diffult import DiffuLT
from ltnb.diffult_steps import DiffuLTConfig, aid_loss, describe_real, extractor, image_generator, usual_scale
from ltnb.generator_steps import seen_everything
from ltnb.recipe import Stage
from ltnb.report import render
from ltnb.runs import Run
from ltnb.sources import load_data
from ltnb.team import Where

CBDM = {"prediction": {}, "noise": dict(cb_space="noise"), "none": dict(cb_tau=0.0)}
FORMS = ("none", "calibrated", "per-time", "x0-band", "feature-match")
FACTS = (
    "id",
    "aid",
    "ood",
    "recognised",
    "recognised_few",
    "copies",
    "copies_few",
    "diversity",
    "distance",
    "judge_distance",
)


def generator_cells(s, forms, known):  # form -> numbers, of one seed and one kind of CBDM
    "Train what is missing, one generator after the other; every form is calibrated on the generator without the loss"

    def accuracy(z):
        return float((z.argmax(1).numpy() == s.data.test.labels).mean())

    eye = extractor(s)
    judge = seen_everything(s)
    if "real" not in known:
        base = accuracy(eye.clf.logits(s.data.test.images))
        yield "real", {**describe_real(s, eye, judge), "all images": base}
    if all(form in known for form in forms):
        return
    plain = image_generator(s, "none", eye, judge)
    scale = usual_scale(s, plain.model, eye)
    for form in forms:
        if form in known:
            continue
        made, pull = plain, {}
        if form != "none":
            loss, pull = aid_loss(s, plain.model, eye, scale, form, form)
            made = image_generator(s, form, eye, judge, loss)
        answers = {
            "all images": classify(s, made.everything, name=f"{form}-all"),
            "filter + weight": classify(s, made.kept, s.cfg.syn_weight, f"{form}-weight"),
        }
        right = {name: accuracy(a.logits) for name, a in answers.items()}
        yield form, {**made.facts, **pull, **right}


def run_cells(kind, seed, forms, out, **more):
    "All forms with one seed and one kind of CBDM"
    folder = Path(out) / f"{kind}-seed-{seed}"
    cfg = DiffuLTConfig(
        dataset="digits", seed=seed, device="cpu", precision="fp32", out=str(folder), **CBDM[kind], **more
    )
    data = load_data(cfg, cfg.data_seed(seed)).in_memory(2)
    cfg = DiffuLT().resolve(cfg, data)
    with Run(cfg) as run:
        run.start(cfg, "cpu", "fp32", train=data.fingerprint())
        kept = run.path / "cells.json"
        known = read_json(kept) if kept.exists() else {}
        for form, cell in generator_cells(Stage(cfg, data, seed, Where(run=run)), forms, known):
            known[form] = cell
            write_json(kept, known)
            print(kind, seed, form, {k: round(v, 3) for k, v in cell.items() if isinstance(v, float)}, flush=True)


def table_of(folders):  # a header and a line a kind and form
    "Mean and standard deviation over seeds"
    files = sorted(p for f in folders for p in Path(f).glob("*-seed-*/cells.json"))
    found = {}
    for p in files:
        kind = f"{p.parents[1].name}: {p.parent.name.split('-seed-')[0]}"
        for form, cell in read_json(p).items():
            found.setdefault((kind, form), []).append(cell)
    keys = (*FACTS, "all images", "filter + weight", "alpha")
    lines = [["CBDM", "form", "seeds", *keys]]
    for (kind, form), cells in found.items():
        values = {k: np.array([np.nan if c.get(k) is None else c[k] for c in cells], dtype=float) for k in keys}

        def show(k, values=values):
            v, factor = values[k], 1 if k in ("diversity", "distance", "judge_distance", "alpha") else 100
            if np.isnan(v).all():
                return "–"
            digits = 1 if factor == 100 and k not in ("all images", "filter + weight") else 2
            return f"{np.nanmean(v) * factor:.{digits}f} ± {np.nanstd(v, ddof=min(len(v) - 1, 1)) * factor:.{digits}f}"

        lines.append([kind, form, str(len(cells)), *map(show, keys)])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="5", help="how many, or which, such as 3,4")
    parser.add_argument("--cbdm", default="prediction,none", help=f"of {', '.join(CBDM)}")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="any setting of DiffuLT")
    parser.add_argument("--out", default="aid-cells")
    parser.add_argument("--table", nargs="+", help="print the table of these folders, and do nothing else")
    a = parser.parse_args()
    if not a.table:
        Progress.quiet = True
        more = {k: json.loads(v) for k, v in (s.split("=", 1) for s in a.set)}
        seeds = range(int(a.seeds)) if a.seeds.isdigit() else [int(s) for s in a.seeds.split(",") if s]
        for seed in seeds:
            for kind in a.cbdm.split(","):
                run_cells(kind, seed, a.forms.split(","), a.out, **more)
    print(render(table_of(a.table or [a.out]), 240))


if __name__ == "__main__":
    main()
