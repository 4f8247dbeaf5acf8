"""``clip-lite plan``: what a training step needs and costs, before there is data or an accelerator.

The step is compiled in a process of its own, `plan_process`.  Which devices jax sees is decided
when it starts, by variables of the environment, and this process may have started it already; the
TPU compiler must be seen by that process alone, or every import of jax would look for a TPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_lite_jax.chips import check_topology
from clip_lite_jax.config import Config, to_dict
from clip_lite_jax.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What is to be planned.  With neither `topology` nor `devices`: for the attached devices."""

    topology: str | None = None
    """Of TPUs, ``v5e:2x4``."""
    devices: int | None = None
    """Fake CPU devices: memory and traffic, no time."""
    utilization: float = 0.4
    """Part of the chip's peak that products reach."""
    price: float | None = None
    """USD for an hour of one chip."""
    fit_batch: bool = False
    """Also look for the largest batch."""
    memory_gib: float | None = None
    """Of one device, in place of what it has."""


def plan(config: Config, request: Request) -> dict[str, Any]:
    """The plan, as plain data: `plan_process.Plan`.

    Raises:
      ConfigError: what cannot be planned, and why.
    """
    check(request)
    given = json.dumps({"config": to_dict(config), "request": asdict(request)})
    done = subprocess.run(
        [sys.executable, "-m", "clip_lite_jax.apps.plan_process"],
        input=given,
        stdout=subprocess.PIPE,
        env=environment(request),
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the planning process ended with status {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer


def check(request: Request) -> None:
    """Raises `ConfigError` for what no process need be started for."""
    if request.topology is not None and request.devices is not None:
        raise ConfigError(
            "--topology and --devices: one of them; the second is of fake CPU devices"
        )
    if request.topology is not None:
        check_topology(request.topology)
    if request.devices is not None and request.devices < 1:
        raise ConfigError(f"--devices {request.devices}: needs at least 1")
    if not 0 < request.utilization <= 1:
        raise ConfigError(f"--utilization {request.utilization}: needs 0 < utilization <= 1")
    if request.price is not None and request.price < 0:
        raise ConfigError(f"--price {request.price}: needs a price of 0 or more")
    if request.memory_gib is not None and request.memory_gib <= 0:
        raise ConfigError(f"--memory {request.memory_gib}: needs more than 0 GiB")


def environment(request: Request) -> dict[str, str]:
    """The environment of the process that compiles.

    Raises:
      ConfigError: a TPU topology, and no TPU compiler.
    """
    variables = dict(os.environ)
    if request.topology is not None:
        variables["TPU_LIBRARY_PATH"] = str(tpu_compiler())
        # There is no TPU: nothing is to be looked up in a Cloud VM's metadata, or initialised.
        variables |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
        # Nor is one taken: several plans may be made at once.
        variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        # Without these two it complains that it finds no host of TPUs.
        variables |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1"}
        # libtpu would stop at flags of the CPU's compiler, and what it compiles for devices that
        # are not there cannot be read back from a cache.
        for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
            variables.pop(name, None)
        variables.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    elif request.devices is not None:
        # The last of equal flags holds.
        flags = variables.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={request.devices}"
        variables |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    return variables


def tpu_compiler() -> Path:
    """``libtpu.so``: what TPU_LIBRARY_PATH names, or that of the installed package.

    Raises:
      ConfigError: there is none.
    """
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named is not None:
        if not Path(named).is_file():
            raise ConfigError(f"TPU_LIBRARY_PATH={named}: no such file; it names a libtpu.so")
        return Path(named)
    found = importlib.util.find_spec("libtpu")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "--topology needs the TPU compiler: pip install 'clip-lite-jax[plan]', best in an "
            "environment of its own (with it every import of jax looks for a TPU), or unpack it "
            "elsewhere, pip install --no-deps --target=DIR libtpu, and set "
            "TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so; --devices N needs neither"
        )
    return Path(found.submodule_search_locations[0]) / "libtpu.so"
