"""Features of frozen towers, computed once, kept on disk, and read in place of pixels and tokens.

A store holds one record per key (an example's id, or a caption) in ArrayRecord shards, in the order
of the keys' hashes, so that a lookup needs the hashes alone.  Shards are written whole or not at
all: a run that was killed goes on at the first that is missing, and processes share the shards out
among themselves.  The name of a store's folder is a hash of the tower and of all that goes in.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from clip_lite_jax.color_jitter import UNCHANGED, color_jitter
from clip_lite_jax.config import Config
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.image_ops import check_resampling
from clip_lite_jax.data.inputs import Pixels, TextInput, TowerInputs
from clip_lite_jax.data.records import RawRecords, write_raw_records
from clip_lite_jax.data.sources import Source
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.files import write_atomic
from clip_lite_jax.models import Model
from clip_lite_jax.sharding import any_rows, batch_sharding, build_mesh, replicated

log = logging.getLogger(__name__)

SHARD = 2048
"""Records of a shard: what a kill costs at most."""
IMAGE_BATCH, TEXT_BATCH = 64, 256
KEYS_FILE = "keys.npy"


class FeatureStore:
    """Features by key, read from disk; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes = np.load(folder / KEYS_FILE, allow_pickle=False)
        count = -(-len(self._hashes) // SHARD)
        self._shards = [RawRecords(_shard_path(folder, n)) for n in range(count)]

    def __getitem__(self, key: str) -> np.ndarray:
        """float32 ``[V, F]``.

        Raises:
          BadImage: the example could not be used when the store was made.
          DataError: the key is not in the store, or its record is damaged.
        """
        row = int(np.searchsorted(self._hashes, _hash(key)))
        if row == len(self._hashes) or self._hashes[row] != _hash(key):
            raise DataError(f"{self.folder} holds no features of {key!r}: delete it and run again")
        record = self._shards[row // SHARD].read(row % SHARD)
        reason, shape, data = msgpack.unpackb(record)
        if reason:
            raise BadImage(reason)
        return np.frombuffer(data, "<f4").reshape(shape)


@dataclass(frozen=True)
class CachedImages:
    """Features of images: row 0 is the view of evaluation, the others are random views."""

    store: FeatureStore
    width: int

    @property
    def blank(self) -> np.ndarray:
        return np.zeros(self.width, np.float32)

    def open(self, source: Source, index: int) -> np.ndarray:
        return self.store[source.metadata(index).id]

    def view(self, opened: np.ndarray) -> np.ndarray:
        return opened[0]

    def random_view(self, opened: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        return opened[rng.integers(1, len(opened)) if len(opened) > 1 else 0], False

    def changes(self, rng: np.random.Generator) -> None:
        """Kept views have their colours."""
        del rng


@dataclass(frozen=True)
class CachedTexts:
    """Features of captions: a `TextInput`."""

    store: FeatureStore

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        features = np.stack([self.store[caption][0] for caption in captions])
        return features, np.ones((len(captions), 1), bool)


def check_cache(config: Config, frozen: Sequence[str]) -> None:
    """Raises `ConfigError` where features are to be kept that change from step to step."""
    for name, tower in (("image", config.model.image), ("text", config.model.text)):
        if tower.cache and name not in frozen:
            raise ConfigError(
                f"model.{name}.cache=True needs a tower that is never trained: "
                f"--config.optim.frozen='{{\"^{name}_encoder/\": [0, null]}}'"
            )
    augment = config.data.augment
    if config.data.captions == "averaged" and not config.model.text.cache:
        raise ConfigError(
            "data.captions='averaged' takes the mean of features kept on disk: set "
            "model.text.cache=True, with a frozen text tower, or choose data.captions='random'"
        )
    if config.model.text.cache and augment.tag_dropout:
        raise ConfigError(
            f"data.augment.tag_dropout={augment.tag_dropout} makes a new caption at every step, "
            "whose features model.text.cache=True does not have: set one of them to 0"
        )
    kept_views = config.model.image.cache and config.data.cached_views == 0
    if augment.flip and (config.model.text.cache or config.model.image.cache) and not kept_views:
        raise ConfigError(
            f"data.augment.flip={augment.flip} mirrors pictures and swaps left and right in their "
            "captions, which features kept on disk cannot follow: set it to 0"
        )


def build_inputs(
    config: Config,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    model: Model,
    params: Any,
    model_state: Any,
    workdir: Path,
) -> TowerInputs:
    """What the towers read: pixels and tokens, or features, which are computed first."""
    if not model.cached:
        return TowerInputs(Pixels(config.data), tokenizer)
    root = Path(config.data.feature_cache or workdir / "features")
    # Every process encodes its own shards with its own devices.
    mesh = build_mesh(jax.local_devices())
    rows, whole = batch_sharding(mesh), replicated(mesh)
    variables = jax.device_put(jax.device_get((params, model_state)), whole)

    def compiled(method: Callable[..., Any], arrays: int) -> Callable[..., np.ndarray]:
        shardings = (whole, whole, *[rows] * arrays)
        function = jax.jit(method, in_shardings=shardings, out_shardings=whole)
        encode = any_rows(mesh, lambda *given: function(*variables, *given))
        return lambda *given: np.asarray(encode(*given), np.float32)

    images, texts = Pixels(config.data), tokenizer
    inputs = TowerInputs(images, texts)
    if "image" in model.cached:
        places = _places(sources)
        features = compiled(_features_of_changed(model), 2)
        if not config.data.cached_views:  # nothing changes the view of evaluation
            plain = compiled(model.image_features, 1)
            features = lambda images, _: plain(images)  # noqa: E731
        encode = _image_encoder(config, images, places, features)
        settings: list[Any] = [config.data.image_size, config.data.resize, model.module.pixel_mean]
        settings += [model.module.pixel_std, config.model.dtype, config.data.cached_views]
        if config.data.cached_views:
            settings += [config.data.augment, config.seed]
        folder = root / _name("image", variables, settings, places)
        store = compute(folder, places, encode, "images")
        width = jax.eval_shape(model.image_features, *variables, images.blank[None]).shape[-1]
        inputs = replace(inputs, image=CachedImages(store, width))
    if "text" in model.cached:
        captions = needed_captions(sources)
        encode = text_encoder(texts, compiled(model.text_features, 2))
        settings = [hashlib.sha256(texts.model).digest(), texts.max_tokens, config.model.dtype]
        folder = root / _name("text", variables, settings, captions)
        inputs = replace(inputs, text=CachedTexts(compute(folder, captions, encode, "captions")))
    return inputs


def compute(
    folder: Path,
    keys: Iterable[str],
    encode: Callable[[Sequence[str]], Iterable[np.ndarray | str]],
    what: str,
) -> FeatureStore:
    """The store of `keys` in `folder`; shards that are not there yet are computed.

    `encode` gives the features ``[V, F]`` of every key, in order, or why there are none.
    """
    ordered = sorted(set(keys), key=_hash)
    hashes = np.array([_hash(key) for key in ordered], np.uint64)
    if len(np.unique(hashes)) < len(hashes):
        raise DataError(f"two {what} have the same 64-bit hash: rename one of them")
    folder.mkdir(parents=True, exist_ok=True)
    shards = [ordered[start : start + SHARD] for start in range(0, len(ordered), SHARD)]
    mine = range(jax.process_index(), len(shards), jax.process_count())
    missing = [n for n in mine if not _shard_path(folder, n).exists()]
    if missing:
        log.info("features of %d %s, kept in %s", len(ordered), what, folder)
    total = sum(len(shards[n]) for n in missing)
    with tqdm(total=total, desc=what, disable=not total or jax.process_index() > 0) as bar:
        for number in missing:
            records = _records(encode(shards[number]), bar)
            write_raw_records(_shard_path(folder, number), records)
    if jax.process_index() == 0:
        buffer = io.BytesIO()
        np.save(buffer, hashes)
        write_atomic(folder / KEYS_FILE, buffer.getvalue())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"features of {what}")
    return FeatureStore(folder)


def needed_captions(sources: Mapping[str, Source]) -> set[str]:
    """Every caption of every example, and all of an example's in one; and that of a broken one."""
    examples = (source.metadata(i) for source in sources.values() for i in range(len(source)))
    return {""} | {text for e in examples for text in (*e.captions, caption_ops.join(e.captions))}


def _features_of_changed(model: Model) -> Callable[..., Any]:
    """`Model.image_features` of images whose colours change first."""

    def features(params: Any, model_state: Any, images: Any, changes: Any) -> Any:
        return model.image_features(params, model_state, color_jitter(images, changes))

    return features


def _image_encoder(
    config: Config,
    pixels: Pixels,
    places: Mapping[str, tuple[Source, int]],
    features: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[Sequence[str]], Iterator[np.ndarray | str]]:
    """Ids → features ``[1 + views, F]``: of the view of evaluation and of random ones."""
    views = config.data.cached_views
    if views:
        check_resampling(config.data.augment)

    def pictures(id: str) -> tuple[np.ndarray, np.ndarray] | str:
        """Of an image, its views ``[1 + views, H, W, 3]`` and their changes."""
        source, index = places[id]
        try:
            opened = pixels.open(source, index)
            rng = np.random.default_rng((config.seed, _hash(id)))
            seen, changes = [pixels.view(opened)], np.stack([UNCHANGED] * (1 + views))
            for number in range(1, 1 + views):
                seen.append(pixels.random_view(opened, rng)[0])
                drawn = pixels.changes(rng)
                if drawn is not None:
                    changes[number, : len(drawn)] = drawn
            return np.stack(seen), changes
        except BadImage as error:
            return str(error)

    def encode(ids: Sequence[str]) -> Iterator[np.ndarray | str]:
        at_once = max(1, IMAGE_BATCH // (1 + views))
        blank = np.stack([pixels.blank] * (1 + views)), np.stack([UNCHANGED] * (1 + views))
        with ThreadPoolExecutor(max(1, config.data.threads)) as pool:
            loaded = pool.map(pictures, ids)
            for _ in range(0, len(ids), at_once):
                found = list(islice(loaded, at_once))
                usable = [blank if isinstance(x, str) else x for x in found]
                usable += [blank] * (at_once - len(found))  # one shape, one program
                images, changes = map(np.concatenate, zip(*usable, strict=True))
                rows = features(images, changes).reshape(at_once, 1 + views, -1)
                yield from (
                    x if isinstance(x, str) else row for x, row in zip(found, rows, strict=False)
                )

    return encode


def text_encoder(
    tokenizer: TextInput, features: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[[Sequence[str]], Iterator[np.ndarray]]:
    """Captions → what `features` makes of their tokens and mask, ``[1, F]`` each."""

    def encode(captions: Sequence[str]) -> Iterator[np.ndarray]:
        tokens, mask = tokenizer(captions)
        lengths = mask.sum(axis=1)
        order = np.argsort(lengths, kind="stable")  # captions of like length waste little padding
        rows: dict[int, np.ndarray] = {}
        for start in range(0, len(captions), TEXT_BATCH):
            chosen = order[start : start + TEXT_BATCH]
            longest = min(-(-int(lengths[chosen].max(initial=1)) // 8) * 8, tokens.shape[1])
            padded = np.resize(chosen, TEXT_BATCH)  # one shape, one program
            found = features(tokens[padded, :longest], mask[padded, :longest])
            rows |= dict(zip(chosen.tolist(), found, strict=False))
        yield from (rows[i][None] for i in range(len(captions)))

    return encode


def _records(found: Iterable[np.ndarray | str], bar: Any) -> Iterator[bytes]:
    for features in found:
        bar.update()
        if isinstance(features, str):
            yield msgpack.packb((features, (), b""))
        else:
            yield msgpack.packb(("", features.shape, features.astype("<f4").tobytes()))


def _places(sources: Mapping[str, Source]) -> dict[str, tuple[Source, int]]:
    return {
        source.metadata(index).id: (source, index)
        for source in sources.values()
        for index in range(len(source))
    }


def _name(tower: str, variables: Any, settings: Sequence[Any], keys: Iterable[str]) -> str:
    """A hash of everything that the features depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    collections = {"params": variables[0], **variables[1]}
    own = {name: tree.get(f"{tower}_encoder", {}) for name, tree in collections.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    for key in sorted(keys):
        digest.update(key.encode() + b"\x00")
    return f"{tower}-{digest.hexdigest()[:16]}"


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.arrayrecord"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
