"""Loading, overriding and checking configurations."""

import json
from pathlib import Path

import pytest

from clip_lite_jax import cli
from clip_lite_jax.config import (
    Config,
    config_path,
    describe,
    field_paths,
    from_dict,
    load_config,
    override,
    parse_overrides,
    to_dict,
    validate,
)
from clip_lite_jax.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
BASE = Config(steps=1000, batch_size=64)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_survives_json(path: Path) -> None:
    config = load_config(path)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert "learning_rate" in describe(config)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.clip_norm", "null", None),
        ("data.augment.crop_scale", "[0.5, 1]", (0.5, 1.0)),
        ("optim.multipliers", '{"^text": 0.1}', {"^text": 0.1}),
        ("model.image.options.width", "12", {"width": 12}),
        ("data.source", "pairs.csv", "pairs.csv"),
        ("data.tokenizer", "12", "12"),
        ("log.tensorboard", "false", False),
        ("steps", "7", 7),
    ],
)
def test_overrides_take_the_type_of_their_field(name: str, text: str, value: object) -> None:
    changed: object = override(BASE, name, text)
    for part in name.split("."):
        changed = getattr(changed, part) if hasattr(changed, part) else {part: changed[part]}  # type: ignore[index]
    assert changed == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.lerning_rate", "1", "did you mean optim.learning_rate"),
        ("learning_rate", "1", "did you mean optim.learning_rate"),
        ("xyz", "1", "fields: accumulate, batch_size"),
        ("optim.learning_rate", "fast", r"optim.learning_rate=fast.*valid number.*'fast'"),
        ("optim.learning_rate", "-1", "greater than 0"),
        ("negatives.sides", "left", "'text', 'image' or 'both'"),
        ("optim.learning_rate.x", "1", "has no fields of its own"),
        ("steps", "1.5", "steps=1.5"),
    ],
)
def test_bad_overrides_name_the_field_and_the_way_out(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(BASE, name, text)


def test_arguments_are_read_with_and_without_equals() -> None:
    parsed = parse_overrides(["--config.steps=5", "--config.seed", "3"])
    assert parsed == {"steps": "5", "seed": "3"}
    with pytest.raises(ConfigError, match="unknown argument '--stepz=1'"):
        parse_overrides(["--stepz=1"])
    with pytest.raises(ConfigError, match="--config.seed needs a value"):
        parse_overrides(["--config.seed"])


def test_fields_between_sections_are_checked() -> None:
    with pytest.raises(ConfigError, match="optim.warmup_steps=100 is not below steps=50"):
        validate(Config(steps=50, batch_size=4))


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere.py: no such file; the package brings .*quickstart"
    ):
        load_config("nowhere.py")
    file = tmp_path / "mine.py"
    file.write_text("x = 1")
    with pytest.raises(ConfigError, match="mine.py: a config file defines get_config"):
        load_config(file)
    file.write_text("def get_config(): return 3")
    with pytest.raises(ConfigError, match="gave int, not Config"):
        load_config(file)
    file.write_text(
        "from clip_lite_jax.config import Config\n"
        "def get_config(): return Config(steps=0, batch_size=1, extra=2)"
    )
    with pytest.raises(ConfigError, match=r"Config.steps.*Config.extra"):
        load_config(file)


VARIANTS = """
from clip_lite_jax.config import Config
def get_config(size{default}): return Config(name=size, steps=1000, batch_size=4)
"""


def test_a_file_may_take_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(VARIANTS.format(default="='small'"))
    assert load_config(file).name == "small"
    assert load_config(f"{file}:large", {"steps": "200"}) == Config(
        name="large", steps=200, batch_size=4
    )
    assert cli.main(["config", "--config", f"{file}:large"]) == 0
    assert capsys.readouterr().out.startswith(f"# {file}:large\nname: large\n")


def test_variants_that_do_not_fit_are_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(VARIANTS.format(default=""))
    with pytest.raises(ConfigError, match=r"mine.py: .* needs a variant, .*mine.py:NAME"):
        load_config(file)
    with pytest.raises(ConfigError, match="nowhere.py: no such file; the package brings"):
        load_config("nowhere.py:large")
    file.write_text("from clip_lite_jax.config import *\ndef get_config(x): return Config(seed=x)")
    with pytest.raises(ConfigError, match=r"mine.py:large: Config.seed: .*'large'"):
        load_config(f"{file}:large")
    with pytest.raises(ConfigError, match=r"quickstart.py:x: .* takes no variant; leave :x out"):
        load_config("configs/quickstart.py:x")


def test_stored_configs_are_checked() -> None:
    with pytest.raises(ConfigError, match="Config.extra"):
        from_dict(Config, {**to_dict(BASE), "extra": 1})


def test_packaged_configs_are_found_by_name() -> None:
    assert config_path("configs/quickstart.py").name == "quickstart.py"
    assert config_path("elsewhere/quickstart.py") == CONFIGS / "quickstart.py"


def test_paths_cover_all_leaves() -> None:
    paths = set(field_paths(BASE))
    assert {"steps", "data.augment.flip", "model.image.name", "optim.b1"} <= paths
