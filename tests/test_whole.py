"""The three implementations of all negatives, and the draw that estimates them without bias."""

import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_negatives import Cosine, make_pairs

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.negatives import Pairs, build_sampler
from clip_lite_jax.objectives import STREAMED, build_objective
from clip_lite_jax.sharding import build_mesh, put_batch

Result = tuple[jax.Array, Any]


def value_and_gradient(
    config: NegativesConfig, objective: str, pairs: Pairs, mesh: Mesh, keys: jax.Array
) -> tuple[Any, Any]:
    """``((loss, metrics), gradient of critic, images and texts)``, each mean over the keys."""
    sampler = build_sampler(config, len(pairs.valid), mesh, STREAMED[objective])
    fn = build_objective(objective)

    def loss(learned: tuple[Cosine, jax.Array, jax.Array], pairs: Pairs) -> Result:
        critic, image, text = learned
        given = pairs.replace(image=image, text=text)
        values = [fn(sampler(key, jnp.zeros((), int), given, critic).scores) for key in keys]
        return jax.tree.map(lambda *x: sum(x) / len(x), *values)

    learned = (Cosine(np.asarray(3.0, pairs.image.dtype)), pairs.image, pairs.text)
    result = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.device_get(result(learned, put_batch(mesh, pairs)))


def in_float64(pairs: Pairs) -> Pairs:
    return pairs.replace(image=pairs.image.astype(np.float64), text=pairs.text.astype(np.float64))


ONE_KEY = [jax.random.key(0)]


@pytest.mark.parametrize("objective", STREAMED)
@pytest.mark.parametrize("block", [None, 16, 4])
def test_gather_and_ring_equal_dense(objective: str, block: int | None, mesh: Mesh) -> None:
    """Value, metrics and every gradient, in chunks that do not divide the rows."""
    pairs = in_float64(make_pairs(64, groups=25, bad=(2, 40)))
    for sides in ("both", "text", "image"):
        config = NegativesConfig(name="all", sides=sides, block=block, chunk=3)
        with jax.enable_x64(True):
            expected, gathered, ringed = (
                value_and_gradient(
                    NegativesConfig(**(vars(config) | {"implementation": name})),
                    objective,
                    pairs,
                    mesh,
                    ONE_KEY,
                )
                for name in ("dense", "gather", "ring")
            )
        for other in (gathered, ringed):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                other,
                expected,
            )


@pytest.mark.parametrize("implementation", ["dense", "gather", "ring"])
def test_a_row_without_any_negative(implementation: Any, mesh: Mesh) -> None:
    pairs = make_pairs(16)
    same = pairs.group.copy()
    same[:, 1] = 7
    config = NegativesConfig(name="all", implementation=implementation)
    (loss, _), gradient = value_and_gradient(
        config, "infonce", pairs.replace(group=same), mesh, ONE_KEY
    )
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("objective", "pool", "lanes", "proposal"),
    [
        *itertools.product(("jsd", "nwj", "sigmoid"), ("block",), (1,), ("sigma", "exp")),
        *itertools.product(("jsd", "nwj", "sigmoid"), ("lane",), (4,), ("sigma", "exp")),
        ("infonce", "block", 1, "exp"),
    ],
)
def test_importance_is_unbiased(objective: str, pool: str, lanes: int, proposal: str) -> None:
    """The mean over many draws is the loss over all negatives, and so is the gradient."""
    mesh = build_mesh(jax.devices()[:1])
    pairs = make_pairs(16, groups=14, bad=(5,))
    objective_fn, draws = build_objective(objective), 20_000
    config = NegativesConfig(
        name="importance", sides="both", pool=pool, lanes=lanes, proposal=proposal
    )
    sampler = build_sampler(config, 16, mesh)
    dense = build_sampler(NegativesConfig(name="all", sides="both"), 16, mesh)

    def loss(learned: Any, key: jax.Array, chosen: Any) -> jax.Array:
        critic, image, text = learned
        given = pairs.replace(image=image, text=text)
        return objective_fn(chosen(key, jnp.zeros((), int), given, critic).scores)[0]

    learned = (Cosine(jnp.asarray(3.0)), pairs.image, pairs.text)
    keys = jax.random.split(jax.random.key(1), draws)

    def one(key: jax.Array) -> jax.Array:
        value, gradient = jax.value_and_grad(loss)(learned, key, sampler)
        return jnp.concatenate([value[None], *map(jnp.ravel, jax.tree.leaves(gradient))])

    samples = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    value, gradient = jax.value_and_grad(loss)(learned, keys[0], dense)
    expected = np.concatenate([value[None], *map(np.ravel, jax.tree.leaves(gradient))])
    if objective == "infonce":  # exp(T) / q is the sum over all, whichever is drawn
        np.testing.assert_allclose(samples[:, 0], value, rtol=1e-5)
    error = samples.std(0) / np.sqrt(draws)
    # A mean over the negatives of a lane is a ratio of sums, off by the square of its spread.
    slack = 0.01 * np.abs(expected).max() if pool == "lane" and objective != "sigmoid" else 1e-6
    assert np.all(np.abs(samples.mean(0) - expected) <= 4.5 * error + slack)


