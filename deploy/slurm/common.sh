# What both Slurm scripts share. Sourced by them on the first node of a job, and on the others to start Ray.

usage() {
    printf 'usage: sbatch [--time=... --gpus-per-node=...] %s CONFIG RUN_DIR [--set KEY=VALUE ...]\n' "$1" >&2
    exit 2
}

# Programs are those of the environment that this shell has, or of an Apptainer image:
#   IMAGE=stage-ray.sif BIND=/shared sbatch ...
inside=()
if [ -n "${IMAGE:-}" ]; then
    inside=(apptainer exec --nv ${BIND:+--bind="$BIND"} "$IMAGE")
fi

# Ray's sockets lie here: the path of a Slurm job's own TMPDIR is often too long for them.
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp}
export RAY_USAGE_STATS_ENABLED=0

# Train, going on where the directory holds a run. Slurm's warning (--signal=B:USR1@600) reaches this shell alone; the
# training gets it from here, saves after its step and ends. Then the job is queued again, and goes on from there.
train_or_requeue() {
    local code=0 training= signal
    for signal in USR1 TERM; do
        trap "[ -z \"\$training\" ] || kill -$signal \"\$training\"" "$signal"
    done
    "${inside[@]}" stage-ray train "$@" --auto-resume &
    training=$!
    wait "$training" || code=$?
    while kill -0 "$training" 2>/dev/null; do # a signal ended the wait, not the training
        code=0
        wait "$training" || code=$?
    done
    if [ "$code" = 138 ]; then # 128 + SIGUSR1: it was warned, and has saved
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
