"""What a compiled program sends and multiplies, read from the text of its HLO.

The text holds the body of a loop once, so every count is multiplied by how often its computation
runs.  XLA's own `cost_analysis` does not do that.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

KINDS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")

BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
"""Bytes of the types whose name does not end in their bits."""

ON_CHIP = "@"
"""Behind an array of `Instruction.shape` that does not lie in the main memory."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(([^()]*)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALL = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    text: str
    root: bool = False


@dataclass
class Computation:
    entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """One collective of the text, as it is when it runs."""

    kind: str
    group: int  # devices that take part
    operand_bytes: int  # on each of them
    times: int
    where: str  # the computation that has it
    instruction: Instruction

    @property
    def sent(self) -> float:
        """Bytes that leave a device every time, by the ring algorithms of NCCL and of TPUs."""
        n = self.group
        share = {
            "all-gather": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
        }
        return self.operand_bytes * share[self.kind]


@dataclass(frozen=True)
class Traffic:
    """By kind of collective."""

    sent: dict[str, float]  # bytes that leave a device
    count: dict[str, int]


def traffic(program: str) -> Traffic:
    """What a device sends when the program runs once."""
    sent = dict.fromkeys(KINDS, 0.0)
    count = dict.fromkeys(KINDS, 0)
    for exchange in exchanges(program):
        sent[exchange.kind] += exchange.times * exchange.sent
        count[exchange.kind] += exchange.times
    return Traffic(sent, count)


def exchanges(program: str) -> Iterator[Exchange]:
    return exchanges_of(parse(program))


def exchanges_of(computations: dict[str, Computation]) -> Iterator[Exchange]:
    runs = run_counts(computations)
    chained = set()
    for name, computation in computations.items():
        for instruction in computation.instructions.values():
            kind = instruction.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            # TPU: the start, the middle and the end of one asynchronous exchange repeat it.
            chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", instruction.text)
            if chain:
                key = re.sub(r",.*,", ",", chain[0])
                if key in chained:
                    continue
                chained.add(key)
            # TPU: a reduce-scatter is a fusion around an all-reduce.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            size = sum(size_in_bytes(shape) for shape in _operand_shapes(computation, instruction))
            times = known(runs[name], name)
            yield Exchange(kind, _group(instruction.text), size, times, name, instruction)


def matmul_flops(program: str) -> int:
    """Floating-point operations of products and convolutions on one device, two for a multiply-add.

    Products with the zeros of padding and of dilation are none.
    """
    computations = parse(program)
    runs = run_counts(computations)
    total = 0
    for name, computation in computations.items():
        for instruction in computation.instructions.values():
            if flops := _flops(computation, instruction):
                total += flops * known(runs[name], name)
    return total


def _flops(computation: Computation, instruction: Instruction) -> int:
    text = instruction.text
    # GPU: calls of libraries.  A convolution's gradients keep the labels of the convolution.
    library = re.search(r'custom_call_target="__(cublas|cudnn)\$(\w+)', text)
    if instruction.operation not in ("convolution", "dot") and library is None:
        return 0
    shapes = [dimensions(shape) for shape in _operand_shapes(computation, instruction)]
    if instruction.operation == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
        return _product_flops(shapes[0], dimensions(instruction.shape), summed)
    result = dimensions(instruction.shape)
    if library is None:
        return _convolution_flops(shapes[0], shapes[1], result, text)
    if library[1] == "cublas":
        summed = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', text)
        return _product_flops(shapes[0], result, summed)
    of_forward = {
        "convForward": (shapes[0], shapes[1], result),
        "convBiasActivationForward": (shapes[0], shapes[1], result),
        "convBackwardInput": (result, shapes[1], shapes[0]),
        "convBackwardFilter": (shapes[0], result, shapes[1]),
    }
    return _convolution_flops(*of_forward[library[2]], text) if library[2] in of_forward else 0


def _product_flops(left: list[int], result: list[int], summed: re.Match[str] | None) -> int:
    axes = [int(n) for n in re.findall(r"\d+", summed[1])] if summed else []
    return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