def test_importance_weights_are_those_of_the_pool() -> None:
    """With one candidate left in the pool the weight says so, and with none nothing is valid."""
    pairs = make_pairs(4)
    group = pairs.group.copy()
    group[:3, 1] = 9  # rows 0 to 2 are negatives of row 3 only
    config = NegativesConfig(name="importance", pool="block")
    sampler = build_sampler(config, 4, build_mesh(jax.devices()[:1]))
    drawn = sampler(
        jax.random.key(0), jnp.zeros((), int), pairs.replace(group=group), Cosine(jnp.asarray(3.0))
    )
    np.testing.assert_array_equal(drawn.index[0, :3, 0], 3)
    np.testing.assert_allclose(drawn.scores.log_weight[0, :3], 0, atol=1e-6)
    np.testing.assert_array_equal(drawn.scores.stands_for[0], [1, 1, 1, 3])


@flax.struct.dataclass
class Ratio:
    """scale · log r + shift, r the density ratio of Gaussian pairs with correlation .8."""

    scale: Any
    shift: Any

    def pairs(self, image: jax.Array, text: jax.Array) -> jax.Array:
        joint = (text - 0.8 * image) ** 2 / (1 - 0.8**2)
        log_ratio = 0.5 * jnp.sum(text**2 - joint - np.log(1 - 0.8**2), axis=-1)
        return self.scale * log_ratio + self.shift

    def matrix(self, image: jax.Array, text: jax.Array) -> jax.Array:
        return self.pairs(image[..., :, None, :], text[..., None, :, :])


def slope_at_the_log_ratio(negatives: NegativesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean over many batches of the gradient of scale and shift at T = log r, and its error."""
    batch, dims, batches = 32, 2, 4000
    sampler = build_sampler(negatives, batch, build_mesh(jax.devices()[:1]))
    objective = build_objective("jsd")
    rows = jnp.arange(batch, dtype=jnp.int32)

    def one(key: jax.Array) -> jax.Array:
        data_key, key = jax.random.split(key)
        image, noise = jax.random.normal(data_key, (2, batch, dims))
        text = 0.8 * image + jnp.sqrt(1 - 0.8**2) * noise
        pairs = Pairs(image, text, rows[:, None], jnp.ones(batch, bool))

        def loss(critic: Ratio) -> jax.Array:
            return objective(sampler(key, jnp.zeros((), int), pairs, critic).scores)[0]

        gradient = jax.grad(loss)(Ratio(jnp.ones(()), jnp.zeros(())))
        return jnp.stack([gradient.scale, gradient.shift])

    keys = jax.random.split(jax.random.key(0), batches)
    slopes = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    return slopes.mean(0), slopes.std(0) / np.sqrt(batches)


@pytest.mark.parametrize("proposal", ["sigma", "exp"])
def test_the_optimum_of_importance_is_log_r(proposal: str) -> None:
    for pool in ("block", "lane"):
        config = NegativesConfig(name="importance", pool=pool, proposal=proposal, lanes=2)
        slope, error = slope_at_the_log_ratio(config)
        assert np.all(np.abs(slope) < 4 * error)


def test_the_optimum_of_hard_is_not() -> None:
    slope, error = slope_at_the_log_ratio(NegativesConfig(name="hard", pool="block"))
    assert slope[1] > 20 * error[1]  # T would have to be lower
