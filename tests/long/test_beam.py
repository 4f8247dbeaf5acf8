"""`clip-lite data convert --beam` equals the conversion by our own processes.

Kept out of the ordinary run because Apache Beam needs an environment of its own, which takes more
than a minute to install.
"""
# ruff: noqa: F401, F811, fixtures of other files

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fifty import everything, written
from test_data_convert import conversion_of, source
from test_remote import shared

from clip_lite_jax.apps.data_convert import convert
from clip_lite_jax.config import DataConfig

BEAM = Path(__file__).parents[2] / ".venv-beam" / "bin" / "python"


def test_a_beam_pipeline_writes_the_same(
    source: DataConfig,
    tmp_path: Path,
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "beam"
    expected = convert(conversion_of(source, alone, per_shard=7), processes=1)
    command = [str(BEAM), "-m", "clip_lite_jax.cli", "data", "convert", source.source, str(out)]
    command += ["--per-shard=7", "--config.data.split_column=split"]
    command += ["--beam=--runner=DirectRunner --direct_num_workers=2"]
    subprocess.run(command, check=True, timeout=240)
    for path in alone.glob("*.arrayrecord"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert json.loads((out / "manifest.json").read_text()) == expected
    (out / "train-00002-of-00005.arrayrecord").unlink()
    subprocess.run(command, check=True, timeout=240)
    assert everything(DataConfig(source=str(out))) == everything(source)


def test_a_beam_pipeline_in_a_bucket(
    shared: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "shared").mkdir()
    local = written("csv_rows", tmp_path / "shared" / "bucket")
    command = [str(BEAM), "-m", "clip_lite_jax.cli", "data", "convert", f"{shared}/pairs.csv"]
    command += [f"{shared}/out", "--per-shard=7", "--config.data.split_column=split"]
    command += ["--beam=--runner=DirectRunner --direct_num_workers=2"]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=240)
        out = tmp_path / "shared" / "bucket" / "out"
        assert everything(DataConfig(source=str(out))) == everything(local)
        (out / "train-00002-of-00005.arrayrecord").unlink()
