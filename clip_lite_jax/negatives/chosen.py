"""Negatives that are chosen: K draws from a pool of candidates, by their scores.

Candidates are scored without gradient, `chunk` at a time (Gumbel-max), and only the drawn ones are
scored again with gradient: no array of batch × batch exists.  The noise of a candidate is a
function of the step's key, the anchor's row and the candidate's row, so that the draw depends
neither on `chunk` nor on the number of devices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from clip_lite_jax.config import NegativesConfig
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.negatives.layout import (
    Ring,
    deal,
    from_lanes,
    in_chunks,
    layout_of,
    per_shard,
    ring_of,
    take_rows,
    to_lanes,
)
from clip_lite_jax.negatives.memory import memory_layout
from clip_lite_jax.negatives.pairs import (
    TEXT,
    Critic,
    Drawn,
    EmbeddingCritic,
    Pairs,
    Rows,
    Sampler,
    anchors_of,
    candidates_of,
    drawn_scores,
    every_pair,
    remembered_of,
    score_matrix,
    sides_of,
)
from clip_lite_jax.objectives import Scores
from clip_lite_jax.sharding import batch_shards, batch_spec

Weighting = Callable[[Array, Array], Array]
"""``(scores, step []) -> log weights``: a candidate is drawn in proportion to its weight."""


def build_k(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """`k` negatives per pair, drawn uniformly and without replacement from its pool."""
    return _build(config, batch, mesh, lambda scores, step: jnp.zeros_like(scores))


def build_hard(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """`k` negatives per pair, drawn with probability proportional to exp(beta · T).

    The optimum is *not* log r: with the whole batch as pool T = (log r + log Z(x)) / (1 + beta).
    Read no information off such scores without a bound that holds for any critic.
    """

    def weighting(scores: Array, step: Array) -> Array:
        ramp = jnp.minimum(1.0, (step + 1) / (config.beta_warmup_steps + 1))
        return config.beta * ramp.astype(scores.dtype) * scores

    return _build(config, batch, mesh, weighting)


def build_importance(config: NegativesConfig, batch: int, mesh: Mesh) -> Sampler:
    """One negative per pair, drawn by its score and weighted so that the choice is unbiased.

    A candidate j of pair i is drawn with probability q_j = w_j / Z, where w is sigmoid(T + b) or
    exp(T) and Z the sum over the pool, and stands for all of them with weight 1 / q_j.  Loss and
    gradient of objectives that average or sum over negatives are then, in expectation, those over
    all rows of the block, and so is the optimum.  With w = sigmoid(T) the gradient of sp(T) has the
    same size whichever candidate is drawn: sigmoid(T) ∇T / q = Z ∇T.

    Of a pool of 1 / lanes of the block every candidate counts lanes times.  A mean over negatives
    is then the ratio of two unbiased sums; a sum over negatives is unbiased as it is.

    With w = exp(T), exp(T) / q is Z whichever candidate is drawn: `infonce` has then its exact
    value from one negative, and an unbiased gradient.

    With `reembed` the pool is the lane and its memory, q is that of the old scores, and what is
    drawn is embedded anew: sums over negatives are, in expectation, those over a memory that was
    embedded anew as a whole.  The logarithm in `infonce` is then of an estimate, which is exact
    only as far as the old scores are.

    Source: importance sampling of the gradient, as for softmax in Bengio and Senécal (2003).
    """
    if config.k != 1:
        raise ConfigError(
            f"negatives.k={config.k}: importance draws one per side; for more name k or hard"
        )
    if config.pool == "memory" and not config.reembed:
        raise ConfigError(
            "negatives.pool='memory': importance would take old embeddings for new ones; set "
            "negatives.reembed=true, the pool to lane or block, or name hard"
        )

    def weighting(scores: Array, step: Array) -> Array:
        del step
        if config.proposal == "exp":
            return scores
        return jax.nn.log_sigmoid(scores + config.proposal_bias)

    return _build(config, batch, mesh, weighting, unbiased=True)


def _build(
    config: NegativesConfig, batch: int, mesh: Mesh, weighting: Weighting, unbiased: bool = False
) -> Sampler:
    pool = _POOLS[config.pool](config, batch, mesh, weighting)

    def sample(key: Array, step: Array, pairs: Pairs, critic: Critic) -> Drawn:
        draws = [
            pool.draw(jax.random.fold_in(key, side), step, pairs, critic, side)
            for side in sides_of(config.sides)
        ]
        rows = [draw.rows for draw in draws]
        anew = _embedded_anew(critic, config.sides, rows) if config.reembed else rows
        drawn = drawn_scores(pairs, critic, config.sides, anew)
        if not unbiased:
            return drawn
        log_z = jnp.stack([draw.log_z for draw in draws])[..., None]  # [S, B, 1]
        count = jnp.stack([draw.count for draw in draws])  # [S, B]
        log_q = jnp.stack([draw.log_weight for draw in draws]) - log_z
        log_count = jnp.log(jnp.maximum(count, 1))[..., None]
        scores = drawn.scores
        assert isinstance(scores, Scores)
        weighted = replace(scores, log_weight=-log_q - log_count, stands_for=pool.share * count)
        return replace(drawn, scores=weighted)

    return sample


def _embedded_anew(critic: Critic, sides: str, drawn: list[Rows]) -> list[Rows]:
    """Drawn rows ``[B, K, ...]`` of each side with embeddings by today's parameters."""
    embedder = cast(EmbeddingCritic, critic)

    def anew(side: int, rows: Rows) -> Rows:
        if rows.inputs is None:
            raise ValueError("negatives.reembed needs Pairs.inputs, and a memory that keeps them")
        inputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows.inputs)
        embed = embedder.embed_text if side == TEXT else embedder.embed_image
        shape = rows.valid.shape  # [B, K]
        embedding = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), embed(inputs))
        return replace(rows, embedding=embedding)

    return [anew(side, rows) for side, rows in zip(sides_of(sides), drawn, strict=True)]


