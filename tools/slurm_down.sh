#!/usr/bin/env bash
# Stops the Slurm that slurm_up.sh started in STATE_DIR, its jobs included, and removes STATE_DIR.
#   tools/slurm_down.sh STATE_DIR
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
unset "${!SLURM_@}"
state=$(cd "${1:?usage: slurm_down.sh STATE_DIR}" && pwd)
if [ ! -e "$state/slurm.conf" ] || [ ! -d "$state/munge" ]; then
    echo "slurm_down: $state holds no Slurm of slurm_up.sh" >&2
    exit 2
fi
export SLURM_CONF=$state/slurm.conf

# A process id may have passed to another program: only one that names this folder is ours.
runs() { [ -n "$1" ] && grep -qsF "$state/" "/proc/$1/cmdline"; }
pid_of() { cat "$state/run/$1.pid" 2>/dev/null || true; }

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

for name in slurmd-node1 slurmd-node2 slurmctld munged; do
    pid=$(pid_of $name)
    runs "$pid" || continue
    kill "$pid"
    for _ in $(seq 100); do
        runs "$pid" || continue 2
        sleep 0.1
    done
    echo "slurm_down: $name would not stop, killed" >&2
    kill -KILL "$pid"
done
rm -rf "$state"
