#!/usr/bin/env bash
# One process per GPU of several machines, which see the same files (recipe, model, data, run folder) under the same paths.
#
#   launch/multi_node.sh RECIPE [section.key=value ...] [--deepspeed zero2]
#
# Three ways, by environment:
#   HOSTFILE=hosts                                   on one machine; the others are reached by ssh without a password,
#                                                    through pdsh
#   HOSTFILE=hosts NODE_RANK=i MASTER_ADDR=host0     on every machine i = 0, 1, ...; deepspeed without ssh
#   NNODES=n MASTER_ADDR=host0                       on every machine; torchrun, in any order
#
# Environment:
#   HOSTFILE      a line "host0 slots=8" for each machine; slots are GPUs
#   MASTER_ADDR   address of the machine where the processes meet (with ssh: of the first one, found by itself)
#   MASTER_PORT   its port (default: 29500)
#   GPUS          processes per machine (default: the slots, or every GPU)
#   JOB_ID        torchrun: any name, the same on every machine (default: qaft)
#   NODE_RANK, LOCAL_ADDR                            torchrun, where host names do not resolve to the addresses in use:
#                 NODE_RANK=0 on the machine of MASTER_ADDR, 1 on the others; LOCAL_ADDR is this machine's address
#   PYTHON        interpreter (default: python3)
#   GRACE         seconds from SIGTERM to SIGKILL (default: 60)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME           network interface, where a machine has several
# With ssh, the other machines get variables that begin with NCCL, PYTHON, MLFLOW, MV2 or UCX and the lines (A=b) of
# ~/.deepspeed_env, nothing else: put HF_HOME, HF_TOKEN, OMP_NUM_THREADS there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

fail() {
  echo "${0##*/}: $*; without arguments this script says what it needs" >&2
  exit 2
}

port=${MASTER_PORT:-29500}
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -z ${NNODES:-} ]] || fail "HOSTFILE is for deepspeed and NNODES for torchrun: set one of them"
  [[ -r $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE cannot be read"
  command=(-m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$port")
  command+=(${GPUS:+--num_gpus "$GPUS"} ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
  if [[ -n ${NODE_RANK:-} ]]; then
    [[ -n ${MASTER_ADDR:-} ]] || fail "NODE_RANK needs MASTER_ADDR, the address of machine 0"
    command+=(--no_ssh --node_rank "$NODE_RANK")
  fi
elif [[ -n ${NNODES:-} ]]; then
  [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES needs MASTER_ADDR, the address of one of the machines"
  command=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "${GPUS:-gpu}")
  command+=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$port" --rdzv_id "${JOB_ID:-qaft}")
  command+=(${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"})
  # Without it torchrun compares MASTER_ADDR with the addresses of its own host name.
  command+=(${NODE_RANK:+--rdzv_conf "is_host=$((NODE_RANK == 0))"})
else
  fail "set HOSTFILE (deepspeed) or NNODES (torchrun)"
fi
exec "$here/run_group.sh" "${PYTHON:-python3}" "${command[@]}" "$here/train.py" "$@"
