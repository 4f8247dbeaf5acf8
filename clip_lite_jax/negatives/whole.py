"""All other rows of the block as negatives, as CLIP and SigLIP take them: three implementations.

``dense`` keeps every score and is the oracle of the other two, which sum the negatives up for each
pair.  ``gather`` collects the embeddings of the block on every device.  ``ring`` passes them round
the devices in chunks, and its backward pass goes round once more instead of keeping scores, so that
memory is linear in the batch.  Source of the ring: SigLIP (arXiv 2303.15343), section 3.3.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives.layout import (
    Layout,
    Ring,
    from_lanes,
    in_chunks,
    per_shard,
    ring_of,
    to_lanes,
)
from clip_lite_jax.negatives.pairs import (
    IMAGE,
    TEXT,
    Critic,
    Drawn,
    Pairs,
    Rows,
    Sampler,
    anchors_of,
    candidates_of,
    every_pair,
    score_matrix,
    sides_of,
)
from clip_lite_jax.objectives import Bound, RowScores, Scores, Sums, sum_negatives
from clip_lite_jax.sharding import BATCH_AXES, batch_shards, batch_spec


def build_all(
    config: NegativesConfig, batch: int, mesh: Mesh, bound: Bound | None = None
) -> Sampler:
    """All other rows of the block; `bound` is needed by the implementations that sum up.

    Raises:
      ConfigError: an objective that needs all scores at once, or sizes that do not divide.
    """
    ring = ring_of(config, batch, batch_shards(mesh))
    if config.implementation == "dense":
        return _dense(config, batch)
    if bound is None:
        raise ConfigError(
            f"negatives.implementation={config.implementation!r}: this objective needs all scores "
            "at once; set it to dense"
        )
    if config.implementation == "gather":
        summed = partial(_gathered, ring, bound)
    else:
        summed = partial(_ringed, ring, bound, config.chunk)

    def local(critic: Critic, images: Rows, texts: Rows, own: Array) -> tuple[Sums, Sums]:
        return from_lanes(summed(critic, *ring.split((images, texts, own))))

    rows, whole = batch_spec(), PartitionSpec()
    by_device = per_shard(local, mesh, (whole, rows, rows, rows))

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        positive = critic.pairs(pairs.image, pairs.text)
        images, texts = anchors_of(pairs, TEXT), candidates_of(pairs, TEXT)
        by_side = by_device(critic, images, texts, lax.stop_gradient(positive))
        chosen = [by_side[side] for side in sides_of(config.sides)]
        sums = jax.tree.map(lambda *x: jnp.stack(x), *chosen)
        slots = float(sums.count.size * (config.block or batch))  # may not fit into int32
        scores = RowScores(
            positive=positive,
            sums=sums,
            share_valid=jnp.sum(sums.count) / slots,
            pair_valid=pairs.valid,
            bound=bound.name,
        )
        return Drawn(scores, None)

    return sample


def _dense(config: NegativesConfig, batch: int) -> Sampler:
    layout = Layout(batch, config.block or batch, lanes=1)
    sides = sides_of(config.sides)

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        del key, step
        images = to_lanes(anchors_of(pairs, TEXT), layout)
        texts = to_lanes(candidates_of(pairs, TEXT), layout)
        matrix = critic.matrix(images.embedding, texts.embedding)  # [blocks, block, block]
        by_side = (matrix, jnp.swapaxes(matrix, -1, -2))
        negative = jnp.stack([from_lanes(by_side[side]) for side in sides])  # [S, B, block]
        valid = from_lanes(every_pair(images, texts))
        index = from_lanes(jnp.broadcast_to(images.index[:, None], matrix.shape))
        scores = Scores(
            positive=jnp.diagonal(matrix, axis1=-2, axis2=-1).reshape(-1),
            negative=negative,
            valid=jnp.broadcast_to(valid, negative.shape),
            log_weight=jnp.zeros_like(negative),
            positive_valid=pairs.valid,
        )
        return Drawn(scores, jnp.broadcast_to(index, negative.shape))

    return sample


# --- Sums over the negatives of each pair ---------------------------------------------------------


def _no_sums(bound: Bound, like: Array) -> Sums:
    zero = jnp.zeros_like(like)
    start = zero - jnp.inf if bound.reduction == "logsumexp" else zero
    return Sums(start, zero, zero, zero, zero)


def _add(bound: Bound, one: Sums, other: Sums) -> Sums:
    total = jax.tree.map(jnp.add, one, other)
    if bound.reduction == "logsumexp":
        total = replace(total, reduced=jnp.logaddexp(one.reduced, other.reduced))
    return total


def _gathered(
    ring: Ring, bound: Bound, critic: Critic, images: Rows, texts: Rows, own: Array
) -> tuple[Sums, Sums]:
    """On one device: its rows against all rows of the block, gathered."""

    def gather(x: Array) -> Array:  # [blocks, rows, ...] -> [blocks, block, ...]
        if ring.spread == 1:
            return x
        return lax.all_gather(x, BATCH_AXES, axis=1, axis_index_groups=ring.peers, tiled=True)

    def one_side(side: int) -> Sums:
        anchors, candidates = (images, texts) if side == TEXT else (texts, images)
        everyone = jax.tree.map(gather, candidates)
        scores = score_matrix(critic, side, anchors.embedding, everyone.embedding)
        return sum_negatives(bound, scores, every_pair(anchors, everyone), own)

    return one_side(TEXT), one_side(IMAGE)


# --- The ring -------------------------------------------------------------------------------------


@flax.struct.dataclass
class _Travellers:
    """Texts on their way round the ring ``[blocks, M, ...]``, with what is added on the way."""

    rows: Rows
    own: Array  # T of the pair
    sums: Any  # forward: `Sums` of the image side
    reduced: Any  # backward: what they were reduced to,
    pull: Any  # the gradient that arrives for it,
    gradient: Any  # and the gradient of the embedding


def _ringed(
    ring: Ring, bound: Bound, chunk: int, critic: Critic, images: Rows, texts: Rows, own: Array
) -> tuple[Sums, Sums]:
    """On one device: its rows against those of every device of the ring, `chunk` at a time."""
    frozen = replace(images, embedding=None), replace(texts, embedding=None), own
    return _ring_sums(ring, bound, chunk, critic, images.embedding, texts.embedding, frozen)


Frozen = tuple[Rows, Rows, Array]
"""Images and texts without their embeddings, and T of the pairs: what has no gradient."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_sums(
    ring: Ring, bound: Bound, chunk: int, critic: Critic, image: Any, text: Any, frozen: Frozen
) -> tuple[Sums, Sums]:
    """Sums for the text side and for the image side, from one pass over the scores."""
    images, texts, own = frozen
    images, texts = replace(images, embedding=image), replace(texts, embedding=text)

    def visit(sums: Sums, visiting: _Travellers) -> tuple[Sums, _Travellers]:
        def one(sums: Sums, part: _Travellers) -> tuple[Sums, Sums]:
            scores = critic.matrix(images.embedding, part.rows.embedding)
            allowed = every_pair(images, part.rows)
            turned = jnp.swapaxes(scores, -1, -2), jnp.swapaxes(allowed, -1, -2)
            columns = _add(bound, part.sums, sum_negatives(bound, *turned, part.own))
            return _add(bound, sums, sum_negatives(bound, scores, allowed, own)), columns

        parts = in_chunks(visiting, visiting.rows.valid, chunk)
        sums, columns = lax.scan(one, sums, parts)
        return sums, replace(visiting, sums=_joined(columns, visiting.rows.valid.shape[1]))

    start = _no_sums(bound, own)
    travellers = _Travellers(texts, own, start, None, None, None)
    row_sums, last = ring.travel(visit, start, travellers)
    return row_sums, ring.hop(last.sums)


