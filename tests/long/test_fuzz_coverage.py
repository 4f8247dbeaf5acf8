"""Readers of strangers' files under a fuzzer that looks which lines its inputs reach.

Kept out of the ordinary run because it takes five minutes; `tests/test_fuzz_readers.py` damages
the same files without looking.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_readers import TARGETS

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 alone")

SCRIPT = Path(__file__).with_name("fuzz_readers.py")


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_crashes_a_reader(target: str, tmp_path: Path) -> None:
    runs = os.environ.get("FUZZ_RUNS", TARGETS[target])
    options = [f"-runs={runs}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, SCRIPT, target, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{output[-6000:]}\nThe input: {list(tmp_path.iterdir())}"
    assert "DONE" in output
