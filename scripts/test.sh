#!/usr/bin/env bash
# Sets up .venv if need be, then lints, type-checks and runs the tests. Arguments go to pytest.
EXTRAS=${EXTRAS:-dev}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check jepa_scale tests scripts benchmarks
ruff format --check --quiet jepa_scale tests scripts benchmarks
mypy
exec python -m pytest "$@"
