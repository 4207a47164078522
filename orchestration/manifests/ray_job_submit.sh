#!/bin/bash
# A run on a standing Ray cluster, submitted from anywhere that reaches its dashboard (RAY_ADDRESS, here a port-forward).
# Ray's own exit code is 0 or 1; `megatron-deepstack status` and `stop` on the run folder tell and do the rest.
set -euo pipefail
export RAY_ADDRESS=${RAY_ADDRESS:-http://127.0.0.1:8265}
ray job submit --submission-id "deepstack-l-7b-$(date +%Y%m%d-%H%M%S)" --no-wait -- \
  megatron-deepstack launch deepstack_l_7b_finetune \
  run_dir=/shared/runs/deepstack-l-7b data.store=/shared/store.zarr data.tokenizer=/shared/tokenizer.model \
  parallel.tensor=8 parallel.pipeline=2 launch.ranks=16 launch.cpus_per_rank=8
