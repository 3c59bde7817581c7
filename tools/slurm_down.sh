#!/usr/bin/env bash
# Stops the Slurm that slurm_up.sh started in STATE_DIR, its jobs included, and removes STATE_DIR.
#   tools/slurm_down.sh STATE_DIR
. "$(dirname "$0")/services.sh"
unset "${!SLURM_@}"
old_state "$@"
export SLURM_CONF=$state/slurm.conf

# Jobs first: without their slurmd they would go on. One that ignores SIGTERM takes KillWait, 10 s.
if runs "$(pid_of slurmctld)"; then
    timeout 15 scancel --user="$(id -un)" || true
    for _ in $(seq 100); do
        [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
        sleep 0.2
    done
fi
# proctrack/linuxproc loses what a job leaves behind in the background. Such a process still carries
# this folder and a job id in its environment.
for environ in /proc/[0-9]*/environ; do
    if grep -zqsxF "SLURM_CONF=$SLURM_CONF" "$environ" && grep -zqs '^SLURM_JOB_ID=' "$environ"; then
        kill -KILL "$(basename "$(dirname "$environ")")" 2>/dev/null || true
    fi
done

for name in slurmd-node1 slurmd-node2 slurmctld munged; do end $name; done
rm -rf "$state"
