#!/usr/bin/env bash
# What runs on a TPU worker, out of the unpacked source: the environment, and a job in it.
#
#   worker.sh run COMMAND...         installs, then becomes COMMAND (GKE: the container's process)
#   worker.sh start LOGS COMMAND...  installs, then leaves COMMAND running in the background; its log goes to the
#                                    directory LOGS (gs://...) when it ends. Does nothing where it is running already.
#   worker.sh follow                 the numbered lines of the job's log, until it ends
#   worker.sh status                 waits until the job has ended, then says with which exit status
#
# HF_SECRET=projects/ID/secrets/NAME: HF_TOKEN is read from there by the worker, so that it is in no command.
set -euo pipefail

python=3.11 # the constraints were made with it; the system's is older
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
job=$HOME/vdjax/job # one a machine, whatever its commit: a TPU is held by one process

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 64 # none that installing or the job ends with
}

# The environment of this source: once, as its last step leaves a mark.
install() {
  local uv=$root/uv/bin/uv pins=$root/tpu/constraints.txt
  if [[ ! -e $root/env/installed ]]; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$root/uv" --upgrade --constraint "$pins" uv
    "$uv" venv --quiet --clear --python "$python" "$root/env"
    "$uv" pip install --quiet --python "$root/env" --constraint "$pins" --build-constraint "$pins" \
      "vdjax[tpu] @ file://$root"
    touch "$root/env/installed"
  fi
  export PATH=$root/env/bin:$PATH PYTHONUNBUFFERED=1
  cd "$root"
}

start() {
  local logs=$1
  shift
  mkdir -p "$job"
  exec 9>>"$job/lock" # held as long as the job lives
  if ! flock --nonblock 9; then
    [[ $(<"$job/command") == "${*@Q}" ]] || fail "$(hostname) is running another command: $(<"$job/command")"
    return
  fi
  install
  if [[ ${HF_SECRET:-} ]]; then
    HF_TOKEN=$(gcloud secrets versions access "$HF_SECRET/versions/latest")
    export HF_TOKEN
  fi
  printf '%s\n' "${*@Q}" >"$job/command"
  rm -f "$job/status"
  # In a session of its own and deaf to SIGHUP, so that it outlives this ssh connection.
  nohup setsid bash "$root/tpu/worker.sh" job "$logs" "$@" >"$job/log" 2>&1 </dev/null &
  printf '%s\n' $! >"$job/pid"
}

run_job() {
  local logs=$1 status=0
  shift
  # A machine that shuts down sends SIGTERM to all its processes: this one must live to write down the job's status.
  trap : TERM
  "$@" 9>&- || status=$?
  printf '%s\n' "$status" >"$job/status.new"
  mv "$job/status.new" "$job/status"
  gcloud storage cp --quiet "$job/log" "$logs/$(hostname)-$(date -u +%Y%m%d-%H%M%S).txt" >/dev/null 2>&1 || true
}

case ${1:-} in
  run) shift; install; exec "$@" ;;
  start) shift; start "$@" ;;
  job) shift; run_job "$@" ;;
  follow) tail --lines=+1 --follow --pid="$(<"$job/pid")" "$job/log" | cat -n ;;
  status)
    flock "$job/lock" true
    # No status: the machine went down, and the job with it.
    printf 'vdjax-status %s %s\n' "$(cat "$job/status" 2>/dev/null || echo lost)" "$(hostname)"
    ;;
  *) fail "${1:-nothing}: expected run, start, follow or status" ;;
esac
