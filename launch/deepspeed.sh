#!/usr/bin/env bash
# Trains under DeepSpeed's launcher. Arguments are overrides: bash launch/deepspeed.sh model=llama_125m
#
#   RANKS        processes on each machine (default: its GPUs, or 2 without any); of the GPUs in CUDA_VISIBLE_DEVICES,
#                where that is set, the first so many
#   HOSTFILE     for several machines: lines of "name slots=8"; they need ssh without a password and this same folder
#   PORT         a free port on the first machine (default: one that is free here, or 29500 with HOSTFILE)
#   RESTARTS     how often a run that a signal has ended (status 75) is started again (default 0); give it a run.dir
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
refuse_several
install_missing

gpus=$(count_gpus)
RANKS=${RANKS:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$RANKS")}
export LONGREACH_COMMAND=${LONGREACH_COMMAND:-"bash $(printf %q "$0")"}
if [ -n "${HOSTFILE:-}" ]; then
    where=(--num_gpus "$RANKS" --master_port "${PORT:-29500}" --hostfile "$HOSTFILE")
else
    where=(--master_port "${PORT:-$(free_port)}")
    if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        # With --num_gpus the launcher would take the machine's first ones.
        devices=$(cut -d , -f "1-$RANKS" <<<"${CUDA_VISIBLE_DEVICES// /}")
        if [ "$RANKS" -gt "$gpus" ]; then
            echo "RANKS must be at most the $gpus GPU(s) of CUDA_VISIBLE_DEVICES; got $RANKS. Lower it" >&2
            exit 1
        fi
        if [[ ! $devices =~ ^[0-9]+(,[0-9]+)*$ ]]; then
            echo "CUDA_VISIBLE_DEVICES must hold numbers for DeepSpeed's launcher; got $CUDA_VISIBLE_DEVICES." \
                "Give numbers, or use launch/torchrun.sh" >&2
            exit 1
        fi
        where+=(--include "localhost:$devices")
    else
        where+=(--num_gpus "$RANKS")
    fi
fi
# Without a GPU the launcher has to be told that processes may be started.
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi
trap '' USR1  # the ranks save and end at this signal; the launcher would die of it
restarting terminate_children "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --module longreach.launch.train "$@"
