"A lesson says at its head what it needs and how long it takes, and shows its pictures at one scale"

import re
import pytest

import lessons

PATHS = lessons.lessons()
MEND = "run `python tests/lessons.py --write`"


@pytest.fixture(params=PATHS, ids=lambda p: p.stem)
def lesson(request):
    return request.param, lessons.read(request.param)["cells"]


def test_the_head_of_a_lesson_is_true(lesson):
    path, cells = lesson
    heads = [i for i, c in enumerate(cells) if lessons.is_head(c)]
    assert len(heads) == 1, f"{len(heads)} lines say what it needs and takes: {MEND}"
    assert lessons.source(cells[heads[0] - 1]).startswith("# "), "that line does not stand below the title"
    said, now = (lessons.LINE.fullmatch(t) for t in (lessons.source(cells[heads[0]]), lessons.head(path, cells)))
    assert said["needs"] == now["needs"], MEND
    stated, counted = int(said["minutes"]), int(now["minutes"])
    assert abs(stated - counted) <= max(1, counted / 4), f"it says {stated} minutes and takes {counted}: {MEND}"


def test_pictures_are_shown_at_one_scale(lesson):
    _, cells = lesson
    sizes = [(lessons.shown(output), width) for output, width in lessons.pictures(cells)]
    wrong = [(said, width) for said, width in sizes if said is None or abs(said - width) > width / 10]
    assert not wrong, f"{len(wrong)} pictures at another scale (shown, should be): {wrong[:3]}; {MEND}"


def test_folded_answers_cost_no_time():
    cells = [{"cell_type": "markdown", "source": ["word " * 400]}, {"cell_type": "code", "source": ["a = 1\n"] * 30}]
    folded = {"cell_type": "markdown", "source": ["<details>", "word " * 4000, "</details>"]}
    hidden = {"cell_type": "code", "source": ["#| export\n", *["a = 1\n"] * 300]}
    assert lessons.minutes(cells) == lessons.minutes([*cells, folded, hidden]) == 4


def test_every_exercise_has_its_answer_folded_away(lesson):
    text = "\n".join("".join(c["source"]) for c in lesson[1] if c["cell_type"] == "markdown")
    exercises = re.split(r"^\d+\. ", text.partition("### Exercises")[2], flags=re.M)[1:]
    for k, exercise in enumerate(exercises, 1):
        assert exercise.count("<summary>Answer</summary>") == 1, f"exercise {k} has no answer, or several"
        assert exercise.count("<details>") == exercise.count("</details>"), f"exercise {k}: a fold is not closed"
