#!/usr/bin/env bash
# Installs what the Slurm, ssh and page tests need (Debian or Ubuntu, as root); starts nothing.
# Prints one line about what it did. Ends with 0 if it cannot install: the tests are then skipped.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
# command=package
for pair in slurmctld=slurmctld slurmd=slurmd srun=slurm-client munged=munge sshd=openssh-server pdsh=pdsh \
    chromium=chromium pdftotext=poppler-utils; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done

if [ ${#missing[@]} -eq 0 ]; then
    echo "test services: all there"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "test services: no apt-get here, not installed: ${missing[*]}"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "test services: not root, not installed: ${missing[*]} (run: sudo $0)"
    exit 0
fi

log=$(mktemp)
policy=/usr/sbin/policy-rc.d # packages ask it before they start a service; 101 means no
made_policy=
trap 'rm -f "$log" ${made_policy:+"$made_policy"}' EXIT
if [ ! -e "$policy" ]; then
    made_policy=$policy
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
# A stale or empty package list is the usual reason for a failure, so refresh and try once more.
if ! install >"$log" 2>&1 && ! { apt-get update -qq && install; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "test services: apt-get failed on: ${missing[*]}" >&2
    exit 1
fi
echo "test services: installed ${missing[*]}"
