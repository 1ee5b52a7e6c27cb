"Every notebook runs from top to bottom, and reads as the rules of CONTRIBUTING.md ask."

import ast
import hashlib
import json
import re
import sys
import traceback
from dataclasses import replace

import pytest
from conftest import ROOT, once
from ltnb.progress import Progress

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.stem != "results")  # which tests/results.py writes
IDS = [p.stem for p in NOTEBOOKS]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(params=NOTEBOOKS, ids=IDS)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def values(node, names):
    "Every comparison in a piece of code that is false now, with what stands on its sides"
    found = []
    for n in ast.walk(node):
        if not isinstance(n, ast.Compare):
            continue
        try:
            if eval(compile(ast.Expression(n), "cell", "eval"), names):
                continue
            sides = [repr(eval(compile(ast.Expression(s), "cell", "eval"), names)) for s in (n.left, *n.comparators)]
        except Exception:
            continue  # a name of a comprehension
        found.append(f"{ast.unparse(n)} with {' and '.join(s[:80] for s in sides)}")
    return found


def explain(cell, number, shell):
    "Which cell failed, and with which values, in one line"
    error, text = shell.exc, f"cell {number} ({cell.id})"
    failed = []
    try:
        tree = ast.parse(source(cell))
    except SyntaxError:
        tree = ast.parse("")  # a magic
    if isinstance(error, AssertionError):
        line = next(
            (
                f.lineno
                for f in reversed(traceback.extract_tb(error.__traceback__))
                if "ipython-input" in f.filename or "ipykernel" in f.filename
            ),
            None,
        )
        at = [s for s in tree.body if line is None or s.lineno <= line <= s.end_lineno]
        failed = [v for s in at for v in values(s, shell.user_ns)]
    said = " ".join(str(error).split())
    return f"{text}: {'; '.join(failed) or f'{type(error).__name__}: {said}'}"[:600]


BRIEF = {  # what is injected after the cell of parameters, as `ltnb run` does it: less work for the same cells
    "96_run_diffusion": "n_steps, diff_bs, per_class, judge_epochs = 24, 16, 10, 2",
}


def run_lesson(path, skip=("slow", "cuda")):
    "Run a notebook's cells, or fail with the cell and its values"
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.test import nb_test_cells

    shell = CaptureShell(path)
    number = {c["id"]: i for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"])}
    with working_directory(path.parent):
        for cell in nb_test_cells(path, skip_flags=list(skip)):
            shell.cell(cell, timeout=600)
            if shell.exc is None and path.stem in BRIEF and "parameters" in cell.metadata.get("tags", []):
                shell.run(BRIEF[path.stem])
            if shell.exc is None:
                continue
            print(shell.prettytb(fname=path))
            pytest.fail(explain(cell, number.get(cell.id), shell), pytrace=False)
    shell.close()


@pytest.fixture
def same_training(tmp_path_factory, monkeypatch):
    "Four lessons begin with the same training on the same digits: the first that runs keeps its model for the others"
    from ltnb import diffusion, generator_steps  # the recipes have the real one, whoever imports them first

    assert generator_steps.train_diffusion is diffusion.train_diffusion
    real, usual = diffusion.train_diffusion, diffusion.Denoising(n_steps=300, diff_bs=32)

    def train_diffusion(images, labels, n_classes, how=None, *more, **changes):
        def train(folder):
            real(images, labels, n_classes, usual).save(folder)

        steps = {k: v for k, v in changes.items() if k != "class_names"}
        few = not more and steps.keys() <= {"n_steps", "diff_bs"}
        if not few or replace(how or diffusion.Denoising(), **steps) != usual:
            return real(images, labels, n_classes, how, *more, **changes)
        shown = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        m = diffusion.DiffusionModel.load(once(tmp_path_factory, f"digits-{shown}", train))
        names = tuple(map(str, changes.get("class_names") or m.class_names))
        return diffusion.DiffusionModel(m.unet, m.objective, names, m.image_shape, m.counts)

    monkeypatch.setattr(diffusion, "train_diffusion", train_diffusion)


def test_runs(path, tmp_path, monkeypatch, same_training):
    monkeypatch.setenv("LTNB_RUNS", str(tmp_path))
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(Progress, "quiet", False)  # and what the notebook does to it is undone
    run_lesson(path)


def test_a_failing_lesson_says_which_cell_and_which_values(tmp_path, capfd):
    import nbformat.v4 as v4

    lesson = [
        "from fastcore.test import test_eq",
        "better, worse = .81, .84",
        "test_eq([better > worse, worse < 1], [True] * 2)",
    ]
    cells = [v4.new_markdown_cell("# A lesson"), *map(v4.new_code_cell, lesson)]
    (tmp_path / "lesson.ipynb").write_text(json.dumps(v4.new_notebook(cells=cells)), encoding="utf-8")
    with pytest.raises(pytest.fail.Exception) as failed:
        run_lesson(tmp_path / "lesson.ipynb")
    assert re.fullmatch(r"cell 3 \(\w+\): better > worse with 0.81 and 0.84", str(failed.value))
    for broken, said in (
        ("assert {}['x']", "KeyError: 'x'"),
        ("1 +", "SyntaxError"),
        ("test_eq(2, 3)", "AssertionError: ==: 2 3"),
    ):
        cells[-1]["source"] = broken
        (tmp_path / "lesson.ipynb").write_text(json.dumps(v4.new_notebook(cells=cells)), encoding="utf-8")
        with pytest.raises(pytest.fail.Exception) as failed:
            run_lesson(tmp_path / "lesson.ipynb")
        assert str(failed.value).startswith("cell 3 (") and said in str(failed.value), broken


def test_opening_and_end(path, cells):
    first = [c for c in cells if c["cell_type"] == "markdown"][0]
    assert re.match(r"# .+\n\n> .+", source(first)), "a notebook opens with a title and a subtitle"
    text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    if path.stem[0].isdigit():  # a lesson
        assert "## Summary" in text and "### Exercises" in text


def test_cells_are_small(cells):
    for c in cells:
        if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", []):
            assert len(source(c).splitlines()) <= 40, f"a cell of {len(source(c).splitlines())} lines: {source(c)[:80]}"


def test_imports_stand_alone(cells):
    for c in (c for c in cells if c["cell_type"] == "code"):
        body = ast.parse(re.sub(r"^\s*[%!].*$", "", source(c), flags=re.M)).body
        kinds = {
            isinstance(n, (ast.Import, ast.ImportFrom))
            for n in body
            if not isinstance(n, ast.Expr) or not isinstance(n.value, ast.Constant)
        }
        assert len(kinds) < 2, f"imports and code share a cell: {source(c)[:80]}"


def test_stored_outputs(path, cells):
    code = [c for c in cells if c["cell_type"] == "code"]
    assert path.stat().st_size < 1_000_000
    assert any(c["outputs"] for c in code) or not code, "no stored output"
    kinds = {o["output_type"] for c in code for o in c["outputs"]}
    assert "error" not in kinds
    text = json.dumps(
        [
            {k: v for k, v in o.get("data", {"text": o.get("text")}).items() if k.startswith("text")}
            for c in code
            for o in c["outputs"]
        ]
    )
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of a machine in an output"
    assert "it/s]" not in text, "a progress bar in an output"
    streams = [o for c in code for o in c["outputs"] if o["output_type"] == "stream" and o["name"] == "stderr"]
    assert not streams or path.stem == "99_cli", f"stderr in an output: {streams[0]['text']}"


def test_parameters_cell_only_where_it_belongs(path, cells):
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == (1 if re.match(r"9\d_run_", path.stem) else 0)
