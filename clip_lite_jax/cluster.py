"""Whether this process is one of several, by what SLURM, GKE and Cloud TPU say of it.

What their variables mean is jax's knowledge (`jax._src.clusters`).  It takes the tasks of an
allocation for running ones, though, and asks for a metadata server where none may be.
"""

import logging
import os
import socket
from pathlib import Path
from typing import Any

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.peers import Group

log = logging.getLogger(__name__)

TPU_PORT = "8482"  # as jax has it
GOOGLE = "0x1ae0"  # vendor of PCI devices


def detect(timeout: float) -> Group | None:
    """The processes that run together with this one, which may be none; None outside of clusters.

    Waits `timeout` seconds at most for the coordinator's name to be known.
    """
    return _slurm() or _gke() or _cloud_tpu(timeout)


def _slurm() -> Group | None:
    """The tasks of a step that ``srun`` has started.

    Not those of an allocation: in a shell or a batch script of it one process runs, however many
    tasks it is for.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS", 0)
    slurm = _of_jax("SlurmCluster")
    if not tasks or slurm is None or not slurm.is_env_present():
        return None
    address = slurm.get_coordinator_address(0, os.environ.get("JAX_COORDINATOR_PORT"))
    return Group(address, tasks, _number("SLURM_PROCID", 0), _slurm_devices(tasks))


def _slurm_devices(tasks: int) -> tuple[int, ...] | None:
    """One accelerator for each task of a host, unless SLURM has dealt them out already."""
    alone = tasks == _number("SLURM_STEP_NUM_NODES", 1)
    dealt = len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,0").split(",")) == 1
    if alone or dealt or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return (_number("SLURM_LOCALID", 0),)


def _gke() -> Group | None:
    """The pods of TPU slices, as GKE (or whoever sets the same variables) names them."""
    named = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not named or "TPU_WORKER_ID" not in os.environ:
        return None
    hosts = named.split(",")
    processes = len(hosts) * _number("MEGASCALE_NUM_SLICES", 1)
    first = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    port = os.environ.get("JAX_COORDINATOR_PORT", TPU_PORT)
    process = _number("TPU_WORKER_ID", 0) + len(hosts) * _number("MEGASCALE_SLICE_ID", 0)
    return Group(f"{first.split(':')[0]}:{port}", processes, process)


def _cloud_tpu(timeout: float) -> Group | None:
    """The workers of a Cloud TPU VM, from its metadata server; asked where there are TPUs only."""
    if not _has_tpus() or not _answers():
        return None
    cloud = _of_jax("GceTpuCluster")
    try:
        if cloud is None or not cloud.is_env_present():
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cloud.get_coordinator_address(int(timeout), port)
        return Group(address, cloud.get_process_count(), cloud.get_process_id())
    except Exception as error:  # of requests, of jax, or because an answer is not what it was
        log.warning("what this TPU's metadata server says of its workers is not clear: %r", error)
        return None


def _has_tpus() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == GOOGLE for path in vendors)


def _answers() -> bool:
    """Whether there is a metadata server; jax would wait for it for minutes."""
    host, _, port = os.environ.get("GCE_METADATA_IP", "metadata.google.internal").partition(":")
    try:
        socket.create_connection((host, int(port or 80)), timeout=2).close()
    except OSError:
        return False
    return True


def _of_jax(name: str) -> Any:
    """A class of jax's that reads a cluster's variables; None in a jax that has no such class.

    The only use of jax's private interface: its public one starts what it has found at once.
    """
    try:
        from jax._src import clusters
    except ImportError:
        return None
    return getattr(clusters, name, None)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, default)
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{variable}={value!r} in the environment is not a number") from error
