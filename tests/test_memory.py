"""Negatives of earlier steps: first in, first out, and the same on any number of devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_negatives import Cosine, make_pairs

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives import Drawn, Pairs, build_sampler, init_memory, remember
from clip_lite_jax.sharding import build_mesh, put_batch

BATCH, LANES, KEPT = 64, 8, 24  # a lane is dealt 8 rows a step and keeps those of 3 steps


def config(name: str, **changes: Any) -> NegativesConfig:
    return NegativesConfig(name=name, sides="both", lanes=LANES, memory=KEPT, **changes)


def pairs_of(step: int) -> Pairs:
    """A batch whose embeddings and groups tell the step."""
    pairs = make_pairs(BATCH, bad=(step,))
    group = pairs.group + 1000 * step
    return pairs.replace(image=pairs.image + step, text=pairs.text - step, group=group)


def run(settings: NegativesConfig, steps: int, mesh: Mesh, keys: bool = False) -> tuple[Any, Drawn]:
    """The memory before the last of some steps, and what was drawn in it."""
    sampler = build_sampler(settings, BATCH, mesh)

    @jax.jit
    def step(pairs: Pairs, number: jax.Array) -> tuple[Any, Drawn]:
        key = jax.random.fold_in(jax.random.key(0), number)
        drawn = sampler(key, number, pairs, Cosine())
        return remember(settings, BATCH, mesh, key, number, pairs), drawn

    memory = init_memory(settings, BATCH, mesh, pairs_of(0))
    for number in range(steps):
        pairs = put_batch(mesh, pairs_of(number)).replace(memory=memory)
        if keys:
            pairs = pairs.replace(key_image=2 * pairs.image, key_text=2 * pairs.text)
        before = memory
        memory, drawn = step(pairs, jnp.asarray(number))
    return jax.device_get((before, drawn))


def test_the_oldest_are_replaced(mesh: Mesh) -> None:
    memory, _ = run(config("memory"), 6, mesh)
    assert memory.image.shape == (LANES, KEPT, 8)
    kept = memory.group[..., 0] // 1000
    for lane in kept:  # before step 5: steps 2, 3 and 4, each where step % 3 puts it
        np.testing.assert_array_equal(lane, np.repeat([3, 4, 2], 8))
    everything = memory.group[..., 0].ravel()
    assert sorted(everything) == sorted(1000 * s + r for s in (2, 3, 4) for r in range(BATCH))
    assert np.sum(~memory.valid) == 3  # the bad example of each step
    rows = memory.group[..., 0] % 1000
    np.testing.assert_allclose(memory.text, make_pairs(BATCH).text[rows] - kept[..., None])


def test_an_empty_memory_holds_no_negatives(mesh: Mesh) -> None:
    _, queue = run(config("queue"), 1, mesh, keys=True)
    assert not queue.scores.valid.any()
    _, memory = run(config("memory"), 1, mesh)
    assert memory.scores.valid[..., :8].any()
    assert not memory.scores.valid[..., 8:].any()


def test_the_queue_scores_keys(mesh: Mesh) -> None:
    memory, drawn = run(config("queue"), 5, mesh, keys=True)
    pairs, scores = pairs_of(4), drawn.scores
    assert scores.negative.shape == (1, 2 * BATCH, KEPT)
    own = 3 * np.sum(pairs.image * 2 * pairs.text, axis=1)
    np.testing.assert_allclose(scores.positive, np.concatenate([own, own]), rtol=1e-4, atol=1e-4)
    lane = np.arange(BATCH) // 8
    expected = 3 * np.einsum("bd,bmd->bm", pairs.image, memory.text[lane])
    np.testing.assert_allclose(scores.negative[0, :BATCH], expected, rtol=1e-4, atol=1e-4)
    expected = 3 * np.einsum("bd,bmd->bm", pairs.text, memory.image[lane])
    np.testing.assert_allclose(scores.negative[0, BATCH:], expected, rtol=1e-4, atol=1e-4)
    assert np.all(drawn.index < 0)


def test_memory_scores_the_lane_and_what_it_kept(mesh: Mesh) -> None:
    memory, drawn = run(config("memory"), 5, mesh)
    pairs, scores = pairs_of(4), drawn.scores
    assert scores.negative.shape == (2, BATCH, 8 + KEPT)
    now = drawn.index[..., :8]
    matrix = 3 * pairs.image @ pairs.text.T
    for side, expected in enumerate((matrix, matrix.T)):
        rows = np.take_along_axis(expected, now[side], axis=1)
        np.testing.assert_allclose(scores.negative[side, :, :8], rows, rtol=1e-4, atol=1e-4)
    before = 3 * np.einsum("bd,bmd->bm", pairs.image, memory.text[np.arange(BATCH) // 8])
    np.testing.assert_allclose(scores.negative[0, :, 8:], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [config("memory"), config("hard", pool="memory"), config("k", k=9, pool="memory")]
)
def test_devices_make_no_difference(settings: NegativesConfig) -> None:
    (one_memory, one), (memory, eight) = (
        run(settings, 5, build_mesh(jax.devices()[:n])) for n in (1, 8)
    )
    jax.tree.map(np.testing.assert_array_equal, one_memory, memory)
    np.testing.assert_array_equal(one.index, eight.index)
    np.testing.assert_array_equal(one.scores.valid, eight.scores.valid)


def test_the_pool_reaches_into_the_memory(mesh: Mesh) -> None:
    _, drawn = run(config("k", k=9, pool="memory"), 5, mesh)
    from_memory = np.mean(drawn.index < 0)
    assert abs(from_memory - KEPT / (KEPT + 8)) < 0.06  # drawn uniformly from 8 new and 24 old


def test_groups_are_masked_across_steps() -> None:
    mesh = build_mesh(jax.devices()[:1])
    settings = config("memory")
    memory, _ = run(settings, 5, mesh)
    same = pairs_of(4).replace(group=pairs_of(3).group, memory=memory)
    drawn = build_sampler(settings, BATCH, mesh)(
        jax.random.key(0), jnp.zeros((), int), same, Cosine()
    )
    lane = np.arange(BATCH) // 8
    clash = memory.group[lane, :, 0] == same.group[:, None, 0]
    assert clash.sum() > 0
    assert not np.any(np.asarray(drawn.scores.valid)[0, :, 8:] & clash)


def test_what_is_missing_is_said() -> None:
    mesh = build_mesh(jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"memory=20: each step brings 8 rows .* multiple of 8"):
        build_sampler(NegativesConfig(name="queue", lanes=8, memory=20), 64, mesh)
    for name, message in (("memory", "needs Pairs.memory"), ("queue", "key_image")):
        sampler = build_sampler(config(name), BATCH, mesh)
        with pytest.raises(ValueError, match=message):
            sampler(jax.random.key(0), jnp.zeros((), int), make_pairs(BATCH), Cosine())
