"""What accelerators have, as their makers publish it."""

from dataclasses import dataclass

from clip_lite_jax.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One device as jax sees it; speeds are peaks."""

    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float
    """At jax's default precision: one pass in bfloat16 on TPUs, TF32 on GPUs that have it."""
    memory_gb_s: float
    network_gb_s: float
    """All links of the chip together, one direction."""
    source: str


_TPU = "cloud.google.com/tpu/docs"
_NVIDIA = "nvidia.com/data-center"

CHIPS: dict[str, Chip] = {
    # Links: 2400, 1600, 4800 and 3584 Gbit/s.
    "v4": Chip(32, 275, 275, 1228, 300, f"{_TPU}/v4"),
    "v5e": Chip(16, 197, 197, 819, 200, f"{_TPU}/v5e"),
    "v5p": Chip(95, 459, 459, 2765, 600, f"{_TPU}/v5p"),
    "v6e": Chip(32, 918, 918, 1640, 448, f"{_TPU}/v6e"),
    # Links: NVLink, half of what is published for both directions.
    "H100": Chip(80, 989, 495, 3350, 450, f"{_NVIDIA}/h100, SXM, dense"),
    "H200": Chip(141, 989, 495, 4800, 450, f"{_NVIDIA}/h200, SXM, dense"),
    "A100": Chip(80, 312, 156, 2039, 300, f"{_NVIDIA}/a100, SXM 80 GB, dense"),
    # Links: PCIe.  The T4 has no bfloat16: it computes in float32.
    "T4": Chip(16, 8.1, 8.1, 320, 16, f"{_NVIDIA}/tesla-t4"),
    "L4": Chip(24, 121, 60, 300, 32, f"{_NVIDIA}/l4, dense"),
}
"""By the name that topologies and `jax.Device.device_kind` begin with or hold."""

KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
"""What libtpu calls TPUs; GPUs hold their name, ``NVIDIA H100 80GB HBM3``."""

TOPOLOGIES = ("v4:2x2x1", "v5e:2x4", "v5e:16x16", "v5p:2x2x1", "v6e:2x4")
"""Examples; `check_topology` says what else is one."""


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Operations a second at best, of products in `dtype`; None for what is not in the table."""
    chip = chip_of(device_kind)
    if chip is None:
        return None
    return 1e12 * (chip.bfloat16_tflops if dtype == "bfloat16" else chip.float32_tflops)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device; None for CPUs and for what is not in the table."""
    if device_kind in KINDS:
        return CHIPS[KINDS[device_kind]]
    words = device_kind.replace("-", " ").split()
    return next((chip for name, chip in CHIPS.items() if name in words), None)


def check_topology(name: str) -> None:
    """Raises `ConfigError` for what cannot be a topology: a chip we know, a colon, its sides."""
    chip, colon, sides = name.partition(":")
    numbers = sides.split("x")
    known = [c for c in KINDS.values() if c == chip]
    if not (known and colon and all(n.isdigit() and int(n) > 0 for n in numbers)):
        raise ConfigError(
            f"--topology {name}: no topology; CHIP:SIDES with CHIP one of "
            f"{', '.join(KINDS.values())}, as in {', '.join(TOPOLOGIES)}"
        )
