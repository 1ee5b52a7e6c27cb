"""How nbdev makes pages of notebooks: boxes of public names, printed lines that fit, links that lead somewhere

Written by hand, and named in `[tool.nbdev]`: nbdev imports it when it makes the pages, and nothing else does.
"""

import ast
import copy
import inspect
import io
import re
import textwrap
import tokenize
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, cached_property
from html import escape
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

from fastcore.docments import docments
from nbdev.doclinks import NbdevLookup, patch_name
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer

from ltnb._modidx import d as INDEX
from ltnb.config import Config

SHOWN = ("__call__", "__getitem__", "__iter__", "__len__")  # methods of Python's own that a reader calls
WIDE = 88  # columns of a signature


# text
def plain(text):
    "A sentence in which Markdown finds nothing but code in backticks"
    parts = re.split(r"(`[^`\n]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_<>$~|^#\[\]])", r"\\\1", p) for p in parts)


def literal(value):
    "Code that nbdev does not take for the name of a function: it links whatever stands in backticks"
    return f"<code>{escape(str(value)).replace('|', '&#124;')}</code>"


def short(code):
    "Types without the modules that every reader knows"
    modules = r"\b(__main__|ltnb\.\w+|typing|collections\.abc|pathlib(\._local)?|dataclasses|builtins)\."
    return re.sub(modules, "", code).replace("numpy.ndarray", "np.ndarray")


def signature(text, kind):
    "A signature of fastcore, shorter; `kind` is def or class"
    lines = [line.partition(" # ") for line in text.splitlines()]
    text = "\n".join(short(code) + hash_ + said for code, hash_, said in lines)
    text = re.sub(r"<(?:function|class|bound method) '?([\w.]+)'?[^>]*>", r"\1", text)
    return re.sub(r"^def ", "class ", text).replace(")->None:", ")") if kind == "class" else text


def is_private(name):
    "Whether a part of a dotted name is nobody's business"
    return any(p.startswith("_") and p not in SHOWN for p in name.split("."))


# records and settings
def published(cls):
    "A class of a notebook as the package has it: there its comments can be read"
    if cls.__module__ != "__main__":
        return cls
    homes = [m for m, names in INDEX["syms"].items() if f"{m}.{cls.__qualname__}" in names]
    found = [getattr(import_module(m), cls.__qualname__, None) for m in homes]
    same = [c for c in found if is_dataclass(c) and [f.name for f in fields(c)] == [f.name for f in fields(cls)]]
    return same[0] if same else cls


def comments(cls):
    "Field -> what is said of it"
    known = {}
    for c in reversed(cls.__mro__):
        known |= {k: " ".join(v.split()) for k, v in docments(c).items() if v} if is_dataclass(c) else {}
    return known


def default_of(field):
    "As text, or its rule"
    if field.metadata.get("says"):
        return plain(field.metadata["says"])
    if field.default is not MISSING:
        return literal(getattr(field.default, "__name__", None) or field.default)
    return "" if field.default_factory is MISSING else literal(f"{field.default_factory.__name__}()")


def meaning(cls, name, said):
    "What is said of a field, its choices and its limits"
    text = [plain(said)] if said else []
    if issubclass(cls, Config):
        _, choices, _ = cls.hints()[name]
        low, high = cls.limits().get(name, (None, None))
        text += ["one of " + ", ".join(map(literal, choices))] if choices else []
        limits = [f"at least {low:g}"] if low is not None else []
        limits += [f"at most {high:g}"] if high is not None else []
        text += [s for s in limits if s not in (said or "")]
    return "; ".join(text)


def inherited(cls):
    "Base class -> its fields that this class leaves as they are"
    own, found = set(cls.__dict__.get("__annotations__", ())), {}
    for f in fields(cls) if issubclass(cls, Config) else ():
        home = next(c for c in cls.__mro__ if f.name in c.__dict__.get("__annotations__", ()))
        if f.name not in own:
            found.setdefault(home.__name__, []).append(f.name)
    return found


