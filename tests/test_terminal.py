"What a person sees: the kernel's Python and its end, notes and bars, closed streams, odd encodings, signals."

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from typing import ClassVar

import nbformat
import pytest
from conftest import ROOT
from ltnb import cli, core, headless
from ltnb.core import LtnbError, UsageError
from ltnb.config import Config
from ltnb.report import render

TRAPS = ("secrets", "types", "random", "profile", "torch", "json", "ipykernel", "logging", "datasets/__init__")


@dataclass(frozen=True)
class Toy(Config):
    recipe: ClassVar[str] = "toy"
    paths: ClassVar[tuple] = ("data_root",)
    n_epochs: int = 80
    data_root: str | None = None
    out: str | None = None


def notebook(path, *cells):
    "A notebook with a parameters cell"
    settings = "n_epochs: int = 80\ndata_root: str = None\nout: str = None"
    cells = [nbformat.v4.new_code_cell(c) for c in (settings, *cells)]
    cells[0].metadata["tags"] = ["parameters"]
    meta = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), path)
    return path


def traps(folder, without=()):
    "Files of a working folder that have the names of modules"
    (folder / "datasets").mkdir(parents=True)
    trap = "raise RuntimeError('a file of the working folder was imported')\n"
    for name in set(TRAPS) - set(without):
        (folder / f"{name}.py").write_text(trap)
    return folder


def run_it(tmp_path, *cells, config=None):
    "Execute cells as `ltnb run` does"
    out = tmp_path / "out {0} {name}"
    out.mkdir(exist_ok=True)
    headless.run_notebook(notebook(tmp_path / "toy.ipynb", *cells), config or Toy(), out)
    return out


def test_the_kernel_is_this_python(tmp_path, monkeypatch, capsys):
    "Whatever is registered as python3, whatever lies in the working folder; PYTHONPATH and relative paths still count"
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "hub", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "my_module.py").write_text("value = 'from PYTHONPATH'\n")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(mine / "nothing.py"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(mine)])
    monkeypatch.chdir(traps(tmp_path / "here"))
    cell = (
        "import sys, os, json, secrets, types, random, my_module\nfrom ltnb import core, progress\n"
        "progress.tell('note: left out one')\n"
        "p = progress.Progress('fit', 3); p.step(3); p.close()\n"
        "core.write_json('seen.json', [sys.executable, my_module.value, core.__file__, n_epochs, data_root])"
    )
    out = run_it(tmp_path, cell, config=Toy(n_epochs=3, data_root="x"))
    python, value, file, n_epochs, root = json.loads((tmp_path / "here" / "seen.json").read_text())
    assert python == sys.executable and value == "from PYTHONPATH" and file == core.check_output.__code__.co_filename
    assert n_epochs == 3 and root == str(tmp_path / "here" / "x")
    said = capsys.readouterr().err
    assert said.count("note: left out one") == 1 and "fit: done (3)" in said and "Traceback" not in said
    assert headless.notebook_finished(out / "toy.ipynb")
    assert "fit" not in "".join(o.get("text", "") for c in nbformat.read(out / "toy.ipynb", 4).cells for o in c.outputs)


@pytest.mark.parametrize(
    "cell, words",
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            ["SIGKILL", "memory", "--bs", "--image-size", "same"],
        ),
        ("import os; os._exit(3)", ["exit code 3", "same command"]),
        (
            "raise RuntimeError('DataLoader worker (pid(s) 4711) exited unexpectedly')",
            ["worker", "4711", "--bs", "same"],
        ),
        ("raise MemoryError", ["memory ran out", "--bs"]),
        ("from ltnb.core import UsageError\nraise UsageError('lr must be positive.')", ["lr must be positive."]),
    ],
)
def test_the_end_of_a_kernel_is_explained(tmp_path, cell, words):
    started = time.monotonic()
    with pytest.raises(LtnbError) as e:
        run_it(tmp_path, cell, "after = 1")
    assert all(w in str(e.value) for w in words), e.value
    assert time.monotonic() - started < 60
    assert not headless.notebook_finished(tmp_path / "out {0} {name}" / "toy.ipynb")
    assert isinstance(e.value, UsageError) == ("UsageError" in cell)


