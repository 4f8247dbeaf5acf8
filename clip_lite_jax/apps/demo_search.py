"""The search tab of the demo: texts and pictures with weights, hits, and a hit in large."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from clip_lite_jax.apps.demo_engine import MAX_HITS, NO_INDEX, Engine, Found, Picture, Wanted
from clip_lite_jax.apps.demo_parts import Messages, Shown, Uploader, tag
from clip_lite_jax.apps.demo_views import one_text, signed, weight
from clip_lite_jax.apps.index import Hit
from clip_lite_jax.errors import ConfigError

MAX_PARTS = 10
Open = Callable[[str, Picture], Awaitable[None]]
"""Takes a picture to another tab, by its name."""


class _Part:
    """A line of the query: a text or a picture, and its weight."""

    def __init__(self, tab: "SearchTab", picture: Picture | None, text: str) -> None:
        self.picture = picture
        with tab.lines, tag("div", "demo-row demo-part") as self.row:
            self.text: Any = None
            if picture is None:
                self.text = (
                    ui.input("Text", value=text).props("outlined dense").classes("demo-grow")
                )
                self.text.on("keydown.enter", tab.search)
            else:
                with tag("span", "demo-row demo-grow"):
                    tag("img", "demo-small", src=picture.url, alt="")
                    ui.label(picture.name)
            self.weight = ui.number("Weight", value=1, step=0.1).props("outlined dense")
            self.weight.classes("demo-weight")
            remove = ui.button(icon="close", on_click=lambda: tab.remove(self))
            remove.props('flat round dense aria-label="remove this part"')

    def wanted(self) -> Wanted | None:
        """None where nothing was written."""
        if self.picture is not None:
            return Wanted(picture=self.picture, weight=weight(self.weight.value))
        text = one_text(self.text.value, "the text")
        return Wanted(text, weight=weight(self.weight.value)) if text else None


class SearchTab:
    """Without an index it says how to start the demo with one."""

    def __init__(self, engine: Engine, open_in: Open) -> None:
        self._engine, self._open_in = engine, open_in
        self._parts: list[_Part] = []
        if not engine.kinds:
            ui.label(f"{NO_INDEX[0].upper()}{NO_INDEX[1:]}.")
            return
        self._messages = Messages()
        self.lines = tag("div", "demo-lines")
        self._build()
        self.remove(None)
        self._said = ui.label().classes("demo-note").props("role=status")
        self._gallery = tag("div", "demo-gallery")
        self._dialog = ui.dialog()

    def _build(self) -> None:
        uploader = Uploader(self._engine, self._messages, self._add_picture)
        uploader.drop_on(self.lines)
        with tag("div", "demo-row"):
            ui.button("Text", icon="add", on_click=self._add_text).props("flat no-caps")
            uploader.button("Picture").props(remove="outline", add="flat")
            self._without = ui.input("Without").props("outlined dense").classes("demo-grow")
            self._without.on("keydown.enter", self.search)
            self._without.tooltip("a concept that is left out of account")
            self._count = ui.number("Hits", value=12, min=1, max=MAX_HITS, precision=0)
            self._count.props("outlined dense").classes("demo-weight")
            kinds = self._engine.kinds
            self._kind = ui.toggle(kinds, value=kinds[0]).props("no-caps")
            self._kind.set_visibility(len(kinds) > 1)
            self._button = ui.button("Search", icon="search", on_click=self.search)
            self._button.props("no-caps")

    def _add(self, picture: Picture | None = None, text: str = "") -> None:
        if len(self._parts) >= MAX_PARTS:
            self._messages.tell(f"a search has at most {MAX_PARTS} parts")
            return
        self._parts.append(_Part(self, picture, text))

    def _add_text(self) -> None:
        self._add()

    def remove(self, part: _Part | None) -> None:
        """Takes a part away; there is always a line to write on."""
        if part is not None:
            self._parts.remove(part)
            part.row.delete()
        if not self._parts:
            self._add()

    async def _add_picture(self, picture: Picture) -> None:
        await asyncio.to_thread(lambda: picture.url)
        for part in list(self._parts):  # an empty line is no part
            if part.text is not None and not (part.text.value or "").strip():
                self._parts.remove(part)
                part.row.delete()
        self._add(picture)

    async def search(self) -> None:
        await self._messages.during(self._search, self._button)

    async def _search(self) -> None:
        asked = [part.wanted() for part in self._parts]
        wanted = [part for part in asked if part is not None]
        without = one_text(self._without.value, "without")
        count = self._count.value
        if count is None:
            raise ConfigError(f"say how many hits, 1 to {MAX_HITS}")
        found = await asyncio.to_thread(
            self._engine.search,
            wanted,
            [without] if without else [],
            int(count),
            str(self._kind.value),
        )
        urls = await asyncio.to_thread(self._engine.thumbnails, found)
        about = next((part.text for part in wanted if part.text and part.weight > 0), "")
        self._show(found, urls, about)

    def _show(self, found: Found, urls: list[str], about: str) -> None:
        measure = "the critic's T in nats" if found.measure == "T" else "the cosine"
        total = self._engine.index.count(found.kind) if self._engine.index else 0
        self._said.set_text(f"The best {len(found.hits)} of {total:,}, with {measure}.")
        self._gallery.clear()
        with self._gallery:
            for hit, url in zip(found.hits, urls, strict=True):
                self._hit(hit, url, found, about)

    def _hit(self, hit: Hit, url: str, found: Found, about: str) -> None:
        name = hit.caption or hit.id
        with tag("button", "demo-hit", type="button", title=name) as card:
            if url:
                tag("img", src=url, alt="")
            ui.label(signed(hit.value)).classes("demo-number")
            ui.label(name).classes("demo-label")
        card.on("click", lambda: self._open(hit, found.kind, about))

    async def _open(self, hit: Hit, kind: str, about: str) -> None:
        async def show() -> None:
            if kind == "texts":
                await self._search_by(None, hit.caption or "")
                return
            picture = await asyncio.to_thread(self._engine.of_row, hit.row)
            await self._enlarge(picture, hit.id, about)

        await self._messages.during(show)

    async def _enlarge(self, picture: Picture, name: str, about: str) -> None:
        self._dialog.clear()
        with self._dialog, ui.card().classes("demo-card"):
            messages = Messages()
            ui.label(name).classes("demo-wrap")
            shown = Shown()
            await shown.show(picture)
            with tag("div", "demo-row"):
                self._action("Search by it", "search", lambda: self._search_by(picture))
                self._action("Score it", "speed", lambda: self._open_in("score", picture))
                self._action("Classify it", "label", lambda: self._open_in("classify", picture))
                ui.button("Close", on_click=self._dialog.close).props("flat no-caps")
        self._dialog.open()
        if about:

            async def heat() -> None:
                found = await asyncio.to_thread(self._engine.heat, picture, about)
                shown.show_heat(found, about)

            await messages.during(heat)

    def _action(self, label: str, icon: str, action: Callable[[], Awaitable[None]]) -> None:
        async def act() -> None:
            self._dialog.close()
            await self._messages.during(action)

        ui.button(label, icon=icon, on_click=act).props("flat no-caps")

    async def _search_by(self, picture: Picture | None, text: str = "") -> None:
        """A search by one picture or text alone; a text then finds pictures."""
        for part in self._parts:
            part.row.delete()
        self._parts.clear()
        self._add(picture, text)
        if picture is None and "images" in self._engine.kinds:
            self._kind.set_value("images")
        await self._search()
