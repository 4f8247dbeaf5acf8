"""Retrieval against a brute-force loop; information read-offs against known distributions."""

import itertools
import math

import numpy as np
import pytest

from clip_lite_jax.config import RetrievalConfig
from clip_lite_jax.data.records import Example
from clip_lite_jax.evaluators.encoding import in_batches
from clip_lite_jax.evaluators.information import (
    CHANCE_LOSS,
    calibrate,
    calibrated_read_offs,
    certified_bound,
    infonce_read_offs,
    intervals,
    matched_and_shuffled,
    read_offs,
)
from clip_lite_jax.evaluators.retrieval import chance_recall, retrieval_metrics, select


def brute_force(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Ranks one query at a time, with plain loops; ties count against the model."""
    images, captions = scores.shape
    text_ranks, image_ranks = [], []
    for c in range(captions):
        right = scores[owner[c], c]
        text_ranks.append(1 + sum(scores[i, c] >= right for i in range(images) if i != owner[c]))
    for i in range(images):
        right = max(scores[i, c] for c in range(captions) if owner[c] == i)
        others = [c for c in range(captions) if owner[c] != i]
        image_ranks.append(1 + sum(scores[i, c] >= right for c in others))
    result = {}
    for name, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        result |= {f"{name}_r{k}": sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)}
        result[f"{name}_median_rank"] = float(np.median(ranks))
    return result


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_brute_force(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, 25)
    owner = np.repeat(np.arange(25), counts)
    scores = rng.normal(size=(25, len(owner)))
    scores[owner, np.arange(len(owner))] += 1
    scores = np.round(scores) if ties else scores
    metrics = retrieval_metrics(scores, owner)
    for name, value in brute_force(scores, owner).items():
        assert metrics[name] == pytest.approx(value), name


def test_a_constant_model_gets_no_credit() -> None:
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["text_to_image_r10"] == metrics["image_to_text_r10"] == 0


def test_a_perfect_model_and_a_gallery_of_one() -> None:
    perfect = retrieval_metrics(np.eye(8), np.arange(8))
    assert perfect["text_to_image_r1"] == perfect["image_to_text_r1"] == 1
    single = retrieval_metrics(np.ones((1, 1)), np.arange(1))
    assert single["text_to_image_r1"] == single["text_to_image_r1_chance"] == 1


def test_chance_by_simulation() -> None:
    rng = np.random.default_rng(0)
    assert chance_recall(10, 150, 1) == pytest.approx(10 / 150)
    hits = [np.any(rng.permutation(30)[:10] < 3) for _ in range(20000)]
    assert chance_recall(10, 30, 3) == pytest.approx(np.mean(hits), abs=0.01)
    assert chance_recall(10, 5, 1) == 1


class Listed:
    def __init__(self, items: list[tuple[str, str]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.metadata(index)

    def metadata(self, index: int) -> Example:
        id, group = self.items[index]
        return Example(id, group, ("caption",), b"", {})


def test_gallery_is_stable_under_reordering() -> None:
    items = [(f"picture {i}", f"group {i % 7}") for i in range(40)]
    config = RetrievalConfig(name="x", validation="v", test="t", one_per_group=True, max_images=5)
    chosen = [items[i] for i in select(Listed(items), config)]
    assert len({group for _, group in chosen}) == len(chosen) == 5
    backwards = items[::-1]
    assert {backwards[i] for i in select(Listed(backwards), config)} == set(chosen)


def test_batches_are_padded_and_cut() -> None:
    seen = []

    def double(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return 2 * x

    values = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(in_batches(double, (values,), 4), 2 * values)
    assert seen == [4, 4, 4]


# --- Information ----------------------------------------------------------------------------------


def gaussian_scores(rho: float, dims: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """log r of correlated Gaussians on pairs (P) and on shuffled pairs (Q)."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, n, dims))
    y = rho * x + math.sqrt(1 - rho**2) * noise

    def log_ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        joint = (y - rho * x) ** 2 / (1 - rho**2)
        return 0.5 * np.sum(y**2 - joint - math.log(1 - rho**2), axis=1)

    return log_ratio(x, y), log_ratio(x, rng.permutation(y))


def test_read_offs_of_the_true_log_ratio() -> None:
    rho, dims = 0.4258, 20  # 2 nats
    truth = -dims / 2 * math.log(1 - rho**2)
    offs = read_offs(*gaussian_scores(rho, dims, 400_000))
    assert offs["score_positive"] == pytest.approx(truth, rel=0.02)
    assert offs["jsd_loss"] == pytest.approx(0.685, rel=0.02)
    assert offs["nwj_lower_bound"] == pytest.approx(truth, rel=0.05)
    assert 0 < offs["jsd_lower_bound"] < truth
    assert offs["dv_estimate"] == pytest.approx(truth, rel=0.05)
    assert offs["smile_estimate"] == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("distort", [0.0, 0.3, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("rho", [0.4258, 0.6717])
def test_bounds_hold_for_any_critic(distort: float, rho: float) -> None:
    truth = -10 * math.log(1 - rho**2)
    positive, negative = gaussian_scores(rho, 20, 100_000)
    offs = read_offs(distort * positive + 0.5, distort * negative + 0.5)
    assert offs["jsd_lower_bound"] <= truth
    assert offs["nwj_lower_bound"] <= truth + 0.5


@pytest.mark.parametrize(("scale", "shift"), [(0.2, -3.0), (4.0, 2.0), (-1.0, 0.0)])
def test_calibration_undoes_scale_and_shift(scale: float, shift: float) -> None:
    positive, negative = gaussian_scores(0.4258, 20, 50_000)
    found = calibrate(positive * scale + shift, negative * scale + shift)
    # log r is the best critic there is, so nothing but the inverse is better.
    assert found[0] * scale == pytest.approx(1, abs=0.05)
    assert found[0] * shift + found[1] == pytest.approx(0, abs=0.1)


def test_calibrated_read_offs_come_from_the_other_half() -> None:
    scores = np.random.default_rng(0).normal(size=(40, 40)) + 9 * np.eye(40) - 5
    groups, fit = np.arange(40), np.arange(40) < 20
    offs = calibrated_read_offs(scores, groups, fit)
    low, high = offs["calibrated_jsd_loss_low"], offs["calibrated_jsd_loss_high"]
    assert low < offs["calibrated_jsd_loss"] < high
    assert offs["calibrated_pairs"] == 20
    assert offs["calibrated_jsd_loss"] < read_offs(*matched_and_shuffled(scores))["jsd_loss"]
    misled = np.where(fit[:, None], -scores, scores)  # the fit turns right scores upside down
    assert calibrated_read_offs(misled, groups, fit)["calibrated_jsd_lower_bound"] == 0
    assert calibrated_read_offs(scores, groups, groups < 1) == {}


def test_infonce_by_hand_and_its_ceiling() -> None:
    scores = np.array([[2.0, 0.0], [1.0, 1.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(2)]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-1))]
    offs = infonce_read_offs(scores)
    assert offs["infonce_loss"] == pytest.approx(np.mean(rows + columns))
    assert infonce_read_offs(1e4 * np.eye(8))["infonce_lower_bound"] == pytest.approx(math.log(8))
    assert infonce_read_offs(np.zeros((8, 8)))["infonce_lower_bound"] == pytest.approx(0)


def test_intervals_equal_a_bootstrap_by_hand() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(12, 12)) + 3 * np.eye(12)
    groups = np.array([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7])
    found = intervals(scores, groups, resamples=200, seed=3)
    draws = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=200)
    by_hand: dict[str, list[float]] = {
        name: [] for name in ("jsd_loss", "nwj_lower_bound", "dv_estimate", "smile_estimate")
    }
    infonce = []
    for times in draws:
        rows = [i for i, g in enumerate(groups) for _ in range(times[g])]
        positive = scores[rows, rows]
        negative = np.array([scores[i, j] for i in rows for j in rows if i != j])
        offs = read_offs(positive, negative)
        for name, values in by_hand.items():
            values.append(offs[name])
        bounds = []
        for matrix, i in itertools.product((scores, scores.T), rows):
            # Copies of a row meet once, so that a row with copies has fewer candidates.
            candidates = [matrix[i, i], *(matrix[i, j] for j in rows if j != i)]
            loss = np.logaddexp.reduce(candidates) - matrix[i, i]
            bounds.append(math.log(len(candidates)) - loss)
        infonce.append(np.mean(bounds))
    for name, values in (by_hand | {"infonce_lower_bound": infonce}).items():
        ends = [found[f"{name}_{end}"] for end in ("low", "high")]
        np.testing.assert_allclose(ends, np.quantile(values, (0.025, 0.975)))
    assert found["jsd_lower_bound_low"] == certified_bound(found["jsd_loss_high"])


