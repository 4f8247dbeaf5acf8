"""A process that runs steps when it is told to, so that two frameworks can take turns.

Requests and answers are lines of JSON on standard input and output.  ``{"build": {...}}`` builds a
step and answers with the values of the first `CHECKED`; ``{"steps": n}`` answers with the seconds
that each of n steps took, by the ``"clock"``, one of `CLOCKS`.  A process can hold several steps,
by ``"name"``, and answer ``{"ask": ...}`` about one of them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CHECKED = 3
"""Steps whose values are compared; they also compile and warm up."""
LEARNING_RATE = 1e-6
"""Of those that train; small, so that rounding does not grow from step to step."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "work": time.process_time}
"""The time that passes, and that of cores at work for the process: of a busy machine the second
is less disturbed by what other programs do."""

Step = Callable[[], float]
"""Runs one step to its end; the value that it computed."""


def serve(build: Callable[..., Any], asked: Mapping[str, Callable[[Any], Any]] = {}) -> None:
    """Answers requests until the input ends.

    `build` makes a `Step`, and `asked` holds what can be asked about one.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def timed(step: Step, clock: Callable[[], float]) -> float:
        start = clock()
        step()
        return clock() - start

    steps: dict[str, Step] = {}
    answer: Any
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        if "build" in request:
            steps[name] = build(**request["build"])
            answer = [steps[name]() for _ in range(CHECKED)]
        elif "ask" in request:
            answer = asked[request["ask"]](steps[name])
        else:
            clock = CLOCKS[request["clock"]]
            answer = [timed(steps[name], clock) for _ in range(request["steps"])]
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The other end: a process that serves."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(environment),
        )

    def build(self, name: str = "", /, **options: Any) -> list[float]:
        return list(self._request({"build": options, "name": name}))

    def seconds(self, steps: int, name: str = "", clock: str = "wall") -> list[float]:
        return list(self._request({"steps": steps, "name": name, "clock": clock}))

    def ask(self, question: str, name: str = "") -> Any:
        return self._request({"ask": question, "name": name})

    def _request(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{self.process.args!r} ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
