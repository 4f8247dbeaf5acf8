"""The final evaluation: the test splits, once, into ``results.json``."""

import json
import time
from pathlib import Path
from typing import Any

from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import to_dict
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.evaluators.retrieval import Retrieval
from clip_lite_jax.evaluators.tasks import Outcome, TaskEvaluator
from clip_lite_jax.files import RESULTS_FILE, write_atomic
from clip_lite_jax.provenance import provenance
from clip_lite_jax.run import Run, restore_or_init
from clip_lite_jax.train_step import make_encode_fns


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates the newest checkpoint on the test splits and writes ``results.json``.

    A workdir whose results are of that checkpoint already keeps them: test data is used once.
    """
    with Checkpoints(run.workdir, run.config.checkpoint) as checkpoints:
        stored = read_results(run.workdir)
        if stored is not None and stored["step"] == checkpoints.latest_step():
            return stored
        state, _ = restore_or_init(run, checkpoints)
    fns = make_encode_fns(run.model, run.mesh)(state.eval_params, state.model_state)
    evaluators = run.evaluators("test", run.inputs(state.params, state.model_state))
    began = time.perf_counter()
    outcomes: dict[str, Outcome] = {}
    queries: dict[str, dict[str, Any]] = {}
    for name, evaluator in evaluators.items():
        if isinstance(evaluator, Retrieval):
            metrics, asked = evaluator.measure(fns)
            outcomes[name], queries[name] = Outcome(metrics), asked.to_json()
        elif isinstance(evaluator, TaskEvaluator):
            outcomes[name] = evaluator.outcome(fns)
        else:
            outcomes[name] = Outcome(evaluator.run(fns))
    results = {
        "name": run.config.name,
        "step": int(state.step),
        "test": {name: outcome.metrics for name, outcome in outcomes.items()},
        "tables": {name: outcome.tables for name, outcome in outcomes.items() if outcome.tables},
        "protocols": {
            name: evaluator.protocol
            for name, evaluator in evaluators.items()
            if isinstance(evaluator, TaskEvaluator)
        },
        # So that runs can be compared query by query without their models, data and packages.
        "queries": {name: asked for name, asked in queries.items() if asked},
        "data_fingerprint": run.meta.data_fingerprint,
        "seconds": round(time.perf_counter() - began, 3),
        "bad_examples": len(run.bad),
        "provenance": provenance(),
        "config": to_dict(run.config),
    }
    if run.is_writer:
        write_atomic(run.workdir / RESULTS_FILE, json.dumps(results, indent=2))
    return results


def read_results(workdir: Path) -> dict[str, Any] | None:
    """The results of a finished run, or None.

    Raises:
      CheckpointError: the file is cut short, or holds something else.
    """
    path = workdir / RESULTS_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _no_results(path, str(error)) from error
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise _no_results(path, "it is no object with the step of a checkpoint")
    test = found.get("test")
    if not isinstance(test, dict) or not all(isinstance(part, dict) for part in test.values()):
        raise _no_results(path, "it has no numbers by evaluator in 'test'")
    return found


def _no_results(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds no results: {why}; move it away, and the command that trained this run "
        "evaluates it again"
    )
