#!/usr/bin/env bash
# Stops the ssh server that sshd_up.sh started in STATE_DIR and removes STATE_DIR.
#   tools/sshd_down.sh STATE_DIR
set -euo pipefail
state=$(cd "${1:?usage: sshd_down.sh STATE_DIR}" && pwd)
if [ ! -e "$state/sshd_config" ]; then
    echo "sshd_down: $state holds no ssh server of sshd_up.sh" >&2
    exit 2
fi

# A process id may have passed to another program: only one that names this folder is ours.
runs() { [ -n "$1" ] && grep -qsF "$state/" "/proc/$1/cmdline"; }

pid=$(cat "$state/sshd.pid" 2>/dev/null || true)
if runs "$pid"; then
    kill "$pid"
    for _ in $(seq 50); do
        runs "$pid" || break
        sleep 0.1
    done
    if runs "$pid"; then
        echo "sshd_down: sshd would not stop, killed" >&2
        kill -KILL "$pid"
    fi
fi
rm -rf "$state"