def record(cls):
    "A table of a dataclass's fields: name, default (or type), meaning"
    said, above = comments(cls), inherited(cls)
    known = {n for names in above.values() for n in names}
    own = [f for f in fields(cls) if f.name not in known and not f.name.startswith("_")]
    defaults = any(default_of(f) for f in own)
    rows = [f"| name | {'default' if defaults else 'type'} | meaning |", "|---|---|---|"]
    for f in own:
        kind = f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)
        value = default_of(f) if defaults else literal(short(kind))
        cells = [literal(f.name), value, meaning(cls, f.name, said.get(f.name))]
        rows.append(f"| {' | '.join(cells)} |")
    table = ["\n".join(rows)] if own else []
    return "\n\n".join([*table, *(f"With all of `{c}`: {', '.join(names)}." for c, names in above.items())])


class Box(BasicMarkdownRenderer):
    "A public name on the site: its heading, its signature or the table of its settings, and its sentence"

    def __init__(self, sym, name=None, title_level=3):
        sym = sym.func if isinstance(sym, cached_property) else sym
        super().__init__(sym, name=name, title_level=title_level, maxline=WIDE)

    def _repr_markdown_(self):
        if is_private(self.nm):
            return "<!-- private -->"
        title = f"{'#' * self.title_level} {plain(self.nm)}"
        source = NbdevLookup().code(self.fn)
        link = [f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}'] if source else []
        kind = "class" if inspect.isclass(self.sym) else "def"
        if kind == "class" and is_dataclass(self.sym):
            body = record(published(self.sym))
        else:
            body = f"```python\n{comments_up(signature(str(self.dm), kind))}\n```"
        return "\n\n".join(["---", *link, title, *([plain(self.docs)] if self.docs else []), body])


# processors of cells
TEXT = 80  # columns of a printed line


def fold(line):
    "A printed line in several: a sentence anywhere, a row of a table in its last cell; a row of numbers stays whole"
    columns = [m.end() for m in re.finditer(r"(?<=[^\s,&])\s{2,}(?=\S)", line)]  # not those of lists, of LaTeX
    columns = [] if len(columns) == 1 and columns[0] > TEXT - 20 else columns  # two sentences
    said = line[columns[-1] :] if columns else ""
    is_row = columns and (len(said) < 30 and len(re.findall("[a-z]{2,}", said)) < 3)
    if len(line) <= TEXT or is_row or (columns and columns[-1] > TEXT - 15):
        return line
    indent = columns[-1] if columns else len(line) - len(line.lstrip()) + 2
    look = dict(break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * indent)
    return textwrap.fill(line, TEXT, replace_whitespace=False, drop_whitespace=True, **look)


def choices_folded(line):
    "A long list of choices, `a|b|c`, in several lines below one another, what follows behind the last of them"
    long = max(line.split(), key=len, default="")
    if len(line) <= TEXT or len(long) < 40 or "|" not in long:
        return line
    at = line.index(long)
    parts = [s.replace("| ", "|") for s in textwrap.wrap(long.replace("|", "| "), max(TEXT - at, 30))]
    return line[:at] + f"\n{' ' * at}".join(parts) + line[at + len(long) :]


def joined(text):
    "Sentences that were folded at more columns than a page has, in one line again"
    return re.sub(rf"^([A-Za-z].{{{TEXT},}})\n  (?=\S)", r"\1 ", text, flags=re.M)


def narrow_table(text):
    "A printed table in several below one another, each with the first column, as `report.render` does it"
    lines = text.split("\n")
    if len(lines) < 3 or not re.fullmatch("-{9,}", lines[1]) or max(map(len, lines)) <= TEXT:
        return text
    lines.pop(1)
    inked = "".join("x" if any(s.strip() for s in at) else " " for at in zip_longest(*lines, fillvalue=" "))
    first, *columns = [m.span() for m in re.finditer("x( ?x)*", inked)]
    parts = [[first]]
    for a, b in columns:
        if len(parts[-1]) > 1 and sum(j - i + 2 for i, j in parts[-1]) + b - a > TEXT:
            parts.append([first])
        parts[-1].append((a, b))
    tables = [["  ".join(s[a:b].ljust(b - a) for a, b in part).rstrip() for s in lines] for part in parts]
    return "\n\n".join("\n".join([head, "-" * max(map(len, [head, *rows])), *rows]) for head, *rows in tables)


