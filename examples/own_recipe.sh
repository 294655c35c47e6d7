#!/usr/bin/env bash
# Pre-training on your own data with your own recipe: own_recipe.sh OUT. Here the data is a phantom.
set -euo pipefail
out=$1
mkdir -p "$out"
python - "$out/ct" <<'PHANTOM'
import sys
from pathlib import Path
from mixcl_dist.phantom import write_cohort
write_cohort(Path(sys.argv[1]), training=4, validation=1, unlabelled=2, size=(40, 34, 40), spacing_mm=9.0)
PHANTOM

# A recipe is the settings that differ from the defaults; `mixcl config show` prints all of them.
cat > "$out/recipe.yaml" <<'RECIPE'
build: {patch_size: [24, 24, 24]}
network: {filters: [4, 8, 16]}
views: {size: [16, 16, 16]}
rows: {per_view_pair: 32}
budget: {scans: 1}
pretrain: {steps: 6, batch_size: 4}
finetune: {steps: 6, patch_size: [24, 24, 24]}
RECIPE

mixcl shards build "$out/ct/dataset.json" "$out/ct/archive" --out "$out/shards" --config "$out/recipe.yaml"
mixcl shards inspect "$out/shards"
mixcl pretrain --data "$out/shards" --run "$out/pretrained" --config "$out/recipe.yaml"
mixcl finetune --data "$out/ct/dataset.json" --from "$out/pretrained" --run "$out/few" --config "$out/recipe.yaml"
mixcl report "$out/few"
