"""Every tutorial runs from top to bottom, warnings as errors, and its assertions hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.ipynb"))
WARNINGS = ("error", "ignore:.*LeafSpec", "ignore:The 'train_dataloader' does not have many workers")


def cells(path, kind):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path):
    """As a script: its cells are plain Python, so that no kernel is needed."""
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(cells(path, "code")))
    strict = [option for warning in WARNINGS for option in ("-W", warning)]
    quiet = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, *strict, "-P", script], cwd=tmp_path, env=quiet, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_has_a_formula_short_cells_and_small_pictures(path):
    assert any("$$" in text for text in cells(path, "markdown"))
    assert all(len(code.splitlines()) <= 30 for code in cells(path, "code"))
    assert '"image/png"' in path.read_text()
    assert path.stat().st_size < 200_000


def test_all_four_are_there():
    assert [path.stem for path in TUTORIALS] == ["encode", "question", "right", "variant_prior"]
