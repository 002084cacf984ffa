#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher, started on one of them. Goes on from the newest checkpoint.
#
#   scripts/launch_deepspeed.sh HOSTFILE --config configs/x.yaml [section.key=value …] [--resume PATH]
#
# HOSTFILE has a line `host slots=GPUS` for each host. All of them see this folder under the same path.
#
# MASTER_ADDR, MASTER_PORT   where the ranks meet (default: the first host's address, 29500)
# DS_ENV_FILE                file of NAME=value lines that every rank's environment gets (DeepSpeed's; default .deepspeed_env)
# SSH_TIMEOUT                seconds that a host may take to answer (default 10)
hostfile=$(realpath -m "${1:-}" 2>/dev/null || true)  # before the folder changes
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
[ $# -ge 2 ] || refuse "usage: scripts/launch_deepspeed.sh HOSTFILE --config CONFIG [section.key=value …]"
name=$1
shift
[ -f "$hostfile" ] || refuse "$name: no such hostfile; the first argument is a file of lines 'host slots=GPUS'"

hosts=() number=0
declare -A line_of
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  line=${line%%#*}
  [[ $line =~ [^[:space:]] ]] || continue
  [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
    refuse "$name, line $number: must read 'host slots=GPUS', not '${line#"${line%%[![:space:]]*}"}'"
  host=${BASH_REMATCH[1]}
  [ -z "${line_of[$host]:-}" ] || refuse "$name, line $number: host '$host' is in line ${line_of[$host]} already"
  line_of[$host]=$number
  hosts+=("$host")
done < "$hostfile"
[ ${#hosts[@]} -gt 0 ] || refuse "$name: names no host; it needs lines 'host slots=GPUS'"

needs deepspeed "run scripts/test.sh or scripts/quickstart.sh once, which make .venv"
needs ssh "install an ssh client"
needs pdsh "install pdsh, by which DeepSpeed starts the ranks"

# DeepSpeed would start the ranks that it can reach, and those would wait for the others
answers=$(mktemp -d)
trap 'rm -rf "$answers"' EXIT
for host in "${hosts[@]}"; do
  (
    code=0
    timeout $((2 * ${SSH_TIMEOUT:-10})) ssh -n -o BatchMode=yes -o ConnectTimeout="${SSH_TIMEOUT:-10}" "$host" true \
      >/dev/null 2>"$answers/${line_of[$host]}" || code=$?
    [ $code != 0 ] || rm "$answers/${line_of[$host]}"
  ) &
done
wait
unreachable=()
for host in "${hosts[@]}"; do
  answer="$answers/${line_of[$host]}"
  [ ! -e "$answer" ] || unreachable+=("'$host' (line ${line_of[$host]}: $(tail -n 1 "$answer" | tr -d '\r' | sed 's/^$/no answer/'))")
done
if [ ${#unreachable[@]} -gt 0 ]; then
  printf -v list '%s, ' "${unreachable[@]}"
  refuse "$name: cannot log in without a password by ssh to ${list%, }; see to its sshd and your key, or remove the line"
fi

check_config "$@"
rm -rf "$answers"
trap - EXIT
quiet_deepspeed "$@"
exec deepspeed ${launcher_flags[@]+"${launcher_flags[@]}"} --hostfile "$hostfile" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} \
  jepa_scale/train.py --resume auto "$@"
