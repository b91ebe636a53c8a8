#!/usr/bin/env bash
# A real Slurm on this machine, for tests: munge, slurmctld and virtual nodes on loopback, without systemd or cgroups.
#
#   scripts/slurm_local.sh install                   Debian's packages, where they are missing (as root, or by sudo)
#   scripts/slurm_local.sh up DIR [NODES=2] [CPUS=4]  start; prints the line that makes sbatch and squeue speak to it
#   scripts/slurm_local.sh down DIR                  end its jobs and stop what `up DIR` started, and nothing else
#
# All state is below DIR, and ports and the first job's number are its own, so several can run side by side. The nodes n1,
# n2, … have no host names: processes of several nodes meet at MASTER_ADDR=127.0.0.1 with GLOO_SOCKET_IFNAME=lo.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
PACKAGES=(munge slurmctld slurmd slurm-client)
PROGRAMS=(munged slurmctld slurmd sbatch)

fail() { echo "slurm_local.sh: $*" >&2; exit 1; }
usage() { fail "usage: slurm_local.sh install | up DIR [NODES] [CPUS] | down DIR"; }
missing() { local p; for p in "${PROGRAMS[@]}"; do command -v "$p" >/dev/null || echo "$p"; done; }

install_packages() {
  [ -n "$(missing)" ] || return 0
  command -v apt-get >/dev/null || fail "no apt-get here: install Slurm and munge by hand"
  local as=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "neither root nor sudo: ask for apt-get install ${PACKAGES[*]}"
    as=(sudo)
  fi
  "${as[@]}" apt-get update -qq
  "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${PACKAGES[@]}"
}

# --- starting -------------------------------------------------------------------------------------------------------

# Neither among those of outgoing connections (from 32768) nor those that Lightning and denoiselab make of a job's number
# (15000 to 24999).
free_ports() {  # COUNT: the first of as many consecutive ports that nobody listens on
  local first port _
  for _ in {1..50}; do
    first=$((25000 + RANDOM % 7000))
    for ((port = first; port < first + $1; port++)); do
      if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    echo "$first"
    return
  done
  fail "no free ports"
}

write_config() {  # NODES CPUS
  local host user port
  host=$(hostname -s) user=$(id -un) port=$(free_ports $(($1 + 1)))
  cat >"$DIR/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# jobs of two Slurms on one machine would else make the same port of the same number
FirstJobId=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# a requeued job waits for as long as a credential lives
AuthInfo=socket=$DIR/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/pid/slurmctld
SlurmdPidFile=$DIR/pid/%n
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdLogFile=$DIR/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=300
MaxArraySize=1001
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
END
  local i
  for ((i = 1; i <= $1; i++)); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$2 RealMemory=8000 State=UNKNOWN"
  done >>"$DIR/slurm.conf"
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$DIR/slurm.conf"
}

daemon() { "$@" 2>>"$DIR/log/up" || { echo "could not start: $*" >>"$DIR/log/up" && return 1; }; }

start() {  # NODES CPUS: fails unless every node is idle within some seconds
  local i idle
  mkdir -p "$DIR"/{state,log,spool,munge,pid}
  (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
  write_config "$1" "$2" || return 1
  # --force: a folder above DIR may be the user's alone, which munge calls an error
  daemon munged --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --seed-file="$DIR/munge/seed" \
    --pid-file="$DIR/pid/munged" --log-file="$DIR/log/munged" || return 1
  daemon slurmctld -c -f "$DIR/slurm.conf" || return 1
  for ((i = 1; i <= $1; i++)); do
    mkdir -p "$DIR/spool/n$i"
    daemon slurmd -c -f "$DIR/slurm.conf" -N "n$i" || return 1
  done
  for i in {1..100}; do
    idle=$(timeout 10 sinfo -h -N -t idle -o %N 2>>"$DIR/log/up" | sort -u | wc -l) || true
    [ "$idle" != "$1" ] || return 0
    [ "$i" -lt 10 ] || [ "$(ours daemons | wc -l)" = $(($1 + 2)) ] || return 1  # one has ended
    sleep 0.2
  done
  return 1
}

up() {  # NODES CPUS
  local attempt
  [ -z "$(missing)" ] || fail "$(missing | paste -sd' ') not found: scripts/slurm_local.sh install"
  [ -z "$(ours)" ] || fail "$DIR: is up already"
  for attempt in 1 2 3; do  # somebody may have taken a port in between
    if start "$1" "$2"; then
      echo "export SLURM_CONF=$DIR/slurm.conf"
      return
    fi
    down
  done
  tail -n 5 "$DIR"/log/* >&2
  fail "Slurm did not start, in $attempt attempts: see $DIR/log"
}

# --- stopping -------------------------------------------------------------------------------------------------------

group_of() { sed 's/.*) [A-Za-z] [0-9]* \([0-9]*\) .*/\1/' "/proc/$1/stat" 2>/dev/null; }

# Process groups are known by what a process in them was started with: all have DIR's configuration in their environment, and
# Slurm's own a name of Slurm's, those of jobs the name of a node. The caller's shell has neither.
ours() {  # [daemons]
  local file name
  grep -lzsxF "SLURM_CONF=$DIR/slurm.conf" /proc/[0-9]*/environ | while read -r file; do
    name=$(cat "${file%environ}comm" 2>/dev/null) || continue
    case ${1-}:$name in
      *:munged | *:slurmctld | *:slurmd | :slurmstepd*) ;;
      :*) grep -qzs '^SLURMD_NODENAME=' "$file" || continue ;;
      *) continue ;;
    esac
    group_of "$(basename "${file%/environ}")" || true
  done | sort -u | grep -vx "$(group_of $$)" || true
}

down() {  # its state is of no use any more, so nobody is asked to end: the daemons would wait for one another
  local group _
  for _ in {1..50}; do
    [ -n "$(ours)" ] || break
    for group in $(ours); do
      kill -KILL -- "-$group" 2>/dev/null || true
    done
    sleep 0.1
  done
  rm -f "$DIR"/munge/{socket,key} "$DIR"/pid/*
  [ -z "$(ours)" ] || fail "$DIR: the process groups $(ours | paste -sd' ') could not be stopped"
}

folder() {  # Slurm's files cannot quote, and a socket's path is short
  DIR=$(realpath -m -- "${1:?}")
  [[ $DIR =~ ^[A-Za-z0-9._/-]{2,60}$ ]] || fail "$DIR: a path of at most 60 letters, digits and ._/- is needed"
  export SLURM_CONF=$DIR/slurm.conf
}

case ${1-}:$# in
  install:1) install_packages ;;
  up:[234])
    folder "$2"
    [[ ${3-2} =~ ^[1-9][0-9]?$ && ${4-4} =~ ^[1-9][0-9]*$ ]] || usage
    up "${3-2}" "${4-4}"
    ;;
  down:2) folder "$2"; down ;;
  *) usage ;;
esac
