#!/usr/bin/env bash
# Several processes on this machine: what a run over several machines does, to try it out.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/local.sh N [OPTION...] --config FILE.py --workdir DIR [--config.FIELD=VALUE...] [-- ARGUMENT...]

Trains with N processes on this machine, each with its own CPU devices, as N machines would.  (A run
over the GPUs of one machine needs no such thing: one process uses them all.)  Every line that a
process prints carries its number.  When one fails, the others end by themselves, and are made to
when they do not; the exit status is that of the first that failed.  Ctrl-C and SIGTERM (or the end
of the terminal) are passed on to all: they save and end with status 75, and the same command goes on.

  --devices=D     CPU devices of each process (1)
  --port=PORT     where process 0 is found by the others (one that is free)
  --grace=SECONDS when one has failed, the others get SIGTERM after 5 s, and SIGKILL so much later (60)
  --python=FILE   (.venv/bin/python of this checkout, else python3)
  --dry_run       print the commands, run nothing
END
}

OPTION+=([devices]=1 [port]="" [grace]=60 [python]="$(python_here)")
parse "$@"

[[ ${#WORDS[@]} == 1 && ${WORDS[0]} =~ ^[1-9][0-9]{0,3}$ ]] ||
    die "how many processes? $0 2 --config FILE.py --workdir DIR"
processes=${WORDS[0]}
need_number devices 1
need_number grace 0
need_training
if [[ -z ${OPTION[port]} ]]; then
    OPTION[port]=$("${OPTION[python]}" -c \
        'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
need_number port 1

# Flags of XLA that the user has set stay; the number of devices is the one given here.
flags=$(sed -E 's/(^| )--xla_force_host_platform_device_count=[^ ]*//g; s/^ *//' <<<"${XLA_FLAGS-}")
flags="${flags:+$flags }--xla_force_host_platform_device_count=${OPTION[devices]}"

command_of() { # PROCESS: sets `command`
    command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags"
        "${OPTION[python]}" -m clip_lite_jax.main "${TRAINING[@]}")
    if ((processes > 1)); then
        command+=(--distributed --coordinator-address "127.0.0.1:${OPTION[port]}"
            --num-processes "$processes" --process-id "$1")
    fi
}

if on dry_run; then
    for ((i = 0; i < processes; i++)); do
        command_of "$i"
        quoted "${command[@]}"
    done
    exit 0
fi

# Every line with the number of its process, which logs of several processes have already.  A
# progress bar goes back to the start of its line, and would never end it.
PREFIX='
import sys
start = f"[process {sys.argv[1]}] "
for line in open(0, encoding="utf-8", errors="replace"):
    if line.strip():
        print("" if line.startswith("[process ") else start, line, sep="", end="", flush=True)
'

declare -A running=() # process id by number
declare -a started=() printers=()
folder=$(mktemp -d)
told=false # whether the processes know that they are to stop
failed="" # when the first has failed, in seconds

pass_on() { # SIGNAL
    told=true
    local pid
    for pid in "${running[@]}"; do
        kill -s "$1" "$pid" 2>/dev/null || true
    done
}

end_all() { # also the worker processes of those that are gone: each group is a process's own
    local pid
    for pid in "${started[@]}"; do
        kill -s KILL -- "-$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}

trap end_all EXIT
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

set -m # every process gets a group of its own, so that Ctrl-C reaches it once, from here
for ((i = 0; i < processes; i++)); do
    mkfifo "$folder/$i"
    "${OPTION[python]}" -c "$PREFIX" "$i" <"$folder/$i" &
    printers+=($!)
    command_of "$i"
    "${command[@]}" >"$folder/$i" 2>&1 </dev/null &
    running[$i]=$!
    started+=($!)
done
set +m

first=0
while ((${#running[@]})); do
    for i in "${!running[@]}"; do
        kill -0 "${running[$i]}" 2>/dev/null && continue
        status=0
        wait "${running[$i]}" 2>/dev/null || status=$?
        unset "running[$i]"
        ((status)) || continue
        say "launch/local.sh: process $i ended with status $status"
        # Those that lose another end with 1, and may be seen first.
        if ((first == 0)) || { ((first == 1)) && ! $told; }; then first=$status; fi
        failed=${failed:-$SECONDS}
    done
    if [[ -n $failed ]] && ((${#running[@]} && SECONDS - failed >= 5)); then
        # One that has saved was told to by something that told the others, too.
        if ! $told && [[ ! $first =~ ^($STOPPED)$ ]]; then
            say "launch/local.sh: stopping process ${!running[*]}"
            pass_on TERM
        elif ((SECONDS - failed >= 5 + OPTION[grace])); then
            say "launch/local.sh: killing process ${!running[*]}"
            pass_on KILL
        fi
    fi
    sleep 0.2 &
    wait $! || true # unlike sleep itself, this is interrupted by a signal
done
end_all
wait "${printers[@]}" || true
exit "$first"
