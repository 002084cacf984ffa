#!/usr/bin/env bash
# Sets up .venv if need be, then lints, type-checks and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check --quiet
ruff format --check --quiet
mypy
exec python -m pytest "$@"
