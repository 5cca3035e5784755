#!/usr/bin/env bash
# A real Slurm of virtual nodes on one Debian machine, to try submission out without a cluster. Needs root.
#
#   slurm/testbed.sh up            install what is missing, start the daemons, wait until all nodes are idle; exit status 4
#                                  if this machine cannot (no root, no namespaces, nothing to install from)
#   slurm/testbed.sh down          end all jobs and daemons of this testbed (and of no other)
#   slurm/testbed.sh status        daemons, nodes and queue; exit status 0 if it is up, 3 if not
#   slurm/testbed.sh env           the line to eval, so that sbatch and the others find it
#   slurm/testbed.sh fail NODE     crash a node: SIGKILL to its slurmd and to everything that runs on it
#   slurm/testbed.sh recover NODE  start the node again
#   slurm/testbed.sh purge         down, and remove its directory
#
# Settings, by the environment; give the same ones to every command:
#   TESTBED_DIR=/tmp/steerscale-testbed   all its files; a short path: sockets have room for 107 characters
#   TESTBED_SLOT=0                        0..49: ports and addresses; two testbeds at a time need different ones
#   NODES=3                               virtual nodes n1, n2, ... (at most 50)
#   GPUS=2                                imitated GPUs of each node, for --gres
#   CPUS=8 MEMORY_MB=16000                what each node claims to have
#   NODE_TIMEOUT=10                       seconds after which a silent node counts as down (it takes up to 15 more)
#   ACCT=0                                1: with MariaDB and slurmdbd, so that sacct has something to say
#
# Not like a cluster: no limit on memory or devices is enforced, and every node has this machine's disk and network.
set -euo pipefail

dir=${TESTBED_DIR:-/tmp/steerscale-testbed}
slot=${TESTBED_SLOT:-0}
nodes=${NODES:-3}
gpus=${GPUS:-2}
cpus=${CPUS:-8}
memory=${MEMORY_MB:-16000}
node_timeout=${NODE_TIMEOUT:-10}
accounting=${ACCT:-0}

port=$((16100 + 100 * slot)) # slurmctld; then slurmdbd, MariaDB, and from +10 on the nodes
subnet=127.77.$slot
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

say() { echo "testbed: $*" >&2; }
die() {
  say "$*"
  exit 1
}
impossible() { # on this machine, whatever is done to it from here
  say "$*"
  exit 4
}

# --- processes: each daemon by its pid file, and only if it carries this testbed's SLURM_CONF in its environment

daemon_pid() { # NAME PROGRAM -> its pid
  local pid
  pid=$(tr -dc 0-9 2>/dev/null <"$dir/run/$1.pid") || return 1
  [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && is_ours "$pid" && echo "$pid"
}

is_ours() { tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; }

end_process() { # PID SECONDS: TERM, and KILL once the time is over
  local tenths=$(($2 * 10))
  kill -TERM "$1" 2>/dev/null || return 0
  while [ "$tenths" -gt 0 ] && alive "$1"; do
    sleep 0.1
    tenths=$((tenths - 1))
  done
  kill -KILL "$1" 2>/dev/null || true
}

alive() { case $(awk '{print $3}' "/proc/$1/stat" 2>/dev/null) in '' | Z) return 1 ;; esac }

names() { seq -f 'n%.0f' "$nodes"; }

