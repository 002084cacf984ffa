#!/usr/bin/env bash
# Whether a change of the source has changed what is trained: shipped configs are trained for a few steps by another revision
# and by the working tree, and metrics and weights are compared bit by bit.
#
#   scripts/same_runs.sh REVISION [CONFIG …]     e.g. scripts/same_runs.sh HEAD~1 configs/reversal.yaml
#
# JEPA_SCALE_DATA   folder with corpora that have a name; configs whose corpus is not found are named and left out
# STEPS             steps of a run (default 20)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -ge 1 ] || { echo "usage: scripts/same_runs.sh REVISION [CONFIG …]" >&2; exit 2; }
revision=$(git rev-parse --verify --quiet "$1^{commit}") || { echo "REVISION: git knows no '$1'" >&2; exit 2; }
shift
work=$(mktemp -d)
trap 'git worktree remove --force "$work/tree"; rm -rf "$work"' EXIT
git worktree add --quiet --detach "$work/tree" "$revision"
for side in before after; do
  tree=$PWD
  [ $side = after ] || tree="$work/tree"
  (cd "$tree" && PYTHONPATH="$tree" python "$OLDPWD/tests/revisions.py" train "$work/$side" "$@" --steps "${STEPS:-20}")
done
PYTHONPATH=$PWD python tests/revisions.py compare "$work/before" "$work/after"
