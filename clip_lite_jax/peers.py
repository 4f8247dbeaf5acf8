"""The processes of one run, joined by plain TCP: who is missing at its start, who is lost later.

jax has a service for this.  But where a process does not come, or is gone, jax aborts the others
with a stack trace of C++ that names none of them, and one that fails waits minutes for the others
at its exit (jax 0.10.2).  So process 0 listens at the coordinator's address itself until all have
come, and only then hands the port to jax; the connections stay, and tell of the end of any process
at once, because the kernel closes those of one that is killed.  A host that is gone does not answer
keepalives (`SILENCE`).  Each side of a connection sends lines of JSON.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, NoReturn

from clip_lite_jax.errors import ConfigError, PeerError

log = logging.getLogger(__name__)

SILENCE = 15
"""Seconds after which a host that answers no keepalive is lost."""
GRACE = 2.0
"""Seconds in which an error may turn out to be the first sign of a peer that is lost."""
TOLD_EVERY = 30.0
"""Seconds between two lines that say whom a process waits for."""


@dataclass(frozen=True)
class Group:
    """The processes of one run, and which of them this one is."""

    address: str
    """HOST:PORT of process 0, the same in all."""
    processes: int
    process: int
    devices: tuple[int, ...] | None = None
    """The accelerators of its host that this process uses; None: all that it sees."""

    def split_address(self) -> tuple[str, int]:
        return split(self.address)


def split(address: str) -> tuple[str, int]:
    """``HOST:PORT``, or ``[HOST]:PORT``, as two; raises `ConfigError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"the coordinator's address {address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Link:
    """One connection to another process."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._file = connection.makefile("rb")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", SILENCE // 3),
            ("TCP_KEEPALIVE", SILENCE // 3),  # its name on macOS
            ("TCP_KEEPINTVL", SILENCE // 3),
            ("TCP_KEEPCNT", 2),
            ("TCP_USER_TIMEOUT", 1000 * SILENCE),
        ):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message: Any) -> None:
        """Sends it if the other is there; that it is not, `receive` finds out."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None where the other is gone, silent for too long, or a stranger."""
        try:
            self.socket.settimeout(timeout)
            message = json.loads(self._file.readline(2**20))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            self.socket.close()


class Peers:
    """The other processes of a run, watched by threads; process 0 knows all, the others know it."""

    def __init__(
        self, group: Group, run: str, hosts: Sequence[str], links: Mapping[int, Link]
    ) -> None:
        self.process, self.hosts = group.process, tuple(hosts)
        self.run = run
        """An identifier that is the same in all processes, and in no other run."""
        self._links = dict(links)
        self._gone: set[int] = set()
        self._done: set[int] = set()
        self._all_done = threading.Event()
        self._ending = threading.Lock()  # whoever ends this process takes it, and keeps it
        for process, link in self._links.items():
            link.socket.settimeout(None)
            name = f"peer {process}"
            threading.Thread(target=self._watch, args=(process,), name=name, daemon=True).start()

    def finish(self) -> None:
        """Blocks until every process has come here: all is done, and each may end.

        Ends this process, with a message, where another is lost or fails before that.
        """
        self._count_done(self.process)
        for link in () if self.process == 0 else self._links.values():
            link.send(done=True)
        self._all_done.wait()

    def fail(self, reason: str, grace: float = GRACE) -> None:
        """Ends the other processes, which print the reason; the caller ends this one.

        Gives up for `grace` seconds first: an error may come of a peer that is lost, and then this
        process ends with the message that says so.
        """
        time.sleep(grace)
        self._ending.acquire()
        self._tell(f"{self._name([self.process])} {reason}")

    def _watch(self, process: int) -> None:
        while (message := self._links[process].receive()) is not None:
            if "failed" in message:
                self._gone.add(process)
                self._end(message["failed"])
            elif self.process == 0:
                self._count_done(process)
            else:
                self._all_done.set()
        self._gone.add(process)
        time.sleep(0.2)  # a host that goes takes all of its processes along
        if not self._all_done.is_set():
            self._end(
                f"{self._name(sorted(self._gone))} ended without a word: killed, out of memory, or "
                "the host or its network is gone. Its own log and the system's may say more; the "
                "same command, on all hosts, goes on from the newest checkpoint"
            )

    def _count_done(self, process: int) -> None:
        self._done.add(process)
        if self.process == 0 and len(self._done) == len(self.hosts):
            for link in self._links.values():
                link.send(done=True)
            self._all_done.set()

    def _end(self, text: str) -> NoReturn:
        """Prints why and ends this process, whatever its main thread does; process 0 ends all."""
        self._ending.acquire()
        start = "" if self.process else "\n"  # below the progress bar
        lines = prefixed(f"error: {text}", self.process)
        os.write(2, f"{start}{lines}\n".encode())  # the main thread may hold the lock of sys.stderr
        if self.process == 0:
            self._tell(text)
        os._exit(1)

    def _tell(self, text: str) -> None:
        """Tells process 0, or, as process 0, all; and lets them end first."""
        for link in self._links.values():
            link.send(failed=text)
        # jax aborts a process whose coordinator is gone: each gets the time to say why it ends.
        deadline = time.monotonic() + 5 * (self.process == 0)
        while len(self._gone) < len(self._links) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _name(self, processes: Sequence[int]) -> str:
        numbers = ", ".join(map(str, processes))
        hosts = ", ".join(dict.fromkeys(self.hosts[process] for process in processes))
        return f"process{'es' * (len(processes) > 1)} {numbers} on {hosts}"


def prefixed(text: str, process: int) -> str:
    """The text with the number of the process before each of its lines."""
    return "\n".join(f"[process {process}] {line}" for line in text.split("\n"))


def gather(group: Group, timeout: float, run: str | None = None) -> Peers:
    """Waits until all processes of the group are there; `run` is what process 0 calls this run.

    Raises:
      PeerError: some are not there in `timeout` seconds; the message says which.
      ConfigError: the address cannot be used, or two processes contradict each other.
    """
    if group.process:
        return _call(group, timeout)
    return _collect(group, timeout, run or uuid.uuid4().hex)


def _collect(group: Group, timeout: float, run: str) -> Peers:
    """Process 0: takes the calls of the others, and tells them when it has heard all."""
    come: dict[int, tuple[Link, str]] = {}
    deadline, told = time.monotonic() + timeout, 0.0
    with _listen(group) as listener:
        while missing := [p for p in range(1, group.processes) if p not in come]:
            left = deadline - time.monotonic()
            if left <= 0:
                text = _missing(group, missing, timeout, {p: host for p, (_, host) in come.items()})
                for link, _ in come.values():
                    link.send(refused=text, mistake=False)
                raise PeerError(text)
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                log.info(
                    "waiting for process%s %s of %d at %s, %.0f s at most",
                    "es" * (len(missing) > 1),
                    _ranges(missing),
                    group.processes,
                    group.address,
                    left,
                )
            sockets = {link.socket: process for process, (link, _) in come.items()}
            for ready in wait([listener, *sockets], min(left, TOLD_EVERY)):
                if ready is listener:
                    _answer(Link(listener.accept()[0]), group, come)
                else:  # it has gone again, and may come again
                    come.pop(sockets[ready])[0].close()  # type: ignore[index]
    hosts = [socket.gethostname()] + [come[p][1] for p in range(1, group.processes)]
    links = {process: link for process, (link, _) in come.items()}
    for link in links.values():
        link.send(hosts=hosts, run=run)
    return Peers(group, run, hosts, links)


def _answer(link: Link, group: Group, come: dict[int, tuple[Link, str]]) -> None:
    """Takes one caller in, or says why not."""
    hello = link.receive(timeout=5)
    if hello is None or not {"process", "processes", "host"} <= hello.keys():  # none of ours
        link.close()
        return
    process, host = hello["process"], str(hello["host"])
    if hello["processes"] != group.processes:
        mistake = (
            f"--num-processes={hello['processes']} for process {process} on {host}, but "
            f"{group.processes} for process 0: all need the same number"
        )
    elif process not in range(group.processes):
        mistake = f"--process-id={process} on {host} is none of 0 to {group.processes - 1}"
    elif process == 0 or process in come:
        other = come[process][1] if process else socket.gethostname()
        mistake = f"--process-id={process} twice, on {other} and on {host}: each needs its own"
    else:
        log.debug("process %d is here, on %s", process, host)
        come[process] = link, host
        return
    log.warning("a process was refused: %s", mistake)
    link.send(refused=mistake, mistake=True)
    link.close()


def _call(group: Group, timeout: float) -> Peers:
    """All but process 0: call it until it answers, and wait until it has heard all."""
    deadline, told, reason = time.monotonic() + timeout, time.monotonic(), ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = Link(socket.create_connection(group.split_address(), min(left, 5)))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            hello = {"process": group.process, "processes": group.processes}
            link.send(host=socket.gethostname(), **hello)
            # Process 0 knows better who is missing, and gives up at about the same time.
            answer = link.receive(max(left, 0) + 5) or {}
            if "refused" in answer:
                raise (ConfigError if answer["mistake"] else PeerError)(answer["refused"])
            if "hosts" in answer:
                return Peers(group, answer["run"], answer["hosts"], {0: link})
            link.close()
            reason = "what listens there is not process 0, or it has ended"
        if time.monotonic() - told > TOLD_EVERY:
            told = time.monotonic()
            log.warning("waiting for process 0 at %s, %.0f s at most", group.address, left)
        time.sleep(min(0.5, max(left, 0)))
    raise PeerError(
        f"process 0 did not come: process {group.process} of {group.processes} on "
        f"{socket.gethostname()} called {group.address} for {timeout:.0f} s ({reason}). See the "
        "log of process 0, and whether a firewall lets that port through; --join-timeout=SECONDS "
        "waits longer"
    )


def _missing(group: Group, missing: Sequence[int], timeout: float, here: Mapping[int, str]) -> str:
    names = [f"{process} on {host}" for process, host in sorted(here.items())]
    return (
        f"process{'es' * (len(missing) > 1)} {_ranges(missing)} of {group.processes} did not come "
        f"to {group.address} in {timeout:.0f} s; here are 0 on "
        f"{', '.join([socket.gethostname(), *names])}. See the logs of those that are missing; all "
        "run the same command, each with its own --process-id. --join-timeout=SECONDS waits longer"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 2, 3, 7`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def _listen(group: Group) -> socket.socket:
    """Where jax's service is going to listen."""
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, port = split(given) if given else ("", group.split_address()[1])
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=group.processes, dualstack_ipv6=both
        )
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen at port {port} of {socket.gethostname()}: {error.strerror}; "
            "end what uses it, or give another port in --coordinator-address, to all processes"
        ) from error
