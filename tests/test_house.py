"The house keeps its measures: rooms, lines, names, documented parameters, pictures with a text"

import importlib
from collections import defaultdict

import pytest

import house

BOOKS = house.notebooks()
PARAMETERS = house.parameters()
ROOMS = {b.module: b for b in BOOKS if b.module}


def none(offenders, what):
    "Fail with a list"
    assert not offenders, f"{len(offenders)} {what}:\n" + "\n".join(map(str, offenders))


def test_no_room_is_larger_than_one_can_know():
    sizes = {b.name: len(b.exported_lines) for b in BOOKS}
    none([f"{name}: {n} exported lines" for name, n in sizes.items() if n > 400], "rooms of more than 400 lines")


def test_no_line_is_wider_than_the_page():
    wide = [(b.name, len(line), line.strip()) for b in BOOKS for line in b.exported_lines if len(line) > 120]
    none([f"{name}: {n} columns: {line[:80]}" for name, n, line in wide], "lines over 120 columns")


def test_functions_do_one_thing():
    long = [(b.name, name, n) for b in BOOKS for n, name in b.functions() if n > 40]
    none([f"{book}: {name} has {n} lines" for book, name, n in long], "functions of more than 40 lines")


def test_the_site_shows_the_code():
    shares = {b.name: b.shown for b in BOOKS if b.shown[1]}
    low = [f"{name}: {part} of {whole}" for name, (part, whole) in shares.items() if part < 0.6 * whole]
    none(low, "notebooks that show less than 60 % of their code cells")
    part, whole = (sum(v) for v in zip(*shares.values(), strict=True))
    assert part >= 0.75 * whole, f"{part} of {whole} code cells are shown, less than 75 %"


def test_no_number_is_given_twice():
    by = defaultdict(list)
    for b in BOOKS:
        by[b.number].append(b.name)
    none([names for n, names in by.items() if n is not None and len(names) > 1], "numbers given twice")


def test_a_room_imports_from_lower_numbers_only():
    up = [
        f"{b.name} imports {ROOMS[m].name}"
        for b in ROOMS.values()
        for m in sorted(b.imports())
        if m in ROOMS and ROOMS[m].number >= b.number
    ]
    none(up, "imports from the same or a higher number")


ENTRIES = {"run"}  # every recipe's room calls its entry so: `from ltnb.baseline import run` reads like the others


def test_a_name_means_one_thing():
    rooms = defaultdict(list)
    for module, source in house.modules().items():
        for name in house.public_names(source):
            rooms[name].append(module)
    shared = {name: ms for name, ms in rooms.items() if len(ms) > 1 and name not in ENTRIES}
    differ = []
    for name, ms in shared.items():
        first, *others = (getattr(importlib.import_module(f"ltnb.{m}"), name) for m in ms)
        if any(o is not first for o in others):
            differ.append(f"{name}: {', '.join(ms)}")
    none(differ, "names with two meanings")


@pytest.mark.parametrize("module", PARAMETERS)
def test_public_parameters_are_typed_and_documented(module):
    bare = [
        f"{p.where}: {p.name} has no {'type' if p.documented else 'comment of its own'}"
        for p in PARAMETERS[module]
        if not (p.typed and p.documented)
    ]
    none(bare, "public parameters without a type or a comment of their own")


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.name)
def test_pictures_say_what_they_show(book):
    silent = []
    for c in book.cells:
        kinds = [k for o in c.get("outputs", ()) for k in o.get("data", {})]
        source = "".join(c["source"])
        if any(k.startswith("image/") for k in kinds) and "fig-alt" not in house.directives(source):
            silent.append(f"cell {c.get('id')}: {(house.lines_of(source) or ['empty'])[0][:80]}")
    none(silent, "figures without #| fig-alt")
