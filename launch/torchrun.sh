#!/usr/bin/env bash
# Trains under torchrun on one machine or several. Arguments are overrides: bash launch/torchrun.sh model=llama_125m
#
#   RANKS        processes on this machine (default: its GPUs, or 2 without any)
#   NODES        machines (default 1); run this script on each, with the same arguments and
#   NODE_RANK    the number of this machine, 0 .. NODES-1
#   HEAD         address of machine 0      PORT   a free port on it (default 29500)
#   RESTARTS     how often a run that a signal has ended (status 75) is started again (default 0); give it a run.dir
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ "${NODES:-1}" -eq 1 ]; then refuse_several; fi
install_missing

gpus=$(count_gpus)
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
NODES=${NODES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$RANKS")}
export LONGREACH_COMMAND=${LONGREACH_COMMAND:-"bash $(printf %q "$0")"}
if [ "$NODES" -eq 1 ]; then
    where=(--standalone)
else
    : "${NODE_RANK:?NODE_RANK must be the number of this machine, 0 .. NODES-1}"
    : "${HEAD:?HEAD must be the address of machine 0}"
    where=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "${PORT:-29500}")
fi
trap '' USR1  # the ranks save and end at this signal; torchrun would die of it
restarting terminate "$PYTHON" -m longreach.trainer.ranks.torchrun "${where[@]}" --nproc-per-node "$RANKS" -m longreach.launch.train "$@"
