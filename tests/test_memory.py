"""Negatives of earlier steps: first in, first out, and the same on any number of devices."""

from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_negatives import Cosine, make_pairs

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.hlo import traffic
from clip_lite_jax.negatives import (
    Drawn,
    Pairs,
    build_sampler,
    init_memory,
    remember,
    uses_memory,
)
from clip_lite_jax.objectives import RowScores, Scores, build_objective
from clip_lite_jax.sharding import batch_sharding, build_mesh, put_batch

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


@pytest.fixture
def one_device() -> Mesh:
    return build_mesh(jax.devices()[:1])


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
    np.testing.assert_allclose(scores.positive, np.repeat(own, 2), rtol=1e-4, atol=1e-4)
    lane = np.arange(BATCH) // 8
    expected = 3 * np.einsum("bd,bmd->bm", pairs.image, memory.text[lane])
    np.testing.assert_allclose(scores.negative[0, 0::2], expected, rtol=1e-4, atol=1e-4)
    expected = 3 * np.einsum("bd,bmd->bm", pairs.text, memory.image[lane])
    np.testing.assert_allclose(scores.negative[0, 1::2], expected, rtol=1e-4, atol=1e-4)
    assert np.all(drawn.index < 0)


@pytest.mark.parametrize("name", ["queue", "memory"])
def test_what_is_sent_does_not_grow_with_the_devices(name: str) -> None:
    """The scores of a step and what it keeps, for as many pairs on each of 2, 4 and 8 devices."""

    def sent(devices: int) -> dict[str, float]:
        mesh, batch, block = build_mesh(jax.devices()[:devices]), 32 * devices, 64
        settings = NegativesConfig(name=name, sides="both", block=block, lanes=4, memory=32)
        sampler = build_sampler(settings, batch, mesh)

        def step(pairs: Pairs) -> tuple[Any, Scores | RowScores]:
            key, number = jax.random.key(0), jnp.zeros((), jnp.int32)
            kept = remember(settings, batch, mesh, key, number, pairs)
            return kept, sampler(key, number, pairs, Cosine()).scores

        pairs = put_batch(mesh, make_pairs(batch))
        memory = jax.device_put(init_memory(settings, batch, mesh, pairs), batch_sharding(mesh))
        pairs = pairs.replace(memory=memory, key_image=pairs.image, key_text=pairs.text)
        return traffic(jax.jit(step).lower(pairs).compile().as_text()).sent

    two, four, eight = (sent(devices) for devices in (2, 4, 8))
    assert two == four == eight  # the pairs of a block lie on two devices
    assert {kind for kind, size in two.items() if size} == {"all-to-all"}


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
    "settings",
    [
        config("memory"),
        config("queue"),
        config("hard", pool="memory"),
        config("k", k=9, pool="memory"),
    ],
    ids=lambda settings: settings.name,
)
def test_devices_make_no_difference(settings: NegativesConfig) -> None:
    (one_memory, one), (memory, eight) = (
        run(settings, 5, build_mesh(jax.devices()[:n]), keys=settings.name == "queue")
        for n in (1, 8)
    )
    jax.tree.map(np.testing.assert_array_equal, one_memory, memory)
    np.testing.assert_array_equal(one.index, eight.index)
    np.testing.assert_array_equal(one.scores.valid, eight.scores.valid)


def test_the_pool_reaches_into_the_memory(mesh: Mesh) -> None:
    _, drawn = run(config("k", k=9, pool="memory"), 5, mesh)
    from_memory = np.mean(drawn.index < 0)
    assert abs(from_memory - KEPT / (KEPT + 8)) < 0.06  # drawn uniformly from 8 new and 24 old


def test_only_what_draws_from_the_memory_keeps_one() -> None:
    assert uses_memory(NegativesConfig(name="hard", pool="memory"))
    assert not uses_memory(NegativesConfig(name="shuffle", pool="memory"))


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


# --- Embedding again ------------------------------------------------------------------------------


@flax.struct.dataclass
class Linear:
    """T = <a · x, b · y> of inputs x and y."""

    a: Any
    b: Any

    def embed_image(self, inputs: Any) -> Any:
        return inputs @ self.a

    def embed_text(self, inputs: Any) -> Any:
        return inputs @ self.b

    def pairs(self, image: Any, text: Any) -> Any:
        return jnp.sum(image * text, -1)

    def matrix(self, image: Any, text: Any) -> Any:
        return jnp.einsum("...nd,...md->...nm", image, text)


