"""Work per second of measured runs, for `ltnb compare --dry-run`: writes ltnb/known/rates.json

    python benchmarks/rates.py results/*-cpu --data-root cifar10_lt100.npz

Each folder is a finished run with config.json, environment.json and timing.jsonl; where its images were in an archive
of that name, `--data-root` says where the archive lies now. Runs whose data are not there are left out, and it says so.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from ltnb.cli import RECIPES
from ltnb.core import DataError, UsageError, read_json, write_json
from ltnb.forecast import measured_rates, work_of

KNOWN = Path(__file__).resolve().parent.parent / "ltnb" / "known" / "rates.json"


def config_of(path, roots):
    "Recipe, its settings as resolved, and its data"
    there = read_json(path / "config.json")
    recipe = RECIPES["ldmlr" if there["recipe"] == "demo" else there["recipe"]].load()
    values = {k: v for k, v in there.items() if k in recipe.config.hints()} | {"seeds": 1}
    for key in ("data_root", "features"):
        if values.get(key):
            values[key] = next((str(r) for r in roots if r.name == Path(values[key]).name), values[key])
    given = recipe.config.from_dict(values | {"dataset": values.get("dataset") or "digits"})
    return recipe, given, recipe.load(given, given.seed)


def rates_of(path, roots):
    "Rates of one run, and a sentence where it has none"
    try:
        recipe, cfg, data = config_of(path, roots)
    except (DataError, UsageError, KeyError) as e:
        return [], f"{path.name} is left out: {e}"
    found = measured_rates(path, work_of(cfg.recipe, cfg, data), path.name)
    return [asdict(r) | {"per_second": float(f"{r.per_second:.4g}")} for r in found], ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--data-root", action="append", default=[], type=Path, help="where an archive lies now")
    parser.add_argument("--out", type=Path, default=KNOWN, help="the file to write")
    args, rows = parser.parse_args(), []
    for path in args.runs:
        found, why = rates_of(path, args.data_root)
        rows += found
        print(why or f"{path.name}: {len(found)} rates")
    write_json(args.out, {"format": 1, "rates": rows})


if __name__ == "__main__":
    main()