def test_a_kernel_that_died_in_the_last_cell_has_not_finished(tmp_path):
    with pytest.raises(LtnbError, match="SIGKILL"):
        run_it(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert not headless.notebook_finished(tmp_path / "out {0} {name}" / "toy.ipynb")
    nbformat.validate(nbformat.read(tmp_path / "out {0} {name}" / "toy.ipynb", 4))


def test_quiet_says_nothing(tmp_path, capsys):
    "Bars and notes stay in the notebook"
    cell = (
        "from ltnb import progress\nprogress.tell('note: one')\np = progress.Progress('fit', 3); p.step(3); p.close()"
    )
    (tmp_path / "out").mkdir()
    headless.run_notebook(notebook(tmp_path / "toy.ipynb", cell), Toy(), tmp_path / "out", quiet=True)
    assert capsys.readouterr().err == ""


def test_a_kernel_that_cannot_start_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ModuleNotFoundError: no ipykernel here >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LtnbError, match="exit code 1 .*no ipykernel here"):
        run_it(tmp_path, "1")


def test_a_path_that_a_notebook_cannot_hold(tmp_path):
    config = Toy(data_root=os.fsdecode(b"caf\xe9"))
    with pytest.raises(UsageError, match="--plain"):
        run_it(tmp_path, "1", config=config)


def test_an_unknown_parameter_is_an_error(tmp_path):
    "papermill itself only warns"
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    cell = (
        "from dataclasses import dataclass\nfrom ltnb.config import Config\n@dataclass(frozen=True)\n"
        "class Toy(Config):\n    n_epochs: int = 80\nconfig = Toy.from_cell(globals())"
    )
    entry = notebook(tmp_path / "toy.ipynb", cell)
    paths, how = (str(entry), str(tmp_path / "o.ipynb")), {"kernel_name": "python3", "progress_bar": False}
    with pytest.raises(PapermillExecutionError) as e:
        execute_notebook(*paths, {"n_epoch": 1}, **how)
    assert e.value.ename == "UsageError" and "Did you mean 'n_epochs'?" in e.value.evalue


def test_names_of_a_parameters_cell():
    injected = ["", "# Parameters\nn_epochs = 3\nPAPERMILL_OUTPUT_PATH = 'x'\n", "helper = 5"]
    scope = {"n_epochs": 3, "helper": 5, "In": injected, "_": 1, "os": os}
    assert Toy.from_cell(scope) == Toy(n_epochs=3)
    with pytest.raises(UsageError, match="no setting 'lr'"):
        Toy.from_cell({**scope, "In": ["# Parameters\nlr = 1\n"]})
    with pytest.raises(UsageError, match="n_epochs"):
        Toy.from_cell({"n_epoch": 3})
    with pytest.raises(UsageError, match="whole number"):
        Toy.from_cell({"n_epochs": "3"})
    for entry in cli.RECIPES.values():
        cells = json.loads(cli.entry_notebook(entry.notebook).read_text())["cells"]
        assert any(f"{entry.load().config.__name__}.from_cell(globals())" in "".join(c["source"]) for c in cells)


COMMAND = """
import sys, time
from ltnb import cli, core, headless
from ltnb.config import Config
from ltnb.progress import Progress
sys.path.insert(0, {tests!r})
def fake(args):
    from test_terminal import Toy
    from pathlib import Path
    headless.run_notebook(Path("toy.ipynb"), Toy(), Path("out"))
cli.COMMANDS["run"] = fake
sys.exit(cli.main(["run"]))
"""
WAIT = (
    "import time, os\nfrom ltnb.progress import Progress\np = Progress('seed 0: classifier', 400)\n"
    "open('pid', 'w').write(str(os.getpid()))\nfor i in range(400):\n    time.sleep(.05)\n    p.step()\n"
    "    if os.path.exists('enough'): break\np.close()"
)


