#!/usr/bin/env bash
# An environment with litdata and mosaicml-streaming, which ask for another NumPy than the project: environment.sh FOLDER
set -euo pipefail
folder=${1:?usage: environment.sh FOLDER}
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
# torch first and by its exact version: the other packages would otherwise choose a build of it.
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet --constraint <(echo torch==2.13.0) \
  litdata==0.2.76 mosaicml-streaming==0.13.0 blosc2==4.14.1 'xxhash>=3.5'
"$folder/bin/pip" list 2>/dev/null | grep -E '^(torch|numpy|litdata|mosaicml-streaming|blosc2|xxhash) '
