#!/usr/bin/env bash
# Runs an experiment on TPU slices of a GKE cluster as a JobSet, and watches it to its end.
#
#   tpu/gke_jobset.sh --project ID --zone ZONE --cluster NAME --topology v5e:8x8 --config configs/NAME.py[:ARG] \
#       --workdir gs://BUCKET/DIRECTORY [--config.KEY=VALUE ...] [OPTION ...] [-- what the module takes]
#
#   --print                shows every command and runs none
#   --zone ZONE            where the cluster is, or the region of a regional one
#   --spot                 only nodes of Spot capacity
#   --slices N             N slices of that topology, each a node pool, joined by the data-center network (1)
#   --module vdjax.study   runs a study instead of an experiment (vdjax.main)
#   --commit REVISION      what is installed and run (HEAD)
#   --name NAME            of the JobSet (the end of the workdir)
#   --namespace NAME       of the cluster (default)
#   --hf_secret NAME       a Kubernetes secret with a Hugging Face token under the key `token`, for gated models
#   --tensorboard PORT     of TensorBoard on this machine (6006; 0: none)
#   --poll SECONDS         between two looks at the JobSet (30)
#
# Node pools are yours to create and to delete (tpu/README.md). The JobSet goes on when this script is stopped; the same
# command finds it again. Exit status: 0 finished, 2 wrong options, otherwise that of the job.

# shellcheck source=tpu/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

option+=([cluster]='' [namespace]=default)
expected+=(
  [cluster]='the name of a GKE cluster' [namespace]='a Kubernetes namespace'
  [zone]='a zone or a region, such as us-east5'
)
pattern+=(
  [cluster]='[a-z]([a-z0-9-]*[a-z0-9])?' [namespace]='[a-z0-9]([a-z0-9-]*[a-z0-9])?'
  [zone]='[a-z]+-[a-z]+[0-9]+(-[a-z])?'
)
required+=(cluster)
prepare "$@"
needs git gcloud kubectl
((option[slices] == 1 || hosts > 1)) ||
  fail "--slices ${option[slices]}: several slices on GKE need more than one host each; ${option[topology]} has one"

name=${option[name]}
kubectl=(
  kubectl --context "gke_${option[project]}_${option[zone]}_${option[cluster]}" --namespace "${option[namespace]}"
)

# quoted TEXT: as a YAML string that Kubernetes leaves as it is (it reads $(NAME) in arguments; $$ stands for $).
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t} text=${text//\$/\$\$}
  printf '"%s"' "$text"
}

manifest() {
  local text word args='' spot='' secret=''
  for word in "${job[@]}"; do args+="${args:+$'\n'                    }- $(quoted "$word")"; done
  [[ ${option[spot]} == no ]] || spot='cloud.google.com/gke-spot: "true"'
  [[ ${option[hf_secret]} == none ]] ||
    secret="env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: ${option[hf_secret]}, key: token}}}]"
  text=$(sed '/^#/d' "$here/jobset.yaml")
  text=${text//@NAME@/$name} text=${text//@SLICES@/${option[slices]}} text=${text//@HOSTS@/$hosts}
  text=${text//@ACCELERATOR@/$gke_accelerator} text=${text//@SHAPE@/${option[topology]#*:}}
  text=${text//@CHIPS@/$((chips / hosts))} text=${text//@SOURCE@/$source}
  text=${text//@SPOT@/$spot} text=${text//@SECRET@/$secret}
  printf '%s\n' "${text//@ARGS@/$args}"
}

apply() {
  if [[ $printing == yes ]]; then
    printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(show "${kubectl[@]}" apply --filename -)" "$(manifest)"
  else
    manifest | "${kubectl[@]}" apply --filename -
  fi
}

delete() {
  run "${kubectl[@]}" delete jobset "$name" --wait
}

# Prints nothing where there is no JobSet of the name, else its name and, at its end, Completed or Failed.
state() {
  run "${kubectl[@]}" get jobset "$name" --ignore-not-found --output 'jsonpath={.metadata.name} {.status.terminalState}'
}

# The pods that the first host of the first slice has had, the newest last.
first_pod() {
  local of=jobset.sigs.k8s.io/jobset-name=$name
  of+=,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  run "${kubectl[@]}" get pods --sort-by .metadata.creationTimestamp --output name --selector "$of"
}

exit_statuses() {
  run "${kubectl[@]}" get pods --selector "jobset.sigs.k8s.io/jobset-name=$name" \
    --output 'jsonpath={range .items[*]}{.status.containerStatuses[0].state.terminated.exitCode}{"\n"}{end}'
}

credentials() {
  run gcloud container clusters get-credentials "${option[cluster]}" --project "${option[project]}" \
    --location "${option[zone]}"
}

if [[ $printing == yes ]]; then
  echo "# commit ${commit:0:12} into the bucket"
  upload_source
  echo "# access to the cluster"
  credentials
  each=$((chips / hosts))
  echo "# ${option[slices]} x ${option[topology]}: $hosts hosts a slice, of $each chips ($gke_machine-${each}t)"
  apply
  echo "# its state, every ${option[poll]} s; then the log of the first host"
  state
  first_pod
  show "${kubectl[@]}" logs --follow --container vdjax pod/POD
  echo "# if it failed: the exit statuses of its hosts"
  exit_statuses
  echo "# to end it, or to start again after a failure"
  delete
  echo "# all the while, on this machine"
  start_tensorboard
  exit 0
fi

trap 'note "the JobSet goes on; the same command follows it; to end it: $(shown delete)"; exit 130' INT TERM
credentials
now=$(state)
case $now in
  *Completed | *Failed) delete ;;&
  '' | *Completed | *Failed)
    upload_source
    apply
    ;;
  *) note "JobSet $name is there already; it is followed" ;;
esac
start_tensorboard
last=''
while :; do
  if now=$(state) && pod=$(first_pod); then
    pod=${pod##*$'\n'}
    if [[ $pod ]]; then
      [[ $pod == "$last" ]] || note "log of $pod"
      [[ $pod == "$last" ]] || seen=0 # a restart makes new pods
      last=$pod
      # Nothing to read before the pod runs; a broken connection is taken up again by the next turn.
      print_new < <("${kubectl[@]}" logs --follow --container vdjax "$pod" 2>/dev/null | cat -n)
    fi
    case $now in
      *Completed)
        note "finished; the report: gcloud storage cp ${option[workdir]}/report.html ."
        exit 0
        ;;
      *Failed)
        status=$(exit_statuses | grep -vx -e 0 -e 75 -e 76 -e '' | head -n 1) || true
        note "JobSet $name failed, exit status ${status:-unknown}; its pods can still be looked at"
        exit "${status:-1}"
        ;;
      '') fail "JobSet $name was deleted" ;;
    esac
  fi
  sleep "${option[poll]}"
done
