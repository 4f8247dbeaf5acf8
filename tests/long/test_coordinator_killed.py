"""The process that all others call is killed in a training.

Kept out of the ordinary run because its six starts of the command take minutes of processor time;
`tests/test_distributed.py` kills the other process, and takes the same way afterwards.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import write_pairs
from test_distributed import assert_same, kill_in_training, logged, sgd, train, write_config


def test_a_run_whose_coordinator_is_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    config = write_config(tmp_path, sgd(write_pairs(tmp_path / "pairs")))
    undisturbed = train(tmp_path, config, 2)
    (tmp_path / "killed").mkdir()
    workdir = tmp_path / "killed" / "processes_2"
    kill_in_training(config, workdir, killed=0, step=13)
    assert train(tmp_path / "killed", config, 2) == workdir
    assert_same(undisturbed, workdir, 0)
    assert logged(undisturbed) == logged(workdir)
