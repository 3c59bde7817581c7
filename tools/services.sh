# Shared by the scripts that start and stop the test services; they source this file.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
tools=$(cd "$(dirname "$0")" && pwd)
script=$(basename "$0" .sh)

die() {
    echo "$script: $1" >&2
    exit 1
}

# need COMMAND...
need() {
    local command
    for command; do
        command -v "$command" >/dev/null || die "$command is missing: run tools/install_test_services.sh"
    done
}

# new_state [FOLDER]: an empty folder for all files of the service, that one or a new one, in $state.
new_state() {
    if [ $# -ge 1 ]; then
        mkdir -p "$1"
        state=$(cd "$1" && pwd)
        [ -z "$(ls -A "$state")" ] || die "$state is not empty: give a new folder"
    else
        state=$(mktemp -d "${TMPDIR:-/tmp}/${script%_up}.XXXXXX")
    fi
    : >"$state/made_by_$script"
}

# old_state [FOLDER]: the folder of a service that was started here, in $state.
old_state() {
    state=$(cd "${1:?usage: $script.sh STATE_DIR}" && pwd)
    [ -e "$state/made_by_${script%_down}_up" ] || die "$state was not made by ${script%_down}_up.sh"
}

# free_ports ADDRESS OFFSET...: in $port, a port that is free together with those at the offsets, below the range that
# outgoing connections use.
free_ports() {
    local offset
    while true; do
        port=$((10000 + RANDOM % 20000))
        for offset in "${@:2}"; do
            ! (: <"/dev/tcp/$1/$((port + offset))") 2>/dev/null || continue 2
        done
        return
    done
}

# A process id may have passed to another program: only one that names this folder is ours.
runs() { [ -n "$1" ] && grep -qsF "$state/" "/proc/$1/cmdline"; }
pid_of() { cat "$state/run/$1.pid" 2>/dev/null || true; }

# end NAME: stop the process whose number stands in run/NAME.pid.
end() {
    local pid
    pid=$(pid_of "$1")
    runs "$pid" || return 0
    kill "$pid"
    for _ in $(seq 100); do
        runs "$pid" || return 0
        sleep 0.1
    done
    echo "$script: $1 would not stop, killed" >&2
    kill -KILL "$pid"
}

# On a failed start: show the ends of the logs, and leave nothing behind.
stop_again() {
    tail -n 8 "$state"/log/* >&2 || true
    "$tools/${script%_up}_down.sh" "$state" || true
    die "the service does not work; the ends of its logs are above"
}
