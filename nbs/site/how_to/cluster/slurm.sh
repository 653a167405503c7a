#!/usr/bin/env bash
# The published protocol on Slurm: Ray over the nodes of one job, and `aimfair reproduce` on it.
#
#   grep -n 'FILL IN' slurm.sh    # what to change
#   sbatch slurm.sh
#
# Preempted or short of time, the job goes back into the queue, and then goes on from what is in the store.

#SBATCH --job-name=aimfair
#SBATCH --partition=gpu          # FILL IN: a partition with GPUs
#SBATCH --nodes=2                # FILL IN: how many machines; one is enough
#SBATCH --gpus-per-node=4        # FILL IN: GPUs of each
#SBATCH --cpus-per-task=32       # FILL IN: CPUs of each, some eight for a GPU
#SBATCH --mem=128G               # FILL IN: memory of each, some 32 GB for a GPU
#SBATCH --time=24:00:00          # FILL IN: how long at a time; the job comes back until all is done
#SBATCH --ntasks-per-node=1
#SBATCH --output=aimfair-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@300

set -euo pipefail

environment=/shared/aimfair/venv         # FILL IN: where `pip install aimfair[ray,s3,hub]` was done, seen by every node
store=/shared/aimfair/store              # FILL IN: a folder that every node sees, or s3://BUCKET/PREFIX
out=/shared/aimfair/results              # FILL IN: folder of tables and figures
export AIMFAIR_CELEBA=/shared/celeba     # FILL IN: CelebA, seen by every node
export AIMFAIR_UTKFACE=/shared/utkface   # FILL IN: UTKFace, which one experiment is about
export HF_HOME=/shared/huggingface       # FILL IN: models of the hub; fetch them beforehand where nodes have no network
export TORCH_HOME=/shared/torch          # FILL IN: ImageNet weights, likewise

# shellcheck source=/dev/null
source "$environment/bin/activate"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# other jobs on these machines have other ports and folders, and no token
address=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$((11000 + SLURM_JOB_ID % 20000))
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
folder=/tmp/ray-$SLURM_JOB_ID
ray_nodes=() command=

on() {  # NODE COMMAND...: with all that the job has of a node
  exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task="$SLURM_CPUS_PER_TASK" "${@:2}"
}

start_ray() {  # NODE OPTIONS...: tried again where a machine was too slow, or the node of Ray is lost
  # shellcheck disable=SC2016  # expanded by the other bash
  on "$1" bash -c 'for _ in 1 2 3; do ray start --block "$@" && exit; sleep 5; done; exit 1' _ \
    --num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=1000000000 --min-worker-port=0 --max-worker-port=0 "${@:2}" &
  ray_nodes+=($!)
}

wait_for_nodes() {  # N: until so many nodes of Ray are there, or one of them has failed
  python -c '
import socket, sys, time
import ray
address, wanted = sys.argv[1], int(sys.argv[2])
deadline, there = time.monotonic() + 600, 0
while there < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"aimfair: after ten minutes {there} of {wanted} nodes of Ray are there")
    time.sleep(1)
    try:
        socket.create_connection(address.rsplit(":", 1), timeout=5).close()
        ray.init(address, ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
        there = sum(node["Alive"] for node in ray.nodes())
    except (OSError, RuntimeError):  # not yet
        ray.shutdown()
' "$address" "$1" &
  command=$!
  local status=0
  wait -n "$command" "${ray_nodes[@]}" || status=$?
  if kill -0 "$command" 2>/dev/null; then  # it was one of the others that ended
    echo "aimfair: a node of Ray did not start; see above" >&2
    status=1
  fi
  return "$status"
}

clean_up() {  # no process and no file of Ray stays; after a failure its logs do, beside the output
  local status=$?
  trap '' USR1 TERM
  kill ${command:+"$command"} ${ray_nodes[@]+"${ray_nodes[@]}"} 2>/dev/null || true
  wait
  for node in "${nodes[@]}"; do
    if ((status)); then
      # shellcheck disable=SC2016  # expanded by the other bash
      (on "$node" bash -c 'mkdir -p "$1" && cp -r "$2/session_latest/logs/." "$1"' _ "ray-$SLURM_JOB_ID/$node" "$folder") || true
    fi
    (on "$node" rm -rf "$folder") || true
  done
  rm -rf "$folder"  # a job that was cancelled starts nothing any more
  return "$status"
}

go_back() {  # into the queue, some minutes before the time is up
  echo "aimfair: the time is nearly up; back into the queue"
  trap - EXIT
  (exit 0)
  clean_up
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

trap clean_up EXIT
trap go_back USR1
trap 'exit 143' TERM

echo "aimfair: ${#nodes[@]} nodes, begun ${SLURM_RESTART_COUNT:-0} times before, Ray at $address"
start_ray "${nodes[0]}" --head --port="${address##*:}" --temp-dir="$folder" --include-dashboard=false
wait_for_nodes 1
for node in "${nodes[@]:1}"; do
  start_ray "$node" --address="$address"
done
wait_for_nodes "${#nodes[@]}"

# in the background: signals are heeded while bash waits, not while a command runs in the foreground
aimfair reproduce --profile paper --on ray="$address" --store "$store" --out "$out" &
command=$!
wait "$command"