def printed(text):
    "What a cell prints, as wide as the page"
    tables = "\n\n".join(map(narrow_table, text.rstrip("\n").split("\n\n")))
    lines = "\n".join(map(choices_folded, joined(tables).split("\n")))
    return "\n".join(map(fold, lines.split("\n"))) + text[len(text.rstrip("\n")) :]


CODE = 90  # columns of a line of code


def moved_up(line, at, said):
    "A line in several: the comment that stood at column `at` of it, and the code below that"
    code = line[:at].rstrip()
    begin = re.match(r"\s*(def|class) \w+\(", code)
    head = begin[0] if begin and code.count("(") > code.count(")") else ""  # said of the parameter behind the name
    indent = " " * (len(head) or len(line) - len(line.lstrip()))
    above = textwrap.wrap(said.lstrip("# "), max(CODE - len(indent) - 2, 30))
    below = code[len(head) :].strip()
    return [s for s in (head, *(f"{indent}# {s}" for s in above), below and indent + below) if s]


def comments_up(source):
    "The comment behind a long line moves above it, and a long comment becomes several lines"
    lines = source.split("\n")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    for t in [t for t in tokens if t.type == tokenize.COMMENT]:
        n, at = t.start
        is_number = len(t.string) < 7 and lines[n - 1][:at].strip()  # `# 5` stays beside its line
        if len(lines[n - 1]) > CODE and not is_number and not re.match(r"#\s*\|", t.string):
            lines[n - 1] = "\n".join(moved_up(lines[n - 1], at, t.string))
    return "\n".join(lines)


def docs_folded(source):
    "A long docstring over several lines"
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not ast.get_docstring(node):
            continue
        n = node.body[0].lineno - 1
        found = re.fullmatch(r'( *)"([^"]+)"', lines[n])
        if found and len(lines[n]) > CODE:
            said = textwrap.wrap(found[2], CODE - len(found[1]) - 3, break_long_words=False, break_on_hyphens=False)
            lines[n] = f'{found[1]}"""' + f"\n{found[1]}".join(said) + '"""'
    return "\n".join(lines)


def inseparable(source):
    "Numbers of lines that black cannot leave alone: a clause of one line that has other clauses beside it"
    lines, found = source.split("\n"), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If | ast.For | ast.While | ast.Try) and (node.orelse or hasattr(node, "handlers")):
            clauses = [node.body, *(h.body for h in getattr(node, "handlers", ())), node.orelse]
            starts = [c[0] for c in [*clauses, getattr(node, "finalbody", [])] if c]
            found |= {s.lineno for s in starts if lines[s.lineno - 1].encode()[: s.col_offset].strip()}
    return found


@cache
def formatter():
    "black, and how it lays out: quotes stay as they are, long strings become several"
    import black

    strings = {black.Preview.string_processing}
    look = dict(line_length=CODE, string_normalization=False, magic_trailing_comma=False)
    look |= dict(target_versions={black.TargetVersion.PY311}, preview=True, enabled_features=strings)
    return black, black.Mode(**look)


def wide_lines(source):
    "Their numbers; a directive is one line, however long"
    return {n for n, line in enumerate(source.split("\n"), 1) if len(line) > CODE and not line.startswith("#|")}


def laid_out(source):
    "Statements with lines too wide for the page, or their headers, in narrower lines; all others as they were written"
    wide = wide_lines(source)
    if not wide:
        return source
    black, mode = formatter()
    lines = [(n, n) for n in sorted(wide | inseparable(source))]
    text = black.format_str(source, mode=mode, lines=lines).rstrip("\n")
    text = re.sub(r"^# \|", "#|", text, flags=re.M)  # directives
    return f"{text};" if source.endswith(";") and not text.endswith(";") else text  # shows no value


def fit_code(cell):
    "Code as wide as the page; a cell that Python or black cannot read, such as a magic, stays as it is"
    if cell.cell_type != "code" or not cell.source:
        return
    with suppress(SyntaxError, ValueError):
        ast.parse(cell.source)
        cell.source = comments_up(laid_out(docs_folded(comments_up(cell.source))))


