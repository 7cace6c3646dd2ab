# shellcheck shell=bash disable=SC2034  # some variables are for the scripts that source this
# What queued_resource.sh and gke_jobset.sh share: options and their errors, what a topology stands for, the job's
# command, the way of the source into the bucket, TensorBoard. To be sourced; the script adds its own options to
# `option` and `expected`, then calls `prepare "$@"`.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "error: bash $BASH_VERSION: expected 4.4 or newer" >&2
  exit 2
}
set -euo pipefail
shopt -u patsub_replacement 2>/dev/null || true # else bash 5.2 reads & in what replaces a placeholder
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Options by name with their defaults. What is expected of those that take a value, in words and as a pattern.
declare -A option=(
  [project]='' [zone]='' [topology]='' [config]='' [workdir]='' [slices]=1 [module]=vdjax.main [commit]=HEAD
  [name]=auto [spot]=no [hf_secret]=none [tensorboard]=6006 [poll]=30 [print]=no
)
declare -A expected=(
  [project]='the id of a Google Cloud project' [zone]='a zone, such as us-east5-b'
  [topology]='GENERATION:SHAPE, such as v5e:8x8' [config]='FILE.py[:ARG], a file of this repository'
  [workdir]='gs://BUCKET/DIRECTORY, of letters, digits and ._=/-' [slices]='a number from 1 on'
  [module]='vdjax.main or vdjax.study' [commit]='a commit of this repository'
  [name]='at most 40 lower-case letters, digits and -, a letter first' [hf_secret]='the name of a secret'
  [tensorboard]='a port, or 0 for none' [poll]='seconds, from 0 on'
)
declare -A pattern=(
  [project]='[a-z][a-z0-9.:-]*[a-z0-9]' [zone]='[a-z]+-[a-z]+[0-9]+-[a-z]'
  [topology]='[^:]+:[^:]+' [config]='.+\.py(:.*)?'
  [workdir]='gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[A-Za-z0-9._=-]+)+' [slices]='[1-9][0-9]*'
  [module]='vdjax\.(main|study)' [name]='[a-z]([a-z0-9-]{0,38}[a-z0-9])?' [hf_secret]='[A-Za-z0-9._-]+'
  [tensorboard]='[0-9]+' [poll]='[0-9]+'
)
required=(project zone topology config workdir)
repeated=() # options that may be given several times; their values are in an array of their name
arguments=() # for the module: config overrides, and what stands after --

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

