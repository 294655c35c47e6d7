#!/usr/bin/env bash
# TorchIO and batchgeneratorsv2 beside what the project's environment has already: environment.sh FOLDER
set -euo pipefail
folder=${1:?usage: environment.sh FOLDER}
# Named one by one, without what they ask for beyond it: pip would install torch and NumPy again.
"${PYTHON:-$(dirname "$0")/../../.venv/bin/python}" -m pip install --quiet --upgrade --target "$folder" --no-deps \
  torchio==1.2.1 batchgeneratorsv2==0.3.6 batchgenerators==0.25.5 \
  einops humanize jaxtyping wadler-lindig typer shellingham rich markdown-it-py mdurl pygments deprecated wrapt \
  scikit-image lazy-loader imageio tifffile
