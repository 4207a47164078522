#!/usr/bin/env bash
# Downloads the wheels that this project needs on a machine with a GPU but without a network, and that such a machine
# lacks. It is taken to have Linux on x86-64, Python 3.12, torch 2.11 for CUDA 13, and beside them numpy, Pillow,
# PyYAML, fsspec, packaging, psutil, rich, safetensors, sentencepiece, tensorboard, tokenizers and typer.
#
#   tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]
#
#   DIR                   folder for the wheels; created, and emptied of other wheels
#   --engine ENGINE_DIR   also copy the wheels of ENGINE_DIR: Transformer Engine's, built for that torch, and what it needs
#
# On the other machine: python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl, and SITE on PYTHONPATH.
# Versions are those of constraints.txt. PYTHON picks the interpreter whose pip downloads (default: python3).
set -euo pipefail

NAMES=(megatron-core numcodecs simplejpeg omegaconf google-crc32c)
MOST_MIB=40
PLATFORMS=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "$0")/.." && pwd)

fail() {
  echo "gpu_wheels: $*" >&2
  exit 2
}

# The version that constraints.txt gives NAME for Python 3.12, as NAME==VERSION.
pinned() {
  local line
  line=$(grep -iE "^$1==" "$ROOT/constraints.txt" | grep -v 'python_version < "3.12"' || true)
  [ -n "$line" ] || fail "constraints.txt has no version of $1 for Python 3.12; add one, or take the name out of NAMES"
  echo "${line%% *}"
}

[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || fail "usage: tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]"
DIR=$1
shift
ENGINE=
if [ $# -gt 0 ]; then
  [ "$1" = --engine ] && [ $# -eq 2 ] || fail "usage: tools/gpu_wheels.sh DIR [--engine ENGINE_DIR]"
  ENGINE=$2
  compgen -G "$ENGINE/*.whl" >/dev/null || fail "--engine $ENGINE: no wheel lies there; give the folder that holds them"
fi

mkdir -p "$DIR"
rm -f "$DIR"/*.whl
requirements=()
for name in "${NAMES[@]}"; do requirements+=("$(pinned "$name")"); done
options=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
for platform in "${PLATFORMS[@]}"; do options+=(--platform "$platform"); done
"$PYTHON" -m pip download --quiet --disable-pip-version-check "${options[@]}" --dest "$DIR" "${requirements[@]}"
[ -z "$ENGINE" ] || cp "$ENGINE"/*.whl "$DIR"/

total=0
for wheel in "$DIR"/*.whl; do
  bytes=$(stat -c %s "$wheel")
  total=$((total + bytes))
  awk -v bytes="$bytes" -v name="$(basename "$wheel")" 'BEGIN { printf "%8.2f MiB  %s\n", bytes / 1048576, name }'
done
awk -v bytes="$total" -v most="$MOST_MIB" 'BEGIN { printf "%8.2f MiB  in all; at most %d are meant to travel\n", bytes / 1048576, most }'
[ "$total" -le $((MOST_MIB * 1048576)) ] || fail "the wheels take more than $MOST_MIB MiB together; leave some out"
