#!/usr/bin/env bash
# Train on a Cloud TPU slice and delete the slice at the end; see --help.
set -euo pipefail

usage() {
  cat <<'END'
usage: experiments/cloud_tpu.sh [--dry-run] [--spot] [--keep] -- --config=configs/vae.py [flags of vae_jax]
       experiments/cloud_tpu.sh [--dry-run] --delete

Creates the TPU slice, or uses an existing one of that name; installs the repository on all of its workers; starts the
training on all of them and shows the output of worker 0. After a preemption it creates the slice again and resumes. It
deletes the slice when training is done, and keeps it if training fails. Interrupting this script does not stop the
training: the same command shows its output again.

  --dry-run  print the commands without running them
  --spot     request a cheaper slice that can be preempted
  --keep     keep the slice at the end
  --delete   delete the slice and do nothing else

Required variables:
  PROJECT, ZONE      of Google Cloud, e.g. my-project and us-west4-a
  TPU_NAME           name of the slice and of the run
  ACCELERATOR_TYPE   e.g. v5litepod-16
  RUNTIME_VERSION    e.g. v2-alpha-tpuv5-lite
  BUCKET             of Cloud Storage; the run directory is gs://BUCKET/TPU_NAME
Optional variables:
  REPOSITORY         cloned by the workers; default: the origin of this clone
  REVISION           checked out by the workers; default: the commit of this clone, which must be pushed
  PAUSE              seconds between status checks; default: 30
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
    *) usage >&2 && fail "unknown argument $1; put the flags of vae_jax after --" 2 ;;
  esac
  shift
done
for name in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION BUCKET; do
  [ -n "${!name:-}" ] || { usage >&2 && fail "$name is not set" 2; }
done
[ $# -gt 0 ] || [ -n "$only_delete" ] || { usage >&2 && fail "give the flags of vae_jax after --" 2; }

cd "$(dirname "$0")/.."
repository=${REPOSITORY:-$(git remote get-url origin)}
revision=${REVISION:-$(git rev-parse HEAD)}
pause=${PAUSE:-30}
workdir=gs://${BUCKET#gs://}/$TPU_NAME
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# Print a `gcloud compute tpus` command; run it unless this is a dry run.
tpus() {
  local command=(gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE")
  printf '+%s\n' "$(printf ' %q' "${command[@]}")" >&2
  [ -n "$dry" ] || "${command[@]}"
}

on_worker() {
  tpus tpu-vm ssh "$TPU_NAME" --quiet "--worker=$1" "--command=$2"
}

# Set `state` to the slice's state, or to NONE if there is no slice.
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
    fail "cannot query the slice $TPU_NAME"
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

# Wait until the slice is active, creating it if necessary.
bring_up() {
  local shown='' failed=0
  while true; do
    look
    case $state in
      ACTIVE) return ;;
      NONE) create ;;
      SUSPENDED) delete ;; # preempted for good: create a new one
      FAILED)
        failed=$((failed + 1))
        [ "$failed" -lt 3 ] || fail "creating the slice $TPU_NAME failed three times: run gcloud compute tpus queued-resources describe $TPU_NAME"
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

# The Python of TPU VM images is too old for the package; uv installs another.
install="set -e
test -d vae_jax || git clone --quiet $(printf %q "$repository") vae_jax
cd vae_jax
git fetch --quiet origin
git checkout --quiet $(printf %q "$revision")
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'"
# Training survives a broken connection, and one that is already running is left alone.
train=".venv/bin/python -m vae_jax --distributed --workdir=$workdir$([ $# -eq 0 ] || printf ' %q' "$@")"
start="cd vae_jax
if test -f pid && kill -0 \$(cat pid) 2>/dev/null; then
printf %s $(printf %q "$train") | cmp -s - command && exit
echo \"another training is already running: \$(cat command)\" >&2
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
    [ "$failures" -lt 3 ] || fail "installing or starting on the workers failed three times; the slice is kept"
  fi
  [ -z "$dry" ] || break
  code=$(sed -n 's/^exit code //p' "$output" | tail -n 1)
  [ "$code" != 0 ] || break
  sleep "$pause" # a preemption takes a while to show
  look
  case $state:$code in
    # a broken connection, a restarted worker, or a preemption notice
    ACTIVE: | ACTIVE:unknown | ACTIVE:75 | ACTIVE:143) echo "the slice $TPU_NAME is still active: reconnecting to the training" >&2 ;;
    ACTIVE:*) fail "training failed with exit code $code; the slice is kept" "$code" ;;
    *) echo "the slice $TPU_NAME is $state: creating it again to resume training" >&2 ;;
  esac
done
[ -n "$keep" ] || delete
echo "done: $workdir" >&2
