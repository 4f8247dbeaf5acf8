"""Estimators of mutual information without a critic, in nats."""

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import digamma


def cca(x: np.ndarray, y: np.ndarray) -> float:
    """-½ Σ log(1 - ρ²) over the canonical correlations ρ of ``[N, dx], [N, dy]``.

    The information of jointly Gaussian variables; of others it sees the linear part.
    """
    bases = [np.linalg.qr(part - part.mean(axis=0))[0] for part in (x, y)]
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(-0.5 * np.sum(np.log1p(-(rho**2))))


def ksg(x: np.ndarray, y: np.ndarray, neighbours: int = 5) -> float:
    """Nearest neighbours of ``[N, dx], [N, dy]``, coordinates at unit variance.

    Source: Kraskov, Stögbauer and Grassberger (2004), eq. 8.
    """
    x, y = ((part - part.mean(axis=0)) / part.std(axis=0) for part in (x, y))
    joint = np.hstack([x, y])
    distance = cKDTree(joint).query(joint, neighbours + 1, p=np.inf)[0][:, -1]
    radius = np.nextafter(distance, 0)  # strictly nearer than the last neighbour

    def closer(part: np.ndarray) -> np.ndarray:
        return cKDTree(part).query_ball_point(part, radius, p=np.inf, return_length=True)  # itself

    mean = np.mean(digamma(closer(x)) + digamma(closer(y)))
    return float(digamma(neighbours) + digamma(len(x)) - mean)
