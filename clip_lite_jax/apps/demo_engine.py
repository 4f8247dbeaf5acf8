"""What the demo asks of the model and the index; knows nothing of pages, safe between threads."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from clip_lite_jax.apps.demo_views import data_url, fitted
from clip_lite_jax.apps.index import Hit, Index
from clip_lite_jax.apps.queries import ModelEncoder, Query, check_sums, mixed
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened, view_box
from clip_lite_jax.data.sources import Source, build_sources
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.evaluators.places import on_picture
from clip_lite_jax.inference import DualEncoderModel

MAX_BYTES = 30_000_000
"""Of an encoded picture."""
SIDE = 640
"""Pixels that a large picture is shown with."""
THUMBNAIL = 224
MAX_HITS = 100
_ROWS = 8
"""Texts are scored in a multiple of so many rows: few programs."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was uploaded or found, ready to be scored."""

    name: str
    shown: Image.Image
    """RGB, at most `SIDE` wide and high."""
    view: np.ndarray
    """What the model sees: uint8 ``[S, S, 3]``."""
    embedding: np.ndarray
    """Its projection, float32 ``[D]``."""
    caption: str = ""
    """Where it is known."""

    @cached_property
    def url(self) -> str:
        return data_url(self.shown)


@dataclass(frozen=True)
class Wanted:
    """A part of a search: a text or a picture, and what it counts for."""

    text: str = ""
    picture: Picture | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Found:
    """The hits of a search, and what their values are: ``T`` or ``cosine``."""

    hits: list[Hit]
    measure: str
    kind: str


class Engine:
    """A model, and an index that it made."""

    def __init__(self, model: DualEncoderModel, path: str = "", index: Index | None = None) -> None:
        self.model, self.path, self.index = model, path, index
        self._lock = threading.Lock()
        """Round the device: requests that share it take turns."""
        self._encoder = ModelEncoder(model)
        self.embedding = lru_cache(maxsize=2000)(self._embedding)

    @property
    def kinds(self) -> list[str]:
        """What can be found: ``images``, ``texts``."""
        if self.index is None:
            return []
        return [kind for kind in ("images", "texts") if self.index.count(kind)]

    def picture(self, data: bytes, name: str, caption: str = "") -> Picture:
        """Raises `BadImage`: too large, or nothing that can be read; the message names it."""
        try:
            if len(data) > MAX_BYTES:
                raise BadImage(f"{len(data):,} bytes, over {MAX_BYTES:,}")
            opened = Opened(data)
            whole = opened.decoded()
        except BadImage as error:
            raise BadImage(f"{name}: {error}") from error
        view = self.model.pixels.view(Opened.of(whole))
        with self._lock:
            embedding = np.asarray(self.model.fns.image(view[None])[0], np.float32)
        return Picture(name, fitted(whole, SIDE), view, embedding, caption)

    def of_row(self, row: int) -> Picture:
        """The picture of a row of the index; raises `DataError` where there is none (any more)."""
        index = self._searched()
        if not 0 <= row < index.count():
            raise DataError(f"row {row}: the index has {index.count():,}")
        hit = index.hit(row)
        data = index.picture(hit)
        if data is None:
            raise DataError(f"{hit.id}: its picture is no file of its own, or is gone")
        return self.picture(data, hit.id)

    def sample(self, rng: np.random.Generator) -> Picture:
        """Some picture: of the index, or else a drawing that is built in, of its test set."""
        if self.index is not None and (count := self.index.count()):
            for row in rng.integers(0, count, 5).tolist():  # a few files may be gone
                if self.index.picture(self.index.hit(row)) is not None:
                    return self.of_row(row)
        example = self._drawings[int(rng.integers(0, len(self._drawings)))]
        return self.picture(example.image, example.id, str(rng.choice(example.captions)))

    @cached_property
    def _drawings(self) -> Source:
        return build_sources(DataConfig(source="emoji"), BadExamples(), training=False)["test"]

    def _embedding(self, text: str) -> np.ndarray:
        """The projection of a text, float32 ``[D]``."""
        with self._lock:
            return self._encoder.text(text).embedding

    def scores(self, picture: Picture, texts: Sequence[str]) -> np.ndarray:
        """The critic's T of the picture with each text, float32 ``[N]``."""
        rows = np.stack([self.embedding(text) for text in texts])
        missing = -len(rows) % _ROWS
        padded = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
        with self._lock:
            scores = self.model.fns.matrix(picture.embedding[None], padded)
        return np.asarray(scores, np.float32)[0, : len(rows)]

    def heat(self, picture: Picture, text: str) -> np.ndarray:
        """What of the picture, as it is shown, speaks for the text: ``[H, W]``, none below 0; see
        `models.heat_maps`.  Raises `ConfigError` where the encoder knows no places."""
        tokens, mask = self.model.tokenizer([text])
        with self._lock:
            heat = np.asarray(self.model.fns.heat_maps(picture.view[None], tokens, mask)[0])
        data, size = self.model.config.data, picture.shown.size
        return on_picture(heat, size, view_box(size, data.image_size, data.resize))

    def search(
        self, wanted: Sequence[Wanted], without: Sequence[str], count: int, kind: str = "images"
    ) -> Found:
        """Raises `ConfigError`, `DataError`: as `queries.query` and `Index.search`."""
        index = self._searched()
        if not wanted:
            raise ConfigError("write what to look for, or add a picture")
        if not 1 <= count <= MAX_HITS:
            raise ConfigError(f"{count} hits: choose 1 to {MAX_HITS}")
        weights = [part.weight for part in wanted]
        critic = index.model.critic
        check_sums(critic, weights, len(without))
        each = [
            Query(self.embedding(part.text), "text")
            if part.picture is None
            else Query(part.picture.embedding, "image")
            for part in wanted
        ]
        query = mixed(critic, each, weights, [self.embedding(text) for text in without])
        matrix = None if index.model.affine else self.model.fns.matrix
        with self._lock:
            hits = index.search(query, count, kind, matrix)
        scored = (query.side, kind) in (("text", "images"), ("image", "texts"))
        return Found(hits, "T" if scored else "cosine", kind)

    def thumbnails(self, found: Found) -> list[str]:
        """An address for each hit, empty where it has no picture."""
        return [self._thumbnail(hit) for hit in found.hits]

    def _thumbnail(self, hit: Hit) -> str:
        data = self._searched().picture(hit)
        if data is None or len(data) > MAX_BYTES:
            return ""
        try:
            opened = Opened(data)
            shrink = max(1.0, min(opened.size) / THUMBNAIL)
            return data_url(fitted(opened.decoded(shrink), THUMBNAIL))
        except BadImage:  # it has changed since it was indexed
            return ""

    def _searched(self) -> Index:
        if self.index is None:
            raise ConfigError(NO_INDEX)
        return self.index

    def warm(self) -> None:
        """Compiles what the first requests need, so that they wait less; without the lock, so that
        they do not wait for all of it."""
        blank, fns = self.model.pixels.blank[None], self.model.fns
        if self.model.has_tokenizer:
            self._encoder.text("a photo")
        fns.image(blank)
        if self.model.has_tokenizer:
            with suppress(ConfigError):  # said when somebody asks for a heat map
                fns.heat_maps(blank, *self.model.tokenizer(["a photo"]))


NO_INDEX = (
    "nothing to search: start the demo with --images FOLDER, or with --index INDEX that "
    "clip-lite index has written"
)
