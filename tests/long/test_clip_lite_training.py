"""A training step of the published models that the ordinary run leaves out.

Kept out of it because the two gradients in float64 take a minute of processor time to compile and
run; `tests/test_clip_lite_import.py` compares their features, scores and losses, and the gradient
of the model that has all terms of the loss.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_clip_lite_import import assert_training_is_as_published, reference

from clip_lite_jax.pretrained.clip_lite import from_state_dict


@pytest.mark.parametrize("name", ["rn18_bert2_concat", "rn50_bert2_dot"])
def test_training_is_as_published(name: str) -> None:
    published = reference(name)
    assert_training_is_as_published(published, from_state_dict(published.weights, published.config))
