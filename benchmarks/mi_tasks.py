"""Pairs (x, y) whose mutual information is known, in nats."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import digamma, gammaln, ndtri

DIMENSIONS = 20
"""Of x and of y on the Gaussian staircase."""

LEVELS = (2.0, 4.0, 6.0, 8.0, 10.0)
"""Mutual information of its steps."""


def correlation(information: float | Array, dimensions: int = DIMENSIONS) -> Array:
    """The correlation [] of each of `dimensions` independent Gaussian pairs that share it, in nats.

    I = -d/2 log(1 - ρ²).  Source: Poole et al. (arXiv 1905.06922), section 3.
    """
    return jnp.sqrt(-jnp.expm1(-2 * jnp.asarray(information) / dimensions))


def gaussian_pairs(key: Array, count: int, information: Array) -> tuple[Array, Array]:
    """Pairs ``[count, 20]`` of standard Gaussians, coordinate i of x correlated with that of y."""
    x, noise = jax.random.normal(key, (2, count, DIMENSIONS))
    rho = correlation(information)
    return x, rho * x + jnp.sqrt(1 - rho**2) * noise


def cubic_pairs(key: Array, count: int, information: Array) -> tuple[Array, Array]:
    """`gaussian_pairs` with y³ for y, at unit variance: as much information, harder to see."""
    x, y = gaussian_pairs(key, count, information)
    return x, y**3 / math.sqrt(15)


def normal_cubic_pairs(key: Array, count: int, information: Array) -> tuple[Array, Array]:
    """`cubic_pairs` as normal scores, fitted on 10 000 other pairs."""
    x, y = cubic_pairs(key, count, information)
    score_x, score_y = _cubic_normal_scores()
    return score_x(x), score_y(y)


def normal_scores(reference: np.ndarray) -> Callable[[Array], Array]:
    """Maps each coordinate to a standard Gaussian by its quantiles in the reference ``[N, d]``.

    A monotone map of a coordinate changes no mutual information.  Beyond the outermost of 1000
    quantiles it is constant.
    """
    share = (np.arange(1000) + 0.5) / 1000
    knots = jnp.asarray(np.quantile(reference, share, axis=0), jnp.float32)  # [1000, d]
    values = jnp.asarray(ndtri(share), jnp.float32)
    one = jax.vmap(lambda column, at: jnp.interp(column, at, values), in_axes=1, out_axes=1)
    return lambda points: one(points, knots)


def gaussian_log_ratio(x: Array, y: Array, information: Array) -> Array:
    """log r [N], r = dP/dQ, of `gaussian_pairs` ``[N, 20]``: the best critic."""
    rho = correlation(information)
    quadratic = 2 * rho * x * y - rho**2 * (x**2 + y**2)
    return information + jnp.sum(quadratic, axis=-1) / (2 * (1 - rho**2))


@functools.cache
def _cubic_normal_scores() -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    with jax.ensure_compile_time_eval():
        pairs = cubic_pairs(jax.random.key(123), 10_000, jnp.array(0.0))
        x, y = (normal_scores(np.asarray(part)) for part in pairs)
    return x, y


STAIRCASE: dict[str, Callable[[Array, int, Array], tuple[Array, Array]]] = {
    "plain": gaussian_pairs,
    "cubic": cubic_pairs,
    "cubic, normal scores": normal_cubic_pairs,
}


@dataclass(frozen=True)
class Task:
    """A distribution of the benchmark of Czyż et al. (arXiv 2306.11078), by its name there."""

    name: str
    information: float  # nats
    sample: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]  # [N, dx], [N, dy]


def multinormal(name: str, covariance: np.ndarray) -> Task:
    """Jointly Gaussian x and y, half of the coordinates each.

    I = ½ log(|Σ_x| |Σ_y| / |Σ|).
    """
    half = len(covariance) // 2
    _, whole = np.linalg.slogdet(covariance)
    parts = [np.linalg.slogdet(part)[1] for part in _diagonal_blocks(covariance)]
    root = np.linalg.cholesky(covariance)

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        points = rng.normal(size=(count, 2 * half)) @ root.T
        return points[:, :half], points[:, half:]

    return Task(name, float(sum(parts) - whole) / 2, sample)


def student(name: str, dimensions: int, freedom: int) -> Task:
    """Multivariate t with identity dispersion: uncorrelated, tied by their common scale.

    I = h(x) + h(y) - h(x, y) with h the entropy of the multivariate t.  Source: Arellano-Valle,
    Contreras-Reyes and Genton (2013), eq. 7.
    """

    def entropy(k: int) -> float:
        half = (freedom + k) / 2
        log_density = gammaln(half) - gammaln(freedom / 2) - k / 2 * math.log(freedom * math.pi)
        return float(half * (digamma(half) - digamma(freedom / 2)) - log_density)

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        points = rng.normal(size=(count, 2 * dimensions))
        points *= np.sqrt(freedom / rng.chisquare(freedom, size=(count, 1)))
        return points[:, :dimensions], points[:, dimensions:]

    return Task(name, 2 * entropy(dimensions) - entropy(2 * dimensions), sample)


def additive_noise(name: str, width: float) -> Task:
    """x uniform on [0, 1], y = x + uniform on [-width, width], width ≤ ½.

    I = width - log(2 width).
    """

    def sample(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.uniform(size=(count, 1))
        return x, x + rng.uniform(-width, width, size=(count, 1))

    return Task(name, width - math.log(2 * width), sample)


def dense_covariance(dimensions: int, off_diagonal: float) -> np.ndarray:
    """Covariance ``[2d, 2d]`` with the same correlation everywhere."""
    size = 2 * dimensions
    return np.full((size, size), off_diagonal) + (1 - off_diagonal) * np.eye(size)


def two_pair_covariance(dimensions: int, strength: float = 2.0) -> np.ndarray:
    """Covariance ``[2d, 2d]``: x_i and y_i of i < 2 share a signal of `strength`, noise is 1."""
    rho = strength**2 / (1 + strength**2)
    covariance = np.eye(2 * dimensions)
    for i in range(2):
        covariance[i, dimensions + i] = covariance[dimensions + i, i] = rho
    return covariance


def _diagonal_blocks(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = len(covariance) // 2
    return covariance[:half, :half], covariance[half:, half:]


TASKS = (
    multinormal("1v1-normal-0.75", dense_covariance(1, 0.75)),
    additive_noise("1v1-additive-0.1", 0.1),
    student("student-identity-1-1-1", dimensions=1, freedom=1),
    student("student-identity-5-5-2", dimensions=5, freedom=2),
    multinormal("multinormal-dense-5-5-0.5", dense_covariance(5, 0.5)),
    multinormal("multinormal-sparse-5-5-2-2.0", two_pair_covariance(5)),
)