def _ring_forward(
    ring: Ring, bound: Bound, chunk: int, critic: Critic, image: Any, text: Any, frozen: Frozen
) -> tuple[tuple[Sums, Sums], Any]:
    sums = _ring_sums(ring, bound, chunk, critic, image, text, frozen)
    return sums, (critic, image, text, frozen, (sums[0].reduced, sums[1].reduced))


def _ring_backward(
    ring: Ring, bound: Bound, chunk: int, kept: Any, pulls: tuple[Sums, Sums]
) -> tuple[Any, Any, Any, None]:
    """Scores every pair again, and sends the gradients of the texts home with them."""
    critic, image, text, (images, texts, own), (reduced, text_reduced) = kept
    pull = pulls[0].reduced

    def share(scores: Array, reduced: Array) -> Array:  # d reduced / d score, [..., N, M]
        terms, derivative = jax.jvp(bound.negative, (scores,), (jnp.ones_like(scores),))
        if bound.reduction == "logsumexp":
            return derivative * jnp.exp(terms - reduced[..., None])
        return derivative

    def visit(so_far: tuple[Any, Any], visiting: _Travellers) -> tuple[Any, _Travellers]:
        def one(so_far: tuple[Any, Any], part: _Travellers) -> tuple[Any, Any]:
            scores, back = jax.vjp(
                lambda c, i, t: c.matrix(i, t), critic, image, part.rows.embedding
            )
            turned = jnp.swapaxes(scores, -1, -2)
            by_text = part.pull[..., None] * share(turned, part.reduced)
            gradient = pull[..., None] * share(scores, reduced) + jnp.swapaxes(by_text, -1, -2)
            allowed = every_pair(images, part.rows)
            d_critic, d_image, d_text = back(jnp.where(allowed, gradient, 0.0))
            added = jax.tree.map(jnp.add, so_far, (d_critic, d_image))
            return added, jax.tree.map(jnp.add, part.gradient, d_text)

        parts = in_chunks(visiting, visiting.rows.valid, chunk)
        so_far, gradients = lax.scan(one, so_far, parts)
        gradients = _joined(gradients, visiting.rows.valid.shape[1])
        return so_far, replace(visiting, gradient=gradients)

    zero = jax.tree.map(jnp.zeros_like, (critic, image, text))
    travellers = _Travellers(
        replace(texts, embedding=text), own, None, text_reduced, pulls[1].reduced, zero[2]
    )
    (d_critic, d_image), last = ring.travel(visit, zero[:2], travellers)
    return d_critic, d_image, ring.hop(last.gradient), None


_ring_sums.defvjp(_ring_forward, _ring_backward)


def _joined(chunks: Any, count: int) -> Any:
    """The inverse of `in_chunks`: ``[chunks, L, size, ...] -> [L, count, ...]``."""

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :count]

    return jax.tree.map(join, chunks)
