#!/usr/bin/env bash
# Training on Google Kubernetes Engine, as a JobSet.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
launch/gke_jobset.sh submit --name=NAME --image=IMAGE (--tpu=TYPE --topology=AxB | --gpu=TYPE) [OPTION...] \
    --config FILE.py --workdir gs://BUCKET/RUN [--config.FIELD=VALUE...] [-- ARGUMENT...]
launch/gke_jobset.sh manifest ...           prints what submit hands to kubectl
launch/gke_jobset.sh status|logs|delete --name=NAME [--namespace=NAME] [--lines=N]

One pod for each host. A pod that is taken away is told before: training saves in all of them, ends
with status 75, and all are started again, as often as that happens; any other failure counts as one
of --max_restarts.

  --image=IMAGE           made from launch/Dockerfile, where the cluster can pull it
  --tpu=TYPE              of the node pool: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...
  --topology=AxB[xC]      of the node pool: 2x4, 4x4, 2x2x4, ...
  --chips_per_host=N      (4)
  --slices=N              so many slices, each on a node pool of its own; trains with mesh.replica=N (1)
  --gpu=TYPE              of the node pool: nvidia-h100-80gb, nvidia-l4, ...
  --hosts=N               machines with GPUs (1)
  --gpus_per_host=N       (8)
  --spot                  on nodes that can be taken away at any time
  --service_account=NAME  of Kubernetes, which may read and write the bucket
  --secret=NAME           a secret of the cluster whose entries become environment variables
  --queue=NAME            the queue of Kueue that admits it
  --max_restarts=N        (10)
  --grace=SECONDS         that a pod which is told to stop has to save (120; of spot nodes GKE gives 25)
  --env=NAME=VALUE        an environment variable, nothing secret; repeat it
  --namespace=NAME        (kubectl's own setting)
  --lines=N               of the log of each pod (100)
  --dry_run               print the command with the manifest that it is given, run nothing
Needed here: kubectl for a cluster with JobSet (https://jobset.sigs.k8s.io/docs/installation)
END
}

OPTION+=([name]="" [image]="" [tpu]="" [topology]="" [chips_per_host]=4 [slices]=1 [gpu]="" [hosts]=1
    [gpus_per_host]=8 [spot]=false [service_account]="" [secret]="" [queue]="" [max_restarts]=10
    [grace]=120 [namespace]="" [lines]=100)
EXTRA_OPTION="env"
parse "$@"

((${#WORDS[@]} == 1)) || die "one action is needed: submit, manifest, status, logs or delete"
action=${WORDS[0]}
label='[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?'
need name "what to call the job"
need_name name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "a small letter, then at most 39 small letters, digits and hyphens"
for option in namespace service_account secret queue; do
    [[ -z ${OPTION[$option]} ]] || need_name "$option" "$label" "a name as Kubernetes wants it"
done
need_number lines 1
kubectl=(kubectl ${OPTION[namespace]:+"--namespace=${OPTION[namespace]}"})

string() { # TEXT: as a string of YAML on one line
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\r'/\\r}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

list() { # INDENT STRING...: an item on each line
    local indent=$1 text
    shift
    for text in "$@"; do
        printf '%*s- %s\n' "$indent" "" "$(string "$text")"
    done
}

check() { # sets `hosts`, pods of each slice
    need image "the image that launch/Dockerfile makes, where the cluster can pull it"
    need_training
    [[ $(option_of_training --workdir) == *://* ]] ||
        say "warning: --workdir $(option_of_training --workdir) is inside each pod and lost with it; give gs://BUCKET/RUN"
    need_number max_restarts 0
    need_number grace 1
    need_number slices 1
    local variable size chips=1
    for variable in "${OPTION[image]}" "${TRAINING[@]}" "${EXTRA[@]}"; do
        [[ ${variable//[$'\t\n\r']/} != *[[:cntrl:]]* ]] || die "$(quoted "$variable") has a control character"
    done
    for variable in "${EXTRA[@]}"; do
        [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=$variable: give --env=NAME=VALUE"
    done
    [[ -n ${OPTION[tpu]} || -n ${OPTION[gpu]} ]] || die "--tpu or --gpu is missing: the type of the node pool"
    [[ -z ${OPTION[tpu]} || -z ${OPTION[gpu]} ]] || die "--tpu and --gpu: give one of them"
    if [[ -n ${OPTION[gpu]} ]]; then
        need_name gpu "$label" "as in the node pool's label cloud.google.com/gke-accelerator"
        need_number hosts 1
        need_number gpus_per_host 1
        ((OPTION[slices] == 1)) || die "--slices is for TPUs; of GPUs give --hosts"
        hosts=${OPTION[hosts]}
        return
    fi
    need_name tpu "$label" "as in the node pool's label cloud.google.com/gke-tpu-accelerator"
    need topology "of the node pool: 2x4, 4x4, 2x2x4, ..."
    need_name topology '[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}' "as in 4x4 or 2x2x4"
    need_number chips_per_host 1
    for size in ${OPTION[topology]//x/ }; do chips=$((chips * size)); done
    ((chips > OPTION[chips_per_host])) || OPTION[chips_per_host]=$chips
    ((chips % OPTION[chips_per_host] == 0)) ||
        die "--topology=${OPTION[topology]} has $chips chips, which are no multiple of --chips_per_host=${OPTION[chips_per_host]}"
    hosts=$((chips / OPTION[chips_per_host]))
    ((OPTION[slices] == 1 || hosts > 1)) || die "--slices: GKE joins only slices of more than one host"
}

pod() { # of each host, at the depth at which the manifest has it
    local text argument arguments=() name=${OPTION[name]}
    for argument in "${TRAINING[@]}"; do
        arguments+=("${argument//\$/\$\$}") # a lone $( is a variable to Kubernetes
    done
    if [[ -n ${OPTION[gpu]} ]] && ((hosts > 1)); then
        # On TPUs this is known without being said.
        # shellcheck disable=SC2016  # for Kubernetes to replace
        arguments+=(--distributed --coordinator-address "$name-worker-0-0.$name:8476"
            --num-processes "$hosts" --process-id '$(JOB_COMPLETION_INDEX)')
    fi
    echo "            restartPolicy: Never"
    echo "            terminationGracePeriodSeconds: ${OPTION[grace]}"
    [[ -z ${OPTION[service_account]} ]] ||
        echo "            serviceAccountName: $(string "${OPTION[service_account]}")"
    if [[ -n ${OPTION[tpu]} ]]; then
        echo "            hostNetwork: true # the slices' network at full speed"
        echo "            dnsPolicy: ClusterFirstWithHostNet"
    fi
    echo "            nodeSelector:"
    if [[ -n ${OPTION[tpu]} ]]; then
        echo "              cloud.google.com/gke-tpu-accelerator: ${OPTION[tpu]}"
        echo "              cloud.google.com/gke-tpu-topology: ${OPTION[topology]}"
    else
        echo "              cloud.google.com/gke-accelerator: ${OPTION[gpu]}"
    fi
    if on spot; then
        cat <<'END'
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
END
    fi
    echo "            containers:"
    echo "            - name: train"
    echo "              image: $(string "${OPTION[image]}")"
    echo '              command: ["python", "-m", "clip_lite_jax.main"]'
    echo "              args:"
    list 14 "${arguments[@]}"
    echo "              env:"
    for text in PYTHONUNBUFFERED=1 "${EXTRA[@]}"; do
        echo "              - name: ${text%%=*}"
        echo "                value: $(text=${text#*=} && string "${text//\$/\$\$}")"
    done
    if [[ -n ${OPTION[secret]} ]]; then
        echo "              envFrom:"
        echo "              - secretRef:"
        echo "                  name: $(string "${OPTION[secret]}")"
    fi
    echo "              resources:"
    echo "                limits:"
    if [[ -n ${OPTION[tpu]} ]]; then
        echo "                  google.com/tpu: ${OPTION[chips_per_host]}"
        # The driver wants the devices and locked memory.
        echo "              securityContext:"
        echo "                privileged: true"
        echo "                runAsUser: 0"
    else
        echo "                  nvidia.com/gpu: ${OPTION[gpus_per_host]}"
    fi
    cat <<'END'
              volumeMounts:
              - name: shared-memory
                mountPath: /dev/shm
            volumes:
            - name: shared-memory # between the processes that read the data
              emptyDir:
                medium: Memory
END
}

manifest() {
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${OPTION[name]}
END
    if [[ -n ${OPTION[queue]} ]]; then
        echo "  labels:"
        echo "    kueue.x-k8s.io/queue-name: $(string "${OPTION[queue]}")"
    fi
    if [[ -n ${OPTION[tpu]} ]]; then
        echo "  annotations:"
        echo "    # All pods of a slice on one node pool."
        echo "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
    fi
    cat <<END
spec:
  failurePolicy:
    maxRestarts: ${OPTION[max_restarts]}
    rules:
    # What the pod failure policy below has matched is no failure, and does not count as one.
    - name: saved
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: worker
    replicas: ${OPTION[slices]}
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: # training was told to stop
              containerName: train
              operator: In
              values: [${STOPPED/|/, }]
          - action: FailJob
            onPodConditions: # the pod was taken away
            - type: DisruptionTarget
              status: "True"
        template:
          spec:
END
    pod
}

case $action in
    submit | manifest)
        if ((OPTION[slices] > 1)); then
            TRAINING=("--config.mesh.replica=${OPTION[slices]}" "${TRAINING[@]}")
        fi
        check
        text=$(manifest)
        if [[ $action == manifest ]]; then
            printf '%s\n' "$text"
        else
            run_with_input "$text" "${kubectl[@]}" apply --filename=-
        fi
        ;;
    status) run "${kubectl[@]}" get jobset,jobs,pods "--selector=jobset.sigs.k8s.io/jobset-name=${OPTION[name]}" ;;
    logs)
        run "${kubectl[@]}" logs "--selector=jobset.sigs.k8s.io/jobset-name=${OPTION[name]}" \
            --container=train --prefix "--tail=${OPTION[lines]}" --max-log-requests=1000
        ;;
    delete) run "${kubectl[@]}" delete jobset "${OPTION[name]}" ;;
    *) die "unknown action $action: submit, manifest, status, logs or delete" ;;
esac
