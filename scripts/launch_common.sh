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

# Checks a trainer's arguments, once on this node: bad input would end every rank, and torchrun would start them again. What
# depends on the number of ranks is found by the ranks.
check_config() {
  local config="" overrides=()
  while [ $# -gt 0 ]; do
    case $1 in
      --config) config=${2:-} && shift 2 || refuse "--config: needs a file" ;;
      --config=*) config=${1#*=} && shift ;;
      --resume) shift 2 || refuse "--resume: needs auto or a path" ;;
      --resume=*) shift ;;
      *) overrides+=("$1") && shift ;;
    esac
  done
  [ -n "$config" ] || refuse "--config: is missing; give the YAML file of the experiment"
  python -m jepa_scale config "$config" ${overrides[@]+"${overrides[@]}"} >/dev/null || exit $?
}
