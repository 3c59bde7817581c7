#!/usr/bin/env bash
# Starts an ssh server on 127.0.0.2 and 127.0.0.3: two "hosts" for pdsh and `deepspeed --hostfile`.
#   eval "$(tools/sshd_up.sh [STATE_DIR])"
#   pdsh -w 127.0.0.2,127.0.0.3 hostname
#   deepspeed --hostfile "$SSH_HOSTFILE" --ssh_port "$SSH_PORT" --no_ssh_check --master_addr 127.0.0.2 ...
#   tools/sshd_down.sh "$SSH_STATE_DIR"       stops it and removes the folder
# Keys, settings and log are in STATE_DIR; ~/.ssh and /etc/ssh are not used. Several may run at once.
. "$(dirname "$0")/services.sh"
need sshd ssh ssh-keygen
new_state "$@"
[[ $state != *[[:space:]]* ]] || die "$state holds a blank, which pdsh cannot pass on to ssh"

mkdir "$state/log" "$state/run"
free_ports 127.0.0.2 0

ssh-keygen -q -t ed25519 -N '' -C 'test host' -f "$state/host_key"
ssh-keygen -q -t ed25519 -N '' -C 'test client' -f "$state/client_key"

# Remote commands get this PATH, so that they find the same python, ninja and compiler as here.
cat >"$state/sshd_config" <<END
Port $port
ListenAddress 127.0.0.2
ListenAddress 127.0.0.3
HostKey $state/host_key
PidFile $state/run/sshd.pid
AuthorizedKeysFile $state/client_key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
AllowUsers $(id -un)
MaxStartups 100
SetEnv "PATH=$PATH"
END
cat >"$state/ssh_config" <<END
Host 127.0.0.2 127.0.0.3
    Port $port
    User $(id -un)
    IdentityFile $state/client_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
END
printf '127.0.0.2 slots=1\n127.0.0.3 slots=1\n' >"$state/hostfile"

trap stop_again ERR INT TERM

[ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd # root's sshd wants this empty folder, shared by all of them
"$(command -v sshd)" -f "$state/sshd_config" -E "$state/log/sshd.log" >&2

for _ in $(seq 50); do
    if ssh -F "$state/ssh_config" 127.0.0.2 true 2>/dev/null && ssh -F "$state/ssh_config" 127.0.0.3 true 2>/dev/null; then
        echo "export SSH_STATE_DIR='$state'"
        echo "export SSH_PORT=$port"
        echo "export SSH_CONFIG='$state/ssh_config'"
        echo "export SSH_HOSTFILE='$state/hostfile'"
        echo "export PDSH_RCMD_TYPE=ssh"
        echo "export PDSH_SSH_ARGS_APPEND='-F $state/ssh_config'"
        exit 0
    fi
    sleep 0.1
done
stop_again