def _convolution_flops(left: list[int], kernel: list[int], result: list[int], text: str) -> int:
    """Outputs of a batch and channels, times inputs of the kernel, times places that meet.

    Groups of features need no factor: the kernel's inputs are those of a group.  Nor do groups of
    the batch: the result's batch is that of a group.  TPU: a matrix product is a convolution, and
    its batch is what the window calls space.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if found is None:
        raise ValueError(f"which dimensions are these? {text}")
    of_left, of_kernel, of_result = found.groups()
    pairs = math.prod(
        _places_that_meet(left[of_left.index(axis)], result[of_result.index(axis)], *window)
        for axis, window in _axes(text)
    )
    batch, channels = result[of_result.index("b")], result[of_result.index("f")]
    return 2 * batch * channels * kernel[of_kernel.index("i")] * pairs


def _axes(text: str) -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """Label, size, stride, padding before, dilation of the input and of the kernel, by axis."""
    found = re.search(r"window=\{([^}]*)\}", text)
    if found is None:
        return
    fields = dict(part.split("=") for part in found[1].split())
    sizes = fields["size"].split("x")
    ones = "x".join("1" * len(sizes))
    zeros = "x".join(["0_0"] * len(sizes))
    for axis, size in enumerate(sizes):
        stride, left, right = (
            int(fields.get(name, ones).split("x")[axis])
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(fields.get("pad", zeros).split("x")[axis].split("_")[0])
        yield str(axis), (int(size), stride, before, left, right)


@cache
def _places_that_meet(
    inputs: int, outputs: int, size: int, stride: int, before: int, left: int, right: int
) -> int:
    """Pairs of an output and a place of the kernel between which an input lies, on one axis."""
    output, place = np.arange(outputs)[:, None], np.arange(size)
    input = output * stride + place * right - before
    return int(np.sum((input >= 0) & (input <= (inputs - 1) * left) & (input % left == 0)))


def parse(program: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    current = Computation(False)
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], Computation(bool(head[1])))
        elif found := _INSTRUCTION.match(line):
            text = re.sub(r"/\*.*?\*/", "", found[3])
            # Layouts hold parentheses.  Of interest is one thing: S(n) is a memory on the chip.
            plain = re.sub(r"(?<=\])\{[^}]*S\([1-9]\d*\)[^}]*\}", ON_CHIP, text)
            plain = re.sub(r"(?<=\])\{[^}]*\}", "", plain)
            if operation := _OPERATION.search(plain):
                operands = tuple(re.findall(r"%([\w.\-]+)", operation[2]))
                shape = plain[: operation.start()]
                current.instructions[found[2]] = Instruction(
                    found[2], shape, operation[1], operands or (operation[2],), text, bool(found[1])
                )
    return computations


def dimensions(shape: str) -> list[int]:
    """Of a single array."""
    found = _ARRAY.search(shape)
    if found is None:
        raise ValueError(f"{shape!r} is no array")
    return [int(n) for n in found[2].split(",") if n]


def size_in_bytes(shape: str) -> int:
    """Of all arrays of a shape, tuples included."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = re.search(r"\d+$", kind)
        one = BYTES.get(kind) or int(bits[0] if bits else 8) // 8
        total += one * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _operand_shapes(computation: Computation, instruction: Instruction) -> list[str]:
    return [computation.instructions[name].shape for name in instruction.operands]


def _group(text: str) -> int:
    """Devices that exchange with each other."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", found[2]))
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return found[1].count("{")
    raise ValueError(f"who takes part in this? {text}")


def run_counts(computations: dict[str, Computation]) -> dict[str, float]:
    """How often each computation runs; not a number inside a loop of unknown length."""
    callers: dict[str, list[tuple[str, float]]] = {name: [] for name in computations}
    for name, computation in computations.items():
        for instruction in computation.instructions.values():
            times = _trips(computations, instruction) if instruction.operation == "while" else 1
            branches = _BRANCHES.search(instruction.text)
            called = [found[1] for found in _CALL.findall(instruction.text)]
            called += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            for other in called:
                callers[other].append((name, times))
    found: dict[str, float] = {}

    def runs(name: str) -> float:
        if name not in found:
            once = float(computations[name].entry)
            found[name] = once + sum(times * runs(caller) for caller, times in callers[name])
        return found[name]

    return {name: runs(name) for name in computations}


def _trips(computations: dict[str, Computation], loop: Instruction) -> float:
    """Iterations of a loop: as stated, or the one constant that its counter is compared with."""
    if stated := _TRIPS.search(loop.text):
        return int(stated[1])
    condition = dict(_CALL.findall(loop.text))["condition"]
    instructions = computations[condition].instructions.values()
    limits = [i.operands[0] for i in instructions if i.operation == "constant"]
    below = any("direction=LT" in i.text for i in instructions)
    return int(limits[0]) if below and len(limits) == 1 else math.nan


def known(times: float, name: str) -> int:
    if math.isnan(times):
        raise ValueError(f"{name} is part of a loop whose length the program does not state")
    return int(times)
