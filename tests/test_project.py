"The repository holds together: doubled metadata, README, site, rooms, imports."

import ast
import json
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser

import pytest
from conftest import ROOT
from readme import readme

INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini")
CFG = INI["DEFAULT"]
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
INDEX = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))


def test_doubled_keys_agree():
    import ltnb

    nbdev = TOML["tool"]["nbdev"]
    assert TOML["project"]["name"] == CFG["lib_name"] and TOML["project"]["requires-python"] == f">={CFG['min_python']}"
    assert ltnb.__version__ == CFG["version"] and TOML["project"]["description"] == CFG["description"]
    site = CFG["doc_host"] + CFG["doc_baseurl"]
    assert TOML["project"]["urls"] == {"Repository": CFG["git_url"], "Documentation": site}
    for key in (
        "lib_path",
        "nbs_path",
        "doc_path",
        "tst_flags",
        "branch",
        "title",
        "readme_nb",
        "allowed_cell_metadata_keys",
    ):
        want = nbdev[key] if not isinstance(nbdev[key], list) else " ".join(nbdev[key])
        assert want == CFG[key], key
    for key in ("recursive", "custom_sidebar", "put_version_in_init", "clean_ids", "jupyter_hooks", "update_pyproject"):
        assert str(nbdev[key]) == CFG[key], key


def test_constraints_hold_the_pins():
    pins = dict(re.findall(r"^(\w+)==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    for name, version in re.findall(r"(\w+)==([\d.]+)", CFG["dev_requirements"]):
        assert pins[name] == version


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(INDEX), "run: python tests/readme.py"


def test_readme_opens_with_the_two_commands():
    head = (ROOT / "README.md").read_text().split("## ")[1]
    lines = [
        "python3 -m venv .venv && . .venv/bin/activate",
        "pip install . && ltnb demo",
        'pip install -e ".[dev]" && pytest',
    ]
    assert [head.index(line) for line in lines] == sorted(head.index(line) for line in lines)


def test_links_resolve():
    for path in [*(ROOT / "nbs").glob("*.ipynb"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = (
            path.read_text(encoding="utf-8")
            if path.suffix == ".md"
            else "\n".join(
                "".join(c["source"])
                for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
                if c["cell_type"] == "markdown"
            )
        )
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_imports_run_one_way():
    "A module imports only from rooms above its own"
    rooms = {}
    for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if found := re.search(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8")):
            rooms[found[1]] = p.stem  # the order of the file names
    for name, number in rooms.items():
        for node in ast.walk(ast.parse((ROOT / "ltnb" / f"{name}.py").read_text())):
            module = getattr(node, "module", None)
            for room in (
                [module.split(".")[-1]]
                if isinstance(node, ast.ImportFrom) and module and (node.level or module.startswith("ltnb"))
                else []
            ):
                if room in rooms:
                    assert rooms[room] < number, f"{name} imports {room}"


@pytest.mark.slow_process
@pytest.mark.parametrize("code", ["import ltnb", "import ltnb.core", "import ltnb.cli"])
def test_light_imports(code):
    "No torch, no matplotlib, no network; the time is that of a whole interpreter"
    timed = f"t = time.perf_counter(); socket.socket = None; {code}; s = time.perf_counter() - t; print(s)"
    heavy = "{'torch', 'matplotlib', 'openai', 'transformers'}"
    probe = f"import sys, time, socket; {timed}; assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


@pytest.mark.slow_process
def test_heavy_imports_touch_no_state():
    probe = (
        "import torch, numpy as np; s = torch.random.get_rng_state(); n = np.random.get_state()[1].copy()\n"
        "import ltnb.ldmlr, sys; assert torch.equal(s, torch.random.get_rng_state())\n"
        "assert (n == np.random.get_state()[1]).all(); assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
