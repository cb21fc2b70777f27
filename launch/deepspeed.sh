#!/usr/bin/env bash
# Trains under DeepSpeed's launcher. Arguments are overrides: bash launch/deepspeed.sh model=llama_125m
#
#   RANKS        processes on each machine (default: its GPUs, or 2 without any)
#   HOSTFILE     for several machines: lines of "name slots=8"; they need ssh without a password and this same folder
#   PORT         a free port on the first machine (default 29500)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_missing

gpus=$(count_gpus)
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$RANKS")}
export LONGREACH_COMMAND="bash launch/deepspeed.sh"
where=(--num_gpus "$RANKS" --master_port "${PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then where+=(--hostfile "$HOSTFILE"); fi
# Without a GPU the launcher has to be told that processes may be started.
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --module longreach.launch.train "$@"
