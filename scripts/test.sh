#!/usr/bin/env bash
# Tests the project in two stages; sets up .venv if need be.
#
#   scripts/test.sh              lint, types, and a test of every rule
#   scripts/test.sh --matrix     what is exhaustive by nature: every engine x world size x objective, real schedulers, random
#                                kills, whole examples. As root on Debian, installs the programs that this needs
#   scripts/test.sh ARGUMENTS    neither: the tests that pytest's arguments name, of both stages
#
# Each stage ends with the files that took longest. GPU tests run where there is a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
stage=(--dist loadfile --numprocesses)  # three in the second stage, on any machine: most of its tests wait for others
case "${1:-}" in
  "")
    ruff check --quiet
    ruff format --check --quiet
    mypy
    exec python -m pytest "${stage[@]}" 2 -m "not matrix"
    ;;
  --matrix)
    shift
    scripts/install_integration.sh || true  # what is missing is skipped, with the reason
    exec python -m pytest "${stage[@]}" 3 -m matrix "$@"
    ;;
  *)
    exec python -m pytest "$@"
    ;;
esac
