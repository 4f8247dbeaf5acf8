"""What a compiled program moves to and from the main memory of its device, read from its HLO."""

import re

from clip_lite_jax.hlo import (
    ON_CHIP,
    Computation,
    Instruction,
    known,
    parse,
    run_counts,
    size_in_bytes,
)

FREE = (
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
)
"""Operations that move nothing, or whose parts are counted themselves."""

SLICED = ("dynamic-slice", "gather", "slice")
"""Operations that read no more of their first operand than they give."""

_ARRAYS = re.compile(rf"\w+\[[\d,]*\]{ON_CHIP}?")
_BODY = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_ELSEWHERE = re.compile(rf"\w+\[[\d,]*\]{ON_CHIP}")


def bytes_moved(program: str) -> int:
    """Bytes that one run reads from and writes to the main memory of a device.

    Every operation reads its operands and writes its result; within a fusion nothing is moved.
    What a slice leaves out, and what an update in place leaves as it was, is not moved.
    """
    computations = parse(program)
    runs = run_counts(computations)
    fused = _fused(computations)
    total = 0
    for name, computation in computations.items():
        if name not in fused and runs[name]:
            moved = sum(
                _moved(computations, computation, i) for i in computation.instructions.values()
            )
            total += moved * known(runs[name], name)
    return total


def in_main_memory(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the main memory."""
    return size_in_bytes(_ELSEWHERE.sub("", shape))


def _fused(computations: dict[str, Computation]) -> set[str]:
    """Computations that are part of an operation: bodies of fusions, reductions and collectives."""
    parts: set[str] = set()
    for computation in computations.values():
        for instruction in computation.instructions.values():
            if instruction.operation != "call":
                parts |= set(_BODY.findall(instruction.text))
    return parts


def _moved(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction
) -> int:
    operation, result = instruction.operation, instruction.shape
    if operation in FREE or operation.endswith("-done"):
        return 0
    operands = [
        computation.instructions[name].shape
        for name in instruction.operands
        if name in computation.instructions
    ]
    body = _BODY.search(instruction.text)
    if operation == "fusion" and body:
        return _moved_by_fusion(computations[body[1]], result, operands)
    if operation == "slice-start":  # ((all), part, flag)
        return size_in_bytes(_ARRAYS.findall(result)[1])
    if operation == "dynamic-update-slice":
        return 2 * size_in_bytes(operands[1])
    read = [in_main_memory(shape) for shape in operands]
    if operation in SLICED:
        read[0] = min(read[0], size_in_bytes(result))
    elif operation.endswith("-start"):  # the result names the source too
        read = []
    return in_main_memory(result) + sum(read)


def _moved_by_fusion(body: Computation, result: str, operands: list[str]) -> int:
    """Of a parameter that is only sliced the slices count, of one updated in place the update."""
    users: dict[str, list[Instruction]] = {name: [] for name in body.instructions}
    for instruction in body.instructions.values():
        for name in instruction.operands:
            if name in users:
                users[name].append(instruction)

    def through(name: str) -> list[Instruction]:
        """Those that use it, looking through bitcasts."""
        found = []
        for user in users[name]:
            found += through(user.name) if user.operation == "bitcast" else [user]
        return found

    total = 0
    for instruction in body.instructions.values():
        if instruction.operation == "parameter":
            given = in_main_memory(operands[int(instruction.operands[0])])
            if given:
                total += min(given, _read(body, instruction, through(instruction.name)))
    written = [result] if "(" not in result else _ARRAYS.findall(result)
    for shape, source in zip(written, _results(body), strict=False):
        if in_main_memory(shape):
            updated = source.operation == "dynamic-update-slice"
            total += size_in_bytes(
                body.instructions[source.operands[1]].shape if updated else shape
            )
    return total


def _read(body: Computation, parameter: Instruction, users: list[Instruction]) -> int:
    whole, read = size_in_bytes(parameter.shape), 0
    for user in users:
        first = _origin(body, user.operands[0]) == parameter.name
        if first and user.operation in SLICED:
            read += size_in_bytes(user.shape)
        elif not (first and user.operation == "dynamic-update-slice"):
            return whole
    return read


def _origin(body: Computation, name: str) -> str:
    """What a chain of bitcasts begins with."""
    instruction = body.instructions[name]
    return _origin(body, instruction.operands[0]) if instruction.operation == "bitcast" else name


def _results(body: Computation) -> list[Instruction]:
    root = next(i for i in body.instructions.values() if i.root)
    names = root.operands if root.operation == "tuple" else (root.name,)
    return [body.instructions[_origin(body, name)] for name in names]
