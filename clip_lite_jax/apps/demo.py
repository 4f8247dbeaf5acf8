"""The demo: a local page to search, score and classify, served by NiceGUI (extra ``demo``)."""

import asyncio
import logging
import os
import socket
import threading
import webbrowser
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import core, ui

from clip_lite_jax.apps.demo_engine import MAX_BYTES, Engine
from clip_lite_jax.apps.demo_guard import LOOPBACK, Guard, is_loopback
from clip_lite_jax.apps.demo_page import Page
from clip_lite_jax.errors import ConfigError

TITLE = "clip-lite demo"
FORM = 100_000
"""Bytes of a form beside the picture in it."""

log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve at; port 0 is any that is free.

    Raises:
      ConfigError: no such address here, or the port is taken.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would wrap it
        raise ConfigError(f"--port {port}: choose 1 to 65535, or 0 for one that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error}; choose another, --port 0 takes one that is free"
        ) from error
    return found


def address(host: str, port: int) -> str:
    """The URL of the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def build_server(engine: Engine, host: str) -> uvicorn.Server:
    """A server of the page, to be run with the socket that `listen` gave; one in a process."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = (*LOOPBACK, host) if is_loopback(host) else None
    app.add_middleware(Guard, hosts=hosts, max_bytes=MAX_BYTES + FORM)

    def page() -> None:
        Page(engine).build()

    ui.run_with(
        app,
        root=page,
        title=TITLE,
        favicon="🔎",
        dark=None,  # as the system
        language="en-GB",
        tailwind=False,
        show_welcome_message=False,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        log_config=None,
        timeout_graceful_shutdown=2,  # pages that are open keep their connection
        ws_max_size=2**20,
    )
    return uvicorn.Server(config)


def serve(engine: Engine, host: str, port: int, open_page: bool) -> None:
    """Serves until Ctrl-C.

    Raises:
      ConfigError: see `listen`.
    """
    sock = listen(host, port)
    url = address(host, sock.getsockname()[1])
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    if not is_loopback(host):
        log.warning(
            "warning: --host %s: anybody who reaches this machine can use the page and see the "
            "indexed pictures; there is no password, and nothing is encrypted",
            host,
        )
    threading.Thread(target=engine.warm, daemon=True).start()
    server = build_server(engine, host)
    if open_page and is_loopback(host) and "SSH_CONNECTION" not in os.environ:
        core.app.on_startup(lambda: _open_later(url))
    with suppress(KeyboardInterrupt):  # the way to end it
        server.run(sockets=[sock])


async def _open_later(url: str) -> Any:
    await asyncio.sleep(0.5)
    await asyncio.to_thread(webbrowser.open, url)
