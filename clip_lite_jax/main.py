"""``python -m clip_lite_jax.main --config configs/quickstart.py --workdir runs/quickstart``.

The same run as ``clip-lite train`` with the same arguments.
"""

import sys
from pathlib import Path

from clip_lite_jax import cli
from clip_lite_jax.agreement import check_same_start
from clip_lite_jax.apps.report import write_report
from clip_lite_jax.apps.report_tables import terminal_table
from clip_lite_jax.config import Config
from clip_lite_jax.evaluate import evaluate
from clip_lite_jax.mirror import Mirror
from clip_lite_jax.places import Place
from clip_lite_jax.train import train


def run(config: Config, workdir: Place) -> Path:
    """Trains (or resumes), evaluates once on the test splits, writes the report and returns it.

    Raises:
      ConfigError: another process was started with something else; and what `train` raises.
    """
    check_same_start(config, workdir)
    with Mirror(workdir) as mirror:
        trained = train(config, mirror.folder, mirror)
        mirror.complete()
        results = evaluate(trained)
        if len(trained.bad) and trained.is_writer:
            print(f"examples that could not be used: {len(trained.bad)}, see {trained.bad.path}")
        report = write_report(mirror.folder, str(workdir))
    if trained.is_writer:
        print(terminal_table(results["test"]))
        print(f"report: {workdir / report.name}")
    return report


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
