"""Parts of the demo's page: messages, a picture with its heat map, a ranking.

Texts of strangers only go where NiceGUI escapes them (labels, attributes), never into HTML or
Markdown.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nicegui import events, ui

from clip_lite_jax.apps.demo_engine import MAX_BYTES, Engine, Picture
from clip_lite_jax.apps.demo_views import data_url, heat_layer
from clip_lite_jax.errors import UserError

log = logging.getLogger(__name__)

FAILED = "this failed; the terminal in which the demo runs says more"
NOT_TAKEN = f"not taken: upload one picture of at most {MAX_BYTES // 10**6} MB"
SMALLEST = 256
"""Pixels of the screen for the longer side of a picture."""


class Messages:
    """Where a tab says what went wrong."""

    def __init__(self) -> None:
        self._label = ui.label().classes("demo-alert").props("role=alert")

    def tell(self, message: str) -> None:
        self._label.set_text(message)

    async def during(self, action: Callable[[], Awaitable[None]], button: Any = None) -> None:
        """Runs an action, and says why it failed; the button turns until then."""
        self.tell("")
        if button is not None:
            button.props("loading")
        try:
            await action()
        except UserError as error:
            self.tell(str(error))
        except Exception:
            log.exception("a request of the demo failed")
            self.tell(FAILED)
        finally:
            if button is not None:
                button.props(remove="loading")


def tag(name: str, classes: str = "", **attributes: str) -> Any:
    """An element of HTML; attributes are escaped."""
    element = ui.element(name).classes(classes)
    element.props.update({key.replace("_", "-"): value for key, value in attributes.items()})
    return element


class Uploader:
    """A button that opens the file dialog, and a place where files can be dropped."""

    def __init__(
        self, engine: Engine, messages: Messages, taken: Callable[[Picture], Awaitable[None]]
    ) -> None:
        self._engine, self._messages, self._taken = engine, messages, taken
        self._upload = ui.upload(
            on_upload=self._uploaded,
            on_rejected=lambda: messages.tell(NOT_TAKEN),
            max_file_size=MAX_BYTES,
            auto_upload=True,
        )
        self._upload.props("accept=image/*").classes("hidden")
        self._found = f"getElement({self._upload.id}).$refs.qRef"

    def button(self, label: str) -> Any:
        button = ui.button(label, icon="upload").props("outline no-caps")
        # In the browser: a file dialog opens only within the click of a person.
        button.on("click", js_handler=f"() => {self._found}.pickFiles()")
        return button

    def drop_on(self, element: Any) -> None:
        element.on("dragover", js_handler="(e) => e.preventDefault()")
        taken = f"{self._found}.addFiles(e.dataTransfer.files)"
        element.on("drop", js_handler=f"(e) => {{ e.preventDefault(); {taken} }}")

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        async def take() -> None:
            data, name = await event.file.read(), event.file.name
            await self._taken(await asyncio.to_thread(self._engine.picture, data, name))

        await self._messages.during(take)
        self._upload.reset()


class Shown:
    """A picture under its heat map, with what turns that on and off."""

    def __init__(self, empty: str = "") -> None:
        """`empty` is said where there is no picture yet."""
        self.frame = tag("div", "demo-frame demo-empty" if empty else "demo-frame")
        with self.frame:
            self._empty = ui.label(empty)
            with tag("div", "demo-stack") as self._stack:
                self._picture = tag("img", alt="")
                self._layer = tag("img", "demo-heat", alt="")
        with tag("div", "demo-row") as self._controls:
            self._switch = ui.switch("heat map", value=True, on_change=self._draw)
            self._opacity = ui.slider(min=0, max=1, step=0.05, value=0.8, on_change=self._draw)
            self._opacity.props('aria-label="opacity of the heat map"').classes("demo-slider")
        self._said = ui.label().classes("demo-note").props("role=status")
        self._heat = False
        self._stack.set_visibility(False)
        self._controls.set_visibility(False)

    async def show(self, picture: Picture) -> None:
        url = await asyncio.to_thread(lambda: picture.url)
        self._picture.props.update(src=url, alt=picture.name)
        self._picture.update()
        width, height = picture.shown.size
        wide = width * max(1.0, SMALLEST / max(width, height))  # drawings of 64 pixels, too
        self._stack.style(f"width: min(100%, {wide:.0f}px, {60 * width / height:.2f}vh)")
        self._empty.set_visibility(False)
        self._stack.set_visibility(True)
        self.clear_heat()

    def clear_heat(self) -> None:
        self._heat = False
        self._said.set_text("")
        self._draw()

    def show_heat(self, heat: np.ndarray, text: str) -> None:
        """Lays a map ``[H, W]`` over the picture."""
        self._heat = bool(heat.max() > 0)
        self._layer.props.update(src=data_url(heat_layer(heat)), alt=f"heat map for “{text}”")
        self._layer.update()
        says = "Red speaks for" if self._heat else "No place of the picture speaks for"
        self._said.set_text(f"{says} “{text}”.")
        self._draw()

    def _draw(self) -> None:
        self._controls.set_visibility(self._heat)
        self._layer.set_visibility(self._heat and bool(self._switch.value))
        self._layer.style(f"opacity: {float(self._opacity.value or 0):.2f}")


class Chooser:
    """Uploads a picture, or takes a sample, and shows it."""

    def __init__(
        self,
        engine: Engine,
        messages: Messages,
        chosen: Callable[[Picture], Awaitable[None]] | None = None,
    ) -> None:
        self._engine, self._messages, self._chosen = engine, messages, chosen
        self.picture: Picture | None = None
        uploader = Uploader(engine, messages, self.take)
        with tag("div", "demo-row"):
            uploader.button("Upload a picture")
            self._sample = ui.button("Sample", icon="casino", on_click=self._take_sample)
            self._sample.props("flat no-caps").tooltip(
                "some picture of the index, or else a drawing that is built in"
            )
        self.shown = Shown("no picture yet: upload one, or drop it here")
        uploader.drop_on(self.shown.frame)
        self._rng = np.random.default_rng()

    async def take(self, picture: Picture) -> None:
        self.picture = picture
        await self.shown.show(picture)
        if self._chosen is not None:
            await self._chosen(picture)

    async def _take_sample(self) -> None:
        async def take() -> None:
            await self.take(await asyncio.to_thread(self._engine.sample, self._rng))

        await self._messages.during(take, self._sample)

    async def heat(self, text: str) -> None:
        """The heat map of the picture for a text."""
        picture = self.picture
        if picture is None:
            return
        heat = await asyncio.to_thread(self._engine.heat, picture, text)
        if picture is self.picture:  # else another has been chosen meanwhile
            self.shown.show_heat(heat, text)


@dataclass(frozen=True)
class Line:
    """Of a ranking."""

    text: str
    numbers: Sequence[str]
    rank: str = ""
    share: float | None = None
    """Length of its bar, 0 to 1; None has no bar."""
    marked: bool = False


class Ranking:
    """Lines, each a button that asks for the heat map of its text."""

    def __init__(self, chosen: Callable[[str], Awaitable[None]]) -> None:
        self._chosen = chosen
        self._list = tag("ol", "demo-ranking")

    def clear(self) -> None:
        self._list.clear()

    def show(self, found: Sequence[tuple[str, Line]]) -> None:
        """Lines, each with the text whose heat map it shows."""
        self._list.clear()
        with self._list:
            for text, line in found:
                with tag("li"), tag("button", "demo-line", type="button") as button:
                    button.on("click", lambda _, text=text: self._chosen(text))
                    if line.marked:
                        button.classes("demo-marked")
                    if line.rank:
                        ui.label(line.rank).classes("demo-rank")
                    with tag("span", "demo-name"):
                        ui.label(line.text)
                        if line.share is not None:
                            width = f"width: {100 * line.share:.1f}%"
                            with tag("span", "demo-track", aria_hidden="true"):
                                tag("span", "demo-bar").style(width)
                    for number in line.numbers:
                        ui.label(number).classes("demo-number")