def start(folder, **how):
    "A process of the command, whose recipe is a toy"
    notebook(folder / "toy.ipynb", WAIT)
    (folder / "out").mkdir()
    (folder / "tmp").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TMPDIR": str(folder / "tmp"), "TERM": "xterm"}
    code = COMMAND.format(tests=str(ROOT / "tests"))
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, **how)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.slow_process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_puts_everything_away(tmp_path, number):
    before = set(os.listdir("/tmp"))
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip() == f"ltnb: stopped by {number.name}: the same command goes on from here."
    wait_for(lambda: not os.path.exists(f"/proc/{pid.read_text()}"), 10)
    assert not [n for n in set(os.listdir("/tmp")) - before if n.startswith(f"ltnb-{process.pid}-")]
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow_process
def test_bars_fit_a_terminal_that_changes(tmp_path):
    "Through papermill: 60 columns, then 20"
    ours, theirs = pty.openpty()

    def size(n):
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, n, 0, 0))

    size(60)
    process = start(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text, narrow = "", None
    while True:
        try:
            data = os.read(ours, 65536).decode(errors="replace")
        except OSError:
            break  # the terminal is closed at the end
        text += data
        bars = len(re.findall("%", text))
        if narrow is None and bars > 5:
            size(20)
            narrow = len(text)
        if narrow and text[narrow:].count("%") > 5:
            (tmp_path / "enough").touch()
    assert process.wait(30) == 0, text
    lines = [s for s in re.split(r"[\r\n]+", text[:narrow]) if "%" in s]
    assert lines and {len(s) for s in lines} == {59} and "it/s" in lines[-1]
    lines = [s for s in re.split(r"[\r\n]+", text[narrow:]) if "%" in s][2:]  # those under way may be wide
    assert lines and all(len(s) < 20 for s in lines)


def sh(command, cwd=None):
    "A command line, as a shell runs it"
    env, command = {**os.environ, "PYTHONPATH": str(ROOT)}, command.replace("ltnb", f"{sys.executable} -m ltnb", 1)
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


@pytest.mark.slow_process
@pytest.mark.parametrize(
    "command, code",
    [
        ("ltnb --help >&-", 0),
        ("ltnb --help >&- 2>&- <&-", 0),
        ("ltnb lst 2>&-", 2),
        ("ltnb --help <&-", 0),
        ("ltnb lst >&-", 2),
        ("ltnb --help | true; exit ${PIPESTATUS[0]}", (0, 1)),
        ("ltnb lst 2> /dev/full", 2),
        ("ltnb --help > /dev/full", 1),
    ],
)
def test_streams_that_are_closed(tmp_path, command, code):
    done = sh(command, tmp_path)
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done
    assert not re.search("unexpected|Traceback|Exception ignored|Error", done.stderr), done.stderr
    assert ("disk is full" in done.stderr) == (code == 1)


@pytest.mark.slow_process
def test_python_m_takes_nothing_from_the_working_folder(tmp_path):
    "But for `types`, which `python -m` itself may import before any code of ours: the command `ltnb` does not"
    done = sh("ltnb data --imb-ratio 20", traps(tmp_path / "here", without=("types",)))
    assert done.returncode == 0 and "digits-lt20" in done.stdout, done.stderr


def test_a_character_that_the_terminal_lacks(monkeypatch):
    from ltnb.progress import show_text

    shown = {"ascii": b"??: caf? ?", "cp1252": b"??: caf\xe9 ?", "utf-8": "日本: café ?".encode()}
    for encoding, bytes_shown in shown.items():
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        cli.open_streams()
        print("日本: café", os.fsdecode(b"\xe9"))
        show_text("日本: café\n")
        assert cli.flush_streams()
        assert out.buffer.getvalue() == bytes_shown + b"\n" and b"caf" in err.buffer.getvalue()
        monkeypatch.undo()


def test_warnings_of_libraries_stay_away(main, monkeypatch):
    import logging
    import warnings

    def noisy(args):
        warnings.simplefilter("always")  # as some libraries do
        warnings.warn("Glyph 26085 missing", stacklevel=1)
        logging.getLogger("a.library").warning("findfont")

    monkeypatch.setitem(cli.COMMANDS, "noisy", noisy)
    assert main("noisy") == (0, "", "")
    with pytest.warns(UserWarning, match="Glyph"):
        main("noisy", "--debug")


def test_lack_of_memory_in_this_process(main, monkeypatch):
    def starved(args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setitem(cli.COMMANDS, "starved", starved)
    code, _, said = main("starved")
    assert code == 1 and "--bs" in said and "unexpected" not in said and "kept" not in said


def test_columns_is_respected(monkeypatch):
    from ltnb.progress import terminal_width

    monkeypatch.setenv("COLUMNS", "44")
    assert terminal_width() == 44
    monkeypatch.setenv("COLUMNS", "many")
    assert terminal_width(io.StringIO(), 160) == 160


def test_a_narrow_table_wraps_names_and_no_numbers():
    cells = [
        ["method", "all", "from scratch vs label shift"],
        ["neighbour mixing + label shift", "81.2 ± 1.3", "-11.2 [-10.4, -12.0]"],
        ["crt", "–", "+1.0 [0.4, 2.0]"],
    ]
    for width in range(20, 120):
        text = render(cells, width)
        assert max(map(len, text.split("\n"))) <= width
        assert all(n in text for line in cells[1:] for n in line[1:])
    assert "neighbour mixing + label shift" in render(cells, 52)
    assert "neighbour mixing +\n label shift\n" in render(cells, 20)
