"""The built wheel, installed outside the clone, trains and searches by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = folder / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "lib", wheel], check=True)
    return folder / "lib"


def command(installed: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_notices_and_configs_are_inside(installed: Path, tmp_path: Path) -> None:
    where = command(installed, tmp_path, "-c", "import clip_lite_jax as c; print(c.__file__)")
    package = installed / "clip_lite_jax"
    assert Path(where.strip()).parent == package
    builtin = package / "data" / "builtin"
    assert (builtin / "emoji.arrayrecord").stat().st_size < 16 * 2**20
    assert "CLDR" in (builtin / "NOTICE.md").read_text()
    assert list((builtin / "licences").glob("*.txt"))
    assert {p.name for p in (ROOT / "configs").glob("*.py")} <= {
        p.name for p in (package / "configs").glob("*.py")
    }
    assert (package / "py.typed").exists()
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_it_trains_the_quickstart_config_and_searches(installed: Path, tmp_path: Path) -> None:
    console = str(installed / "bin" / "clip-lite")
    short = [f"--config.{field}" for field in ("steps=3", "optim.warmup_steps=1", "eval.every=3")]
    train = ["train", "--config", "configs/quickstart.py", "--workdir", "run", *short]
    printed = command(installed, tmp_path, console, *train)
    assert "report: run/report.html" in printed
    (tmp_path / "pictures").mkdir()
    for shape in ("circle", "cross"):
        draw(shape, "red").save(tmp_path / "pictures" / f"{shape}.png")
    search = ["search", "--model", "run", "--images", "pictures", "red circle"]
    printed = command(installed, tmp_path, console, *search)
    assert sorted(line.split()[1] for line in printed.splitlines()) == [
        "pictures/circle.png",
        "pictures/cross.png",
    ]
