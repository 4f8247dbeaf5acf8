"""What a run is made of, built from its configuration: shared by training and evaluation."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from clip_lite_jax.agreement import check_same_config, check_same_data, check_same_everywhere
from clip_lite_jax.beginnings import resumed, tokenizer_of, weights_of
from clip_lite_jax.checkpoints import Checkpoints, Meta, has_checkpoint
from clip_lite_jax.config import Config, to_dict
from clip_lite_jax.data import caption_ops
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.sources import Source, build_sources, captions_of, fingerprint
from clip_lite_jax.data.tokenizer import LONGEST, Tokenizer, load_or_train_tokenizer, load_tokenizer
from clip_lite_jax.errors import ConfigError
from clip_lite_jax.evaluators import Evaluator
from clip_lite_jax.evaluators.information import Information
from clip_lite_jax.evaluators.registry import build_task
from clip_lite_jax.evaluators.retrieval import build_retrieval
from clip_lite_jax.evaluators.tasks import TaskData, data_of
from clip_lite_jax.features import build_inputs, check_cache
from clip_lite_jax.files import CONFIG_FILE, SKIPPED_FILE, TOKENIZER_FILE, write_atomic
from clip_lite_jax.models import Model, build_model
from clip_lite_jax.optim import build_optimizer, frozen_towers
from clip_lite_jax.pretrained.towers import load_towers, resolve
from clip_lite_jax.sharding import build_mesh
from clip_lite_jax.train_state import TrainState, init_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    config: Config
    workdir: Path
    mesh: Mesh
    bad: BadExamples
    sources: dict[str, Source]
    tokenizer: Tokenizer
    model: Model
    meta: Meta

    @property
    def is_writer(self) -> bool:
        """Whether this process writes logs and reports."""
        return jax.process_index() == 0

    def warn_of_cut_captions(self) -> None:
        """Says so where more than one training caption in a hundred is cut, of some a thousand."""
        data, train = self.config.data, self.sources["train"]
        if data.augment.tag_dropout:  # tags are in another order at every step: none is always cut
            return
        some = range(0, len(train), max(1, len(train) // 1000))
        captions = [caption_ops.choose(train.metadata(i).captions, data.captions)[0] for i in some]
        whole = Tokenizer(self.tokenizer.model, LONGEST, data.caption_normalization)
        tokens = whole(captions)[1].sum(axis=1)
        share = np.mean(tokens > data.max_tokens)
        if share > 0.01:
            log.warning(
                "%.0f %% of the captions are longer than data.max_tokens=%d and are cut: %d would "
                "hold 99 %% of them",
                100 * share,
                data.max_tokens,
                np.quantile(tokens, 0.99, method="higher"),
            )

    def init_state(
        self, given: Mapping[str, Any], shapes_only: bool = False
    ) -> tuple[TrainState, optax.GradientTransformation]:
        """A fresh state on the mesh but for the `given` parts, and its optimizer.

        With `shapes_only` it is what a checkpoint is restored into, see `train_state.init_state`.
        """
        config = self.config
        return init_state(
            self.model,
            lambda params: build_optimizer(config.optim, config.steps, params),
            config.seed,
            config.optim.ema_decay > 0,
            self.mesh,
            config.negatives,
            config.batch_size,
            given,
            config.mesh,
            shapes_only,
        )

    def inputs(self, params: Any, model_state: Any) -> TowerInputs:
        """What the towers read; features of frozen ones are computed if they are not there yet."""
        return build_inputs(
            self.config, self.sources, self.tokenizer, self.model, params, model_state, self.workdir
        )

    def evaluators(
        self, stage: str, inputs: TowerInputs, tasks: bool = True
    ) -> dict[str, Evaluator]:
        """The evaluators of a stage, ``validation`` or ``test``, with or without `eval.tasks`.

        One whose split has no two usable examples is left out, and the log says so.
        """
        settings = self.config.eval
        evaluators: dict[str, Evaluator] = {}
        split = (
            settings.information_split if stage == "validation" else settings.information_test_split
        )
        if split in self.sources:
            information = Information(
                self.sources[split],
                inputs,
                settings.batch_size,
                "joined" if self.config.data.captions == "joined" else "first",
                settings.max_information_pairs,
                self.bad,
            )
            if len(information.pairs.examples) > 1:
                evaluators["information"] = information
        retrieval = build_retrieval(self.config, self.sources, inputs, self.bad, stage)
        evaluators |= {f"retrieval/{name}": gallery for name, gallery in retrieval.items()}
        configured = [f"retrieval/{gallery.name}" for gallery in settings.retrieval]
        if missing := [n for n in ["information", *configured] if n not in evaluators]:
            log.warning(
                "not evaluated on %s data: %s; the split has no two usable examples (splits: %s)",
                stage,
                ", ".join(missing),
                ", ".join(f"{name} {len(source)}" for name, source in self.sources.items()),
            )
        return evaluators | (self._tasks(stage, inputs) if tasks else {})

    def _tasks(self, stage: str, inputs: TowerInputs) -> dict[str, Evaluator]:
        """Those of `eval.tasks`.  All are built each time: none fails first at the end of a run."""
        found: dict[str, Evaluator] = {}
        for name, task in self.config.eval.tasks.items():
            # Texts of a task need not be among those whose features are kept.
            own = TowerInputs(inputs.image, self.tokenizer)
            data = TaskData(self.sources, own, self.config.eval.batch_size, self.bad)
            if task.source:
                fields = data_of(task, self.config.data)
                bad = BadExamples(self.workdir / f"skipped-{name}.jsonl")
                splits = build_sources(fields, bad, training=False)
                own = TowerInputs(Pixels(fields), self.tokenizer)
                data = replace(data, splits=splits, inputs=own, bad=bad)
            evaluator = build_task(task.task, data, task.options)
            if stage == "test" or task.while_training:
                found[f"tasks/{name}"] = evaluator
        return found


def build_run(config: Config, workdir: Path) -> Run:
    """Reads the data, trains or loads the tokenizer and builds the model.

    Raises:
      ConfigError: the workdir holds a run with another configuration or other data, or cannot be
        written; or another process was given something else.
      DataError: data that cannot be used.
    """
    _check_writable(workdir)
    stored = workdir / TOKENIZER_FILE
    given = config
    if has_checkpoint(workdir):
        check_same_config(config, workdir)
        config = _with_stored_model(config, workdir)
    else:  # nothing was learned yet: what an earlier attempt left does not bind this one
        config = resolve(config)
        stored.unlink(missing_ok=True)
        (workdir / SKIPPED_FILE).unlink(missing_ok=True)
    bad = BadExamples(workdir / SKIPPED_FILE, config.data.max_bad_share, strict=config.data.strict)
    sources = build_sources(config.data, bad)
    train = sources["train"]
    bad.expect(bad.total or len(train))
    if stored.exists():
        tokenizer = load_tokenizer(stored, config.data)
    else:
        tokenizer = _first_tokenizer(config, train)
    meta = Meta(config, tokenizer.model, fingerprint(sources))
    check_same_everywhere(config, meta.data_fingerprint)
    write_atomic(stored, tokenizer.model)
    write_atomic(workdir / CONFIG_FILE, json.dumps(to_dict(given), indent=2))
    model = build_model(
        config.model,
        config.data.image_size,
        tokenizer.vocab_size,
        config.data.max_tokens,
        config.objective,
    )
    if config.optim.frozen:
        params, _ = jax.eval_shape(model.init, jax.random.key(0))
        model = model.freeze(frozen_towers(config.optim, config.steps, params))
    check_cache(config, model.module.frozen)
    mesh = build_mesh(config=config.mesh)
    return Run(config, workdir, mesh, bad, sources, tokenizer, model, meta)


def restore_or_init(
    run: Run, checkpoints: Checkpoints
) -> tuple[TrainState, optax.GradientTransformation]:
    """The state that a run goes on or begins with, and the optimizer.

    The newest checkpoint of its own; or that of the run in `config.resume_from`; or the weights of
    the model in `config.init_from`; or a fresh state.

    Raises:
      ConfigError: its own checkpoint was made on other data.
      CheckpointError: a checkpoint is missing, damaged, or of another model.
    """
    step = checkpoints.latest_step()
    if step is not None:
        check_same_data(run.workdir, run.meta, checkpoints.meta(step))
        shapes, optimizer = run.init_state({}, shapes_only=True)
        state = checkpoints.restore(step, shapes)
        log.info("restored checkpoint %d of %s", step, run.workdir)
        return state, optimizer
    config = run.config
    if config.resume_from is not None:
        shapes, optimizer = run.init_state({}, shapes_only=True)
        state = resumed(config, shapes)
        number = int(state.step)  # the array is gone with the first step, a record may stay
        log.info("restored checkpoint %d of %s, to go on from", number, config.resume_from)
        return state, optimizer
    if config.init_from is not None:
        begun = run.init_state(weights_of(config.init_from, run.model))
        log.info("the run begins with the weights of %s", config.init_from)
        return begun
    return run.init_state(load_towers(run.model, config.model))


def _check_writable(workdir: Path) -> None:
    """Makes the folder of a run, and raises `ConfigError` where nothing can be written to it."""
    problem = "it is read-only, or belongs to somebody else"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        writable = os.access(workdir, os.W_OK | os.X_OK)
    except OSError as error:
        writable, problem = False, str(error)
    if not writable:
        raise ConfigError(f"--workdir={workdir} cannot be written: {problem}; name another folder")


def _first_tokenizer(config: Config, train: Source) -> Tokenizer:
    """That of what the run begins with, or as `config.data` says."""
    given = tokenizer_of(config)
    if given is None:
        return load_or_train_tokenizer(captions_of(train), config.data)
    named = config.data.tokenizer
    if named is not None and load_tokenizer(named, config.data).model != given.model:
        raise ConfigError(
            f"data.tokenizer={named!r} is not the tokenizer of "
            f"{config.resume_from or config.init_from}, whose weights go with their own: leave it "
            "out"
        )
    return given


def _with_stored_model(config: Config, workdir: Path) -> Config:
    """The configuration with what `model.*.init_from` stated when the run began."""
    with Checkpoints.open(workdir) as checkpoints:
        step = checkpoints.latest_step()
        stored = config if step is None else checkpoints.meta(step).config
    return replace(config, model=stored.model)
