"Every notebook runs from top to bottom, and reads as the rules of CONTRIBUTING.md ask."

import ast
import atexit
import json
import os
import re
import sys
import traceback
from dataclasses import replace
from functools import partial
from importlib import import_module

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


BRIEF = {  # lesson -> cell -> what runs after it: the same cells with less work; what they assert holds with less, too
    "11_data": {"ef53229d": "seeds = range(3)"},
    "13_metrics": {"17ce6221": "seeds = range(6)"},
    "22_losses": {"9a128dbf": "taus = taus[::4]", "99d18e68": "draws = range(2)"},
    "29_decoupled": {"224797cd": "seeds = range(4)"},
    "35_controls": {"487732dd": "cfg = brief(cfg, n_epochs=2)"},
    "38_baseline": {"975b2cc3": "cfg = brief(cfg, n_epochs=10)", "f2e7e503": "tiny = brief(tiny, n_epochs=3)"},
    "41_ldmlr_published": {"79dc0412": "small |= dict(n_steps=5)"},
    "44_ldmlr": {
        "f2a4b003": "quick = brief(quick, head_steps=10, scratch_steps=10)",
        "c4a06b3d": "cfg = brief(cfg, n_epochs=20, n_steps=60)",
    },
    "51_diffusion": {"f2a51003": "whole = train_plainly\ndef train_plainly(*a): return whole(*a[:3], min(a[3], 80))"},
    "56_generator_steps": {"245a737f": "few = brief(few, n_steps=20, diff_bs=16)"},
    "57_generator": {"6d63de2b": "cfg = brief(cfg, n_steps=20, sample_every=10, judge_epochs=2)"},
    "58_generate": {"57a0b004": "few |= dict(n_steps=10, sample_every=5, judge_epochs=1)"},
    "60_aid": {"037acdc8": "def make(part): return sample_images(model, part, sample_steps=3)"},
    "61_aid_loss": {"f36b68d8": "measured = dict(n=128, sample_steps=3)"},
    "62_diffult_steps": {
        "21d76472": "cfg = brief(cfg, n_steps=20, sample_steps=2, target_per_class=25); s = brief(s, cfg=cfg)"
    },
    "63_diffult_ablations": {"fdd42ba7": "cfg = brief(cfg, n_steps=3); s = brief(s, cfg=cfg)"},
    "64_diffult": {"e45068c4": "tiny = brief(tiny, n_steps=3, sample_steps=2, judge_epochs=1)"},
    "78_text_diffusion": {
        "8b958a35": "whole = train\ndef train(texts, n_steps, **more): return whole(texts, n_steps // 6 or 1, **more)"
    },
    "79_chatdiff": {"8a1e79ff": "cfg = brief(cfg, n_steps=6)"},
    "83_discl_steps": {"45d4964e": "cfg = brief(cfg, n_steps=6, clip_steps=10); s = brief(s, cfg=cfg)"},
    "84_discl": {
        "10523b33": "cfg = brief(cfg, n_steps=4, clip_steps=5, n_epochs=3, fine_epochs=6, curriculum_epochs=5)"
    },
    "86_discl_adaptive_steps": {"47752571": "cfg = brief(cfg, n_steps=6, clip_steps=10); s = brief(s, cfg=cfg)"},
    "87_discl_adaptive": {"25d8c694": "cfg = brief(cfg, n_steps=4, clip_steps=5, n_epochs=3, judge_epochs=1)"},
    "90_compare": {"c34cc228": "cfg = brief(cfg, settings=tiny + ' ldmlr.head_steps=10 ldmlr.scratch_steps=10')"},
    "91_run_baseline": {"8bfeb72a": "n_epochs = 10"},
    "92_run_ldmlr": {"db589df4": "n_epochs, n_steps, per_class, head_steps, scratch_steps = 10, 60, 20, 10, 10"},
    "96_run_diffusion": {"50d1096b": "n_steps, diff_bs, sample_steps, per_class, judge_epochs = 24, 16, 5, 10, 2"},
}


