# shellcheck shell=bash
# What the scripts of this folder share: how they read their command line, and run or print.
#
# A script declares its options with their defaults in the associative array OPTION, defines
# `usage`, and calls `parse "$@"`.  An option whose default is `false` is a switch and takes no
# value.  Hyphens and underscores are the same.  What is left goes to two arrays: WORDS has the
# words that are no options, TRAINING the arguments of the training command.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    printf 'error: bash 4.4 or newer is needed, this is %s\n' "$BASH_VERSION" >&2
    exit 2
fi

# How a training ends that was told to stop, so that the same command goes on: it has saved (75), or
# there was nothing to save yet or any more, and SIGTERM has ended it (128 + 15).
# shellcheck disable=SC2034  # for the scripts that read this
STOPPED="75|143"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
declare -A OPTION=([dry_run]=false [help]=false)
declare -a WORDS=() TRAINING=() EXTRA=()
EXTRA_OPTION="" # the option that may be given many times; its values go to EXTRA

die() { # MESSAGE...: what the user can mend; status 2, like the training command's
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() { # MESSAGE...: to standard error, so that it does not mix with what --dry_run prints
    printf '%s\n' "$*" >&2
}

parse() { # ARGUMENT...
    local argument name value
    while (($#)); do
        argument=$1
        shift
        case $argument in
            --) TRAINING+=("$@") && break ;;
            --config.*=*) TRAINING+=("$argument") && continue ;;
            --config | --workdir | --config.*)
                (($#)) || die "$argument needs a value"
                TRAINING+=("$argument" "$1")
                shift && continue
                ;;
            --config=* | --workdir=*)
                TRAINING+=("${argument%%=*}" "${argument#*=}")
                continue
                ;;
            -h) argument=--help ;;
            --*) ;;
            -*) die "unknown option $argument; $0 --help lists them" ;;
            *) WORDS+=("$argument") && continue ;;
        esac
        name=${argument%%=*}
        name=${name#--}
        name=${name//-/_}
        if [[ $name != "${EXTRA_OPTION:-none}" && -z ${OPTION[$name]+known} ]]; then
            die "unknown option ${argument%%=*}; $0 --help lists them." \
                "Arguments of the training command stand after --"
        fi
        if [[ ${OPTION[$name]-} == false || ${OPTION[$name]-} == true ]]; then
            [[ $argument != *=* ]] || die "--$name takes no value"
            OPTION[$name]=true
            continue
        fi
        if [[ $argument == *=* ]]; then
            value=${argument#*=}
        else
            (($#)) || die "--$name needs a value: --$name=VALUE"
            value=$1
            shift
        fi
        if [[ $name == "$EXTRA_OPTION" ]]; then
            EXTRA+=("$value")
        else
            OPTION[$name]=$value
        fi
    done
    if [[ ${OPTION[help]} == true ]]; then
        usage
        exit 0
    fi
}

on() { # OPTION: whether the switch was given
    [[ ${OPTION[$1]} == true ]]
}

need() { # OPTION WHAT: an option that must be given
    [[ -n ${OPTION[$1]} ]] || die "--$1 is missing: $2"
}

need_number() { # OPTION LEAST
    if [[ ! ${OPTION[$1]} =~ ^[0-9]{1,9}$ ]] || ((10#${OPTION[$1]} < $2)); then
        die "--$1=${OPTION[$1]}: give a whole number of at least $2"
    fi
    OPTION[$1]=$((10#${OPTION[$1]}))
}

need_name() { # OPTION PATTERN WHAT: a name that others have rules for
    [[ ${OPTION[$1]} =~ ^($2)$ ]] || die "--$1=${OPTION[$1]}: $3"
}

need_training() { # the flags without which there is no training
    local flag
    for flag in --config --workdir; do
        [[ " ${TRAINING[*]-} " == *" $flag "* ]] && continue
        [[ $flag == --config ]] && die "--config is missing: FILE.py or FILE.py:VARIANT"
        die "--workdir is missing: the folder of the run, where all its processes can write"
    done
}

option_of_training() { # FLAG: its value
    local i
    for ((i = 0; i < ${#TRAINING[@]} - 1; i++)); do
        [[ ${TRAINING[i]} != "$1" ]] || printf '%s' "${TRAINING[i + 1]}"
    done
}

quoted() { # WORD...: one line that a shell reads as these words
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

run() { # COMMAND...: runs it, or prints it with --dry_run
    if on dry_run; then
        quoted "$@"
    else
        "$@"
    fi
}

run_with_input() { # INPUT COMMAND...: the same with text on standard input
    local input=$1
    shift
    if on dry_run; then
        printf "%s <<'END_OF_INPUT'\n%s\nEND_OF_INPUT\n" "$(quoted "$@")" "$input"
    else
        "$@" <<<"$input"
    fi
}

python_here() { # the Python of this checkout's environment if there is one
    if [[ -x $ROOT/.venv/bin/python ]]; then
        printf '%s' "$ROOT/.venv/bin/python"
    else
        printf 'python3'
    fi
}
