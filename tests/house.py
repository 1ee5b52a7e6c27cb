"""The house in numbers: `python tests/house.py [--git REV]` prints rooms and notebooks, of a revision too"""

import argparse
import ast
import io
import json
import re
import subprocess
import tokenize
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {"export", "exporti", "hide", "default_exp"}  # directives whose cells the site does not show
EXPORTED = {"export", "exports", "exporti"}


# reading
def directives(source):
    "Names of a cell's `#|` lines"
    return set(re.findall(r"^\s*#\s*\|\s*([\w-]+)", source, re.M))


def lines_of(source):
    "Non-blank lines of a cell, without its directives"
    return [line for line in source.splitlines() if line.strip() and not re.match(r"\s*#\s*\|", line)]


@dataclass
class Notebook:
    "A notebook and, where it exports something, the room that it is"

    name: str  # 40_latent
    cells: list  # as in the file

    def sources(self, kind="code"):
        return ["".join(c["source"]) for c in self.cells if c["cell_type"] == kind]

    @property
    def number(self):
        found = re.match(r"\d+", self.name)
        return int(found[0]) if found else None

    @property
    def module(self):
        found = [re.search(r"^#\s*\|\s*default_exp\s+([\w.]+)", s, re.M) for s in self.sources()]
        return next((m[1] for m in found if m), None)

    @property
    def exported(self):
        "Sources of its exported cells"
        return [s for s in self.sources() if directives(s) & EXPORTED]

    @property
    def exported_lines(self):
        return [line for s in self.exported for line in lines_of(s)]

    @property
    def shown(self):
        "(code cells that the site shows, all code cells)"
        cells = [s for s in self.sources() if s.strip()]
        return sum(not directives(s) & HIDDEN for s in cells), len(cells)

    def functions(self):
        "(lines, name) of every function in its exported cells"
        found = []
        for source in self.exported:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append((node.end_lineno - node.lineno + 1, node.name))
        return found

    def imports(self):
        "Modules of the package that its exported cells import"
        found = set()
        for node in (n for s in self.exported for n in ast.walk(ast.parse(s))):
            if isinstance(node, ast.ImportFrom) and node.module == "ltnb":
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ltnb."):
                found.add(node.module.removeprefix("ltnb."))
            elif isinstance(node, ast.Import):
                found |= {a.name.removeprefix("ltnb.") for a in node.names if a.name.startswith("ltnb.")}
        return found


def git(*args):
    return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout


