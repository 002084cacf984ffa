#!/usr/bin/env bash
# Sets up .venv if need be and, as root on Debian, what tests/integration needs; then lints, type-checks and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check --quiet
ruff format --check --quiet
mypy
scripts/install_integration.sh || true  # what is missing is skipped, with the reason
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile  # all of them: most wait for processes, not for a core
exec python -m pytest "$@"
