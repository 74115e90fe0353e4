#!/bin/bash
# A Slurm of one node on this machine, for tests: munged, slurmctld, slurmd, everything under DIR and on the loopback.
#   bash tests/slurm/setup_slurm.sh start DIR     # then: export SLURM_CONF=DIR/slurm.conf
#   bash tests/slurm/setup_slurm.sh stop DIR
# Exit code 77 with the reason on stderr where a Slurm cannot be had. Nothing outside DIR is touched, in particular
# not /etc/slurm: a machine that belongs to a cluster keeps its configuration.
set -eu

skip() { echo "no Slurm here: $1" >&2; exit 77; }

start() {
    [ "$(uname)" = Linux ] || skip "not Linux"
    [ "$(id -u)" = 0 ] || skip "starting its daemons needs root"
    for tool in munged slurmctld slurmd sbatch srun scontrol; do
        command -v $tool >/dev/null || skip "$tool is not installed (Debian: apt-get install slurm-wlm munge)"
    done
    id munge >/dev/null 2>&1 || skip "there is no user munge"
    mkdir -p "$dir/munge" "$dir/state" "$dir/spool"
    # munged insists on a private key and on a socket folder that others may enter.
    dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
    chmod 700 "$dir/munge/key" && chmod 400 "$dir/munge/key"
    chown -R munge "$dir/munge" && chmod 755 "$dir" "$dir/munge"
    runuser -u munge -- munged --key-file "$dir/munge/key" --socket "$dir/munge/socket" \
        --pid-file "$dir/munge/pid" --log-file "$dir/munge/log" --seed-file "$dir/munge/seed" \
        || skip "munged did not start"
    host=$(hostname -s)
    # Ports of this run alone, so that two test runs on one machine do not meet; below those that the system hands out.
    port=$((10000 + $$ % 220 * 100))
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SrunPortRange=$((port + 10))-$((port + 60))
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
# A requeued job starts again after cred_expire seconds (120 by default).
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
# A requeued job waits KillWait at most for its tasks to save and leave.
KillWait=30
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    export SLURM_CONF="$dir/slurm.conf"
    slurmctld -c -f "$SLURM_CONF" || skip "slurmctld did not start, see $dir/slurmctld.log"
    slurmd -f "$SLURM_CONF" || skip "slurmd did not start, see $dir/slurmd.log"
    for _ in $(seq 60); do
        if sinfo --noheader --format %T 2>/dev/null | grep -q '^idle'; then
            return
        fi
        sleep 0.5
    done
    skip "the node did not come up in 30 s, see $dir/slurmctld.log"
}

# Jobs that a failed test left behind are cancelled first: their tasks would outlive the daemons.
stop() {
    export SLURM_CONF="$dir/slurm.conf"
    if [ -s "$dir/slurmctld.pid" ] && timeout 10 scancel --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 80); do
            [ -n "$(timeout 10 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for file in "$dir/slurmd.pid" "$dir/slurmctld.pid" "$dir/munge/pid"; do
        if [ -s "$file" ]; then
            pid=$(cat "$file")
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 20); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.2
            done
        fi
    done
}

[ $# = 2 ] || { echo "usage: setup_slurm.sh start|stop DIR" >&2; exit 2; }
dir=$(realpath -m "$2")
case $1 in
    start) start ;;
    stop) stop ;;
    *) echo "usage: setup_slurm.sh start|stop DIR" >&2; exit 2 ;;
esac
