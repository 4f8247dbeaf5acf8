"""Two tabs of the demo: a caption for a picture, and labels for a picture."""

import asyncio

import numpy as np
from nicegui import ui

from clip_lite_jax.apps.demo_engine import Engine, Picture
from clip_lite_jax.apps.demo_parts import Chooser, Line, Messages, Ranking, tag
from clip_lite_jax.apps.demo_views import (
    TEMPLATE,
    lines,
    one_text,
    prompts,
    ranks,
    sigmoid,
    signed,
    softmax,
)
from clip_lite_jax.apps.score_calibration import why_not_log_r
from clip_lite_jax.errors import ConfigError

CLICK = "Click a line for its heat map."


class ScoreTab:
    """T of a picture and a caption, and the rank of that caption among others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cautions = why_not_log_r(engine.model.config)
        self._filled = ""
        """The caption that came with a picture."""
        with tag("div", "demo-columns"):
            with tag("div", "demo-column"):
                self._messages = Messages()
                self.chooser = Chooser(engine, self._messages, self._chosen)
            with tag("div", "demo-column"):
                self._caption = ui.input("Caption").props("outlined")
                self._caption.on("keydown.enter", self._score)
                self._others = ui.textarea("Other captions, one on each line").props(
                    "outlined autogrow"
                )
                self._button = ui.button("Score", on_click=self._score).props("no-caps")
                with tag("div", role="status"):
                    self._value = ui.label().classes("demo-value")
                    self._means = ui.label()
                    self._rank = ui.label()
                self._caution = ui.label().classes("demo-caution")
                self._hint = ui.label().classes("demo-note")
                self._ranking = Ranking(self._heat)

    async def _chosen(self, picture: Picture) -> None:
        self._clear()
        if self._caption.value in ("", None, self._filled):  # nobody has typed
            self._caption.set_value(picture.caption)
            self._filled = picture.caption

    def _clear(self) -> None:
        for label in (self._value, self._means, self._rank, self._caution, self._hint):
            label.set_text("")
        self._ranking.clear()
        self.chooser.shown.clear_heat()

    async def _score(self) -> None:
        await self._messages.during(self._scored, self._button)

    async def _scored(self) -> None:
        self._clear()
        picture = self.chooser.picture
        if picture is None:
            raise ConfigError("choose a picture first")
        caption = one_text(self._caption.value, "the caption")
        if not caption:
            raise ConfigError("write a caption first")
        others = [text for text in lines(self._others.value, "captions") if text != caption]
        texts = [caption, *others]
        scores = await asyncio.to_thread(self._engine.scores, picture, texts)
        if picture is not self.chooser.picture:
            return
        self._show(texts, scores)
        await self.chooser.heat(caption)

    def _show(self, texts: list[str], scores: np.ndarray) -> None:
        score = float(scores[0])
        self._value.set_text(f"T = {signed(score, 3)} nats")
        if self._cautions:
            self._means.set_text(f"σ(T) = {sigmoid(score):.3f}, no probability")
            self._caution.set_text(
                "σ(T) is no probability here, and 0 no border. This model was trained with "
                f"{'; '.join(self._cautions)}. T ranks all the same. clip-lite score fits what "
                "makes a probability of T."
            )
        else:
            self._means.set_text(
                f"σ(T) = {sigmoid(score):.3f}: how likely the pair is a real one, if half of all "
                "pairs were"
            )
        places = ranks(scores)
        if len(texts) > 1:
            self._rank.set_text(f"Rank {places[0]} of {len(texts)} captions")
            self._hint.set_text(CLICK)
            order = np.argsort(-scores, kind="stable")
            self._ranking.show(
                [
                    (
                        texts[n],
                        Line(texts[n], [signed(scores[n], 3)], f"{places[n]}.", marked=n == 0),
                    )
                    for n in order
                ]
            )

    async def _heat(self, text: str) -> None:
        await self._messages.during(lambda: self.chooser.heat(text))


class ClassifyTab:
    """Zero-shot classification of a picture with labels that somebody types."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cautioned = bool(why_not_log_r(engine.model.config))
        with tag("div", "demo-columns"):
            with tag("div", "demo-column"):
                self._messages = Messages()
                self.chooser = Chooser(engine, self._messages, self._chosen)
            with tag("div", "demo-column"):
                self._labels = ui.textarea("Labels, one on each line").props("outlined autogrow")
                self._template = ui.input("Prompt, {} stands for the label", value=TEMPLATE)
                self._template.props("outlined").on("keydown.enter", self._classify)
                self._button = ui.button("Classify", on_click=self._classify).props("no-caps")
                with tag("div", role="status"):
                    self._winner = ui.label().classes("demo-value")
                self._hint = ui.label().classes("demo-note")
                self._ranking = Ranking(self._heat)

    async def _chosen(self, picture: Picture) -> None:
        self._clear()

    def _clear(self) -> None:
        self._winner.set_text("")
        self._hint.set_text("")
        self._ranking.clear()
        self.chooser.shown.clear_heat()

    async def _classify(self) -> None:
        await self._messages.during(self._classified, self._button)

    async def _classified(self) -> None:
        self._clear()
        picture = self.chooser.picture
        if picture is None:
            raise ConfigError("choose a picture first")
        labels = lines(self._labels.value, "labels")
        if len(labels) < 2:
            raise ConfigError("give at least two labels, one on each line")
        texts = prompts(labels, self._template.value)
        scores = await asyncio.to_thread(self._engine.scores, picture, texts)
        if picture is not self.chooser.picture:
            return
        shares, order = softmax(scores), np.argsort(-scores, kind="stable")
        best = int(order[0])
        self._winner.set_text(labels[best])
        self._hint.set_text(
            "Share: softmax of T over these labels, as though exactly one were true"
            + ("; no probability here, the tab Score says why. " if self._cautioned else ". ")
            + CLICK
        )
        self._ranking.show(
            [
                (
                    texts[n],
                    Line(
                        labels[n],
                        [f"{100 * shares[n]:.1f} %", f"T {signed(scores[n])}"],
                        share=float(shares[n]),
                        marked=n == best,
                    ),
                )
                for n in order
            ]
        )
        await self.chooser.heat(texts[best])

    async def _heat(self, text: str) -> None:
        await self._messages.during(lambda: self.chooser.heat(text))
