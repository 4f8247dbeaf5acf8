"""What each exchange between devices in a compiled program is for, read from its HLO.

The compiler keeps with most operations the name of what they were in the source, and joins small
exchanges to larger ones.  So every operand of an exchange is followed back to an operation that has
a name.  Flax puts modules into names, and jax transformations: ``transpose`` is of gradients.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from clip_lite_jax.hlo import (
    Computation,
    Exchange,
    Instruction,
    exchanges_of,
    parse,
    size_in_bytes,
)

NEGATIVES = "negatives"
"""Name of the scope in which negatives are drawn and scored (`jax.named_scope`)."""

_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_PART = re.compile(r"\b(?:(?:image|text)_(?:encoder|prior)|(?:visual_|textual_)?critic)\b")
_STORED = ("state.", "sharding_constraint", "dynamic_index_in_dim")
"""In names of parameters, of one that is gathered, and of a layer of many (`gathering`)."""
_FARTHEST = 50


@dataclass(frozen=True)
class Collective:
    """All that a program sends of one kind for one purpose."""

    kind: str
    purpose: str
    times: int
    """Exchanges that carry some of it."""
    sent: float
    """Bytes that leave a device."""


def collectives(program: str) -> list[Collective]:
    """What a device sends when the program runs once, the most first.

    Purposes are ``parameters of image_encoder``, ``gradients of critic``, ``statistics of`` what
    counts over a batch, ``activations of`` what was split otherwise, ``negatives``, ``gradients of
    negatives``, ``sums`` of losses, metrics and norms, and ``other``.
    """
    reader = _Reader(parse(program))
    times: dict[tuple[str, str], int] = {}
    sent: dict[tuple[str, str], float] = {}
    for exchange in exchanges_of(reader.computations):
        shares = list(reader.shares(exchange))
        whole = sum(size for _, size in shares)
        for purpose, size in shares:
            key = (exchange.kind, purpose)
            share = exchange.sent * exchange.times * size / whole if whole else 0.0
            sent[key] = sent.get(key, 0.0) + share
        for purpose in {purpose for purpose, _ in shares}:
            key = (exchange.kind, purpose)
            times[key] = times.get(key, 0) + exchange.times
    found = [Collective(kind, what, times[kind, what], sent[kind, what]) for kind, what in times]
    return sorted(found, key=lambda c: (-c.sent, c.kind, c.purpose))


def purpose_of(kind: str, names: list[str]) -> str:
    """By the names of what is exchanged, those that say most first."""
    summed = kind in ("all-reduce", "reduce-scatter")
    for name in names:
        backward = "transpose(" in name
        part = _PART.search(name)
        if NEGATIVES in name and not (summed and part and "shard_map" not in name):
            if kind == "all-reduce" and name.endswith("psum"):
                continue  # of the critic's parameters, by which every device scores
            return f"gradients of {NEGATIVES}" if backward else NEGATIVES
        if part:
            if not summed and any(word in name for word in _STORED):
                return f"parameters of {part[0]}"
            what = "gradients" if backward else "statistics" if summed else "activations"
            return f"{what} of {part[0]}"
    if any(NEGATIVES in name for name in names):
        return "gradients of critic"
    if kind == "all-reduce" and any(re.search(r"\b(reduce_\w+|psum)\b", name) for name in names):
        return "sums"
    return "other"


class _Reader:
    """Follows operands through the computations of a program."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations = computations
        self.callers: dict[str, tuple[str, Instruction]] = {}
        self.results: dict[tuple[str, str], dict[int, str]] = {}
        for where, computation in computations.items():
            for instruction in computation.instructions.values():
                if called := _CALLED.search(instruction.text):
                    self.callers[called[1]] = where, instruction
                index = _INDEX.search(instruction.text)
                if instruction.operation == "get-tuple-element" and index:
                    of = self.results.setdefault((where, instruction.operands[0]), {})
                    of[int(index[1])] = name if ":" not in (name := _name(instruction)) else ""

    def shares(self, exchange: Exchange) -> Iterator[tuple[str, int]]:
        """Purpose and bytes of every operand."""
        where, instruction = exchange.where, exchange.instruction
        results = self.results.get((where, instruction.name), {})
        caller = self.callers.get(where)
        around = [_name(caller[1])] if caller else []
        own = _name(instruction)
        joined = len(instruction.operands) > 1
        for number, operand in enumerate(instruction.operands):
            names = [results.get(number, "") if joined else own, self.origin(where, operand)]
            names += [own, *around]
            size = size_in_bytes(self.computations[where].instructions[operand].shape)
            yield purpose_of(exchange.kind, [name for name in names if name]), size

    def origin(self, where: str, name: str) -> str:
        """The name of the operation that an array comes from; empty where none has one."""
        for _ in range(_FARTHEST):
            instruction = self.computations[where].instructions[name]
            if found := _name(instruction):
                return found
            called = _CALLED.search(instruction.text)
            if instruction.operation == "parameter":
                if where not in self.callers:
                    return ""
                number = int(instruction.operands[0])
                where, caller = self.callers[where]
                name = caller.operands[number]
            elif called and called[1] in self.computations:
                where = called[1]
                body = self.computations[where].instructions
                name = next(i.name for i in body.values() if i.root)
            elif instruction.operation == "get-tuple-element":
                name = self._element(where, instruction)
            elif instruction.operands[0] in self.computations[where].instructions:
                name = instruction.operands[0]
            else:
                return ""
        return ""

    def _element(self, where: str, element: Instruction) -> str:
        """Of a tuple, or of an exchange of several arrays, the one; of anything else the whole."""
        whole = self.computations[where].instructions[element.operands[0]]
        index = _INDEX.search(element.text)
        called = _CALLED.search(whole.text)
        many = whole.operation in ("tuple", "all-reduce") or (
            called is not None and called[1].startswith("all-reduce-scatter")
        )
        if many and index and int(index[1]) < len(whole.operands):
            return whole.operands[int(index[1])]
        return whole.name


def _name(instruction: Instruction) -> str:
    """What jax called it; without it the partitioner's own work, of which nothing is said."""
    found = _NAME.search(instruction.text)
    return found[1].replace("\\'", "'") if found else ""
