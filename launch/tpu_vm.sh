#!/usr/bin/env bash
# Training on Cloud TPU VMs: one slice, or several that are joined (multislice).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [OPTION...]
launch/tpu_vm.sh run --name=NAME --zone=ZONE [OPTION...] \
    --config FILE.py --workdir gs://BUCKET/RUN [--config.FIELD=VALUE...] [-- ARGUMENT...]

Actions
  create    asks for the TPU and waits until it is there
  setup     copies this checkout (what is committed) to all its workers and installs it
  run       creates and sets up what is not there, trains on all workers, and watches: a TPU that was
            preempted is deleted, created again, and the same command goes on from the newest
            checkpoint. Ends when training has. Ctrl-C ends only the watching; `run` watches again
  status    of the TPU, and of training on every worker
  logs      what training has printed last on every worker
  stop      tells training to save and end, which ends a `run` that watches, too
  delete    the TPU, which costs money until then, with what lies on its disks

Options
  --project=PROJECT     (gcloud's own setting)
  --accelerator=TYPE    v5litepod-8, v6e-16, v5p-32, ... (v5litepod-8)
  --runtime=VERSION     software of the VM (the one for the accelerator)
  --spot                cheaper, and can be taken away at any time
  --queued              as a queued resource, which waits for capacity
  --slices=N            so many slices, as a queued resource; trains with mesh.replica=N (1)
  --create_flag=FLAG    any other flag of gcloud's create command, such as --network=NAME; repeat it
  --poll=SECONDS        between two looks (60)
  --max_restarts=N      a training that fails on a TPU that is there is started again so often (3);
                        one that was told to stop and has saved (status 75) always is
  --delete_when_done    delete the TPU when training has ended well
  --lines=N             of the log of each worker (100)
  --dry_run             print the commands, run nothing
Needed here: gcloud with an account (gcloud auth login), and git. For several workers, the key that
gcloud made for ssh in an agent: ssh-add ~/.ssh/google_compute_engine
END
}

OPTION+=([name]="" [zone]="" [project]="" [accelerator]=v5litepod-8 [runtime]="" [spot]=false
    [queued]=false [slices]=1 [poll]=60 [max_restarts]=3 [delete_when_done]=false [lines]=100)
EXTRA_OPTION=create_flag
parse "$@"

((${#WORDS[@]} == 1)) || die "one action is needed: create, setup, run, status, logs, stop or delete"
action=${WORDS[0]}
case $action in
    create | setup | run | status | logs | stop | delete) ;;
    *) die "unknown action $action: create, setup, run, status, logs, stop or delete" ;;
esac
need name "what to call the TPU"
need zone "where the TPU is, such as us-central1-a"
need_name name '[a-z]([-a-z0-9]{0,48}[a-z0-9])?' "a small letter, then small letters, digits and hyphens"
need_number slices 1
need_number poll 1
need_number max_restarts 0
need_number lines 1
if ((OPTION[slices] > 1)); then
    OPTION[queued]=true
    TRAINING=("--config.mesh.replica=${OPTION[slices]}" "${TRAINING[@]}")
fi
if [[ $action == run ]]; then
    need_training
    workdir=$(option_of_training --workdir)
    [[ $workdir == *://* ]] ||
        say "warning: --workdir $workdir is on the TPU's own disk and lost with it; give gs://BUCKET/RUN"
fi

name=${OPTION[name]}
where=("--zone=${OPTION[zone]}" ${OPTION[project]:+"--project=${OPTION[project]}"})
tpus=(gcloud compute tpus)
if on queued; then
    kind=queued-resources
    all=(--node=all --worker=all)
    state_field=state.state
else
    kind=tpu-vm
    all=(--worker=all)
    state_field=state
fi
describe=("${tpus[@]}" "$kind" describe "$name" "${where[@]}" "--format=value($state_field)")
alive=(-oServerAliveInterval=15 -oConnectTimeout=30) # a machine that is taken away says nothing
archive=$ROOT/.work/launch/$name.tar.gz
worker="bash clip_lite_jax/launch/worker.sh"

runtime_of() { # ACCELERATOR, by Cloud TPU's table of software versions
    case $1 in
        v6e-*) printf v2-alpha-tpuv6e ;;
        v5p-*) printf v2-alpha-tpuv5 ;;
        v5litepod-*) printf v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) printf tpu-ubuntu2204-base ;;
        *) die "--accelerator=$1: its software is not known here; give --runtime=VERSION" ;;
    esac
}
[[ -n ${OPTION[runtime]} ]] || OPTION[runtime]=$(runtime_of "${OPTION[accelerator]}")

create() {
    local type=("--accelerator-type=${OPTION[accelerator]}") nodes=()
    ! on spot || type+=(--spot)
    if on queued; then
        nodes=("--node-id=$name")
        ((OPTION[slices] == 1)) || nodes=("--node-count=${OPTION[slices]}" "--node-prefix=$name")
        run "${tpus[@]}" queued-resources create "$name" "${where[@]}" "${type[@]}" \
            "--runtime-version=${OPTION[runtime]}" "${nodes[@]}" "${EXTRA[@]}"
    else
        run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" "${type[@]}" \
            "--version=${OPTION[runtime]}" "${EXTRA[@]}"
    fi
}

delete() {
    local nodes=()
    ! on queued || nodes=(--force) # the TPUs with the request for them
    run "${tpus[@]}" "$kind" delete "$name" "${where[@]}" "${nodes[@]}" --quiet
}

on_workers() { # COMMAND...: of all workers at once
    run "${tpus[@]}" "$kind" ssh "$name" "${where[@]}" "${all[@]}" \
        "${alive[@]/#/--ssh-flag=}" "--command=$*"
}

