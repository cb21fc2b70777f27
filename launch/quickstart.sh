#!/usr/bin/env bash
# Trains a small hybrid on the Python standard library, each row shared by two ranks, and shows what came of it.
#
#   bash launch/quickstart.sh                                   under ten minutes on two cores
#   bash launch/quickstart.sh experiment=quickstart_long        the same for an hour
#   bash launch/quickstart.sh trainer.steps=20                  any setting can be changed
#   bash launch/quickstart.sh run.dir=runs/quickstart/TIME      goes on from the newest checkpoint there
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
refuse_several
install_missing

gpus=$(count_gpus)
overrides=("$@")
case " $* " in *" experiment="*) ;; *) overrides=(experiment=quickstart "${overrides[@]}") ;; esac
if [ "$gpus" -ge 8 ]; then ranks=8
elif [ "$gpus" -ge 4 ]; then ranks=4
elif [ "$gpus" -ge 2 ]; then ranks=2
elif [ "$gpus" -eq 1 ]; then
    ranks=1
    overrides=(parallel.sequence=1 "${overrides[@]}")
    echo "one GPU was found: one rank holds whole rows (two ranks cannot share a GPU)"
else ranks=2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_for "$ranks")}
export LONGREACH_COMMAND=${LONGREACH_COMMAND:-"bash $(printf %q "$0")"}
trap '' USR1  # the ranks save and end at this signal; torchrun would die of it
exec "$PYTHON" -m longreach.trainer.ranks.torchrun --standalone --nproc-per-node "$ranks" \
    -m longreach.launch.train "${overrides[@]}"