# All that lives on a node has the node's own UTS namespace: slurmd, its slurmstepds, the tasks and their children.
node_processes() {
  local namespace
  namespace=$(cat "$dir/run/uts-$1" 2>/dev/null) || return 0
  [ "$namespace" != "$(readlink /proc/self/ns/uts)" ] || return 0
  # uts:[NUMBER]: the brackets are not a pattern's. Processes end while they are looked at.
  namespace=${namespace//[/\\[}
  find /proc/[0-9]*/ns/uts -maxdepth 0 -lname "${namespace//]/\\]}" -printf '%h\n' 2>/dev/null | cut -d/ -f3 || true
}

kill_node() { # until none is left: one may just be starting another
  local pid found
  for _ in $(seq 20); do
    found=$(node_processes "$1")
    [ -n "$found" ] || break
    for pid in $found; do kill -KILL "$pid" 2>/dev/null || true; done
    sleep 0.1
  done
  rm -f "$dir/run/slurmd-$1.pid" "$dir/run/uts-$1"
}

# --- installation

install_missing() {
  local packages=() guard=/usr/sbin/policy-rc.d guarded=''
  command -v slurmctld >/dev/null || packages+=(slurmctld)
  command -v slurmd >/dev/null || packages+=(slurmd)
  command -v sbatch >/dev/null || packages+=(slurm-client)
  command -v munged >/dev/null || packages+=(munge)
  if [ "$accounting" = 1 ]; then
    command -v slurmdbd >/dev/null || packages+=(slurmdbd)
    command -v mariadbd >/dev/null || packages+=(mariadb-server)
  fi
  [ ${#packages[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || impossible "apt-get is not here: install ${packages[*]} yourself"
  say "installing ${packages[*]}"
  if [ ! -e $guard ]; then # the packages would start daemons of their own
    printf '#!/bin/sh\nexit 101\n' >$guard
    chmod +x $guard
    guarded=1
  fi
  local done_well=''
  if fetch_packages "${packages[@]}" || { apt-get update -q >>"$dir/log/apt.log" 2>&1 && fetch_packages "${packages[@]}"; }; then
    done_well=1
  fi
  if [ -n "$guarded" ]; then rm -f $guard; fi
  [ -n "$done_well" ] || impossible "apt-get could not install ${packages[*]}: see $dir/log/apt.log"
}

fetch_packages() {
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends "$@" \
    >>"$dir/log/apt.log" 2>&1
}

# --- configuration

write_configuration() {
  local i name host accounting_lines
  host=$(cat /proc/sys/kernel/hostname)
  accounting_lines="AccountingStorageType=accounting_storage/none"
  if [ "$accounting" = 1 ]; then
    # AccountingStoragePass names munge's socket.
    accounting_lines="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/run/munge.socket"
  fi
  {
    cat <<CONFIGURATION
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job begins once the credential of its last start is out of date; less than 5 would count as the default, 120.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
# Numbers of jobs, and with them the ports of their ranks, differ between testbeds.
FirstJobId=$((1 + 200 * slot))
MaxArraySize=1001
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
$accounting_lines
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2
EnforcePartLimits=ALL
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=$node_timeout
KillWait=5
CompleteWait=0
UnkillableStepTimeout=20
MinJobAge=600
# A silent node counts as down after two of these and NODE_TIMEOUT.
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=20
CONFIGURATION
    if [ "$gpus" -gt 0 ]; then echo "GresTypes=gpu"; fi
    for ((i = 1; i <= nodes; i++)); do
      name=n$i
      echo "NodeName=$name NodeHostname=$name NodeAddr=$subnet.$i Port=$((port + 10 + i)) CPUs=$cpus Boards=1" \
        "SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory" \
        "$([ "$gpus" -eq 0 ] || echo "Gres=gpu:$gpus ")State=UNKNOWN"
    done
    echo "PartitionName=testbed Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 State=UP OverSubscribe=NO"
  } >"$SLURM_CONF.new"
  echo "CgroupAutomount=no" >"$dir/cgroup.conf"
  : >"$dir/gres.conf"
  if [ "$gpus" -gt 0 ]; then
    # Character devices with the names of real ones: Slurm then sets CUDA_VISIBLE_DEVICES.
    for ((i = 0; i < gpus; i++)); do
      [ -e "$dir/dev/nvidia$i" ] || mknod -m 666 "$dir/dev/nvidia$i" c 1 3
      echo "Name=gpu File=$dir/dev/nvidia$i"
    done >"$dir/gres.conf"
  fi
  {
    echo "127.0.0.1 localhost $host"
    for ((i = 1; i <= nodes; i++)); do echo "$subnet.$i n$i"; done
  } >"$dir/hosts"
}

# --- start; every daemon closes the lock (descriptor 9)

start_munge() {
  daemon_pid munged munged >/dev/null && return 0
  rm -f "$dir"/run/munge.socket*
  if [ ! -s "$dir/munge.key" ]; then (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key"); fi
  munged --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" --num-threads=4 </dev/null 9>&- ||
    die "munged did not start: see $dir/log/munged.log"
}

start_database() {
  [ "$accounting" = 1 ] || return 0
  local socket=$dir/run/mariadbd.sock
  if ! daemon_pid mariadbd mariadbd >/dev/null; then
    if [ ! -d "$dir/mysql/mysql" ]; then
      mkdir -p "$dir/mysql"
      mariadb-install-db --no-defaults --user=root --datadir="$dir/mysql" --auth-root-authentication-method=normal \
        --skip-test-db >"$dir/log/mariadb-install.log" 2>&1 || die "MariaDB: see $dir/log/mariadb-install.log"
    fi
    setsid mariadbd --no-defaults --user=root --datadir="$dir/mysql" --socket="$socket" \
      --pid-file="$dir/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$((port + 2)) --performance-schema=OFF \
      --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-flush-log-at-trx-commit=0 \
      --log-error="$dir/log/mariadbd.log" </dev/null >/dev/null 2>&1 9>&- &
    wait_for 60 "MariaDB (see $dir/log/mariadbd.log)" mariadb --no-defaults --socket="$socket" -uroot -e \
      "CREATE DATABASE IF NOT EXISTS slurm;
       CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm', 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
       GRANT ALL ON slurm.* TO 'slurm'@'localhost', 'slurm'@'127.0.0.1'"
  fi
  daemon_pid slurmdbd slurmdbd >/dev/null && return 0
  (umask 077 && cat >"$dir/slurmdbd.conf") <<CONFIGURATION
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
CONFIGURATION
  slurmdbd </dev/null 9>&- || die "slurmdbd did not start: see $dir/log/slurmdbd.log"
  wait_for 60 "slurmdbd (see $dir/log/slurmdbd.log)" timeout 10 sacctmgr -n -i show cluster
  sacctmgr -i add cluster testbed >/dev/null 2>&1 || true
  sacctmgr -i add account default Cluster=testbed >/dev/null 2>&1 || true
  sacctmgr -i add user root Account=default >/dev/null 2>&1 || true
}

start_controller() {
  daemon_pid slurmctld slurmctld >/dev/null && return 0
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    die "port $port is in use: choose another TESTBED_SLOT"
  fi
  slurmctld </dev/null 9>&- || die "slurmctld did not start: $(tail -n 3 "$dir/log/slurmctld.log")"
}

start_node() { # NODE, in namespaces of its own: there `hostname` is the node's name, and the nodes' names resolve
  daemon_pid "slurmd-$1" slurmd >/dev/null && return 0
  mkdir -p "$dir/spool/$1"
  # shellcheck disable=SC2016 # the arguments are for the inner shell
  env -i SLURM_CONF="$SLURM_CONF" PATH="$PATH" HOME="${HOME:-/root}" \
    unshare --uts --mount --propagation private sh -ec '
      echo "$1" >/proc/sys/kernel/hostname
      readlink /proc/self/ns/uts >"$2/run/uts-$1"
      mount --bind "$2/hosts" /etc/hosts
      exec slurmd -N "$1"' sh "$1" "$dir" </dev/null 9>&- || die "slurmd of $1 did not start: see $dir/log/slurmd-$1.log"
}

wait_for() { # SECONDS WHAT COMMAND...
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$until" ] || die "no answer from $what"
    sleep 0.1
  done
}

all_idle() { [ "$(sinfo -h -N -p testbed -o %t | grep -cE '^(idle|mix|alloc|comp)$')" -ge "$nodes" ]; }
node_is_up() { case $(sinfo -h -N -n "$1" -o %t) in idle | mix | alloc | comp) ;; *) return 1 ;; esac }

# --- commands

up() {
  [ "$(id -u)" = 0 ] || impossible "needs root: slurmd starts processes as other users, and nodes have namespaces of their own"
  [ ${#dir} -lt 80 ] || die "TESTBED_DIR=$dir is too long for the path of a socket"
  if [ "$slot" -lt 0 ] || [ "$slot" -gt 49 ]; then die "TESTBED_SLOT must be 0 to 49, got $slot"; fi
  unshare --uts --mount true 2>/dev/null || impossible "unshare is not allowed here: nodes need namespaces of their own"
  mkdir -p "$dir"/{run,log,state,spool,dev}
  chmod 755 "$dir" "$dir/run" # munge wants everybody to reach its socket
  exec 9>"$dir/lock"
  flock -w 300 9 || die "another 'up' is at work in $dir"
  install_missing
  write_configuration
  if [ -e "$SLURM_CONF" ] && ! cmp -s "$SLURM_CONF" "$SLURM_CONF.new"; then
    say "other settings than last time: starting from nothing"
    down
    rm -rf "$dir"/{state,spool,mysql}
    mkdir -p "$dir"/{state,spool}
  fi
  mv "$SLURM_CONF.new" "$SLURM_CONF"
  start_munge
  start_database
  start_controller
  local name
  for name in $(names); do start_node "$name"; done
  wait_for 60 "the nodes (see $dir/log)" all_idle
  say "$(sinfo -V), $nodes nodes; eval \"\$($0 env)\" to use it"
}

down() {
  local name pid
  if daemon_pid slurmctld slurmctld >/dev/null; then timeout 10 scancel --quiet -u root 2>/dev/null || true; fi
  # The controller first: it would wait for an answer from nodes that are gone.
  if pid=$(daemon_pid slurmctld slurmctld); then end_process "$pid" 20; fi
  for name in $(cd "$dir/spool" 2>/dev/null && ls); do kill_node "$name"; done
  for name in slurmdbd mariadbd munged; do
    if pid=$(daemon_pid "$name" "$name"); then end_process "$pid" 20; fi
  done
}

status() {
  local name pid result=0
  for name in munged slurmctld; do
    if pid=$(daemon_pid "$name" "$name"); then echo "$name: pid $pid"; else
      echo "$name: not running"
      result=3
    fi
  done
  for name in $(names); do
    if pid=$(daemon_pid "slurmd-$name" slurmd); then echo "$name: pid $pid"; else
      echo "$name: not running"
      result=3
    fi
  done
  if daemon_pid slurmctld slurmctld >/dev/null; then
    sinfo -N -o '%8N %8t %4c %8m %10G %E' || result=3
    squeue || result=3
  fi
  return $result
}

fail() {
  [ -e "$dir/run/uts-$1" ] || die "there is no running node $1"
  kill_node "$1"
  say "$1 has crashed; slurmctld notices within $((node_timeout + 15)) s or so"
}

recover() {
  start_node "$1"
  local until=$((SECONDS + 60))
  until node_is_up "$1"; do
    [ $SECONDS -lt $until ] || die "$1 does not come back: $(sinfo -h -N -n "$1" -o '%t %E')"
    scontrol update nodename="$1" state=resume 2>/dev/null || true
    sleep 0.5
  done
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF PATH=\$PATH:/usr/sbin" ;;
  fail | recover) "$1" "${2:?which node?}" ;;
  purge)
    down
    rm -rf "$dir"
    ;;
  *)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
