"""What a run begins with that is not its own: another run's state, or the weights of a model."""

from collections.abc import Mapping
from typing import Any

import jax

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config
from clip_lite_jax.data.tokenizer import Tokenizer
from clip_lite_jax.errors import CheckpointError, ConfigError
from clip_lite_jax.inference import load
from clip_lite_jax.mirror import local_copy
from clip_lite_jax.models import Model
from clip_lite_jax.parameter_paths import by_path
from clip_lite_jax.train_state import TrainState


def tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer of what a run begins with: its embeddings of words are of no other use.

    None where it begins with nothing of the kind.

    Raises:
      CheckpointError: there is no such run, or it has no tokenizer.
    """
    if config.resume_from is not None:
        with Checkpoints.open(local_copy(config.resume_from)) as checkpoints:
            model = checkpoints.meta(_newest(checkpoints, config.resume_from)).tokenizer
    elif config.init_from is not None:
        model = load(config.init_from).tokenizer.model
    else:
        return None
    return Tokenizer(model, config.data.max_tokens, config.data.caption_normalization)


def resumed(config: Config, like: TrainState) -> TrainState:
    """The state of the run that `config.resume_from` names, shaped and spread as `like`.

    Raises:
      CheckpointError: there is none, or it is of another model or optimizer.
      ConfigError: it has taken as many steps as this run shall.
    """
    path = str(config.resume_from)
    with Checkpoints.open(local_copy(path)) as checkpoints:
        step = _newest(checkpoints, path)
        if step >= config.steps:
            raise ConfigError(
                f"resume_from={path!r} is at step {step} already: give more --config.steps than "
                f"{config.steps}"
            )
        return checkpoints.restore(step, like)


def weights_of(path: str, model: Model) -> Mapping[str, Any]:
    """The variables of every part of `model` from those in `path`, for `init_state`.

    Raises:
      CheckpointError: `path` holds no model, or another one; the first difference is named.
    """
    loaded = load(path)
    theirs = {"params": loaded.params, **loaded.model_state}
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    ours = {"params": params, **model_state}
    there, here = ({k: v.shape for k, v in by_path(tree).items()} for tree in (theirs, ours))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"init_from={path!r} does not fit: {name} is {there.get(name, 'missing')} there "
                f"and {here.get(name, 'missing')} in this model; use its model configuration"
            )
    theirs = jax.device_get(theirs)  # they lie on a mesh of `load`'s
    return {
        part: {name: tree[part] for name, tree in theirs.items() if part in tree} for part in params
    }


def _newest(checkpoints: Checkpoints, path: str) -> int:
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(f"{path} holds no finished checkpoint to begin with")
    return step
