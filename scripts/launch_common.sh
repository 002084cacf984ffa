# Sourced by the launchers: goes to the repository and takes the programs of its .venv, if there is one. Nothing is
# installed here: a hundred nodes would do it at once into one folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"

# One line to stderr; 2 is the exit code of bad input.
refuse() {
  echo "jepa-scale: $*" >&2
  exit 2
}

needs() {
  command -v "$1" >/dev/null || refuse "$1: not found; $2"
}