def notebooks(rev=None):
    "All of a revision, or of the working tree, in order"
    if rev is None:
        texts = {p.stem: p.read_text("utf-8") for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
    else:
        paths = [p for p in git("ls-tree", "--name-only", rev, "nbs/").split() if p.endswith(".ipynb")]
        texts = {Path(p).stem: git("show", f"{rev}:{p}") for p in sorted(paths)}
    return [Notebook(name, json.loads(text)["cells"]) for name, text in texts.items() if not name.startswith("_")]


# what is public, and documented
@dataclass(frozen=True)
class Parameter:
    "A parameter of something public, or a field of a public dataclass"

    where: str  # latent.train_latent
    name: str
    typed: bool
    documented: bool  # a comment on its own lines or right above, or where a base class has the parameter


def _comments(source):
    "Line numbers that end in a comment; of a comment that has lines of its own, the line below them too"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = [t for t in tokens if t.type == tokenize.COMMENT and len(t.string.strip("# ")) > 0]
    alone = {t.start[0] for t in said if t.line.lstrip().startswith("#")}
    return {t.start[0] for t in said} | {n + 1 for n in alone}


def _end(arg, default):
    return max(n.end_lineno for n in (arg, arg.annotation, default) if n is not None)


def _of_function(where, node, commented):
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    pairs = [*zip(plain, defaults, strict=True), *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    pairs = [(arg, _end(arg, d), False) for arg, d in pairs if arg.arg not in ("self", "cls")]
    pairs += [(arg, _end(arg, None), True) for arg in (a.vararg, a.kwarg) if arg]
    on_line = Counter(line for _, line, _ in pairs)
    for arg, line, variadic in pairs:
        if not arg.arg.startswith("_"):
            own = line in commented and on_line[line] == 1
            yield Parameter(where, arg.arg, variadic or arg.annotation is not None, own)


def _decorators(node):
    return {n.id for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}


def _of_class(where, node, commented):
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (not item.name.startswith("_") or item.name in DUNDERS):
            yield from _of_function(f"{where}.{item.name}", item, commented)
        elif isinstance(item, ast.AnnAssign) and "dataclass" in _decorators(node):
            kind, name = ast.unparse(item.annotation), item.target.id
            if not kind.startswith("ClassVar") and not name.startswith("_"):
                own = commented & set(range(item.lineno, item.end_lineno + 1))
                yield Parameter(where, name, True, bool(own))


DUNDERS = ("__init__", "__call__")


def _bases():
    "Class -> names of its base classes, of all modules"
    classes = [n for s in modules().values() for n in ast.parse(s).body if isinstance(n, ast.ClassDef)]
    return {n.name: [b.id for b in n.bases if isinstance(b, ast.Name)] for n in classes}


def _above(name, bases):
    "All base classes of a class"
    return [c for b in bases.get(name, ()) for c in (b, *_above(b, bases))]


def parameters():
    """Module -> its public parameters; what overrides a method need not repeat what the base class says

    A method has its base's parameters, typed and documented there, if they have the same names.
    """
    found = {module: list(_parameters(module, source)) for module, source in modules().items()}
    bases, said = (
        _bases(),
        {tuple(p.where.split(".")[1:]) + (p.name,) for ps in found.values() for p in ps if p.typed and p.documented},
    )

    def again(p):
        _, *owner, method = p.where.split(".")
        return bool(owner) and any((c, method, p.name) in said for c in _above(owner[0], bases))

    return {m: [replace(p, typed=True, documented=True) if again(p) else p for p in ps] for m, ps in found.items()}


def _parameters(module, source):
    "Every public parameter of a module, as written"
    commented = _comments(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _of_class(f"{module}.{node.name}", node, commented)
        elif isinstance(node, ast.FunctionDef) and "patch" in _decorators(node):
            owner = ast.unparse(node.args.args[0].annotation)
            if not owner.startswith("_") and (not node.name.startswith("_") or node.name in DUNDERS):
                yield from _of_function(f"{module}.{owner}.{node.name}", node, commented)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from _of_function(f"{module}.{node.name}", node, commented)


def modules():
    "Name -> source of the package's modules"
    return {p.stem: p.read_text("utf-8") for p in sorted((ROOT / "ltnb").glob("*.py")) if not p.stem.startswith("_")}


def public_names(source):
    "`__all__` of a module"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


# printing
def render(rows):
    "Columns, the first one to the left"
    widths = [max(len(str(r[i])) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            str(v).ljust(w) if i == 0 else str(v).rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def percent(part, whole):
    return f"{100 * part / whole:.0f} %" if whole else "–"


def table(books):
    "A row a notebook"
    rows = [["notebook", "exported", "widest", "over 120", "longest function", "", "shown"]]
    for b in books:
        wide, (n, name) = [len(x) for x in b.exported_lines], max(b.functions(), default=(0, "–"))
        room = [len(wide), max(wide), sum(w > 120 for w in wide), name, n] if wide else ["–"] * 5
        rows.append([b.name, *room, percent(*b.shown)])
    return rows


def totals(books):
    "Name -> figure, of all rooms and notebooks"
    lines = [len(x) for b in books for x in b.exported_lines]
    sizes = {b.name: len(b.exported_lines) for b in books if b.exported}
    shown = [sum(v) for v in zip(*(b.shown for b in books), strict=True)]
    shares = {b.name: b.shown[0] / b.shown[1] for b in books if b.shown[1]}
    twice = [n for n, k in Counter(b.number for b in books if b.number is not None).items() if k > 1]
    largest, least = max(sizes, key=sizes.get), min(shares, key=shares.get)
    n, name = max(f for b in books for f in b.functions())
    return {
        "rooms": len(sizes),
        "exported lines": len(lines),
        "largest room": f"{sizes[largest]} ({largest})",
        "rooms over 400 lines": sum(v > 400 for v in sizes.values()),
        "widest line": max(lines),
        "lines over 120": sum(w > 120 for w in lines),
        "longest function": f"{n} ({name})",
        "functions over 40 lines": sum(k > 40 for b in books for k, _ in b.functions()),
        "code cells shown": percent(*shown),
        "least shown": f"{100 * shares[least]:.0f} % ({least})",
        "notebooks below 60 %": sum(v < 0.6 for v in shares.values()),
        "numbers given twice": len(twice),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--git", metavar="REV", help="print a revision too, and the totals of both side by side")
    rev = parser.parse_args().git
    here = notebooks()
    render(table(here))
    print()
    if rev is None:
        return render([["", "now"], *([k, v] for k, v in totals(here).items())])
    there = notebooks(rev)
    render(table(there))
    print()
    then, now = totals(there), totals(here)
    render([["", rev, "now"], *([k, then[k], now[k]] for k in now)])


if __name__ == "__main__":
    main()
