#!/usr/bin/env bash
# One process on one GPU (or on the CPU, where there is none).
#
#   launch/single_gpu.sh RECIPE [section.key=value ...]
#
# Environment:
#   GPU      which GPU (CUDA_VISIBLE_DEVICES; default: what that says already, else the first)
#   PYTHON   interpreter (default: python3)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

export CUDA_VISIBLE_DEVICES=${GPU:-${CUDA_VISIBLE_DEVICES:-0}}
exec "${PYTHON:-python3}" "$here/train.py" "$@"