def with_an_old_memory(settings: NegativesConfig, mesh: Mesh) -> tuple[Linear, Pairs]:
    """Eight pairs with sixteen of earlier steps, whose embeddings are those of other weights."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 24, 3))
    now, old = (Linear(*rng.normal(size=(2, 3, 2)) / 2) for _ in range(2))
    group = rng.integers(0, 40, (24, 1), np.int32)

    def pairs(critic: Linear, rows: slice) -> Pairs:
        image, text = critic.embed_image(x[rows]), critic.embed_text(y[rows])
        valid = np.arange(24)[rows] != 20
        return Pairs(image, text, group[rows], valid, inputs=(x[rows], y[rows]))

    memory = init_memory(settings, 8, mesh, pairs(old, slice(8)))
    for step in range(2):
        batch = pairs(old, slice(8 + 8 * step, 16 + 8 * step)).replace(memory=memory)
        memory = remember(settings, 8, mesh, jax.random.key(0), jnp.asarray(step), batch)
    return now, pairs(now, slice(8)).replace(memory=memory)


def test_what_is_drawn_is_embedded_anew(one_device: Mesh) -> None:
    settings = NegativesConfig(
        name="k", sides="both", lanes=1, memory=16, pool="memory", reembed=True, k=5
    )
    with jax.enable_x64(True):
        now, pairs = with_an_old_memory(settings, one_device)
        drawn = build_sampler(settings, 8, one_device)(
            jax.random.key(3), jnp.zeros((), int), pairs, now
        )
    now, pairs, drawn = jax.device_get((now, pairs, drawn))
    kept_images, kept_texts = pairs.memory.inputs
    for side, (anchors, own, kept) in enumerate(
        (
            (pairs.image, pairs.text, now.embed_text(kept_texts[0])),
            (pairs.text, pairs.image, now.embed_image(kept_images[0])),
        )
    ):
        candidates = np.concatenate([kept[::-1], own])  # -1 - m is row m of the memory
        expected = np.einsum("bd,bkd->bk", anchors, candidates[drawn.index[side] + 16])
        valid = drawn.scores.valid[side]
        np.testing.assert_allclose(drawn.scores.negative[side][valid], expected[valid])
        assert np.any(drawn.index[side] < 0)


@pytest.mark.parametrize("proposal", ["sigma", "exp"])
def test_a_sum_is_that_over_a_memory_embedded_anew(proposal: Any, one_device: Mesh) -> None:
    """However old the scores that choose: the draw is unbiased, in value and gradient."""
    settings = NegativesConfig(
        name="importance", sides="both", lanes=1, memory=16, pool="memory", reembed=True
    )
    settings = replace(settings, proposal=proposal)
    objective, draws = build_objective("sigmoid"), 20_000
    sampler = build_sampler(settings, 8, one_device)
    with jax.enable_x64(True):
        now, pairs = with_an_old_memory(settings, one_device)
        memory = pairs.memory

        def embedded(critic: Linear) -> Pairs:
            x, y = pairs.inputs
            return pairs.replace(image=critic.embed_image(x), text=critic.embed_text(y))

        def one(critic: Linear, key: jax.Array) -> jax.Array:
            drawn = sampler(key, jnp.zeros((), int), embedded(critic), critic)
            return objective(drawn.scores)[0]

        def whole(critic: Linear) -> jax.Array:
            x, y = (
                jnp.concatenate([a, b[0]]) for a, b in zip(pairs.inputs, memory.inputs, strict=True)
            )
            scores = critic.matrix(critic.embed_image(x), critic.embed_text(y))
            group = np.concatenate([pairs.group, memory.group[0]])[:, 0]
            valid = np.concatenate([pairs.valid, memory.valid[0]])
            allowed = (group[:8, None] != group) & valid
            terms = [jnp.where(allowed, jax.nn.softplus(s), 0) for s in (scores[:8], scores.T[:8])]
            positive = jnp.diagonal(scores)[:8]
            return jnp.mean(jax.nn.softplus(-positive)) + sum(map(jnp.sum, terms)) / 16

        def flat(value: Any, gradient: Any) -> jax.Array:
            return jnp.concatenate([value[None], *map(jnp.ravel, jax.tree.leaves(gradient))])

        keys = jax.random.split(jax.random.key(1), draws)
        both = jax.jit(jax.vmap(lambda key: flat(*jax.value_and_grad(one)(now, key))))
        samples = np.asarray(both(keys))
        expected = np.asarray(flat(*jax.value_and_grad(whole)(now)))
    error = samples.std(0) / np.sqrt(draws)
    assert np.all(np.abs(samples.mean(0) - expected) <= 4.5 * error + 1e-9)


def test_inputs_are_asked_for(one_device: Mesh) -> None:
    settings = config("hard", pool="memory", reembed=True)
    memory = init_memory(settings, BATCH, one_device, pairs_of(0))
    sampler = build_sampler(settings, BATCH, one_device)
    with pytest.raises(ValueError, match=r"reembed needs Pairs\.inputs"):
        sampler(jax.random.key(0), jnp.zeros((), int), pairs_of(0).replace(memory=memory), Cosine())
    with pytest.raises(ConfigError, match=r"old embeddings for new ones; set negatives\.reembed"):
        build_sampler(config("importance", pool="memory"), BATCH, one_device)
