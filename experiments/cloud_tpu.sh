#!/usr/bin/env bash
# Train on a Cloud TPU slice, from creating it to deleting it. `--help` says how.
set -euo pipefail

usage() {
  cat <<'END'
usage: experiments/cloud_tpu.sh [--dry-run] [--spot] [--keep] -- --config=configs/vae.py [flags of vae_jax.main]
       experiments/cloud_tpu.sh [--dry-run] --delete

Creates the TPU slice, or takes the one of that name; installs the repository on all of its workers; starts the same
training on all and shows what worker 0 prints; after a preemption creates the slice again and continues; deletes it
when the training is done. Interrupting this script leaves the training alone: the same command watches it again.
Where the training fails the slice is kept; --delete deletes it.

  --dry-run  print the commands, run none
  --spot     a cheaper slice, which may be taken away at any time
  --keep     do not delete the slice at the end

Variables that must be set:
  PROJECT, ZONE      of Google Cloud, such as my-project and us-west4-a
  TPU_NAME           name of the slice, and of the run
  ACCELERATOR_TYPE   such as v5litepod-16
  RUNTIME_VERSION    such as v2-alpha-tpuv5-lite
  BUCKET             of Cloud Storage; the run directory is gs://BUCKET/TPU_NAME
and that may be:
  REPOSITORY         what the workers clone; default: this clone's origin
  REVISION           of it; default: this clone's commit, which must have been pushed
  PAUSE              seconds between two looks at the slice; default: 30
END
}

fail() {
  echo "cloud_tpu.sh: $1" >&2
  exit "${2:-1}"
}

dry='' spot='' keep='' only_delete=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --delete) only_delete=yes ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) usage >&2 && fail "unknown argument $1; flags of vae_jax.main come after --" 2 ;;
  esac
  shift
done
for name in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION BUCKET; do
  [ -n "${!name:-}" ] || { usage >&2 && fail "$name is not set" 2; }
done
[ $# -gt 0 ] || [ -n "$only_delete" ] || { usage >&2 && fail "give vae_jax.main's flags after --" 2; }

cd "$(dirname "$0")/.."
repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
pause=${PAUSE:-30}
workdir=gs://${BUCKET#gs://}/$TPU_NAME
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# Print a command of `gcloud compute tpus`, and run it unless it is a dry run.
tpus() {
  local command=(gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE")
  printf '+%s\n' "$(printf ' %q' "${command[@]}")" >&2
  [ -n "$dry" ] || "${command[@]}"
}

on_worker() {
  tpus tpu-vm ssh "$TPU_NAME" --quiet "--worker=$1" "--command=$2"
}

# Set `state` to what the slice is in, NONE if there is none.
look() {
  if [ -n "$dry" ]; then
    tpus queued-resources describe "$TPU_NAME" '--format=value(state.state)'
    [ "${state:-}" = CREATED ] && state=ACTIVE || state=NONE
  elif tpus queued-resources describe "$TPU_NAME" '--format=value(state.state)' >"$output" 2>&1; then
    state=$(tail -n 1 "$output")
  elif grep -q NOT_FOUND "$output"; then
    state=NONE
  else
    cat "$output" >&2
    fail "cannot ask for the slice $TPU_NAME"
  fi
}

create() {
  tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" \
    "--runtime-version=$RUNTIME_VERSION" ${spot:+--spot}
  state=CREATED
}

delete() {
  tpus queued-resources delete "$TPU_NAME" --force --quiet
}

# Wait until there is a slice that works.
bring_up() {
  local shown='' failed=0
  while true; do
    look
    case $state in
      ACTIVE) return ;;
      NONE) create ;;
      SUSPENDED) delete ;; # preempted; only a new one comes back
      FAILED)
        failed=$((failed + 1))
        [ "$failed" -lt 3 ] || fail "creating the slice $TPU_NAME failed three times: see gcloud compute tpus queued-resources describe $TPU_NAME"
        delete
        ;;
      *)
        [ "$state" = "$shown" ] || echo "the slice $TPU_NAME is $state" >&2
        shown=$state
        sleep "$pause"
        ;;
    esac
  done
}

# The images of TPU VMs have an older Python than the package takes; uv brings one.
install="set -e
test -d vae_jax || git clone --quiet $(printf %q "$repository") vae_jax
cd vae_jax
git fetch --quiet origin
git checkout --quiet $(printf %q "$revision")
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'"
# It runs on when the connection breaks; a training that runs already is left alone.
train=".venv/bin/python -m vae_jax.main --distributed --workdir=$workdir$([ $# -eq 0 ] || printf ' %q' "$@")"
start="cd vae_jax
if test -f pid && kill -0 \$(cat pid) 2>/dev/null; then
printf %s $(printf %q "$train") | cmp -s - command && exit
echo \"another training runs there: \$(cat command)\" >&2
exit 1
fi
rm -f exit_code
printf %s $(printf %q "$train") >command
nohup sh -c $(printf %q "$train >train.log 2>&1; echo \$? >exit_code") >/dev/null 2>&1 </dev/null &
echo \$! >pid"
watch="cd vae_jax
tail -n +1 -F --pid=\$(cat pid) train.log 2>/dev/null
echo \"exit code \$(cat exit_code 2>/dev/null || echo unknown)\""

if [ -n "$only_delete" ]; then
  delete
  exit
fi
failures=0
while true; do
  bring_up
  if on_worker all "$install" && on_worker all "$start"; then
    failures=0
    on_worker 0 "$watch" | tee "$output" || true
  else
    failures=$((failures + 1))
    [ "$failures" -lt 3 ] || fail "the workers cannot be made ready; the slice is kept"
  fi
  [ -z "$dry" ] || break
  code=$(sed -n 's/^exit code //p' "$output" | tail -n 1)
  [ "$code" != 0 ] || break
  sleep "$pause" # a preemption shows only after a while
  look
  case $state:$code in
    # a broken connection, a worker that started anew, the notice of a preemption
    ACTIVE: | ACTIVE:unknown | ACTIVE:143) echo "the slice $TPU_NAME is still there: the training goes on" >&2 ;;
    ACTIVE:*) fail "the training ended with code $code; the slice is kept" "$code" ;;
    *) echo "the slice $TPU_NAME is $state: it is created again, and the training goes on" >&2 ;;
  esac
done
[ -n "$keep" ] || delete
echo "done: $workdir" >&2
