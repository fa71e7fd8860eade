#!/usr/bin/env bash
# Runs a launcher as a process group of its own, so that nothing of the job survives it and nothing is lost:
#   - SIGTERM and SIGINT to this script reach every process of the job (deepspeed's front end passes on neither); the run
#     saves a checkpoint, and the exit code is 143 or 130.
#   - a launcher that ends before its processes, whatever its exit code, is a failure; they get SIGTERM.
#   - what is left after GRACE seconds is killed.
# Otherwise the exit code is the launcher's.
set -euo pipefail

usage() {
  echo "usage: ${0##*/} COMMAND [ARGUMENT ...]        environment: GRACE (60) seconds from SIGTERM to SIGKILL" >&2
  exit 2
}
[[ $# -ge 1 && $1 != -h && $1 != --help ]] || usage

grace=${GRACE:-60}
signal_code=0
group=''
pending=''

to_group() { kill "-$1" -- "-$group" 2>/dev/null; }

# Before the command starts: a signal that comes while it does would end this script and leave the job behind.
# shellcheck disable=SC2329  # called by the traps
on_signal() {
  signal_code=$2 pending=$1
  [[ -z $group ]] || to_group "$1" || true
}
trap 'on_signal TERM 143' TERM
trap 'on_signal INT 130' INT

empty_within() {
  local tenths
  for ((tenths = 0; tenths < $1 * 10; tenths++)); do
    to_group 0 || return 0
    sleep 0.1
  done
  return 1
}

# Job control gives a background command its own process group.
set -m
"$@" </dev/null &
group=$!
set +m
[[ -z $pending ]] || to_group "$pending" || true

code=0
# Not one long wait: a signal that comes just before it would leave it waiting for a command that ignores the signal.
while ((signal_code == 0)) && kill -0 "$group" 2>/dev/null; do
  sleep 0.2 &
  wait "$!" || true
done
((signal_code)) || wait "$group" 2>/dev/null || code=$?
# Trackers and the like may need a moment to follow their launcher.
if ((signal_code == 0)) && ! empty_within 2; then
  code=$((code ? code : 1))
  to_group TERM || true
fi
empty_within "$grace" || to_group KILL || true
exit "$((signal_code ? signal_code : code))"