# --- Pools ----------------------------------------------------------------------------------------


@flax.struct.dataclass
class _Draw:
    rows: Rows  # [B, K, ...] drawn candidates; not valid where the pool had no more
    log_weight: Array  # [B, K] of the drawn ones
    log_z: Array  # [B] log of the sum of weights over the pool
    count: Array  # [B] candidates in the pool


def _as_draw(best: "_Best", rows: Rows) -> _Draw:
    rows = replace(rows, valid=rows.valid & (best.value > -jnp.inf))
    return from_lanes(_Draw(rows, best.log_weight, best.log_z, best.count))


@dataclass(frozen=True)
class _Pool:
    draw: Callable[[Array, Array, Pairs, Critic, int], _Draw]
    """``(key, step, pairs, critic, side) -> _Draw``"""
    share: int
    """Rows of the block for each one in a pool; a pool with memory stands for itself."""


def _check_k(config: NegativesConfig, candidates: int) -> None:
    if config.k > candidates:
        raise ConfigError(
            f"negatives.k={config.k}: the pool {config.pool!r} of a pair has {candidates} "
            "candidates; lower it, or take a larger pool"
        )


def _lane_pool(config: NegativesConfig, batch: int, mesh: Mesh, weighting: Weighting) -> _Pool:
    """The candidates of a pair are the rows that its lane was dealt: traffic as for `shuffle`."""
    with_memory = config.pool == "memory"
    layout = (
        memory_layout(config, batch, mesh)
        if with_memory
        else layout_of(config, batch, batch_shards(mesh))
    )

    kept = config.memory if with_memory else 0
    _check_k(config, layout.rows + kept)

    def draw(key: Array, step: Array, pairs: Pairs, critic: Critic, side: int) -> _Draw:
        deal_key, draw_key = jax.random.split(key)
        pool = deal(deal_key, candidates_of(pairs, side), pairs.rows, layout, mesh)
        if with_memory:
            pool = jax.tree.map(
                lambda new, old: jnp.concatenate([new, old], axis=1),
                pool,
                remembered_of(pairs, side),
            )
        slots = jnp.arange(pool.index.shape[1], dtype=jnp.int32)
        slots = jnp.broadcast_to(slots, pool.index.shape)
        anchors = to_lanes(anchors_of(pairs, side), layout)
        chooser = _Chooser(draw_key, step, critic, side, weighting, config.chunk)
        best = chooser.visit(_no_best(anchors, config.k), anchors, pool, slots)
        return _as_draw(best, take_rows(pool, best.slot))

    return _Pool(draw, 1 if with_memory else layout.lanes)


