# Sourced by all job files: starts the ranks, passes on signals, requeues the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it by itself
export SLURM_EXPORT_ENV=ALL                         # otherwise, with --export=NONE, the ranks would have no PATH

# run_ranks STAGE RECIPE [OPTION ...]: `atlantis-ds STAGE RECIPE [OPTION ...]` on all ranks of the job; ends the script.
run_ranks() {
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || set -- "$@" --part "$SLURM_ARRAY_TASK_ID/$parts"
    # USR2 comes 180 s before the time limit, and before preemption if the site sends it (preempt_send_user_signal):
    # the ranks save, end with 75, and the job goes back into the queue. On TERM (scancel) they save, and the job ends.
    requeue=
    trap 'requeue=yes; kill -USR2 "$ranks"' USR2
    trap 'requeue=no; kill -TERM "$ranks"' TERM
    # $python may be several words: apptainer exec IMAGE python
    # shellcheck disable=SC2086
    srun --kill-on-bad-exit=1 ${python:-python} -m atlantis_ds "$@" &
    ranks=$!
    while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done # a trapped signal interrupts `wait`
    wait "$ranks"
    code=$?
    if [ "$code" -eq 75 ]; then requeue=${requeue:-yes}; fi # by a STOP file, or a TERM sent only to the ranks
    if [ "$code" -ne 0 ] && [ "$requeue" = yes ]; then
        trap '' TERM # which requeueing sends
        scontrol requeue "$SLURM_JOB_ID" || hold_what_waits
    fi
    exit "$code"
}

# The site does not allow requeueing. Jobs that wait for this one would be cancelled: hold them, and say how to resume.
hold_what_waits() {
    local me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} after=afterok:\$job file again id dependency rest
    # Array elements that still run count, too.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || after+=",afterany:$me"
    file=${script:+$(printf %q "$script")}
    again="job=\$(sbatch --parsable ${SLURM_ARRAY_TASK_ID:+--array=$SLURM_ARRAY_TASK_ID }${file:-FILE RECIPE})"
    while read -r id dependency; do
        rest=$(sed -E "s/afterok:${me}(_\*)?\([^)]*\)//; s/\([^)]*\)//g; s/^,+|,+$//g; s/,,+/,/g" <<<"$dependency")
        scontrol uhold "$id"
        scontrol update JobId="$id" Dependency="$rest"
        again+=" && scontrol update JobId=$id Dependency=$after${rest:+,$rest} && scontrol release $id"
    done < <(squeue --me --noheader --states=PENDING --format='%A %E' | grep -E "afterok:${me}(_\*)?\(")
    echo "Slurm does not requeue this job. Finished work is saved, and the jobs after it are held. Resume with:"
    echo "  $again"
}
