#!/usr/bin/env bash
# Does pre-training help with few labels? The whole path on OpenKBP: one pre-training for each subset seed, which reads
# the labels of that seed's 5 % of cases only (they are part of its 15 %, too), then every trial against scratch.
#
#     benchmarks/openkbp.sh OPENKBP OUT        OPENKBP holds dataset.json; each step goes on where it was interrupted
set -euo pipefail
data=$1/dataset.json out=$2

pretrain() {
  local run=$out/pretrained-s$1 resume=""
  [ -e "$run/network.safetensors" ] && return
  [ -e "$run/run.json" ] && resume="--resume latest"
  # One thread each: on few cores three runs side by side waste less than one run with many threads.
  OMP_NUM_THREADS=1 mixcl pretrain --data "$out/shards" --run "$run" --recipe openkbp --budget.seed "$1" $resume
}

mixcl shards build "$data" --out "$out/shards" --recipe openkbp
mixcl shards verify "$out/shards"
for seed in 0 1 2; do pretrain "$seed" & done
for job in $(jobs -p); do wait "$job"; done
mixcl tune --data "$data" --from "$out"/pretrained-s[0-9] --study "$out/study" --recipe openkbp
mixcl report "$out/study"
