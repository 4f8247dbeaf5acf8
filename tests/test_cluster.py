"""What is found without flags: clusters by their variables, and nothing elsewhere."""

import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from clip_lite_jax import cluster, distributed
from clip_lite_jax.distributed import Options, find_group
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.peers import Group

STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
PODS = {"TPU_WORKER_HOSTNAMES": "pod-0.svc,pod-1.svc", "TPU_WORKER_ID": "1"}
EXPLICIT = Options(coordinator_address="a:1234", num_processes=4, process_id=2)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, whatever machine the tests run on."""
    for name in ("ADDRESS", "PORT", "BIND_ADDRESS"):
        monkeypatch.delenv(f"JAX_COORDINATOR_{name}", raising=False)
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in (*STEP, *PODS, "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cluster, "_has_tpus", lambda: False)


def give(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_on_a_laptop_there_is_nothing() -> None:
    assert find_group(Options()) is None
    with pytest.raises(ConfigError, match="no cluster found .* srun, or give --coordinator"):
        find_group(Options(distributed=True))


def test_flags_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Group("a:1234", 4, 2)
    assert find_group(EXPLICIT) == expected
    give(
        monkeypatch,
        {
            "JAX_COORDINATOR_ADDRESS": "a:1234",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "2",
        },
    )
    assert find_group(Options()) == find_group(Options(distributed=True)) == expected
    assert find_group(Options(process_id=0)) == Group("a:1234", 4, 0)  # a flag counts more
    assert find_group(Options(num_processes=1, process_id=0)) is None
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='two' in the environment"):
        find_group(Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_id": 4}, "--process-id=4: of 4 processes they are 0 to 3"),
        ({"process_id": -1}, "--process-id=-1"),
        ({"num_processes": 0}, "--num-processes=0: at least 1"),
        ({"coordinator_address": "a"}, "'a' is not HOST:PORT"),
        ({"process_id": None}, "and --num-processes without --process-id: give all three"),
        ({"coordinator_address": None}, "without --coordinator-address"),
        ({"num_processes": None, "process_id": None}, "--coordinator-address without --num-"),
        ({"num_processes": 1}, "--process-id=2: of 1 processes"),
        ({"join_timeout": 0.0}, "--join-timeout=0.0"),
    ],
)
def test_flags_that_do_not_go_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_group(replace(EXPLICIT, **changes))  # type: ignore[arg-type]


def test_a_step_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, STEP)
    address = "gpu07:61441"  # from 61440 on, by the number of the job
    assert find_group(Options()) == Group(address, 8, 5, devices=(1,))
    assert find_group(Options(coordinator_address="b:1")) == Group("b:1", 8, 5, devices=(1,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # dealt out by --gpus-per-task
    assert find_group(Options()) == Group(address, 8, 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    give(monkeypatch, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"})
    assert find_group(Options()) == Group(address, 2, 1)  # one for each host: all of its GPUs
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "99")
    assert find_group(Options()) == Group("gpu07:99", 2, 1)


def test_an_allocation_without_a_step_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script, a shell of salloc, and a shell that is a step of one task."""
    batch = {n: v for n, v in STEP.items() if "STEP" not in n} | {"SLURM_PROCID": "0"}
    give(monkeypatch, batch)
    assert find_group(Options()) is None
    with pytest.raises(ConfigError, match="start it with srun"):
        find_group(Options(distributed=True))
    give(monkeypatch, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert find_group(Options()) is None
    assert find_group(Options(distributed=True)) is None  # a cluster, of one


def test_pods_of_gke(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, PODS)
    assert find_group(Options()) == Group("pod-0.svc:8482", 2, 1)
    give(
        monkeypatch,
        {
            "MEGASCALE_NUM_SLICES": "3",
            "MEGASCALE_SLICE_ID": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "set-0-0.svc:8080",
        },
    )
    assert find_group(Options()) == Group("set-0-0.svc:8482", 6, 5)
    for name in ("NUM_SLICES", "SLICE_ID", "COORDINATOR_ADDRESS"):
        monkeypatch.delenv(f"MEGASCALE_{name}")
    give(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert find_group(Options()) is None


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A metadata server, with attributes that a test gives it, for a host with TPUs."""
    attributes: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = attributes.get(self.path.rpartition("/")[2])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # jax sets it where no TPU is
        monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(cluster, "_has_tpus", lambda: True)
        yield attributes
        server.shutdown()


def test_workers_of_a_cloud_tpu(metadata: dict[str, str]) -> None:
    metadata |= {
        "agent-worker-number": "1",
        "worker-network-endpoints": "u:1:127.0.0.1,u:2:127.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
    }
    assert find_group(Options()) == Group("127.0.0.1:8482", 2, 1)
    metadata["worker-network-endpoints"] = "u:1:127.0.0.1"
    metadata["agent-worker-number"] = "0"
    assert find_group(Options()) is None
    assert find_group(Options(distributed=True)) is None


def test_what_a_metadata_server_does_not_say(
    metadata: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    metadata |= {"agent-worker-number": "1", "tpu-env": "", "worker-network-endpoints": "a:b"}
    assert find_group(Options()) is None
    assert "metadata server says of its workers is not clear" in caplog.text


def test_a_tpu_without_a_metadata_server(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str]
) -> None:
    del metadata
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    assert find_group(Options()) is None


def test_a_jax_that_tells_nothing_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, STEP)
    monkeypatch.delattr("jax._src.clusters.SlurmCluster")
    assert find_group(Options()) is None
    assert distributed.end(3) == 3
