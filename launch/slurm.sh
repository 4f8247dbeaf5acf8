#!/usr/bin/env bash
# Training as a Slurm job, which goes back to the queue when its time is up.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/slurm.sh [OPTION...] --config FILE.py --workdir DIR [--config.FIELD=VALUE...] [-- ARGUMENT...]

Submits a job that trains on all its nodes: one process for each GPU, or for each node. They find each other by what Slurm tells them. The folder of the run and this checkout
must be at the same place on all nodes. Shortly before its time is up, and when it is preempted, the
job is told to stop: training saves, ends with status 75, and the job goes back to the queue under the
same number, where it goes on from that checkpoint.  scancel ends it.

  --nodes=N            (1)
  --gpus_per_node=G    (0: CPUs)
  --tasks_per_node=T   processes of each node: G, each with one GPU, or 1 with all (G, or 1 on CPUs)
  --cpus_per_task=C    processors of each process, which read its data (Slurm's own setting)
  --time=TIME          such as 24:00:00 or 2-00:00:00 (the partition's)
  --warning=SECONDS    before the end of that time (120)
  --partition=NAME     (Slurm's own setting)
  --account=NAME       (Slurm's own setting)
  --name=NAME          of the job (clip_lite_jax)
  --log=FILE           %j is the job's number (NAME-%j.log)
  --sbatch=OPTION      any other option of sbatch, such as --qos=long or --mem=64G; repeat it
  --python=FILE        (.venv/bin/python of this checkout, else python3)
  --dry_run            print the command with the script that it is given, run nothing
END
}

OPTION+=([nodes]=1 [gpus_per_node]=0 [tasks_per_node]="" [cpus_per_task]="" [time]="" [warning]=120
    [partition]="" [account]="" [name]=clip_lite_jax [log]="" [python]="$(python_here)")
EXTRA_OPTION=sbatch
parse "$@"

((${#WORDS[@]} == 0)) || die "not understood: ${WORDS[*]}; arguments of the training command stand after --"
need_number nodes 1
need_number gpus_per_node 0
need_number warning 60
need_training
need_name name '[-_.A-Za-z0-9]+' "letters, digits, hyphens, underscores and dots"
if [[ -z ${OPTION[tasks_per_node]} ]]; then
    OPTION[tasks_per_node]=$((OPTION[gpus_per_node] > 0 ? OPTION[gpus_per_node] : 1))
fi
need_number tasks_per_node 1
((OPTION[gpus_per_node] == 0 || OPTION[tasks_per_node] == 1 ||
    OPTION[tasks_per_node] == OPTION[gpus_per_node])) ||
    die "--tasks_per_node=${OPTION[tasks_per_node]}: give 1, or ${OPTION[gpus_per_node]}, one for each GPU"
[[ -z ${OPTION[cpus_per_task]} ]] || need_number cpus_per_task 1
for option in time partition account log "${EXTRA[@]}"; do
    [[ ${OPTION[$option]-$option} != *[[:space:]\"\'\\]* ]] ||
        die "${OPTION[$option]-$option}: an #SBATCH line takes no spaces, quotes or backslashes"
done
for option in "${EXTRA[@]}"; do
    [[ $option == --[a-z]* ]] || die "--sbatch=$option: give it as on sbatch's command line, --sbatch=--qos=long"
done

lines=(
    "--job-name=${OPTION[name]}"
    "--output=${OPTION[log]:-${OPTION[name]}-%j.log}"
    --open-mode=append # the log of what came before the queue stays
    "--nodes=${OPTION[nodes]}"
    "--ntasks-per-node=${OPTION[tasks_per_node]}"
)
! ((OPTION[gpus_per_node])) || lines+=("--gpus-per-node=${OPTION[gpus_per_node]}")
for option in cpus_per_task time partition account; do
    [[ -z ${OPTION[$option]} ]] || lines+=("--${option//_/-}=${OPTION[$option]}")
done
lines+=("--signal=TERM@${OPTION[warning]}" --requeue "${EXTRA[@]}")

# Slurm must not end the others when the first process has saved and ended with status 75, and not
# when all but the first, which writes the report, have ended well.  When one fails, the others
# notice that by themselves and end.
step=(srun --kill-on-bad-exit=0 --wait=0)
# Since Slurm 22.05 a step no longer takes this from the job.
[[ -z ${OPTION[cpus_per_task]} ]] || step+=("--cpus-per-task=${OPTION[cpus_per_task]}")
step+=("${OPTION[python]}" -m clip_lite_jax.main "${TRAINING[@]}")

script="#!/usr/bin/env bash
$(printf '#SBATCH %s\n' "${lines[@]}")
set -uo pipefail
# Who stops the job may signal this shell, too: it waits for the processes, which save.
trap : TERM
cd $(quoted "$PWD")
$(quoted "${step[@]}")
status=\$?
# Not when it was cancelled, which is told to the processes in the same way.
if [[ \$status =~ ^($STOPPED)\$ && \$(squeue --noheader --jobs=\"\$SLURM_JOB_ID\" --format=%T) == RUNNING ]]; then
    echo \"told to stop: back to the queue\"
    scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$status"
run_with_input "$script" sbatch
