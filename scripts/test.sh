#!/usr/bin/env bash
# Sets up .venv if need be, then lints, type-checks and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check --quiet
ruff format --check --quiet
mypy
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile  # all of them: most wait for processes, not for a core
exec python -m pytest "$@"
