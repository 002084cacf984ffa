#!/usr/bin/env bash
# Breaks the reversal curse: trains `lm` and `concept` on the same facts, seed and backbone, and compares them.
#
#   scripts/quickstart.sh [section.key=value …]
#
# Leaves reversal_lm and reversal in runs/, or in the folder RUNS; what is there already is continued. Arguments are overrides
# for both runs.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source scripts/launch_common.sh
preload_tcmalloc
quiet_deepspeed "$@"
runs=${RUNS:-runs}

for config in reversal_lm reversal; do
  deepspeed ${launcher_flags[@]+"${launcher_flags[@]}"} --num_gpus 1 jepa_scale/train.py --config "configs/$config.yaml" --resume auto run.dir="$runs" "$@"
done
jepa-scale report "$runs/reversal_lm" "$runs/reversal"