def wrap_outputs(cell):
    "Printed sentences and tables wrapped, as a terminal does it"
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if output.get("output_type") == "stream":
            output["text"] = printed("".join(output["text"]))
        elif list(data) == ["text/plain"]:
            data["text/plain"] = printed("".join(data["text/plain"]))


def names_of(node):
    "What a definition is called: `f`, or `Class.f` of a patch"
    names = patch_name(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
    return [names] if isinstance(names, str) else list(names)


@cache
def headed():
    "Names that have a box somewhere: nbdev makes none for methods that are written inside of their class"
    found = set()
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            found |= set(names_of(node))
    return {n for n in found if not is_private(n)}


def unlink(cell):
    "No links to what has no box"

    def keep(m):
        name = re.sub(r"^ltnb\.(\w+\.)?|\(\)$", "", m[1])
        return m[0] if name in headed() or m[1].startswith("ltnb.") else f"`{m[1]}`"

    inside = re.compile(r"\[([^\[\]]*)\[(`[^`]+`)\]\([^)]*\)([^\[\]]*)\]\(([^)]*)\)")  # a link's own words, linked

    def mend(text):
        while inside.search(text):
            text = inside.sub(r"[\1\2\3](\4)", text)
        return re.sub(r"\[`([\w.()]+)`\]\(https?://[^)]*\.html#[^)]*\)", keep, text)

    if cell.cell_type == "markdown" and cell.source:
        cell.source = mend(cell.source)
    for output in cell.get("outputs", ()):
        if "text/markdown" in output.get("data", {}):
            output["data"]["text/markdown"] = mend("".join(output["data"]["text/markdown"]))


def box_of(cell):
    "The name that a cell of nbdev shows, or None"
    found = re.search(r"^show_doc\(([\w.]+)\)", cell.source or "", re.M) if cell.cell_type == "code" else None
    return found and found[1]


def only_heading(cell):
    "A box without what the code below it says; a table of settings stays"
    for output in cell.get("outputs", ()):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        if "```python" in text:
            output["data"]["text/markdown"] = re.search(r".*?^#+ .*?$", text, re.S | re.M)[0]
    return cell


def pieces(source, known):
    """A cell of several definitions in pieces: [(name, code)], a piece a definition that has a box

    What stands between two definitions goes with the second, and what is left with the last.
    """
    lines, found, begin = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        name = next((n for n in names_of(node) if n in known), None)
        if name:
            found.append((name, "\n".join(lines[begin : node.end_lineno]).strip("\n")))
            begin = node.end_lineno
    rest = "\n".join(lines[begin:]).strip("\n")
    if found and rest:
        found[-1] = (found[-1][0], f"{found[-1][1]}\n\n\n{rest}")
    return found


def taken_apart(cell, boxes):
    "An exported cell as boxes with their code below them"
    directives, source = re.match(r"((?:#\|[^\n]*\n)*)(.*)", cell.source, re.S).groups()
    found, cells = pieces(source, boxes), []
    for i, (name, code) in enumerate(found):
        part = copy.deepcopy(cell)
        part.source, part["id"] = directives + code, f"{cell.get('id', 'cell')}-{i}"
        part["outputs"] = cell.get("outputs", []) if i == len(found) - 1 else []
        cells += [only_heading(boxes[name]), part]
    return cells


class one_by_one(Processor):
    "Each exported definition right below its heading: nbdev shows a signature first, and several in any order"

    def end(self):
        boxes = {name: c for c in self.nb.cells if (name := box_of(c))}
        shown = [c for c in self.nb.cells if c.cell_type == "code" and "#| exports" in (c.source or "")]
        apart = {id(c): taken_apart(c, boxes) for c in shown}
        placed = {box_of(c) for cells in apart.values() for c in cells} - {None}
        kept = [c for c in self.nb.cells if box_of(c) not in placed]
        self.nb.cells = [part for c in kept for part in apart.get(id(c)) or [c]]