set_up() {
    local changed
    changed=$(git -C "$ROOT" status --porcelain)
    [[ -z $changed ]] || say "warning: not committed, and therefore not copied:"$'\n'"$changed"
    run mkdir -p "$(dirname "$archive")"
    run git -C "$ROOT" archive --format=tar.gz --prefix=clip_lite_jax/ "--output=$archive" HEAD
    run "${tpus[@]}" "$kind" scp "$archive" "$name:clip_lite_jax.tar.gz" "${where[@]}" "${all[@]}" \
        "${alive[@]/#/--scp-flag=}" && on_workers "tar -xzf clip_lite_jax.tar.gz && $worker setup"
}

start() {
    on_workers "$worker start $(quoted "${TRAINING[@]}")"
}

ask_workers() { # one line of every worker
    on_workers "test ! -e clip_lite_jax/launch/worker.sh || $worker state"
}

state_of_tpu() { # READY or ACTIVE, another of the API's, absent, or unknown
    local said
    if said=$("${describe[@]}" 2>&1); then
        printf '%s' "${said##*$'\n'}"
    elif [[ $said == *NOT_FOUND* ]]; then
        printf absent
    else
        say "$said"
        printf unknown
    fi
}

wait_until_there() {
    local state
    while true; do
        state=$(state_of_tpu)
        case $state in
            READY | ACTIVE) return ;;
            ACCEPTED | CREATING | PROVISIONING | RESTARTING | STARTING | WAITING_FOR_RESOURCES) ;;
            *) die "the TPU is $state; look at: $(quoted "${describe[@]:0:7}")" ;;
        esac
        say "$(date '+%F %T') the TPU is $state"
        sleep "${OPTION[poll]}"
    done
}

plan() { # what `run` does, in the order in which it can come
    echo "# Where the TPU is not there:"
    create
    echo "# Until it is READY or ACTIVE, and again and again while training runs:"
    quoted "${describe[@]}"
    echo "# On a TPU on which no training runs:"
    set_up
    start
    echo "# Every ${OPTION[poll]} s until training has ended:"
    ask_workers
    echo "# When the TPU was preempted, and then from the start:"
    delete
    if on delete_when_done; then
        echo "# When training has ended well:"
        delete
    fi
}

failed() { # STATUS
    on_workers "$worker log 30" || true
    say "training ended with status $1; the TPU is still there and costs money." \
        "Its logs: $0 logs --name=$name ...; its end: $0 delete --name=$name ..."
    exit "$1"
}

restarts=0
count_restart() { # STATUS
    restarts=$((restarts + 1))
    ((restarts <= OPTION[max_restarts])) || failed "$1"
    say "training ended with status $1: started again, $restarts of at most ${OPTION[max_restarts]} times"
}

judge() { # REPORT: sets `next` to start, wait, stopped or ended
    local states bad
    states=$(sed -nE 's/^worker [^:]*: (none|running|stopped|lost|ended [0-9]+): .*/\1/p' <<<"$1" | sort -u)
    bad=$(sed -nE 's/^ended ([0-9]+)$/\1/p' <<<"$states" | grep -vxE "0|$STOPPED" | sort -n | head -n 1) || true
    [[ $states != *lost* ]] || bad=${bad:-137}
    next=start # no training yet, or all have saved
    if [[ $states == *running* ]]; then
        next="wait"
    elif $started && [[ $states == stopped ]]; then
        next=stopped
    elif $started && [[ $states == "ended 0" ]]; then
        next=ended
    elif $started && grep -qx "ended 2" <<<"$states"; then
        failed 2 # what the user can mend
    elif $started && [[ -n $bad ]]; then
        # Those that lose another worker fail.  Whether it was preempted shows a little later.
        if $looked; then count_restart "$bad"; else next="wait"; fi
        looked=true
    fi
}

watch() { # until training has ended well
    local state report next="" started=false looked=false created=false
    trap 'say "training goes on; the same command watches again, stop or delete end it"; exit 130' INT
    while true; do
        state=$(state_of_tpu)
        case $state in
            READY | ACTIVE) ;;
            absent)
                if create; then
                    wait_until_there
                    created=true started=false
                    continue
                fi
                $created || die "the TPU was not created; --queued waits for capacity"
                ;;
            PREEMPTED | TERMINATED | SUSPENDED)
                say "$(date '+%F %T') the TPU is $state: it is deleted and created again"
                created=true
                delete && continue
                ;;
            FAILED | STOPPED) die "the TPU is $state; look at: $(quoted "${describe[@]:0:7}")" ;;
            unknown) $started || $created || exit 1 ;;
            *) say "$(date '+%F %T') the TPU is $state" ;;
        esac
        if [[ $state == READY || $state == ACTIVE ]] && report=$(ask_workers); then
            say "$report"
            judge "$report"
            case $next in
                ended) return 0 ;;
                stopped)
                    say "training was told to stop and has saved; run goes on with it"
                    exit 75
                    ;;
                start)
                    if { $started || set_up; } && start; then
                        started=true looked=false
                    else
                        count_restart 1
                    fi
                    ;;
                wait) [[ $report != *": running: "* ]] || started=true ;;
            esac
        fi
        sleep "${OPTION[poll]}"
    done
}

case $action in
    create)
        create
        if on dry_run; then quoted "${describe[@]}"; else wait_until_there; fi
        ;;
    setup) set_up ;;
    status)
        run "${describe[@]}"
        ask_workers
        ;;
    logs) on_workers "$worker log ${OPTION[lines]}" ;;
    stop) on_workers "$worker stop" ;;
    delete) delete ;;
    run)
        if on dry_run; then
            plan
        else
            watch
            say "training has ended well"
            if on delete_when_done; then
                delete
            else
                say "the TPU is still there and costs money; its end: $0 delete --name=$name ..."
            fi
        fi
        ;;
esac