@pytest.mark.parametrize("size", [20, 100])
def test_a_critic_that_knows_nothing_bounds_nothing(size: int) -> None:
    """Resampling makes copies, which must not pass for knowledge."""
    found = intervals(np.zeros((size, size)), np.arange(size), resamples=50)
    for end in ("low", "high"):
        assert found[f"infonce_lower_bound_{end}"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(certified_bound(math.nan))


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        thing = np.repeat(np.arange(60), 3)  # three drawings of each; as if independent: 0.74
        scores = np.diag(1 + rng.normal(size=60)[thing])
        found = intervals(scores, thing, resamples=300)
        covered.append(found["score_positive_low"] <= 1 <= found["score_positive_high"])
    assert 0.9 < np.mean(covered) < 0.98


def test_certified_bound_values() -> None:
    # Checked by a linear programme over all density ratios of given divergence.
    for divergence, nats in [(0.1, 0.3016), (0.3, 1.0210), (0.5, 2.1020), (0.6, 3.0958)]:
        assert certified_bound(CHANCE_LOSS - 2 * divergence) == pytest.approx(nats, abs=1e-4)
    assert certified_bound(CHANCE_LOSS - 2 * 0.68) == pytest.approx(5.5124, abs=1e-4)
    assert certified_bound(CHANCE_LOSS) == certified_bound(5.0) == 0


@pytest.mark.parametrize("c", [1.0, 1.5, 4.0, 60.0, 1e4])
def test_the_proof_of_the_certified_bound(c: float) -> None:
    """In `docs/objectives.md`: r log r is nowhere below a line in (integrand of JSD, r)."""
    r = np.concatenate([np.geomspace(1e-9, 1e6, 20_000), [c]])

    def integrand(r: np.ndarray) -> np.ndarray:  # of JSD, per unit of Q
        return math.log(2) + 0.5 * (r * np.log(r) - (1 + r) * np.log1p(r))

    divergence = math.log(2) - 0.5 * math.log1p(1 / c) - math.log1p(c) / (2 * c)
    alpha = 2 * c / math.log1p(c)
    beta = math.log(c) + 1 - alpha * 0.5 * math.log(c / (1 + c))
    line = math.log(c) + alpha * (integrand(r) - divergence) + beta * (r - 1)
    assert np.all(r * np.log(r) - line >= -1e-9 * (1 + r * np.abs(np.log(r))))
    assert line[-1] == pytest.approx(c * math.log(c), abs=1e-9 * c)  # they touch at c
    assert certified_bound(CHANCE_LOSS - 2 * divergence) == pytest.approx(math.log(c), abs=1e-9)


def test_huge_scores_do_not_overflow() -> None:
    offs = read_offs(np.array([1e4, 1e4]), np.array([1e4, -1e4]))
    assert offs["nwj_lower_bound"] == -math.inf
    assert math.isfinite(offs["jsd_loss"])
    found = intervals(1e5 * np.ones((6, 6)), np.arange(6), resamples=50)
    assert not any(math.isnan(value) for value in found.values())
