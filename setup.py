"""Builds ltnb from settings.ini; the wheel also carries the entry notebooks, stripped of their outputs

Name, summary and addresses stand in pyproject.toml as well, where nbdev reads them.
"""

import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("lab", "eval", "slurm", "onnx", "dev")}
extras["dev"] = [r for own in extras.values() for r in own]  # all of them


def is_entry(path):
    "An entry notebook has a cell tagged `parameters`"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return any("parameters" in c.get("metadata", {}).get("tags", []) for c in cells)


class build_py_with_notebooks(build_py):
    "Copies entry notebooks to ltnb/nbs without their outputs"

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / "ltnb" / "nbs"
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((here / cfg["nbs_path"]).glob("*.ipynb")):
            if not is_entry(path):
                continue
            nb = json.loads(path.read_text(encoding="utf-8"))
            for c in nb["cells"]:
                if c["cell_type"] == "code":
                    c.update(outputs=[], execution_count=None)
            (target / path.name).write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


setup(
    version=cfg["version"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=["ltnb"],
    package_data={"ltnb": ["known/*.json"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": [f"ltnb={cfg['lib_name']}._modidx:d"],  # names in backticks become links, here and in other projects
    },
    cmdclass={"build_py": build_py_with_notebooks},
)
