"""How a pair's score compares with those of its image and other captions."""

import numpy as np
from scipy.special import logsumexp


def ranks_among(
    own: np.ndarray, others: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks ``[N]`` of scores `own` ``[N]`` among `others` ``[N, M]``, and the number of others.

    1 is best; ties count against the pair.  Only `valid` ``[N, M]`` others count: captions of the
    same group or with the same text are not other captions.
    """
    at_least = (others >= own[:, None]) & valid
    return 1 + at_least.sum(axis=1), valid.sum(axis=1)


def contrasts(own: np.ndarray, others: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """T less the logarithm of the mean of exp T over the image's other captions, ``[N]``.

    Free of what T has in common for all captions of an image: the constants of `infonce`, `dv` and
    `sigmoid`, and the log Z(x) of hard negatives.  NaN where an image has no valid other.
    """
    hidden = np.where(valid, others.astype(np.float64), -np.inf)
    count = valid.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = logsumexp(hidden, axis=1) - np.log(count)
        return np.where(count > 0, own - mean, np.nan)


def other_captions(groups: np.ndarray, captions: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Which captions are those of other things, bool ``[N, M]``.

    Of N images with their `groups`, and M `captions` of the images `owner`.  A caption is no other
    one of an image whose group it shows, nor of one that has a caption of the same text.
    """
    _, group = np.unique(groups, return_inverse=True)
    _, text = np.unique(captions, return_inverse=True)
    others = group[:, None] != group[owner][None, :]
    has = np.zeros((len(groups), int(text.max(initial=-1)) + 1), bool)
    has[owner, text] = True
    return others & ~has[:, text]
