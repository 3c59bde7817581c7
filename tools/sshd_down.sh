#!/usr/bin/env bash
# Stops the ssh server that sshd_up.sh started in STATE_DIR and removes STATE_DIR.
#   tools/sshd_down.sh STATE_DIR
. "$(dirname "$0")/services.sh"
old_state "$@"
end sshd
rm -rf "$state"