note() {
  printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

# wrong NAME: ends with what was expected of the option.
wrong() {
  fail "--$1 ${option[$1]}: expected ${expected[$1]}"
}

# distance A B: prints how many letters must be changed, added or left out to make one of the other.
distance() {
  local a=$1 b=$2 row=() i j diagonal above least
  for ((j = 0; j <= ${#b}; j++)); do row[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    diagonal=${row[0]} row[0]=$i
    for ((j = 1; j <= ${#b}; j++)); do
      above=${row[j]} least=$diagonal
      [[ ${a:i-1:1} == "${b:j-1:1}" ]] || least=$((least + 1))
      ((above + 1 >= least)) || least=$((above + 1))
      ((row[j - 1] + 1 >= least)) || least=$((row[j - 1] + 1))
      diagonal=$above row[j]=$least
    done
  done
  echo "${row[-1]}"
}

# nearest WORD NAME...: a hint for an error, the name that is closest to WORD, or all of them where none is close.
nearest() {
  local word=$1 name best='' far least
  shift
  least=$(((${#word} + 1) / 2))
  for name; do
    far=$(distance "$word" "$name")
    if ((far <= least)); then
      [[ $best && $far == "$least" ]] || best=$name least=$far
    fi
  done
  if [[ $best ]]; then echo "; did you mean $best?"; else echo "; valid: $*"; fi
}

# show WORD...: a command as it can be pasted into a shell.
show() {
  local word line=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+|-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  printf '%s\n' "${line[*]}"
}

# run COMMAND...: or, with --print, only show it.
run() {
  if [[ $printing == yes ]]; then show "$@"; else "$@"; fi
}

# shown FUNCTION...: what the function would run.
shown() {
  local printing=yes
  "$@"
}

parse_options() {
  local name value
  while (($#)); do
    name=${1#--} name=${name%%=*}
    case $1 in
      --)
        arguments+=("${@:2}")
        return
        ;;
      --config.*=*) arguments+=("$1") ;;
      --config.*) fail "$1: expected --config.KEY=VALUE in one word" ;;
      -h | --help)
        sed -n '2,/^$/s/^#\( \|$\)//p' "$0"
        exit 0
        ;;
      --?*)
        [[ -v option[$name] ]] ||
          fail "--$name: no such option$(nearest "$name" "${!option[@]}")"
        if [[ ! -v expected[$name] ]]; then
          [[ $1 != *=* ]] || fail "$1: --$name takes no value"
          option[$name]=yes
        else
          if [[ $1 == *=* ]]; then
            value=${1#*=}
          else
            (($# > 1)) || fail "--$name has no value: expected ${expected[$name]}"
            value=$2
            shift
          fi
          option[$name]=$value
          if [[ " ${repeated[*]} " == *" $name "* ]]; then
            [[ $value =~ ^(${pattern[$name]})$ ]] || wrong "$name"
            local -n values=$name
            values+=("$value")
          fi
        fi
        ;;
      *) fail "$1: expected --OPTION VALUE, --config.KEY=VALUE, or -- before what the module takes; see --help" ;;
    esac
    shift
  done
}

# What the topology's generation and shape stand for, from topologies.txt.
read_topology() {
  local generation shape=${option[topology]#*:} generations=() shapes found='' prefix per_chip
  while read -r generation prefix per_chip runtime gke_accelerator gke_machine shapes; do
    [[ $generation && $generation != \#* ]] || continue
    generations+=("$generation")
    if [[ $generation == "${option[topology]%%:*}" ]]; then
      found=yes
      break
    fi
  done <"$here/topologies.txt"
  generation=${option[topology]%%:*}
  [[ $found ]] ||
    fail "--topology ${option[topology]}: no generation $generation$(nearest "$generation" "${generations[@]}")"
  # shellcheck disable=SC2086 # one word a shape
  [[ " $shapes " == *" $shape "* ]] ||
    fail "--topology ${option[topology]}: $generation has no slice $shape$(nearest "$shape" $shapes)"
  chips=$((${shape//x/*}))
  hosts=$((chips < 4 ? 1 : chips / 4))
  accelerator=$prefix-$((chips * per_chip))
}

# The flags of xla_flags.txt for the generation.
read_xla_flags() {
  local generation flag _
  xla_flags=()
  while read -r generation flag _; do
    [[ $generation != "${option[topology]%%:*}" ]] || xla_flags+=("$flag")
  done <"$here/xla_flags.txt"
}

# The commit and the config in it: what is launched is what anyone can check out.
read_commit() {
  local revision=${option[commit]} file=${option[config]%%:*} files
  commit=$(git -C "$here" rev-parse --verify --quiet "$revision^{commit}") || wrong commit
  if ! git -C "$here" cat-file -e "$commit:$file" 2>/dev/null; then
    mapfile -t files < <(git -C "$here" ls-tree -r --name-only --full-tree "$commit" configs | grep '\.py$')
    fail "--config ${option[config]}: commit ${commit:0:9} has no file $file$(nearest "$file" "${files[@]}")"
  fi
  [[ -z $(git -C "$here" status --porcelain --untracked-files=no) ]] ||
    note "there are uncommitted changes; what runs is commit ${commit:0:9} without them"
}

# prepare "$@": reads and checks all options. Sets commit, source, chips, hosts, accelerator, runtime, gke_accelerator,
# gke_machine, xla_flags and job, the words of the command that every worker runs.
prepare() {
  local name
  parse_options "$@"
  printing=${option[print]}
  for name in "${required[@]}"; do
    [[ ${option[$name]} ]] || fail "--$name is missing: expected ${expected[$name]}"
  done
  option[workdir]=${option[workdir]%/}
  if [[ ${option[name]} == auto ]]; then # the end of the workdir, so that the same command finds what it started
    name=${option[workdir]##*/} name=${name,,} name=${name//[!a-z0-9]/-}
    [[ $name == [a-z]* ]] || name=run-$name
    name=${name:0:40}
    option[name]=${name%%-}
  fi
  for name in "${!pattern[@]}"; do
    [[ ${option[$name]} =~ ^(${pattern[$name]})$ ]] || wrong "$name"
  done
  read_topology
  read_xla_flags
  read_commit
  source=${option[workdir]}/launch/source-${commit:0:12}.tar.gz
  job=(env)
  ((${#xla_flags[@]} == 0)) || job+=("LIBTPU_INIT_ARGS=${xla_flags[*]}")
  # Compiled programs in the bucket: a slice that was requested again need not compile again.
  job+=("JAX_COMPILATION_CACHE_DIR=${option[workdir]}/launch/compiled")
  job+=(python -m "${option[module]}" --config "${option[config]}" --workdir "${option[workdir]}" "${arguments[@]}")
}

# needs PROGRAM...: ends where one is not installed.
needs() {
  local program
  for program; do
    [[ $printing == yes ]] || command -v "$program" >/dev/null || fail "$program is not on PATH: expected it installed"
  done
}

# The source of the commit, into the bucket: the workers need neither git nor access to the repository.
upload_source() {
  local archive=(git -C "${here%/*}" archive --format=tar.gz "$commit")
  local copy=(gcloud storage cp - "$source" --project "${option[project]}")
  if [[ $printing == yes ]]; then
    show "${archive[@]}" '|' "${copy[@]}"
  else
    "${archive[@]}" | "${copy[@]}"
  fi
}

# TensorBoard on this machine, as long as this script runs. It reads the bucket with application default credentials.
start_tensorboard() {
  local command=(tensorboard --logdir "${option[workdir]}" --port "${option[tensorboard]}")
  ((option[tensorboard] > 0)) || return 0
  if [[ $printing == yes ]]; then
    show "${command[@]}"
  elif ! command -v tensorboard >/dev/null; then
    note "no tensorboard on PATH here; where there is one: $(show "${command[@]}")"
  else
    "${command[@]}" >/dev/null 2>&1 &
    # shellcheck disable=SC2064 # the process of now
    trap "kill $! 2>/dev/null || true" EXIT
    note "TensorBoard: http://localhost:${option[tensorboard]}"
  fi
}

# print_new: of numbered lines (cat -n), those after number `seen`, without their numbers. So a log that is read again
# from its beginning, after a broken connection, is not printed twice.
seen=0
print_new() {
  local row
  while IFS= read -r row; do
    if ((${row%%$'\t'*} > seen)); then
      seen=$((${row%%$'\t'*}))
      printf '%s\n' "${row#*$'\t'}"
    fi
  done
}
