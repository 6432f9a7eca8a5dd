"""The wheel, installed where no checkout is near: every module imports from it, and the recipes are in it.

``ltm_pyro.evaluation.lm_eval`` alone is left out: it needs lm-eval, which brings sixty packages
(`tests/cli/test_lm_eval.py`).
"""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ALL = """
import importlib, importlib.metadata, importlib.resources, json, pkgutil, ltm_pyro, ltm_pyro.models
names = [m.name for m in pkgutil.walk_packages(ltm_pyro.__path__, "ltm_pyro.")]
files = {n: importlib.import_module(n).__file__ for n in names if not n.endswith(("__main__", ".lm_eval"))}
recipes = importlib.resources.files("ltm_pyro.studies").joinpath("recipes").iterdir()
print(json.dumps({"files": files, "recipes": sorted(r.name for r in recipes), "typed":
    importlib.resources.files("ltm_pyro").joinpath("py.typed").is_file()}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that knows nothing of this checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A new environment with our wheel in it; the dependencies are borrowed from the one that runs the tests."""
    place = tmp_path_factory.mktemp("wheel")
    for item in ("ltm_pyro", "models", "guides", "studies"):
        shutil.copytree(ROOT / item, place / "source" / item, ignore=shutil.ignore_patterns("__pycache__"))
    for item in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / item, place / "source" / item)
    offline = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", place, "./source", cwd=place)
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    (wheel,) = place.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, cwd=place)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    shutil.rmtree(place / "source")
    return place / "venv"


def test_everything_imports_from_the_wheel(installed):
    found = json.loads(run(installed / "bin" / "python", "-P", "-c", IMPORT_ALL, cwd=installed))
    rooms = ("ltm_pyro.models.decoder", "ltm_pyro.guides.mean_field", "ltm_pyro.inference.local", "ltm_pyro.data")
    assert set(rooms) <= set(found["files"])
    assert not {name: file for name, file in found["files"].items() if not Path(file).is_relative_to(installed)}
    assert {"ltm-small.yaml", "ltm-medium.yaml", "ltm-large.yaml"} <= set(found["recipes"])
    assert found["typed"]