def _block_pool(config: NegativesConfig, batch: int, mesh: Mesh, weighting: Weighting) -> _Pool:
    """All rows of the block, passed round the ring of its devices: traffic grows with them."""
    ring = ring_of(config, batch, batch_shards(mesh))
    _check_k(config, (config.block or batch) - 1)
    rows, whole = batch_spec(), PartitionSpec()

    def draw(key: Array, step: Array, pairs: Pairs, critic: Critic, side: int) -> _Draw:
        def local(
            key: Array, step: Array, critic: Critic, anchors: Rows, candidates: Rows
        ) -> _Draw:
            anchors, candidates = ring.split(anchors), ring.split(candidates)
            chooser = _Chooser(key, step, critic, side, weighting, config.chunk)

            def visit(best: _Best, visiting: Rows) -> tuple[_Best, Rows]:
                return chooser.visit(best, anchors, visiting, visiting.index), visiting

            frozen = lax.stop_gradient(candidates)
            best, _ = ring.travel(visit, _no_best(anchors, config.k), frozen)
            return _as_draw(best, _fetch(ring, candidates, best.slot))

        by_device = per_shard(local, mesh, (whole, whole, whole, rows, rows))
        sides = anchors_of(pairs, side), candidates_of(pairs, side)
        return by_device(key, step, critic, *sides)

    return _Pool(draw, 1)


_POOLS: dict[str, Callable[[NegativesConfig, int, Mesh, Weighting], _Pool]] = {
    "block": _block_pool,
    "lane": _lane_pool,
    "memory": _lane_pool,
}


def _fetch(ring: Ring, rows: Rows, wanted: Array) -> Rows:
    """The rows whose index is `wanted` ``[blocks, N, K]``, wherever in the ring they are."""

    @jax.checkpoint  # or the backward pass would keep what it selected, for every device
    def visit(found: Rows, visiting: Rows) -> tuple[Rows, Rows]:
        place = wanted - visiting.index[:, :1, None]
        here = (place >= 0) & (place < ring.rows)

        def pick(taken: Array, so_far: Array) -> Array:
            return jnp.where(here.reshape(*here.shape, *[1] * (taken.ndim - 3)), taken, so_far)

        taken = take_rows(visiting, jnp.clip(place, 0, ring.rows - 1))
        return jax.tree.map(pick, taken, found), visiting

    nothing = jax.tree.map(lambda x: jnp.zeros((*wanted.shape, *x.shape[2:]), x.dtype), rows)
    return ring.travel(visit, nothing, rows)[0]


# --- Gumbel-max -----------------------------------------------------------------------------------


@flax.struct.dataclass
class _Best:
    """The largest perturbed log weights so far; ``...`` are lanes or blocks."""

    value: Array  # [..., N, K] -inf: none
    slot: Array  # [..., N, K] int32
    log_weight: Array  # [..., N, K]
    log_z: Array  # [..., N]
    count: Array  # [..., N]


def _no_best(anchors: Rows, k: int) -> _Best:
    shape = anchors.index.shape
    dtype = jnp.result_type(*jax.tree.leaves(anchors.embedding))
    none = jnp.full((*shape, k), -jnp.inf, dtype)
    # A slot that exists, on every device of a ring.
    slot = jnp.broadcast_to(anchors.index[:, :1, None], (*shape, k)) * 0
    return _Best(none, slot, none, none[..., 0], jnp.zeros(shape, dtype))


