#!/usr/bin/env bash
# Trains with torchrun; started alike on every node. A rank that ends badly makes all start again from the newest checkpoint.
#
#   NNODES=4 RDZV_ENDPOINT=node0:29400 scripts/launch_torchrun.sh --config configs/x.yaml [section.key=value …] [--resume PATH]
#
# NNODES           how many nodes (default 1)
# NPROC_PER_NODE   ranks on this node (default auto: its GPUs, or its cores if it has none)
# RDZV_ENDPOINT    host:port of one of the nodes, the same on all; needed with several nodes
# RDZV_ID          name of the job, the same on all (default jepa-scale)
# MAX_RESTARTS     how often the ranks may be started again (default 3)
# RDZV_WAIT        seconds that the endpoint's host name may take to be known (default 0; a new pod's takes a while)
# LOCAL_ADDR       this node's address for the others, where its host name does not give it
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
[ $# -ge 1 ] || refuse "usage: [NNODES=N RDZV_ENDPOINT=host:port] scripts/launch_torchrun.sh --config CONFIG [section.key=value …]"
nodes=${NNODES:-1} restarts=${MAX_RESTARTS:-3} endpoint=${RDZV_ENDPOINT:-}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "NNODES: must be a number of nodes, not '$nodes'"
[[ $restarts =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS: must be a number, not '$restarts'"
[ "$nodes" = 1 ] || [ -n "$endpoint" ] || refuse "RDZV_ENDPOINT: needed with NNODES=$nodes; give host:port of one of the nodes"
[ -z "$endpoint" ] || [[ $endpoint =~ ^.+:[0-9]+$ ]] || refuse "RDZV_ENDPOINT: must look like host:port, not '$endpoint'"

settings=()
if [ -n "$endpoint" ]; then
  # torchrun compares host names to find whether the endpoint is here, and is wrong if the name is of another interface
  host=${endpoint%:*}
  deadline=$((SECONDS + ${RDZV_WAIT:-0}))
  until address=$(getent ahosts "$host" | awk 'NR == 1 { print $1 }') && [ -n "$address" ]; do
    [ $SECONDS -lt $deadline ] || break
    sleep 2
  done
  [ -n "$address" ] || refuse "RDZV_ENDPOINT: no address is known for host '$host'"
  here=false
  case " $(hostname -I) 127.0.0.1 ::1 " in *" $address "*) here=true ;; esac
  settings=(--rdzv-conf "is_host=$here")
fi

# Otherwise all rounds share one store, where a rank that starts early finds the addresses of ranks that have ended. Where there is one
# round alone, sharing is better: the launcher holds the ranks' port, which anybody could take before rank 0 has begun to listen.
if [ "$nodes" != 1 ] || [ "$restarts" != 0 ]; then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; fi
needs torchrun "run scripts/test.sh or scripts/quickstart.sh once, which make .venv"
check_config "$@"
preload_tcmalloc
exec torchrun --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "${endpoint:-localhost:0}" --rdzv-id "${RDZV_ID:-jepa-scale}" \
  "${settings[@]}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} jepa_scale/train.py --resume auto "$@"
