"""The demo's page: the model on top, and a tab for each thing to do."""

from nicegui import ui

from clip_lite_jax.apps.demo_engine import Engine, Picture
from clip_lite_jax.apps.demo_parts import tag
from clip_lite_jax.apps.demo_search import SearchTab
from clip_lite_jax.apps.demo_tabs import ClassifyTab, ScoreTab
from clip_lite_jax.apps.demo_views import facts
from clip_lite_jax.apps.report_pages import environment

TABS = {"search": "Search", "score": "Score", "classify": "Classify"}


class Page:
    """What one visitor sees."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def build(self) -> None:
        ui.add_css(environment().get_template("demo.css.j2").render())
        ui.colors(primary="#3f51b5")
        with tag("header", "demo-header"):
            with tag("h1"):
                ui.label("clip-lite demo")
            self._facts()
        with ui.tabs().props("no-caps align=left").classes("demo-tabs") as self._tabs:
            for name, label in TABS.items():
                ui.tab(name, label)
        first = "search" if self._engine.kinds else "score"
        with (
            tag("main", "demo-main"),
            ui.tab_panels(self._tabs, value=first, animated=False).props("keep-alive"),
        ):
            with ui.tab_panel("search"):
                SearchTab(self._engine, self._open_in)
            with ui.tab_panel("score"):
                score = ScoreTab(self._engine)
            with ui.tab_panel("classify"):
                classify = ClassifyTab(self._engine)
        self._choosers = {"score": score.chooser, "classify": classify.chooser}

    async def _open_in(self, tab: str, picture: Picture) -> None:
        self._tabs.set_value(tab)
        await self._choosers[tab].take(picture)

    def _facts(self) -> None:
        model = self._engine.model
        known = facts(model.config, self._engine.path, model.step, model.data_fingerprint)
        with tag("dl", "demo-facts"):
            for fact in known:
                with tag("div"):
                    with tag("dt"):
                        ui.label(fact.name)
                    with tag("dd"):
                        ui.label(fact.value)
