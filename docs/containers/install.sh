#!/bin/sh
# Installs the checkout in /src into the image's Python: install.sh cpu|cuda. From /src/wheelhouse alone where it is there.
set -eu
cd /src
case $1 in
cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;;
cuda) index="" ;; # the build of Linux on PyPI brings CUDA along
*) echo "DEVICE $1: give cpu or cuda" >&2 && exit 2 ;;
esac
# DeepSpeed and Triton build parts of theirs when they are first used.
apt-get update -qq
apt-get install -y -qq --no-install-recommends build-essential openssh-client
rm -rf /var/lib/apt/lists/*
if [ -d wheelhouse ]; then
  pip install --no-cache-dir --no-index --find-links wheelhouse --constraint constraints.txt 'mixcl-dist[remote]'
else
  pip install --no-cache-dir --no-deps $index --constraint constraints.txt torch
  pip install --no-cache-dir --constraint constraints.txt '.[remote]'
fi
mixcl --version
