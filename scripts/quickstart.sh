#!/usr/bin/env bash
# Breaks the reversal curse: trains `lm` and `concept` on the same facts, seed and backbone, and compares them.
# Leaves runs/reversal_lm and runs/reversal. Arguments are overrides for both runs, e.g. run.seed=1.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

for config in reversal_lm reversal; do
  rm -rf "runs/$config"
  deepspeed --num_gpus 1 jepa_scale/train.py --config "configs/$config.yaml" "run.name=$config" "$@"
done
jepa-scale report runs/reversal_lm runs/reversal
