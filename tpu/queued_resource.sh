#!/usr/bin/env bash
# Runs an experiment on a slice of TPU VMs that it requests as a queued resource, and watches it to its end.
#
#   tpu/queued_resource.sh --project ID --zone ZONE --topology v5e:8x8 --config configs/NAME.py[:ARG] \
#       --workdir gs://BUCKET/DIRECTORY [--config.KEY=VALUE ...] [OPTION ...] [-- what the module takes]
#
#   --print                shows every command and runs none
#   --spot                 requests Spot capacity, which is cheaper and may be taken away
#   --slices N             N slices of that topology, joined by the data-center network (1)
#   --module vdjax.study   runs a study instead of an experiment (vdjax.main)
#   --commit REVISION      what is installed and run (HEAD)
#   --name NAME            of the queued resource (the end of the workdir)
#   --runtime VERSION      the software version of the TPU VMs (that of the generation in topologies.txt)
#   --hf_secret NAME       a secret of Secret Manager with a Hugging Face token, for gated models
#   --create_flag=--FLAG   one more flag for `gcloud compute tpus queued-resources create`; may be repeated
#   --ssh_flag=--FLAG      one more for `gcloud compute tpus queued-resources ssh`, such as --tunnel-through-iap
#   --keep                 leaves the slice when the job has ended; else it is deleted, as it costs money
#   --tensorboard PORT     of TensorBoard on this machine (6006; 0: none)
#   --poll SECONDS         between two looks at the queued resource (30)
#
# The job goes on when this script is stopped; the same command finds it again. A preempted slice is deleted and
# requested again. Exit status: 0 finished, 2 wrong options, otherwise that of the job.

# shellcheck source=tpu/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option+=([runtime]=auto [keep]=no [create_flag]=none [ssh_flag]=none)
expected+=([runtime]='a TPU software version' [create_flag]='--FLAG' [ssh_flag]='--FLAG')
pattern+=([runtime]='[a-z0-9.-]+' [create_flag]='none|--.+' [ssh_flag]='none|--.+')
repeated=(create_flag ssh_flag) create_flag=() ssh_flag=()
prepare "$@"
needs git gcloud

name=${option[name]}
place=(--project "${option[project]}" --zone "${option[zone]}")
[[ ${option[runtime]} == auto ]] || runtime=${option[runtime]}
folder=vdjax/${commit:0:12} # on the workers
logs=${option[workdir]}/launch/logs

request() {
  local nodes=(--node-id "$name") spot=()
  ((option[slices] == 1)) || nodes=(--node-count "${option[slices]}" --node-prefix "$name")
  [[ ${option[spot]} == no ]] || spot=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --accelerator-type "$accelerator" \
    --runtime-version "$runtime" "${nodes[@]}" "${spot[@]}" "${create_flag[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Prints the state of the queued resource, nothing where there is none; fails where Google Cloud does not answer.
state() {
  run gcloud compute tpus queued-resources list "${place[@]}" --filter "name~/$name\$" --format 'value(state.state)'
}

# on_workers NODES WORKERS COMMAND: on all of them at the same time. ssh itself gives up on a machine that is gone,
# else a log would be waited for that never goes on.
on_workers() {
  run gcloud compute tpus queued-resources ssh "$name" "${place[@]}" --node "$1" --worker "$2" --batch-size all \
    --quiet --ssh-flag "-oConnectTimeout=30 -oServerAliveInterval=30" "${ssh_flag[@]}" --command "$3"
}

# Brings the source onto every worker, installs it and starts the job, each only where that is not so already.
start() {
  local secret=() words
  [[ ${option[hf_secret]} == none ]] || secret=(HF_SECRET="projects/${option[project]}/secrets/${option[hf_secret]}")
  # %q: what stands in the words reaches the module as it is, through the shell at the other end of ssh.
  printf -v words ' %q' env "${secret[@]}" bash "$folder/tpu/worker.sh" start "$logs" "${job[@]}"
  on_workers all all "test -e $folder || { mkdir -p $folder.new && gcloud storage cp $source - |\
 tar xz -C $folder.new && mv $folder.new $folder; } &&$words"
}

# The numbered lines of the first worker's log, until the job ends there.
follow() {
  on_workers 0 0 "bash $folder/tpu/worker.sh follow"
}

# A line from every worker when the job has ended there.
status() {
  on_workers all all "bash $folder/tpu/worker.sh status"
}

# Waits until the job has ended on all workers. Sets ended: lost (a worker is gone, or was restarted), else a status
# that means failure, else 75 or 76, with which the same command goes on, else 0.
wait_for_end() {
  local lines code
  ended=lost
  lines=$(status) || return 0
  [[ $lines == *vdjax-status* && $lines != *'vdjax-status lost'* ]] || return 0
  ended=0
  while read -r code; do
    case $ended,$code in
      *,0 | 7[56],7[56]) ;;
      0,* | 7[56],*) ended=$code ;;
    esac
  done < <(sed -n 's/^vdjax-status \([0-9]*\) .*/\1/p' <<<"$lines")
}

