#!/usr/bin/env bash
# One process per GPU of this machine.
#
#   launch/multi_gpu.sh RECIPE [section.key=value ...] [--deepspeed zero2]
#
# Environment:
#   GPUS          number of processes (default: every GPU in CUDA_VISIBLE_DEVICES, or of the machine); on a machine
#                 without GPUs, of processes on the CPU. With deepspeed it counts from GPU 0.
#   LAUNCHER      deepspeed | torchrun (default: deepspeed where it is installed)
#   MASTER_PORT   where the processes meet (default: 29500); each job on a machine needs its own
#   PYTHON        interpreter (default: python3)
#   GRACE         seconds from SIGTERM to SIGKILL (default: 60); deepspeed and torchrun themselves wait 30
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

python=${PYTHON:-python3}
port=${MASTER_PORT:-29500}
launcher=${LAUNCHER:-deepspeed}
if [[ -z ${LAUNCHER:-} ]] && ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)'
then
  launcher=torchrun
fi

case $launcher in
  deepspeed)
    command=(-m deepspeed.launcher.runner ${GPUS:+--num_gpus "$GPUS"} --master_port "$port")
    ;;
  torchrun)
    command=(-m torch.distributed.run --nproc_per_node "${GPUS:-gpu}" --master_port "$port")
    ;;
  *)
    echo "${0##*/}: LAUNCHER=$launcher: must be deepspeed or torchrun" >&2
    exit 2
    ;;
esac
exec "$here/run_group.sh" "$python" "${command[@]}" "$here/train.py" "$@"
