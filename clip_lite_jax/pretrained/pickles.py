"""A reader of pickles that runs nothing.

Python's own reader calls whatever a file names.  This one knows the instructions that plain data
needs, and of all globals those that its caller lists, each with a stand-in of our own.  Everything
else raises `CheckpointError`.  Memory stays in proportion to the file: no instruction allocates
more than the bytes it brings along, and what functions may copy is counted.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lite_jax.errors import CheckpointError

PLAIN = {
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("STRING", "UNICODE", "LONG", "FLOAT"),  # protocol 0, the default of Python 2
}
"""Instructions that push the value they hold, `pickletools`' names."""

LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MOST_STEPS = 5_000_000
"""Instructions of a pickle; a tensor needs about 30."""
WIDEST = 128  # bits of an integer: torch's magic number has 80
WIDEST_KEY = 60  # bits: of wider ones, many can have the same hash
LONGEST_GLOBAL = 200
MOST_ARGUMENTS = 20
MARK = object()
FOREIGN_CLASS = object()
"""Stands for a class whose objects become `Instance`s."""


@dataclass(frozen=True)
class Constructor:
    """A function of ours that stands for a global that files may call."""

    make: Callable[..., Any]


@dataclass(eq=False)
class Instance:
    """An object of a class that is not loaded: its attributes."""

    state: Any = None


class Buildable:
    """What `find` makes and a file then gives a state."""

    def set_state(self, state: Any) -> None:
        """Takes the pickled state; raises `ValueError` or `TypeError` where it is none."""
        raise NotImplementedError


Globals = Callable[[str, str], Any]
"""What stands for a global: `(module, name)` → a `Constructor` or an inert value.

Raises `KeyError` where it may not be used.
"""


def read_pickle(
    stream: Any,
    file: Path,
    find: Globals,
    persistent: Callable[[Any], Any] | None = None,
    most_steps: int | None = None,
) -> Any:
    """The first pickled value of a stream.

    Args:
      stream: a `BytesIO` or `mmap`, whose `read(n)` allocates no more than is left.
      file: for messages.
      find: what stands for globals.
      persistent: what stands for a persistent id (torch's storages).
      most_steps: instructions that it may have, `MOST_STEPS` by default.

    Raises:
      CheckpointError: it asks for anything but plain data and what `find` knows.
      ArithmeticError, LookupError, TypeError, ValueError: it is damaged.
    """
    machine = _Machine(stream, file, find, persistent)
    most = most_steps or MOST_STEPS
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name == "STOP":
            break
        if count > most:
            raise CheckpointError(f"{file} needs more than {most} pickle instructions")
        machine.step(opcode.name, argument)
    return machine.pop()


def make_dict(items: Any = ()) -> dict[Any, Any]:
    """A dict of pairs, whose keys are plain.

    Raises:
      ValueError: a key is not: tuples can nest so deeply that their hash overflows the stack.
    """
    made = {}
    for key, value in items:
        wide = isinstance(key, int) and key.bit_length() > WIDEST_KEY
        if wide or not isinstance(key, (str, int, float, bytes, type(None))):
            raise ValueError(f"a dict with a {type(key).__name__} as a key")
        made[key] = value
    return made


BUILTINS: dict[str, Any] = {
    "collections.OrderedDict": Constructor(make_dict),
    "collections.defaultdict": Constructor(lambda factory, items=(): make_dict(items)),
    # Factories of a defaultdict: nothing calls them.
    "builtins.dict": "dict",
    "builtins.list": "list",
    "__builtin__.dict": "dict",
    "__builtin__.list": "list",
}
"""Globals of all formats, by full name."""


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(
        self, stream: Any, file: Path, find: Globals, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.stream, self.file, self.find, self.persistent = stream, file, find, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.passed = 0

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        if name in PLAIN:
            value = LITERALS.get(name, argument)
            if isinstance(value, int) and value.bit_length() > WIDEST:
                raise ValueError(f"an integer of {value.bit_length()} bits")
            self.stack.append(value)
        elif name in TUPLES:
            count = TUPLES[name]
            items = [self.pop() for _ in range(count)][::-1]
            self.stack.append(tuple(items))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[argument])
        elif name not in STEPS:
            raise CheckpointError(
                f"{self.file}: pickle instruction {name} is none that plain data need; "
                "nothing was run"
            )
        else:
            STEPS[name](self, argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("a mark where a value should be")
        return value

    def to_mark(self) -> list[Any]:
        """Takes what lies above the last mark."""
        items = []
        while (value := self.stack.pop()) is not MARK:
            items.append(value)
        return items[::-1]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {kind.__name__} was expected")
        return self.stack[-1]

    def new_dict(self, items: list[Any]) -> None:
        self.stack.append(make_dict(zip(items[::2], items[1::2], strict=True)))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        target.update(make_dict(zip(items[::2], items[1::2], strict=True)))

    def get_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        if len(module) + len(name) > LONGEST_GLOBAL:
            raise ValueError("a global with an endless name")
        try:
            self.stack.append(self.find(module, name))
        except KeyError:
            raise CheckpointError(
                f"{self.file} asks for {module}.{name}, which is not needed to hold "
                "weights; it was not loaded and nothing was run. If you trust the file, open it "
                "with torch and save its weights alone: torch.save(model.state_dict(), path)"
            ) from None

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Constructor) or not isinstance(arguments, tuple):
            raise CheckpointError(
                f"{self.file} calls a {type(function).__name__}, which makes no weights; "
                "nothing was run"
            )
        self.count(arguments)
        self.stack.append(function.make(*arguments))

    def new(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if kind is not FOREIGN_CLASS or arguments != ():
            raise CheckpointError(
                f"{self.file} makes objects that are not weights; nothing was run"
            )
        self.stack.append(Instance())

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Instance):
            target.state = state
        elif isinstance(target, Buildable):
            self.count(state)
            target.set_state(state)
        elif not isinstance(target, dict):  # an OrderedDict's attributes say nothing of weights
            raise CheckpointError(
                f"{self.file} sets the state of a {type(target).__name__}; nothing was run"
            )

    def count(self, values: Any) -> None:
        """Of what functions of ours may copy: a file can pass one long value a thousand times."""
        if not isinstance(values, tuple) or len(values) > MOST_ARGUMENTS:
            raise ValueError("a call with strange arguments")
        copied = (str, bytes, bytearray, list)
        self.passed += sum(len(value) for value in values if isinstance(value, copied))
        if self.passed > 4 * self.stream.tell():
            raise CheckpointError(f"{self.file} would grow to many times its size")

    def persist(self) -> None:
        if self.persistent is None:
            raise ValueError("a persistent id where none can be")
        self.stack.append(self.persistent(self.pop()))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)


def _pair(machine: _Machine) -> list[Any]:
    value, key = machine.pop(), machine.pop()
    return [key, value]


STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.stack.append(MARK),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.to_mark())),
    "LIST": lambda m, _: m.stack.append(m.to_mark()),
    "DICT": lambda m, _: m.new_dict(m.to_mark()),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.to_mark()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "SETITEM": lambda m, _: m.set_items(_pair(m)),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "GLOBAL": lambda m, full: m.get_global(*full.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.get_global(*[m.pop(), m.pop()][::-1]),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persist(),
}
"""The other instructions, by `pickletools`' names."""
