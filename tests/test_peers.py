"""Real processes that meet, miss and lose each other; without jax, whose start takes seconds."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
from test_distributed import HOST, Processes, free_port

from clip_lite_jax.errors import ConfigError
from clip_lite_jax.peers import Group, _ranges, prefixed, split

MEET = """
import logging, sys, time
from clip_lite_jax import peers
from clip_lite_jax.errors import UserError
logging.basicConfig(level=logging.DEBUG, format="%(message)s")
address, processes, process, timeout = sys.argv[1:]
process = int(process)
try:
    us = peers.gather(peers.Group(address, int(processes), process), float(timeout))
except UserError as error:
    print(type(error).__name__, error)
    sys.exit(error.status)
print("met", us.run, flush=True)
{body}
"""
FINISH = "us.finish()"


def peers(
    port: int, processes: int, numbers: list[int], timeout: float = 30, body: str = FINISH
) -> list[list[str]]:
    shared = ["-c", MEET.format(body=body), f"127.0.0.1:{port}", str(processes)]
    return [[*shared, str(number), str(timeout)] for number in numbers]


def last_lines(running: Processes) -> list[str]:
    return [text.splitlines()[-1] for text in running.texts()]


def test_all_meet_and_part(tmp_path: Path) -> None:
    with Processes(tmp_path, peers(free_port(), 3, [2, 0, 1])) as running:
        assert running.wait() == (0, 0, 0), running.texts()
    assert len(set(last_lines(running))) == 1
    assert last_lines(running)[0].startswith("met ")


def test_missing_ones_are_named(tmp_path: Path) -> None:
    port = free_port()
    with Processes(tmp_path, peers(port, 6, [0, 2], timeout=2)) as running:
        assert running.wait() == (1, 1), running.texts()
    assert last_lines(running)[0] == last_lines(running)[1]
    assert last_lines(running)[0].startswith(
        f"PeerError processes 1, 3-5 of 6 did not come to 127.0.0.1:{port} in 2 s; here are 0 on "
        f"{HOST}, 2 on {HOST}."
    )
    assert running.texts()[0].startswith("waiting for processes 1-5 of 6 at 127.0.0.1")


def test_without_a_coordinator(tmp_path: Path) -> None:
    port = free_port()
    with Processes(tmp_path, peers(port, 2, [1], timeout=1)) as running:
        assert running.wait() == (1,)
    assert last_lines(running)[0].startswith(
        f"PeerError process 0 did not come: process 1 of 2 on {HOST} called 127.0.0.1:{port} for "
        "1 s (Connection refused)"
    )


def test_something_else_at_the_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"220 mail\r\n")
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with Processes(tmp_path, peers(port, 2, [1], timeout=1)) as running:
            assert running.wait() == (1,)
        assert "what listens there is not process 0" in last_lines(running)[0]
        with Processes(tmp_path, peers(port, 2, [0])) as running:
            assert running.wait() == (2,)
        assert f"cannot listen at port {port}" in last_lines(running)[0]


def test_contradictions_are_refused_and_the_rest_go_on(tmp_path: Path) -> None:
    port = free_port()
    folders = [tmp_path / name for name in ("first", "wrong", "rest")]
    for folder in folders:
        folder.mkdir()
    with Processes(folders[0], peers(port, 3, [0, 1])) as first:
        first.wait_for(lambda: "process 1 is here" in first.texts()[0])
        wrong = peers(port, 3, [1]) + peers(port, 4, [3]) + peers(port, 3, [7])
        with Processes(folders[1], wrong) as refused:
            assert refused.wait() == (2, 2, 2), refused.texts()
        twice, other, outside = last_lines(refused)
        assert f"--process-id=1 twice, on {HOST} and on {HOST}" in twice
        assert f"--num-processes=4 for process 3 on {HOST}, but 3 for process 0" in other
        assert "--process-id=7" in outside
        with Processes(folders[2], peers(port, 3, [2])) as rest:
            assert rest.wait() == (0,), rest.texts()
            assert first.wait() == (0, 0), first.texts()
    assert first.texts()[0].count("refused") == 3


def test_strangers_and_those_who_come_again(tmp_path: Path) -> None:
    port = free_port()
    folders = [tmp_path / name for name in ("first", "again")]
    for folder in folders:
        folder.mkdir()
    with Processes(folders[0], peers(port, 3, [0])) as first:
        first.wait_for(lambda: "waiting" in first.texts()[0])
        for sent in (b"", b"GET / HTTP/1.0\r\n\r\n", b'{"process": 1}\n', b"[]\n", b"\xff\n"):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(sent)
        with Processes(folders[1], peers(port, 3, [1])):  # it comes, and is killed
            first.wait_for(lambda: "process 1 is here" in first.texts()[0])
        with Processes(folders[1], peers(port, 3, [1, 2])) as again:
            assert again.wait() == (0, 0), again.texts()
            assert first.wait() == (0,), first.texts()


def test_all_that_are_lost_at_once_are_named(tmp_path: Path) -> None:
    body = "time.sleep(60)"
    with Processes(tmp_path, peers(free_port(), 5, [0, 1, 2, 3, 4], body=body)) as running:
        running.wait_for(lambda: all("met" in text for text in running.texts()))
        running.running[2].kill()
        running.running[4].kill()
        assert running.wait(10) == (1, 1, -9, 1, -9), running.texts()
    for number in (0, 1, 3):
        assert last_lines(running)[number].startswith(
            f"[process {number}] error: processes 2, 4 on {HOST} ended without a word"
        )


@pytest.mark.parametrize("failing", [0, 2])
def test_the_reason_of_one_is_told_by_all(failing: int, tmp_path: Path) -> None:
    body = f"""
if process == {failing}:
    us.fail("failed: disk full\\nat /data", grace=0)
    sys.exit(2)
time.sleep(60)
"""
    with Processes(tmp_path, peers(free_port(), 3, [0, 1, 2], body=body)) as running:
        statuses = [2 if number == failing else 1 for number in range(3)]
        assert running.wait(10) == tuple(statuses), running.texts()
    for number in {0, 1, 2} - {failing}:
        told = f"[process {number}] error: process {failing} on {HOST} failed: disk full\n"
        told += f"[process {number}] at /data\n"
        assert told in running.texts()[number]  # before "met" or after it


def test_one_that_is_lost_when_others_are_done(tmp_path: Path) -> None:
    body = "time.sleep(60) if process == 2 else us.finish()"
    with Processes(tmp_path, peers(free_port(), 3, [0, 1, 2], body=body)) as running:
        running.wait_for(lambda: all("met" in text for text in running.texts()))
        time.sleep(0.5)
        running.running[2].kill()
        assert running.wait(10) == (1, 1, -9), running.texts()


def test_addresses() -> None:
    assert split("node-1:1234") == ("node-1", 1234)
    assert Group("[::1]:80", 2, 0).split_address() == ("::1", 80)
    for wrong in ("node-1", "node-1:", ":1234", "node-1:0", "node-1:65536", "node-1:http"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            split(wrong)


def test_texts() -> None:
    assert _ranges([1, 2, 4, 6, 7, 8, 11]) == "1, 2, 4, 6-8, 11"
    assert prefixed("a\n\nb", 3) == "[process 3] a\n[process 3] \n[process 3] b"