@dataclass(frozen=True)
class _Chooser:
    key: Array
    step: Array
    critic: Critic
    side: int
    weighting: Weighting
    chunk: int

    def visit(self, best: _Best, anchors: Rows, candidates: Rows, slots: Array) -> _Best:
        """`best` after more candidates ``[L, M, ...]`` for anchors ``[L, N, ...]``.

        `slots` ``[L, M]`` is what a candidate is known by in the result.
        """
        anchors, candidates = lax.stop_gradient((anchors, candidates))
        critic = lax.stop_gradient(self.critic)

        def one(best: _Best, chunk: tuple[Rows, Array]) -> tuple[_Best, None]:
            rows, slots = chunk
            scores = score_matrix(critic, self.side, anchors.embedding, rows.embedding)
            log_weight = self.weighting(scores, self.step)
            log_weight = jnp.where(every_pair(anchors, rows), log_weight, -jnp.inf)
            noise = _gumbel(self.key, anchors.index, rows.index, scores.dtype)
            value, slot, chosen = _largest(best, log_weight + noise, slots, log_weight)
            log_z = jnp.logaddexp(best.log_z, jax.nn.logsumexp(log_weight, axis=-1))
            count = best.count + jnp.sum(log_weight > -jnp.inf, axis=-1)
            return _Best(value, slot, chosen, log_z, count), None

        chunks = in_chunks((candidates, slots), candidates.valid, self.chunk)
        return lax.scan(one, best, chunks)[0]


def _largest(
    best: _Best, value: Array, slots: Array, log_weight: Array
) -> tuple[Array, Array, Array]:
    """(value, slot, log weight) of the K largest of `best` and of more values ``[..., N, M]``.

    Of equal values the lower slot wins, whatever the order in which they are visited.
    """
    slots = jnp.broadcast_to(slots[..., None, :], value.shape)
    k = best.value.shape[-1]
    if k == 1:  # both top_k and argmax take several times as long as plain reductions
        top = jnp.max(value, axis=-1, keepdims=True)
        last = jnp.iinfo(slots.dtype).max
        slot = jnp.min(jnp.where(value == top, slots, last), axis=-1, keepdims=True)
        chosen = jnp.where((value == top) & (slots == slot), log_weight, -jnp.inf)
        better = (top > best.value) | ((top == best.value) & (slot < best.slot))
        found = (top, slot, jnp.max(chosen, axis=-1, keepdims=True))
        so_far = (best.value, best.slot, best.log_weight)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), found, so_far)
    columns = (-best.value, best.slot, best.log_weight), (-value, slots, log_weight)
    both = [jnp.concatenate(pair, axis=-1) for pair in zip(*columns, strict=True)]
    ordered = lax.sort(both, dimension=-1, num_keys=2)
    value, slots, log_weight = (x[..., :k] for x in ordered)
    return -value, slots, log_weight


def _gumbel(key: Array, anchor: Array, candidate: Array, dtype: DTypeLike) -> Array:
    """Gumbel noise ``[L, N, M]`` for rows ``[L, N]`` and ``[L, M]``: a hash of key, row and row."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
    words = jax.random.key_data(fold(key, anchor.astype(jnp.uint32)))[..., None, :]  # [L, N, 1, 2]
    # A generator per pair would take several times as long as the scores do.
    bits = candidate.astype(jnp.uint32)[..., None, :] * jnp.uint32(0x9E3779B9) + words[..., 0]
    bits = _mixed(_mixed(bits) ^ words[..., 1])
    # 23 bits and a half: never 0 or 1, exact in float32.
    uniform = ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def _mixed(x: Array) -> Array:
    """A bijection of uint32 in which every input bit changes every output bit half of the time.

    Source of the constants: Wellons' hash prospector (public domain), ``lowbias32``.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
