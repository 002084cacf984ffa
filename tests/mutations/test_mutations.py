"""The table of mutations fits the source; in the matrix a tenth of it is tried, another one after each commit."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

from tests.mutations.run import BROKEN, CAUGHT, REPOSITORY, SURVIVED, mutated
from tests.mutations.table import DISTRIBUTED, ROWS, TOPICS

PARTS = 10


@cache
def source(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_fits_the_source(row):
    """Where one fails, the line has changed: let ``old`` follow it, and see that the mutation is still caught."""
    text = source(row.file)
    wrong = mutated(text, row)
    assert wrong != text and row.tests
    if row.file.endswith(".py"):
        ast.parse(wrong)
    for test in row.tests:
        file, _, function = test.partition("::")
        assert f"def {function}(" in source(file), f"there is no {test}"


def test_every_topic_has_its_mutations():
    assert len({row.id for row in ROWS}) == len(ROWS) >= 80
    assert {row.topic for row in ROWS} == set(TOPICS) and set(DISTRIBUTED) < set(TOPICS)


TREE = {
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib -q"\npythonpath = ["."]\n',
    "jepa_scale/__init__.py": "",
    "jepa_scale/sums.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n",
    "tests/test_sums.py": """import pytest
import subprocess
import sys

from jepa_scale.sums import add, double


def test_add():
    assert add(2, 2) == 4


@pytest.mark.parametrize("n", [0, 1])
def test_add_elsewhere(n):
    assert add(n, n) == 2 * n


def test_in_another_process():
    subprocess.run([sys.executable, "-c", "from jepa_scale.sums import double; assert double(2) == 4"], check=True)


def test_wrong():
    assert add(1, 1) == 3
""",
}
CHECK = """
import sys
from pathlib import Path

import pytest

from tests.mutations.run import check
from tests.mutations.table import Row

FILE, T = "jepa_scale/sums.py", "tests/test_sums.py::"
ROWS = [
    Row("one", "", "", FILE, "a + b", "a - b", (T + "test_add", T + "test_add_elsewhere")),
    Row("both", "", "", FILE, "a + b", "a * b", (T + "test_add", T + "test_add_elsewhere")),
    Row("square", "", "", FILE, "a + b", "a * b", (T + "test_add",)),
    Row("forked", "", "", FILE, "2 * a", "3 * a", (T + "test_in_another_process",)),
    Row("gone", "", "", FILE, "a / b", "a * b", (T + "test_add",)),
    Row("failing", "", "", FILE, "a + b", "a * b", (T + "test_wrong",)),
    Row("missing", "", "", FILE, "a + b", "a * b", (T + "test_nothing",)),
    Row("import", "", "", FILE, "def add", "def sub", (T + "test_add",)),
]
for name, outcome in check(ROWS, Path(sys.argv[1]), jobs=2, quiet=True).items():
    print(name, outcome.verdict)
"""


def test_the_driver_tells_what_is_caught_from_what_is_not(tmp_path):
    """On a tree of its own. A case of a test that fails is enough, but every test that is named must; in other processes too it is
    the mutated copy that is imported."""
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis and its like, a second each time
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        "one": CAUGHT,
        "both": SURVIVED,  # 2 * 2 is 4, though 1 * 1 is not 2
        "square": SURVIVED,
        "forked": CAUGHT,
        "gone": BROKEN,
        "failing": BROKEN,
        "missing": BROKEN,
        "import": BROKEN,
    }
    assert {name: (tmp_path / name).read_text() for name in TREE} == TREE


def turn() -> int:
    """Which of the ``PARTS`` parts is tried: the number of commits says so, or it is the first."""
    git = shutil.which("git")
    command = [git or "git", "-C", str(REPOSITORY), "rev-list", "--count", "HEAD"]
    counted = subprocess.run(command, capture_output=True, text=True) if git else None
    return int(counted.stdout) % PARTS + 1 if counted and counted.returncode == 0 else 1


@pytest.mark.matrix
def test_a_tenth_of_the_mutations_is_caught():
    part = f"{turn()}/{PARTS}"
    command = [sys.executable, "-m", "tests.mutations.run", "--part", part]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"python -m tests.mutations.run --part {part}:\n{done.stdout}{done.stderr}"
