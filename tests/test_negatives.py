"""Which negative each pair gets: derangements, masks, distribution, and the traffic."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives import NEGATIVES, Drawn, Pairs, build_sampler, layout_of
from clip_lite_jax.negatives.chosen import _Best, _gumbel, _largest
from clip_lite_jax.objectives import STREAMED, build_objective
from clip_lite_jax.sharding import build_mesh, put_batch

WIDTH = 8
OF_THE_BATCH = sorted(NEGATIVES.keys() - {"queue", "memory"})  # those are in test_memory.py


@flax.struct.dataclass
class Cosine:
    """The simplest critic."""

    scale: Any = 3.0

    def pairs(self, image: jax.Array, text: jax.Array) -> jax.Array:
        return self.scale * jnp.sum(image * text, -1)

    def matrix(self, image: jax.Array, text: jax.Array) -> jax.Array:
        return self.scale * jnp.einsum("...nd,...md->...nm", image, text)


def make_pairs(batch: int, groups: int | None = None, bad: tuple[int, ...] = ()) -> Pairs:
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(2, batch, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
    own = np.arange(batch, dtype=np.int32)
    group = np.stack([own if groups is None else own % groups, own + batch], 1).astype(np.int32)
    valid = ~np.isin(own, bad)
    return Pairs(image, text, group, valid)


@functools.cache  # one compilation for all tests that ask for the same
def sampler_fn(
    config: NegativesConfig, batch: int, mesh: Mesh
) -> Callable[[Pairs, int, int], Drawn]:
    sampler = build_sampler(config, batch, mesh)

    def sample(pairs: Pairs, seed: int, step: int) -> Drawn:
        return sampler(jax.random.key(seed), jnp.asarray(step), pairs, Cosine())

    return jax.jit(sample)


def draw(config: NegativesConfig, pairs: Pairs, mesh: Mesh, seed: int = 0, step: int = 0) -> Drawn:
    batch = len(pairs.valid)
    return jax.device_get(sampler_fn(config, batch, mesh)(put_batch(mesh, pairs), seed, step))


@pytest.mark.parametrize("name", ["roll", "shuffle"])
@pytest.mark.parametrize("sides", ["text", "image", "both"])
def test_derangement_of_the_whole_batch(name: str, sides: str, mesh: Mesh) -> None:
    drawn = draw(NegativesConfig(name=name, sides=sides, lanes=8), make_pairs(64), mesh)
    assert drawn.index.shape == (2 if sides == "both" else 1, 64, 1)
    for side in drawn.index[..., 0]:
        assert sorted(side) == list(range(64))  # a permutation ...
        assert not np.any(side == np.arange(64))  # ... that leaves no pair its own partner
    assert drawn.scores.valid.all()


@pytest.mark.parametrize("name", OF_THE_BATCH)
@pytest.mark.parametrize("sides", ["text", "image", "both"])
def test_scores_are_those_of_the_drawn_rows(name: str, sides: str, mesh: Mesh) -> None:
    pairs = make_pairs(64)
    drawn = draw(NegativesConfig(name=name, sides=sides, lanes=8), pairs, mesh)
    scores = np.asarray(Cosine().matrix(pairs.image, pairs.text))
    np.testing.assert_allclose(drawn.scores.positive, np.diagonal(scores), rtol=1e-5, atol=1e-6)
    by_side = {"text": [scores], "image": [scores.T], "both": [scores, scores.T]}[sides]
    for side, expected in enumerate(by_side):
        rows = np.take_along_axis(expected, drawn.index[side], 1)
        np.testing.assert_allclose(drawn.scores.negative[side], rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_draws_do_not_depend_on_the_number_of_devices(name: str) -> None:
    config = NegativesConfig(name=name, sides="both", lanes=8, block=64)
    pairs = make_pairs(128, groups=50, bad=(3, 77))
    draws = [draw(config, pairs, build_mesh(jax.devices()[:n]), step=5) for n in (1, 2, 4, 8)]
    for other in draws[1:]:
        np.testing.assert_array_equal(draws[0].index, other.index)
        np.testing.assert_array_equal(draws[0].scores.valid, other.scores.valid)


@pytest.mark.parametrize("name", ["k", "hard", "importance"])
@pytest.mark.parametrize("pool", ["lane", "block"])
def test_chunks_change_no_draw(name: str, pool: str, mesh: Mesh) -> None:
    """Nor does it matter whether they divide the pool, or how many devices share the block."""
    pairs = make_pairs(64, groups=20, bad=(3,))
    config = NegativesConfig(name=name, pool=pool, sides="both", lanes=8)
    expected = draw(replace(config, chunk=64), pairs, build_mesh(jax.devices()[:2]))
    for chunk in (3, 8):
        drawn = draw(replace(config, chunk=chunk), pairs, mesh)
        np.testing.assert_array_equal(drawn.index, expected.index)
        np.testing.assert_allclose(drawn.scores.log_weight, expected.scores.log_weight, atol=1e-5)


@pytest.mark.parametrize("name", ["k", "hard"])
@pytest.mark.parametrize("pool", ["lane", "block"])
def test_several_are_drawn_without_replacement(name: str, pool: str, mesh: Mesh) -> None:
    drawn = draw(NegativesConfig(name=name, pool=pool, k=3, lanes=8), make_pairs(128), mesh)
    assert drawn.index.shape == (1, 128, 3)
    assert all(len(set(row)) == 3 for row in drawn.index[0])
    assert drawn.scores.valid.all()


def test_nothing_is_drawn_twice_where_candidates_run_out(mesh: Mesh) -> None:
    """Of 16 rows in 3 groups a row has 10 or 11 candidates, and 12 are asked for."""
    for pool in ("lane", "block"):
        config = NegativesConfig(name="k", pool=pool, k=12, lanes=1)
        if pool == "lane" and mesh.size > 1:
            continue  # one lane lies on one device
        drawn = draw(config, make_pairs(16, groups=3), mesh)
        valid = drawn.scores.valid[0]
        np.testing.assert_array_equal(valid.sum(1), np.where(np.arange(16) % 3 == 0, 10, 11))
        for row, ok in zip(drawn.index[0], valid, strict=True):
            assert len(set(row[ok])) == ok.sum()


def test_equal_values_do_not_depend_on_the_order_of_visits() -> None:
    slots = jnp.array([[4, 2, 9, 7, 1, 3]])
    value = jnp.array([[[1.0, 5.0, 5.0, 0.0, 5.0, 2.0]]])
    weight = 10 * slots[:, None].astype(float)
    for k, expected in ((1, [1]), (4, [1, 2, 9, 3])):
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 2, 0, 1, 4]):
            none = jnp.full((1, 1, k), -jnp.inf)
            best = _Best(none, jnp.zeros((1, 1, k), int), none, none[..., 0], none[..., 0])
            for part in (order[:3], order[3:]):
                best = replace(
                    best,
                    **dict(
                        zip(
                            ("value", "slot", "log_weight"),
                            _largest(best, value[..., part], slots[..., part], weight[..., part]),
                            strict=True,
                        )
                    ),
                )
            np.testing.assert_array_equal(best.slot[0, 0], expected)
            np.testing.assert_array_equal(best.log_weight[0, 0], 10 * np.array(expected))


def test_a_pool_with_too_few_candidates_says_so(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match=r"k=9: the pool 'lane' of a pair has 8 candidates"):
        build_sampler(NegativesConfig(name="k", k=9, lanes=8), 64, mesh)
    pairs = make_pairs(64, groups=2)
    drawn = draw(NegativesConfig(name="k", k=6, lanes=8), pairs, mesh)
    assert drawn.scores.valid.any()
    assert not drawn.scores.valid.all()
    clash = drawn.index[0] % 2 == np.arange(64)[:, None] % 2
    assert not np.any(drawn.scores.valid[0] & clash)


@pytest.mark.parametrize("name", ["roll", "shuffle", "hard"])
def test_draws_stay_in_their_block_and_change_with_the_key(name: str, mesh: Mesh) -> None:
    config = NegativesConfig(name=name, lanes=4, block=32)
    drawn = draw(config, make_pairs(128), mesh)
    assert np.all(drawn.index[0, :, 0] // 32 == np.arange(128) // 32)
    if name == "roll":
        return  # nothing is random in it
    again = draw(config, make_pairs(128), mesh)
    other = draw(config, make_pairs(128), mesh, seed=1)
    np.testing.assert_array_equal(drawn.index, again.index)
    assert np.mean(drawn.index == other.index) < 0.5


def test_sides_are_drawn_apart(mesh: Mesh) -> None:
    drawn = draw(NegativesConfig(name="shuffle", sides="both"), make_pairs(64), mesh)
    assert np.mean(drawn.index[0] == drawn.index[1]) < 0.5


@pytest.mark.parametrize(("lanes", "block"), [(1, 8), (2, 8), (4, 16)])
def test_shuffle_is_uniform_as_documented(lanes: int, block: int) -> None:
    mesh = build_mesh(jax.devices()[:1])
    batch, draws = block, 4000
    sample = build_sampler(NegativesConfig(name="shuffle", lanes=lanes), batch, mesh)
    pairs = make_pairs(batch)

    def index(key: jax.Array) -> jax.Array:
        return sample(key, jnp.zeros((), int), pairs, Cosine()).index[0, :, 0]

    drawn = jax.jit(jax.vmap(index))(jax.random.split(jax.random.key(0), draws))
    counts = np.zeros((batch, batch))
    np.add.at(counts, (np.tile(np.arange(batch), draws), np.asarray(drawn).ravel()), 1)
    lane = np.arange(batch) // (batch // lanes)
    rows = batch // lanes
    same = lane[:, None] == lane
    expected = np.where(same, 1 / (lanes * (rows - 1)), 1 / (lanes * rows))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(expected.sum(1), 1)
    spread = np.sqrt(expected / draws)
    assert np.all(np.abs(counts / draws - expected) <= 5 * spread)


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize("pool", ["lane", "block"])
def test_hard_draws_in_proportion_to_exp_beta_score(side: str, pool: str) -> None:
    mesh = build_mesh(jax.devices()[:1])
    batch, draws, beta = 16, 6000, 1.5
    config = NegativesConfig(name="hard", sides=side, lanes=1, beta=beta, pool=pool)
    pairs = make_pairs(batch, groups=12, bad=(5,))
    sample = build_sampler(config, batch, mesh)

    def index(key: jax.Array) -> jax.Array:
        return sample(key, jnp.zeros((), int), pairs, Cosine()).index[0, :, 0]

    drawn = np.asarray(jax.jit(jax.vmap(index))(jax.random.split(jax.random.key(0), draws)))
    scores = np.asarray(Cosine().matrix(pairs.image, pairs.text), np.float64)
    scores = scores if side == "text" else scores.T
    own = np.arange(batch)
    allowed = (own[:, None] % 12 != own % 12) & pairs.valid & pairs.valid[:, None]
    weight = np.where(allowed, np.exp(beta * scores), 0)
    for row in np.flatnonzero(pairs.valid):
        expected = weight[row] / weight[row].sum()
        counts = np.bincount(drawn[:, row], minlength=batch) / draws
        assert np.all(counts[expected == 0] == 0)
        assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected / draws) + 1e-9)


def test_the_noise_of_a_draw_is_gumbel_noise() -> None:
    """Over anchors, over candidates and over steps; neighbours have nothing to do with each other.

    Euler's constant is its mean, pi² / 6 its variance.
    """
    rows = jnp.arange(512)[None]
    noise = np.stack([_gumbel(jax.random.key(k), rows, rows, jnp.float32)[0] for k in range(4)])
    assert len(np.unique(noise)) > 0.9 * noise.size * (1 - noise.size / 2**24)
    for axes in ((0, 1), (0, 2), (1, 2)):
        count = np.prod([noise.shape[axis] for axis in axes])
        means = noise.mean(axes)
        assert np.all(np.abs(means - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * count))
    np.testing.assert_allclose(noise.var(), np.pi**2 / 6, rtol=0.02)
    for axis in range(3):
        near = np.corrcoef(noise.ravel(), np.roll(noise, 1, axis).ravel())[0, 1]
        assert abs(near) < 5 / np.sqrt(noise.size)
    ordered = np.sort(np.exp(-np.exp(-noise.ravel())))  # uniform
    assert np.max(np.abs(ordered - np.linspace(0, 1, noise.size))) < 2 / np.sqrt(noise.size)


def test_hard_beta_ramps_from_zero() -> None:
    mesh = build_mesh(jax.devices()[:1])
    pairs = make_pairs(64)
    ramped = NegativesConfig(name="hard", lanes=1, beta=50.0, beta_warmup_steps=1000)
    early = draw(ramped, pairs, mesh, step=0).scores.negative.mean()
    late = draw(ramped, pairs, mesh, step=1000).scores.negative.mean()
    hardest = draw(NegativesConfig(name="hard", lanes=1, beta=50.0), pairs, mesh)
    assert abs(early) < 0.4 < late
    np.testing.assert_allclose(late, hardest.scores.negative.mean(), rtol=1e-6)


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_group_members_and_bad_examples_are_no_negatives(name: str, mesh: Mesh) -> None:
    pairs = make_pairs(64, groups=5, bad=(0, 9, 33))
    drawn = draw(NegativesConfig(name=name, sides="both"), pairs, mesh)
    rows = np.arange(64)[None, :, None]
    clash = drawn.index % 5 == rows % 5
    touched = ~pairs.valid[drawn.index] | ~pairs.valid[rows]
    np.testing.assert_array_equal(drawn.scores.valid, ~(clash | touched) & (drawn.index != rows))
    np.testing.assert_array_equal(drawn.scores.positive_valid, pairs.valid)


def test_equal_captions_are_no_negatives() -> None:
    pairs = make_pairs(16)
    same = pairs.group.copy()
    same[:, 1] = 7  # other pictures, one caption for all
    drawn = draw(NegativesConfig(name="roll"), pairs.replace(group=same), build_mesh())
    assert not drawn.scores.valid.any()


def test_all_holds_every_other_row(mesh: Mesh) -> None:
    drawn = draw(NegativesConfig(name="all", sides="both"), make_pairs(16), mesh)
    assert drawn.scores.negative.shape == (2, 16, 16)
    np.testing.assert_array_equal(drawn.scores.valid[0], ~np.eye(16, dtype=bool))


@pytest.mark.parametrize(
    ("batch", "shards", "changes", "message"),
    [
        (60, 1, {"block": 32}, "not a multiple of negatives.block=32"),
        (48, 1, {"lanes": 8}, "multiple of lanes² = 64"),
        (4, 1, {"lanes": 2, "block": 2}, "multiple of lanes² = 4"),
        (64, 8, {"lanes": 4}, "do not spread evenly over 8 devices"),
        (96, 6, {"lanes": 4}, "do not spread evenly over 6 devices"),
    ],
)
def test_sizes_that_do_not_divide(
    batch: int, shards: int, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(NegativesConfig(**changes), batch, shards)


@pytest.mark.parametrize(("batch", "lanes"), [(64, 8), (96, 4), (20, 2), (50, 1), (2, 1), (512, 8)])
def test_lanes_follow_from_the_batch(batch: int, lanes: int) -> None:
    assert layout_of(NegativesConfig(), batch, 1).lanes == lanes


def test_names_and_sizes_are_checked() -> None:
    mesh = build_mesh()
    with pytest.raises(ConfigError, match="all, hard, importance, k, memory, queue, roll, shuffle"):
        build_sampler(NegativesConfig(name="shufle"), 64, mesh)
    with pytest.raises(ConfigError, match="does not divide over 8 devices"):
        build_sampler(NegativesConfig(name="roll"), 60, mesh)
    with pytest.raises(ConfigError, match="block=24 does not spread evenly"):
        build_sampler(NegativesConfig(name="roll", block=24), 144, mesh)
    with pytest.raises(ConfigError, match="draws one per side; for more name k or hard"):
        build_sampler(NegativesConfig(name="importance", k=2), 64, mesh)
    with pytest.raises(ConfigError, match="needs all scores at once; set it to dense"):
        build_sampler(NegativesConfig(name="all", implementation="ring"), 64, mesh)


# --- What crosses the network, and what is held: read from the compiled program ------------------

COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("
)
COLUMNS = 4  # of what travels beside an embedding: two of group, validity and index


def compiled_gradient(config: NegativesConfig, batch: int, devices: int) -> Any:
    """The compiled gradient of a loss over the embeddings of a batch."""
    mesh = build_mesh(jax.devices()[:devices])
    objective = "infonce" if config.name == "all" else "jsd"
    sampler = build_sampler(config, batch, mesh, STREAMED[objective])
    fn = build_objective(objective)

    def loss(embeddings: tuple[jax.Array, jax.Array], pairs: Pairs) -> jax.Array:
        image, text = embeddings
        given = pairs.replace(image=image, text=text)
        return fn(sampler(jax.random.key(0), jnp.zeros((), int), given, Cosine()).scores)[0]

    pairs = put_batch(mesh, make_pairs(batch))
    return jax.jit(jax.grad(loss)).lower((pairs.image, pairs.text), pairs).compile()


@functools.cache
def collectives(config: NegativesConfig, batch: int, devices: int) -> list[tuple[str, str]]:
    """(kind, result shape) of the collectives of a loss and its gradient."""
    program = compiled_gradient(config, batch, devices).as_text()
    return [(kind, shape) for shape, kind in COLLECTIVE.findall(program)]


def elements(shape: str) -> int:
    """Elements of all arrays in an HLO shape, tuples included."""
    sizes = re.findall(r"\w+\[([\d,]*)\]", shape)
    return sum(int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes)


@pytest.mark.parametrize("name", ["roll", "shuffle", "hard", "importance", "k"])
@pytest.mark.parametrize("devices", [2, 8])
def test_at_most_its_own_embeddings_leave_a_device(name: str, devices: int) -> None:
    """Per tensor and direction, however many devices there are; and nothing is gathered."""
    batch = 64 * devices
    found = collectives(NegativesConfig(name=name, sides="both", lanes=8), batch, devices)
    exchanges = [(kind, elements(shape)) for kind, shape in found if kind != "all-reduce"]
    assert {kind for kind, _ in exchanges} <= {"all-to-all", "collective-permute"}
    local = batch // devices * WIDTH
    assert all(size <= local for _, size in exchanges)
    # Two sides: an embedding there, its gradient back, and one array of integers beside it.
    assert len(exchanges) <= 2 * (2 + 1)
    large = [size for _, size in exchanges if size > batch // devices * COLUMNS]
    assert len(large) <= 4
    # Means over the batch are numbers; gradients of parameters would come on top.
    assert all(elements(shape) <= 16 for kind, shape in found if kind == "all-reduce")


def test_roll_sends_one_row_per_boundary() -> None:
    found = collectives(NegativesConfig(name="roll", sides="both"), 512, 8)
    sent = {elements(shape) for kind, shape in found if kind != "all-reduce"}
    assert max(sent) == WIDTH


@pytest.mark.parametrize(
    "config",
    [
        NegativesConfig(name="shuffle", sides="both"),
        NegativesConfig(name="hard", sides="both", lanes=8, block=512),
        NegativesConfig(name="importance", sides="both", pool="block", chunk=32),
        NegativesConfig(name="all", sides="both", implementation="ring", chunk=32),
    ],
    ids=["shuffle", "hard", "importance, block", "all, ring"],
)
def test_memory_is_linear_in_the_batch(config: NegativesConfig) -> None:
    used = [
        compiled_gradient(config, batch, 8).memory_analysis().temp_size_in_bytes
        for batch in (2048, 4096, 8192)
    ]
    assert used[2] - used[1] < 2.2 * (used[1] - used[0])
    assert used[2] < 2.2 * used[1]


def test_dense_memory_is_not() -> None:
    config = NegativesConfig(name="all", sides="both")
    used = [
        compiled_gradient(config, batch, 8).memory_analysis().temp_size_in_bytes
        for batch in (2048, 4096)
    ]
    assert used[1] > 3 * used[0]
