# Sourced by the other scripts: finds or makes the Python environment, installs what is missing, and sets $PYTHON.
#
# An active environment (a virtual environment, conda, or a `python` that already imports torch) is used as it is: what
# is missing is installed into it, its torch is never replaced. Without one, .venv is made in the checkout.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local name
    if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then echo "$VIRTUAL_ENV/bin/python"; return; fi
    if [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then echo "$CONDA_PREFIX/bin/python"; return; fi
    for name in python python3; do
        if "$name" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    if [ ! -x "$repository/.venv/bin/python" ]; then
        for name in python3.12 python3.13 python3.11 python3 python; do
            if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                echo "making $repository/.venv with $("$name" --version)" >&2
                "$name" -m venv "$repository/.venv" >&2 || return 1
                break
            fi
        done
    fi
    if [ ! -x "$repository/.venv/bin/python" ]; then
        echo "LongReach needs Python 3.11 or later; none was found. Install one, or activate an environment." >&2
        return 1
    fi
    echo "$repository/.venv/bin/python"
}

PYTHON=$(find_python) || exit 1
PATH="$(dirname "$PYTHON"):$PATH"
export PATH PYTHON

# The checkout's own kernels/, models/, trainer/ must never be found as top-level packages.
export PYTHONSAFEPATH=1

# On a CPU, glibc would return the memory of large tensors to the system at every step and take it again, page by page.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}

# install_missing [extra]: the distribution's requirements, and those of the extra ("dev" for the tests).
install_missing() {
    "$PYTHON" "$repository/launch/install.py" "$repository" "$@" || exit 1
    # Another checkout may be installed here: this one's code goes first, and the other's installation is left alone.
    if ! (cd / && "$PYTHON" -c "import longreach, os, sys; sys.exit(not os.path.samefile(longreach.__path__[0], sys.argv[1]))" \
        "$repository" 2>/dev/null); then
        mkdir -p "$repository/.cache/import"
        ln -sfn "$repository" "$repository/.cache/import/longreach"
        export PYTHONPATH="$repository/.cache/import${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

# The number of CUDA devices that torch sees.
count_gpus() { (cd / && "$PYTHON" -c "import torch; print(torch.cuda.device_count())"); }

# A TCP port that nothing listens on now.
free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# Ends a script that srun or mpirun started several times: each would train on its own, into the same folder.
refuse_several() {
    local tasks=${OMPI_COMM_WORLD_SIZE:-1}
    if [ -n "${SLURM_STEP_ID:-}" ]; then tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}; fi
    if [ "$tasks" -gt 1 ]; then
        echo "this script must be started once; got $tasks tasks, each of which would train alone. Start one task a node" \
            "with NODES, NODE_RANK and HEAD, as launch/slurm.sbatch does, or every rank by itself:" \
            "srun python -m longreach.launch.train" >&2
        exit 1
    fi
}

# threads_for RANKS: cores for each rank of this machine.
threads_for() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    echo $((cores > $1 ? cores / $1 : 1))
}

# A run that a signal has ended after saving leaves with this (EX_TEMPFAIL); started again, it goes on.
AGAIN=75

# restarting STOP COMMAND…: ends this script with the command's status; where that is $AGAIN, starts it again, up to
# $RESTARTS times. Not where this script is told to end, by SIGTERM or Ctrl-C: then `STOP PID` passes that on.
restarting() {
    local stop=$1 left=${RESTARTS:-0} status heard
    shift
    if [ "$left" -gt 0 ] && [[ " $* " != *" run.dir="* ]]; then
        echo "RESTARTS must come with run.dir=…, where a run goes on; got $RESTARTS without. Name a folder" >&2
        exit 1
    fi
    told=0
    trap 'told=$((told + 1)); "$stop" "$launcher"' TERM INT
    while :; do
        "$@" &
        launcher=$!
        # A signal ends `wait` before the command has ended.
        while heard=$told status=0; wait "$launcher" || status=$?; [ "$told" -ne "$heard" ]; do :; done
        if [ "$status" -ne "$AGAIN" ] || [ "$told" -gt 0 ] || [ "$left" -eq 0 ]; then exit "$status"; fi
        left=$((left - 1))
        echo "starting again, as status $AGAIN asks ($left restart(s) left)"
    done
}

terminate() { kill -TERM "$1" 2>/dev/null || true; }

# DeepSpeed's runner would die alone and leave the ranks: what it has started is told.
terminate_children() {
    "$PYTHON" -c 'import psutil, sys; [child.terminate() for child in psutil.Process(int(sys.argv[1])).children()]' "$1" || true
}