def asked():
    "How lessons run: brief; whole, so that nothing is shortened; or slow, so that slow cells run as well"
    how = os.environ.get("LTNB_LESSONS", "brief")
    assert how in ("brief", "whole", "slow"), f"LTNB_LESSONS must be brief, whole or slow, got {how!r}"
    return how


def run_lesson(path):
    "Run a notebook's cells: its names in the end, or the cell that failed, and why"
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.test import nb_test_cells

    how = asked()
    shell, less = CaptureShell(path), BRIEF.get(path.stem, {}) if how == "brief" else {}
    shell.user_ns["brief"] = replace
    number = {c["id"]: i for i, c in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"])}
    with working_directory(path.parent):
        for cell in nb_test_cells(path, skip_flags=["cuda"] if how == "slow" else ["slow", "cuda"]):
            shell.cell(cell, timeout=7200 if how == "slow" else 600)
            if shell.exc is None and cell.id in less:
                shell.run(less[cell.id])
            if shell.exc is None:
                continue
            print(shell.prettytb(fname=path))
            pytest.fail(explain(cell, number.get(cell.id), shell), pytrace=False)
    names = dict(shell.user_ns)
    shell.close()
    atexit.unregister(shell.atexit_operations)  # or all shells live until the end, and each collects garbage then
    return names


LONG = 60  # steps or epochs of a training that is worth keeping
GIVES = {  # lessons that build a training themselves: its name, what it is told beside the images, and the model there
    "51_diffusion": ("train_diffusion", dict(n_steps=300, diff_bs=32), lambda names: 10, "model"),
    "75_clip_training": ("train_clip", dict(n_steps=120), lambda names: names["pool"], "clip"),
}


class Trainings:
    "Several lessons begin with the same training on the same digits: the first one keeps its model for the others"

    def __init__(self, factory):
        from ltnb import classifier, clip, clip_training, diffusion, training

        self.factory = factory
        self.known = {  # name -> (what tells it how, what comes out, its room)
            "train_diffusion": (diffusion.Denoising, diffusion.DiffusionModel, diffusion),
            "train_clip": (clip_training.ClipTraining, clip.Clip, clip_training),
            "fit": (training.Fitting, classifier.Classifier, training),
        }

    def kept(self, name, what, how, make):
        "The model, made by `make` where no lesson has made it; None where the training is short, or not to be compared"
        from ltnb.store import content_key

        long = (getattr(how, "n_steps", 0) or how.n_epochs) >= LONG
        key = content_key(*what, how) if long and not any(map(callable, vars(how).values())) else None
        if key is not None:
            folder = once(self.factory, f"{name}-{key}", lambda folder: make().save(folder))
            return self.known[name][1].load(folder)

    def instead(self, name):
        "What lessons call in place of a training"
        settings, _, room = self.known[name]
        real = getattr(room, name)

        def train(*given, class_names=None, **changes):
            named = {} if class_names is None else {"class_names": class_names}
            what = [x for x in given if not isinstance(x, settings)]
            how = next((x for x in given if isinstance(x, settings)), settings())
            if len(what) > 3 or not changes.keys() <= vars(how).keys():  # a run, a callback, a loss
                return real(*given, **changes, **named)
            model = self.kept(name, what, replace(how, **changes), lambda: real(*given, **changes))
            if model is None:
                return real(*given, **changes, **named)
            if name == "fit":  # which trains in place
                what[0].load_state_dict(model.state_dict())
                what[0].log_prior = model.log_prior
                return what[0].eval()
            if name == "train_diffusion":
                names = range(model.n_classes) if class_names is None else class_names
                return replace(model, class_names=tuple(map(str, names)))
            return model

        return train

    def take(self, lesson, names):
        "Keep the model of a lesson for those that only call its training"
        if lesson in GIVES:
            name, told, more, model = GIVES[lesson]
            train, how = names["data"].train, self.known[name][0](**told)
            self.kept(name, [train.images, train.labels, more(names)], how, lambda: names[model])


@pytest.fixture
def same_trainings(tmp_path_factory, monkeypatch):
    import ltnb

    for room in ("chatdiff", "diffult_ablations", "discl_steps", "ldmlr"):  # recipes have the real ones in any case
        import_module(f"ltnb.{room}")
    trainings = Trainings(tmp_path_factory)
    for name, (_, _, room) in trainings.known.items():
        everyone = [m for n, m in sys.modules.items() if n.startswith("ltnb.") and hasattr(m, name)]
        assert len({getattr(m, name) for m in everyone}) == 1
        monkeypatch.setattr(room, name, trainings.instead(name))
    monkeypatch.setattr(ltnb, "fit", trainings.known["fit"][2].fit)  # which the package would keep
    return trainings


@pytest.fixture
def few_draws(monkeypatch):
    "Recipes measure the AID-biased loss on an eighth of the images that they draw for it"
    from ltnb import aid_loss

    if asked() == "brief":
        monkeypatch.setattr(aid_loss, "Draws", partial(aid_loss.Draws, n=128))


def test_runs(path, tmp_path, monkeypatch, same_trainings, few_draws):
    monkeypatch.setenv("LTNB_RUNS", str(tmp_path))
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(Progress, "quiet", False)  # and what the notebook does to it is undone
    same_trainings.take(path.stem, run_lesson(path))


def written(folder, code):
    "A notebook of a title and cells of code"
    import nbformat.v4 as v4

    cells = [v4.new_markdown_cell("# A lesson"), *map(v4.new_code_cell, code)]
    (folder / "lesson.ipynb").write_text(json.dumps(v4.new_notebook(cells=cells)), encoding="utf-8")
    return folder / "lesson.ipynb"


def test_a_failing_lesson_says_which_cell_and_which_values(tmp_path, capfd):
    lesson = [
        "from fastcore.test import test_eq",
        "better, worse = .81, .84",
        "test_eq([better > worse, worse < 1], [True] * 2)",
    ]
    with pytest.raises(pytest.fail.Exception) as failed:
        run_lesson(written(tmp_path, lesson))
    assert re.fullmatch(r"cell 3 \(\w+\): better > worse with 0.81 and 0.84", str(failed.value))
    for broken, said in (
        ("assert {}['x']", "KeyError: 'x'"),
        ("1 +", "SyntaxError"),
        ("test_eq(2, 3)", "AssertionError: ==: 2 3"),
    ):
        with pytest.raises(pytest.fail.Exception) as failed:
            run_lesson(written(tmp_path, [*lesson[:-1], broken]))
        assert str(failed.value).startswith("cell 3 (") and said in str(failed.value), broken


def test_lessons_run_as_they_are_asked_to(tmp_path, monkeypatch):
    lesson = written(tmp_path, ["run = ['always']", "#| slow\nrun.append('slow')", "#| cuda\nrun.append('cuda')"])
    first = json.loads(lesson.read_text(encoding="utf-8"))["cells"][1]["id"]
    monkeypatch.setitem(BRIEF, "lesson", {first: "run.append('less')"})
    for asked, found in (("brief", ["always", "less"]), ("whole", ["always"]), ("slow", ["always", "slow"])):
        monkeypatch.setenv("LTNB_LESSONS", asked)
        assert run_lesson(lesson)["run"] == found


@pytest.mark.parametrize("lesson", BRIEF)
def test_what_is_shortened_is_there(lesson):
    cells = json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = {c["id"]: source(c) for c in cells if c["id"] in BRIEF[lesson]}
    assert found.keys() == BRIEF[lesson].keys() and not any("#| slow" in text for text in found.values())


@pytest.mark.parametrize("lesson", GIVES)
def test_a_lesson_gives_the_training_that_others_ask_for(lesson):
    "Its own call says what its model is kept under, and nothing else that changes the model"
    name, told, _, model = GIVES[lesson]
    cells = json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = (t for t in map(source, cells) if re.search(rf"^{model} = {name}\(", t, re.M))
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    said = {k.arg: k.value for n in calls if n.func.id in (name, "Denoising") for k in n.keywords}
    watched = {"class_names", "sample_every", "on_sample"}  # which leave it as it is
    assert {k: v.value for k, v in said.items() if k not in watched} == told


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