# taken_away: whether the slice stops being ACTIVE within ten looks. A worker that vanishes makes the others fail
# before Google Cloud says why.
taken_away() {
  local look now
  for ((look = 0; look < 10; look++)); do
    sleep "${option[poll]}"
    now=$(state) || now=ACTIVE
    [[ $now == ACTIVE ]] || return 0
  done
  return 1
}

finish() {
  if [[ ${option[keep]} == yes ]]; then
    note "the slice is kept, and costs money; to delete it: $(shown delete)"
  else
    delete || note "the slice could not be deleted, and costs money: $(shown delete)"
  fi
  exit "$1"
}

if [[ $printing == yes ]]; then
  echo "# commit ${commit:0:12} into the bucket"
  upload_source
  echo "# ${option[slices]} x ${option[topology]}: ${option[slices]} x $chips chips"
  request
  echo "# its state, every ${option[poll]} s"
  state
  echo "# when ACTIVE: onto all workers, install, start; after exit status 75 or 76 again"
  start
  echo "# the log, from the first worker; then how the job ended on each"
  follow
  status
  echo "# when SUSPENDED, before it is requested again; and at the end"
  delete
  echo "# all the while, on this machine"
  start_tensorboard
  exit 0
fi

trap 'note "the job goes on; the same command follows it; to end it: $(shown delete)"; exit 130' INT TERM
upload_source
start_tensorboard
requested='' before='' starts=0
while :; do
  if ! now=$(state); then
    [[ $before ]] || exit 1 # at the first question: a wrong project, or no permission
    sleep "${option[poll]}"
    continue
  fi
  [[ ${now:-none} == "$before" ]] || note "queued resource $name: ${now:-none}"
  before=${now:-none}
  case $now in
    ACTIVE)
      code=0
      start || code=$?
      if ((code == 0)); then
        starts=0 seen=0
        print_new < <(follow)
        wait_for_end
      elif ((code == 64)); then # another job runs there: not ours to end
        exit 64
      elif ((++starts < 3)); then
        ended=lost
      else
        ended=$code
      fi
      case $ended in
        0)
          note "finished; the report: gcloud storage cp ${option[workdir]}/report.html ."
          finish 0
          ;;
        75) note "interrupted, with everything saved; it goes on" ;;
        76) note "a process was lost; it goes on from the newest resume point" ;;
        lost) note "a worker cannot be reached, or was restarted; it is tried again" ;;
        *)
          note "exit status $ended; waiting whether the slice is being taken away"
          taken_away || finish "$ended"
          ;;
      esac
      ;;
    '')
      starts=0
      if request; then
        requested=yes
      else
        [[ $requested ]] || exit 1
      fi
      ;;
    SUSPENDED)
      note "the slice was taken away; it is deleted and requested again"
      delete || true
      continue
      ;;
    FAILED)
      gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'yaml(state)' >&2 || true
      delete
      exit 1
      ;;
  esac
  sleep "${option[poll]}"
done
