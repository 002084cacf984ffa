"""``jepa-scale new objective``: what it writes is the example of the docs under another name, and trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_scale.cli.main import main
from jepa_scale.cli.new import rendered

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def test_the_example_of_the_docs_is_what_the_template_gives():
    made = rendered("neighbour")
    for file in ("{}.py", "{}.yaml"):
        assert made[file] == (EXAMPLES / file.format("neighbour")).read_text(encoding="utf-8")
    other = rendered("far_target")
    assert "class FarTarget(Objective)" in other["{}.py"] and "far_target:FarTarget" in other["{}.yaml"]
    assert not any(left in text for text in other.values() for left in ("eighbour", "@name@", "@Class@"))


@pytest.mark.parametrize("name", ["MyObjective", "my-objective", "1st", "class", "_", ""])
def test_what_is_no_module_is_refused(name, tmp_path, capsys):
    assert main(["new", "objective", name, "--dir", str(tmp_path / "new")]) == 2
    assert "must be the name of a Python module" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("own")
    assert main(["new", "objective", "mine", "--dir", str(tmp_path)]) == 2
    assert "mine.yaml: is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "own"


def test_what_was_written_passes_its_own_test(tmp_path):
    """As a user runs it: pytest in the folder, where nothing of this repository's settings applies."""
    folder = tmp_path / "new"
    assert main(["new", "objective", "far_target", "--dir", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["far_target.py", "far_target.yaml", "test_far_target.py"]
    environment = {**os.environ, "JEPA_SCALE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
