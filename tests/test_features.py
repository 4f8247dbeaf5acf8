"""Features of frozen towers: what is kept, what is read, and what happens after a kill."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import draw, tiny_config, tiny_model
from PIL import Image

from clip_lite_jax import features, load
from clip_lite_jax.config import AugmentConfig, Config, NegativesConfig, OptimConfig
from clip_lite_jax.data.caption_ops import join
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.features import FeatureStore, build_inputs, compute
from clip_lite_jax.run import build_run
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train import train

FROZEN = OptimConfig(
    warmup_steps=1, frozen={"^image_encoder/": (0, None), "^text_encoder/": (0, None)}
)


def cached_config(pairs: Path, **changes: object) -> Config:
    model = tiny_model()
    model = replace(
        model, image=replace(model.image, cache=True), text=replace(model.text, cache=True)
    )
    config = tiny_config(pairs, model=model, optim=FROZEN)
    data = replace(config.data, augment=AugmentConfig(flip=0))
    return replace(config, data=data, **changes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("two_devices")
def test_a_run_on_kept_features_trains_the_critic_alone(pairs: Path, tmp_path: Path) -> None:
    config = cached_config(pairs)
    run = train(config, tmp_path)
    model = load(tmp_path)
    start, _ = run.init_state({})
    for tower in ("image_encoder", "text_encoder"):
        before, after = start.params[tower], model.params[tower]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    moved = jax.tree.map(np.array_equal, start.params["critic"], model.params["critic"])
    assert not all(jax.tree.leaves(moved))
    # What is kept is what the whole model makes of pixels and words.
    inputs = run.inputs(model.params, model.model_state)
    source = run.sources["validation"]
    kept = np.stack([inputs.image.view(inputs.image.open(source, i)) for i in range(3)])
    pixels = [Image.open(pairs.parent / source.metadata(i).id) for i in range(3)]
    np.testing.assert_allclose(
        model.fns.image(kept), model.project_image(pixels), rtol=1e-4, atol=1e-5
    )
    captions = list(source.metadata(0).captions)
    captions.append(join(captions))
    np.testing.assert_allclose(
        model.fns.text(*inputs.text(captions)), model.project_text(captions), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("two_devices")
def test_a_memory_embeds_kept_features_again(pairs: Path, tmp_path: Path) -> None:
    negatives = NegativesConfig(
        name="importance", pool="memory", memory=16, reembed=True, block=4, lanes=2
    )
    train(cached_config(pairs, negatives=negatives), tmp_path)


@pytest.mark.usefixtures("two_devices")
def test_other_weights_views_or_pixels_are_kept_apart(pairs: Path, tmp_path: Path) -> None:
    shared = tmp_path / "features"
    config = cached_config(pairs)
    config = replace(config, steps=2, data=replace(config.data, feature_cache=str(shared)))

    def keep(config: Config, name: str) -> None:
        run = build_run(config, tmp_path / name)
        state, _ = run.init_state({})
        run.inputs(state.params, state.model_state)

    keep(config, "first")
    names = {path.name for path in shared.iterdir()}
    assert len(names) == 2
    for number, other in enumerate(
        (
            replace(config, seed=1),
            replace(config, data=replace(config.data, cached_views=2)),
            replace(config, data=replace(config.data, resize=20)),
        )
    ):
        keep(other, f"other {number}")
        assert len({path.name for path in shared.iterdir()} - names) >= 1
        names = {path.name for path in shared.iterdir()}
    keep(replace(config, batch_size=8), "again")
    assert {path.name for path in shared.iterdir()} == names


def test_views_are_drawn_once(pairs: Path, tmp_path: Path) -> None:
    config = cached_config(pairs)
    config = replace(config, data=replace(config.data, cached_views=3))
    run = build_run(config, tmp_path)
    state, _ = run.init_state({})
    inputs = run.inputs(state.params, state.model_state)
    opened = inputs.image.open(run.sources["train"], 0)
    assert opened.shape == (4, 16)
    assert len(np.unique(opened, axis=0)) == 4
    rng = np.random.default_rng(0)
    drawn = np.stack([inputs.image.random_view(opened, rng)[0] for _ in range(50)])
    assert {row.tobytes() for row in drawn} == {row.tobytes() for row in opened[1:]}


def test_a_kill_costs_the_shard_it_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD", 4)
    keys = [f"key {n}" for n in range(18)]
    encoded: list[str] = []

    def encode(chosen):  # type: ignore[no-untyped-def]
        for key in chosen:
            if len(encoded) == 10:
                raise KeyboardInterrupt
            encoded.append(key)
            yield np.full((1, 3), int(key.split()[1]), np.float32)

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, keys, encode, "keys")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000.arrayrecord",
        "00001.arrayrecord",
    ]
    finished, encoded = set(encoded[:8]), []
    store = compute(tmp_path, keys, encode, "keys")
    assert set(encoded) == set(keys) - finished
    for number, key in enumerate(keys):
        np.testing.assert_array_equal(store[key], np.full((1, 3), number))
    encoded = []
    compute(tmp_path, keys, encode, "keys")
    assert encoded == []
    with pytest.raises(DataError, match="holds no features of 'another'"):
        store["another"]


def test_a_broken_picture_keeps_its_reason(tmp_path: Path) -> None:
    store = compute(tmp_path, ["a", "b"], lambda keys: ["cannot be decoded" for _ in keys], "x")
    with pytest.raises(BadImage, match="cannot be decoded"):
        FeatureStore(tmp_path)["a"]
    assert len(list(store.folder.glob("*.arrayrecord"))) == 1


@pytest.mark.usefixtures("two_devices")
def test_broken_pictures_are_listed_and_skipped(tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        name = f"{number}.png"
        draw("circle", "red").save(tmp_path / name)
        rows.append(f"{name},circle {number}")
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "\n".join(rows))
    config = cached_config(tmp_path / "pairs.csv")
    config = replace(config, steps=6, data=replace(config.data, held_out=0.05))
    run = train(config, tmp_path / "run")
    assert "3.png" in (tmp_path / "run" / "skipped.jsonl").read_text()
    assert len(run.bad) == 1


def test_what_cannot_be_kept_is_refused(pairs: Path, tmp_path: Path) -> None:
    config = cached_config(pairs)
    cases = [
        (
            replace(config, optim=OptimConfig(warmup_steps=1)),
            "model.image.cache=True needs a tower",
        ),
        (
            replace(config, data=replace(config.data, augment=AugmentConfig(tag_dropout=0.5))),
            "tag_dropout=0.5 makes a new caption",
        ),
        (
            replace(
                config, data=replace(config.data, cached_views=2, augment=AugmentConfig(flip=0.5))
            ),
            "flip=0.5 mirrors",
        ),
    ]
    for number, (wrong, message) in enumerate(cases):
        with pytest.raises(ConfigError, match=message):
            build_run(wrong, tmp_path / str(number))


def test_stores_do_not_depend_on_devices(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(cached_config(pairs), tmp_path)
    state, _ = run.init_state({})
    found = []
    for devices in (1, 8):
        mesh = build_mesh(jax.devices()[:devices])
        monkeypatch.setattr("clip_lite_jax.features.build_mesh", lambda _, mesh=mesh: mesh)
        inputs = build_inputs(
            run.config,
            run.sources,
            run.tokenizer,
            run.model,
            state.params,
            state.model_state,
            tmp_path / str(devices),
        )
        found.append(inputs.image.view(inputs.image.open(run.sources["train"], 5)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
