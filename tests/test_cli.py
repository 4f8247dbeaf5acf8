"""``clip-lite`` and ``python -m clip_lite_jax.main``: what they print and how they fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw

from clip_lite_jax import cli
from clip_lite_jax._version import __version__
from clip_lite_jax.commands import train


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert __version__ in printed
    assert "--config.optim.learning_rate=3e-4" in printed


def test_config_prints_the_resolved_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--config", "quickstart.py", "--config.optim.b2=0.5"]) == 0
    assert "b2: 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "--config", "nowhere.py"], "nowhere.py: no such file"),
        (["config", "--config", "quickstart.py", "--config.optim.lr=1"], "optim.lr: no such field"),
        (["config", "--config", "quickstart.py", "--steps=1"], "unknown argument '--steps=1'"),
        (["search", "--model", "m", "--images", "i", "q", "--top=1"], "unknown argument '--top=1'"),
        (["search", "--model", "nowhere", "--images", ".", "cat"], "nowhere holds no checkpoints"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_search_prints_the_best_files(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for colour in ("red", "blue"):
        draw("circle", colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    arguments = [
        "--model",
        str(finished_run),
        "--images",
        str(tmp_path),
        "--count",
        "1",
        "a circle",
    ]
    assert cli.main(["search", *arguments]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert printed.out.split()[1] in {str(tmp_path / "red.png"), str(tmp_path / "blue.png")}
    assert "broken.png: cannot be decoded" in printed.err


def test_the_module_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clip_lite_jax.main", "--config", "quickstart.py"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path), "--config.data.source=nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "data.source='nowhere': neither a built-in source" in done.stderr


def test_control_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_config", interrupted)
    assert cli.main(["config", "--config", "configs/quickstart.py"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
