#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on every worker of a TPU, from the copy of this checkout there.
# Training is started apart from the connection that asks for it, so that it outlives that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'END'
launch/worker.sh setup | start ARGUMENT... | state | stop | log [LINES]

  setup   the environment of this checkout, .venv, from launch/tpu.lock (Python 3.11, by uv)
  start   the training command with these arguments, unless a training runs
  state   one line: none | running | ended STATUS | stopped | lost, and the last line of the log
  stop    SIGTERM: training saves and ends with status 75, which shows as stopped
  log     the last LINES (100) of what training has printed
END
}

RUN=$HOME/.clip_lite_jax # of the training that was started last: its process, its end, what it said
PYTHON=.venv/bin/python

set_up() {
    if [[ ! -x $PYTHON ]]; then
        # Images of Cloud TPU have an older Python than jax needs; uv brings one.
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --python 3.11 .venv
    fi
    python3 -m uv pip install --quiet --python "$PYTHON" --requirement launch/tpu.lock
    python3 -m uv pip install --quiet --python "$PYTHON" --no-deps --editable .
    "$PYTHON" -c 'import jax, clip_lite_jax; print("installed:", jax.__version__)'
}

running() { # whether the process is there, and is no other that got its number
    local pid
    [[ -s $RUN/pid ]] && pid=$(<"$RUN/pid") && kill -0 "$pid" 2>/dev/null &&
        grep -qa clip_lite_jax "/proc/$pid/cmdline"
}

start() { # ARGUMENT...
    if running; then
        echo "a training runs already"
        return
    fi
    mkdir -p "$RUN"
    rm -f "$RUN"/{pid,status,stopped}
    setsid nohup bash launch/worker.sh supervise "$@" >>"$RUN/log" 2>&1 </dev/null &
    for _ in {1..100}; do
        [[ ! -s $RUN/pid ]] || break
        sleep 0.1
    done
    state
}

supervise() { # ARGUMENT...: trains, and leaves behind how that ended
    local status=0
    # A machine that is taken away signals all processes: this one waits for the other to save.
    trap : TERM
    "$PYTHON" -m clip_lite_jax.main "$@" &
    echo $! >"$RUN/pid"
    while true; do
        status=0
        wait $! || status=$?
        kill -0 $! 2>/dev/null || break
    done
    echo "$status" >"$RUN/status"
}

state() {
    local state=none last=""
    if running; then
        state=running
    elif [[ -s $RUN/status ]]; then
        state="ended $(<"$RUN/status")"
        [[ ! -e $RUN/stopped || ! $state =~ ^ended\ (75|143)$ ]] || state=stopped
    elif [[ -s $RUN/pid ]]; then
        state=lost # the machine was started anew
    fi
    # Progress bars go back to the start of their line instead of ending it.
    [[ ! -e $RUN/log ]] || last=$(tail -c 2000 "$RUN/log" | tr '\r' '\n' | grep . | tail -n 1) || true
    printf 'worker %s: %s: %.160s\n' "$(hostname)" "$state" "$last"
}

stop() {
    running && touch "$RUN/stopped" && kill -s TERM "$(<"$RUN/pid")"
}

case ${1-} in
    setup) set_up ;;
    start | supervise) "$@" ;;
    state) state ;;
    stop) stop || echo "no training runs" ;;
    log) tail -n "${2:-100}" "$RUN/log" ;;
    -h | --help) usage ;;
    *) usage >&2 && exit 2 ;;
esac
