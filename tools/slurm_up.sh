#!/usr/bin/env bash
# Starts a real two-node Slurm on this machine, on loopback, with all its state under one folder.
#   eval "$(tools/slurm_up.sh [STATE_DIR])"   then srun, sbatch, squeue ... reach it
#   tools/slurm_down.sh "$SLURM_STATE_DIR"    stops it and removes the folder
# Several may run at once. Partitions: main (preemptible, 30 s grace) and urgent (preempts main).
# Each node claims 2 CPUs, 4000 MB and 2 fake GPUs, whatever the machine has.
. "$(dirname "$0")/services.sh"
unset "${!SLURM_@}" # run from inside a job, or after another slurm_up, nothing of that one may leak in
need slurmctld slurmd sinfo munged
new_state "$@"
# Unix sockets live in there, and their paths may hold 107 characters.
[ ${#state} -le 70 ] || die "$state is too long for socket names: use a path of at most 70 characters"
chmod 755 "$state"
mkdir -m 755 "$state/munge" "$state/spool" "$state/log" "$state/run"

free_ports 127.0.0.1 0 1 2

echo 'NodeName=node[1-2] Name=gpu File=/dev/null,/dev/zero' >"$state/gres.conf"

cat >"$state/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s where it is not set)
AuthInfo=socket=$state/munge/socket,cred_expire=5
StateSaveLocation=$state/spool/slurmctld
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/run/slurmctld.pid
SlurmdPidFile=$state/run/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
END

trap stop_again ERR INT TERM

export SLURM_CONF=$state/slurm.conf
(umask 077 && head -c 128 /dev/urandom >"$state/munge/key")
munged --key-file="$state/munge/key" --socket="$state/munge/socket" --pid-file="$state/run/munged.pid" \
    --log-file="$state/log/munged.log" --seed-file="$state/munge/seed" >&2
slurmctld -f "$SLURM_CONF" >&2
slurmd -f "$SLURM_CONF" -N node1 >&2
slurmd -f "$SLURM_CONF" -N node2 >&2

both_idle() { [ "$(timeout 5 sinfo -h -N -p main -o %T 2>/dev/null)" = $'idle\nidle' ]; }
for _ in $(seq 150); do
    if both_idle; then
        echo "export SLURM_CONF='$SLURM_CONF'"
        echo "export SLURM_STATE_DIR='$state'"
        exit 0
    fi
    sleep 0.2
done
stop_again
