"""The one place that joins the processes of a run, and that ends them together."""

import ctypes
import json
import logging
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lite_jax import peers
from clip_lite_jax.cluster import detect
from clip_lite_jax.errors import ConfigError, Interrupted
from clip_lite_jax.files import write_atomic
from clip_lite_jax.peers import Group, Peers, prefixed

if TYPE_CHECKING:
    from clip_lite_jax.places import Place

HEARTBEAT = 20
"""Seconds after which jax gives up a process that is there but does not move, by aborting all."""
TOGETHER = (0, Interrupted.status)
"""Exit statuses that all processes come to at the same step; any other is one process's own."""
STOPPED = 128 + signal.SIGINT
FOLDER_FILE = ".processes.json"
SEEN_WITHIN = 60.0
"""Seconds in which a file of process 0 is seen by all hosts, where they share the folder."""


@dataclass(frozen=True)
class Options:
    """What the command line says of processes; None is not said."""

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: float = 300.0


@dataclass
class _This:
    """This process: None until it has joined others."""

    group: Group | None = None
    peers: Peers | None = None


_this = _This()


def join(options: Options, workdir: "Place") -> None:
    """Joins this process with the others of its run, if there are any; before jax is used.

    Raises:
      ConfigError: what is asked for contradicts itself, or `workdir` is not one folder for all.
      PeerError: not all processes came in time.
    """
    group = find_group(options)
    if group is None:
        return
    _this.group = group
    _mark_logs(group.process)
    run = uuid.uuid4().hex
    shared = workdir if isinstance(workdir, Path) else None  # a bucket is the same everywhere
    if group.process == 0 and shared is not None:
        _sign_folder(shared, run)
    _this.peers = peers.gather(group, options.join_timeout, run)
    _start_jax(group)
    if group.process and shared is not None:
        _check_folder(shared, _this.peers)


def joined() -> bool:
    """Whether this process is one of several."""
    return _this.peers is not None


def end(status: int, message: str = "", told: str = "") -> int:
    """Prints the message and returns the exit status, once the other processes know of it.

    A process that fails among several ends here: at its exit jax would wait for the others, which
    print ``process I on HOST`` and what they are `told` (default: the message).
    """
    group, others = _this.group, _this.peers
    if others is not None and status in TOGETHER:
        others.finish()
    elif others is not None:
        others.fail(told or message, grace=0 if status == STOPPED else peers.GRACE)
    if message:
        print(prefixed(message, group.process) if group else message, file=sys.stderr)
    if others is not None and status not in TOGETHER:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def find_group(options: Options) -> Group | None:
    """The group that flags, the environment or the cluster state; None for a process by itself.

    Raises:
      ConfigError: they contradict themselves, or `options.distributed` and there is none.
    """
    if options.join_timeout <= 0:
        raise ConfigError(f"--join-timeout={options.join_timeout}: give seconds, more than 0")
    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _given(options.num_processes, "--num-processes", "JAX_NUM_PROCESSES")
    process = _given(options.process_id, "--process-id", "JAX_PROCESS_ID")
    if processes == 1 and not process:
        return None
    said = {"--coordinator-address": address, "--num-processes": processes, "--process-id": process}
    missing = [flag for flag, value in said.items() if value is None]
    if address is not None and processes is not None and process is not None:
        return _checked(Group(address, processes, process))
    found = detect(options.join_timeout)
    if found is None and options.distributed and len(missing) == len(said):
        raise ConfigError(
            "--distributed: no cluster found (looked for a step of SLURM, pods of GKE and workers "
            "of a Cloud TPU): start it with srun, or give --coordinator-address, --num-processes "
            "and --process-id"
        )
    if found is None or found.processes == 1:
        if len(missing) < len(said):
            given = " and ".join(flag for flag in said if flag not in missing)
            raise ConfigError(f"{given} without {' and '.join(missing)}: give all three")
        return None
    return _checked(
        Group(
            address or found.address,
            found.processes if processes is None else processes,
            found.process if process is None else process,
            found.devices,
        )
    )


def _checked(group: Group) -> Group:
    if group.processes < 1:
        raise ConfigError(f"--num-processes={group.processes}: at least 1")
    if group.process >= group.processes:
        raise ConfigError(
            f"--process-id={group.process}: of {group.processes} processes they are 0 to "
            f"{group.processes - 1}"
        )
    group.split_address()
    return group


def _given(flag: int | None, name: str, variable: str) -> int | None:
    """A number from its flag or else from the environment."""
    if flag is None:
        text = os.environ.get(variable)
        if not text:
            return None
        if not text.isdecimal():
            raise ConfigError(f"{variable}={text!r} in the environment is not a number")
        return int(text)
    if flag < 0:
        raise ConfigError(f"{name}={flag}: not less than 0")
    return flag


def _mark_logs(process: int) -> None:
    """Only process 0 tells how it goes; every line says whose it is."""

    class Marked(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return prefixed(super().format(record), process)

    root = logging.getLogger()
    root.setLevel(logging.INFO if process == 0 else logging.WARNING)
    for handler in root.handlers:
        handler.setFormatter(Marked("%(message)s"))


def _start_jax(group: Group) -> None:
    """Joins the processes for jax, too.  Between CPUs its collectives are gloo's by default."""
    import jax

    host, _ = group.split_address()
    # gRPC would look for the coordinator behind a proxy, in vain, and jax warns of any.
    variables = ("no_grpc_proxy", "no_proxy")
    os.environ[variables[0]] = ",".join([*filter(None, map(os.environ.get, variables)), host])
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)
    jax.distributed.initialize(
        group.address,
        group.processes,
        group.process,
        list(group.devices) if group.devices else None,
        cluster_detection_method="deactivate",  # it would take one accelerator of a SLURM host
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    _slow_abort()


def _slow_abort() -> None:
    """Puts six seconds before an abort, in which the watch of `Peers` ends the process.

    jax aborts at once when the coordinator is killed, most often before Python can say who is lost.
    A signal's handler gets its number, 6 for SIGABRT, and ``sleep`` takes seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _sign_folder(workdir: Path, run: str) -> None:
    """Process 0: leaves in the run's folder what the others look for."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomic(workdir / FOLDER_FILE, json.dumps({"run": run}))
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def _check_folder(workdir: Path, found: Peers) -> None:
    """Raises `ConfigError` where the folder is not that of process 0: half of a checkpoint in each
    of two folders is none."""
    deadline = time.monotonic() + SEEN_WITHIN
    while time.monotonic() < deadline:
        try:
            if json.loads((workdir / FOLDER_FILE).read_text())["run"] == found.run:
                return
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.2)
    raise ConfigError(
        f"--workdir={workdir} on {found.hosts[found.process]} is not the folder that process 0 on "
        f"{found.hosts[0]} sees: give one on a file system that all hosts share"
    )
