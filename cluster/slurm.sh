#!/usr/bin/env bash
# A search on a Slurm cluster: Ray's head beside the driver on the first node, workers on the others.
#
#   sbatch cluster/slurm.sh --name runs10 --storage /shared/searches -- --space runs10 --data /shared/cityscapes
#
# Given in the project's folder, on a file system that all nodes share, after `make setup` there. Slurm runs the job again
# when it was preempted, lost a node, or came to its time limit; it then resumes from storage. What is before `--` names
# the search, what follows are flags of tune_bisenet.run.
#
# EDIT: what your Slurm calls its partition, account and GPUs; all of it can be given to sbatch instead.
#SBATCH --job-name=tune-bisenet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
#SBATCH --output=tune-bisenet-%j.log
set -euo pipefail

GRACE_SECONDS=150  # for the driver to write down where it is; below the 180 above
RESTARTABLE=75     # Ray died under the driver: the exit code of tune_bisenet.run

cd "${SLURM_SUBMIT_DIR:?run this by sbatch}"
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD"

# One token for this job, in a file that only its user can read; every Ray below needs it.
umask 077
private="$HOME/.tune_bisenet-$SLURM_JOB_ID"
mkdir -p "$private"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
umask 022

# Ray's own files, on each node's disk. The name is short, since a socket's path may have 107 characters; and two jobs may
# share a node, so nothing has a fixed name.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
port=$((20000 + SLURM_JOB_ID % 20000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

driver=''
end() {
  trap - TERM INT EXIT
  [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true
  # shellcheck disable=SC2046  # a list of numbers
  kill $(jobs -p) 2> /dev/null || true
  wait || true
  rm -rf "$private"
}

# Preempted, or near the time limit: the driver flushes its state, and the job goes back into the queue.
preempted() {
  trap '' TERM
  echo "SIGTERM at $(date -Is): ending the driver, to resume later"
  if [ -n "$driver" ]; then
    kill -TERM "$driver" 2> /dev/null || true
    timeout "$GRACE_SECONDS" tail --pid="$driver" -f /dev/null || true
  fi
  end
  scontrol requeue "$SLURM_JOB_ID" || true
  exit 143
}
trap preempted TERM
trap end EXIT

# On a node: run Ray until SIGTERM, and leave nothing of it behind.
# shellcheck disable=SC2016  # the node's shell is the one to fill this in
node='mkdir -p -m 700 "$RAY_TMPDIR"
ray start "$@" --block --temp-dir="$RAY_TMPDIR" &
trap "kill -TERM $! 2> /dev/null" TERM
wait
wait
rm -rf "$RAY_TMPDIR"'

start() {  # start NODE FLAGS...
  local where=$1
  shift
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$where" bash -c "$node" ray "$@" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" &
}

start "$head" --head --node-ip-address="$address" --port="$port" --include-dashboard=false
for _ in $(seq 60); do
  ray health-check --address "$address:$port" > /dev/null 2>&1 && break
  sleep 2
done
for other in "${nodes[@]:1}"; do
  start "$other" --address="$address:$port"
done

bash cluster/search.sh "$@" --address "$address:$port" &
driver=$!
code=0
wait "$driver" || code=$?
driver=''
if [ "$code" = "$RESTARTABLE" ]; then
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
