#!/usr/bin/env bash
# Before a long job: a few steps of its config, a checkpoint, a resume from it, an evaluation and a report, on this node.
#
#   scripts/quick_test.sh --config configs/x.yaml [section.key=value …]
#
# STEPS            steps of each of the two parts (default 3)
# NPROC_PER_NODE   ranks (default auto: the GPUs, or the cores if there are none)
# QUICK_TEST_DIR   where the run is kept; if not given, it is removed at the end
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
[ "${1:-}" = --config ] && [ $# -ge 2 ] || refuse "usage: scripts/quick_test.sh --config CONFIG [section.key=value …]"
steps=${STEPS:-3}
[[ $steps =~ ^[1-9][0-9]*$ ]] || refuse "STEPS: must be a number of steps, not '$steps'"
needs jepa-scale "run scripts/test.sh or scripts/quickstart.sh once, which make .venv"
preload_tcmalloc

folder=${QUICK_TEST_DIR:-}
if [ -z "$folder" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
run="$folder/quick_test"
[ ! -e "$run" ] || refuse "QUICK_TEST_DIR: '$run' is there already; remove it or choose another folder"

train() {  # steps in all; the length of the real run, and what could end it before, do not count here
  echo "== $1 steps"
  NNODES=1 RDZV_ENDPOINT="" MAX_RESTARTS=0 scripts/launch_torchrun.sh "${given[@]}" run.dir="$folder" run.name=quick_test \
    train.steps="$1" train.epochs=0 train.flops=0 train.same_flops_as=null train.early_stopping=null 'train.abort=[]' \
    checkpoint.keep_best=null \
    train.log_every=1 train.eval_every=0 log.wandb=false log.report=false
}
given=("$@")
train "$steps"
train $((2 * steps))  # goes on from the checkpoint of the first part
echo "== evaluation of the checkpoint"
jepa-scale eval "$run"
echo "== report"
jepa-scale report "$run"
python scripts/monitor.py "$run" --once  # ends with 1 if the loss is not finite
echo "quick test: all works"
