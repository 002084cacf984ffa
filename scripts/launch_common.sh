# Sourced by what starts runs: goes to the repository and takes the programs of its .venv, if there is one. Nothing is
# installed here: a hundred nodes would do it at once into one folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$started_in" != "$PWD" ]; then
  # a config of the folder where the script was started is meant, and not one of the repository's of the same name
  arguments=() before=""
  for argument in "$@"; do
    file=${argument#--config=}
    if { [ "$before" = --config ] || [ "$file" != "$argument" ]; } && [ "${file:0:1}" != / ] && [ -f "$started_in/$file" ]; then
      argument=${argument%"$file"}$started_in/$file
    fi
    arguments+=("$argument") before=$argument
  done
  set -- ${arguments[@]+"${arguments[@]}"}
  echo "jepa-scale: started in $started_in; relative paths but that of --config are below $PWD" >&2
fi
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"

# One line to stderr; 2 is the exit code of bad input.
refuse() {
  echo "jepa-scale: $*" >&2
  exit 2
}

needs() {
  command -v "$1" >/dev/null || refuse "$1: not found; $2"
}

gpu_devices=(/dev/nvidia[0-9]* /dev/kfd /dev/dxg)

# Whether there is a GPU that is not hidden from the run.
has_gpu() {
  local device
  case ${CUDA_VISIBLE_DEVICES-all} in "" | -1) return 1 ;; esac
  for device in "${gpu_devices[@]}"; do [ ! -e "$device" ] || return 0; done
  return 1
}

# Sets `launcher_flags` to those of `deepspeed` that hide its launcher's own lines, unless the trainer is to log more (-v). Errors stay.
quiet_deepspeed() {
  local argument
  launcher_flags=()
  for argument in "$@"; do case $argument in -v | --verbose) return 0 ;; esac; done
  launcher_flags=(--quiet)
  has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}  # else a warning that there is no GPU comes before it reads its flags
}

# Gives tcmalloc to the processes that are started from here on, where it is installed and there is no GPU: steps on a CPU are faster
# with it (docs/performance.md). LD_PRELOAD of the user's own, or JEPA_SCALE_MALLOC=system, leaves them as they are.
preload_tcmalloc() {
  ! has_gpu || return 0
  local line
  while read -r line; do [ -z "$line" ] || export "${line?}"; done < <(python -m jepa_scale.utils.allocator)
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
