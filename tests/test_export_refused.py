"""Exported folders whose parts disagree are refused, and both values are named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

import clip_lite_jax
from clip_lite_jax.apps.export import export
from clip_lite_jax.config import EncoderConfig
from clip_lite_jax.errors import CheckpointError
from clip_lite_jax.pretrained.files import read_weights, write_safetensors
from clip_lite_jax.pretrained.own import OWN_FILE, WEIGHTS_FILE, sha256
from clip_lite_jax.pretrained.towers import resolve


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "whole"
    export(finished_run, out)
    return out


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stated = json.loads((folder / OWN_FILE).read_text())
    change(stated)
    (folder / OWN_FILE).write_text(json.dumps(stated))


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def flip_a_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def change_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"#words\na\nb")


def state_other_pixels(folder: Path) -> None:
    edit(folder, lambda stated: stated["preprocessing"].update(mean=[0.4, 0.5, 0.5]))


def state_another_critic(folder: Path) -> None:
    edit(folder, lambda stated: stated["config"]["model"]["critic"]["options"].update(width=8))


def state_another_vocabulary(folder: Path) -> None:
    edit(folder, lambda stated: stated["text"].update(vocab_size=7))


def leave_out_a_weight(folder: Path) -> None:
    weights = read_weights(folder)
    del weights["critic/params/score_bias"]
    rewrite(folder, weights)


def widen_a_weight(folder: Path) -> None:
    weights = read_weights(folder)
    rewrite(folder, weights | {"critic/params/score_bias": np.zeros(3, np.float32)})


def rewrite(folder: Path, weights: dict[str, np.ndarray]) -> None:
    write_safetensors(folder / WEIGHTS_FILE, weights, {})
    digest = sha256(folder / WEIGHTS_FILE)
    edit(folder, lambda stated: stated["weights"].update(sha256=digest))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (flip_a_weight, r"model.safetensors has sha256 \w+, but clip_lite_jax.json states \w+"),
        (change_the_tokenizer, r"tokenizer.model has sha256 \w+, but .* states \w+"),
        (state_other_pixels, r"preprocessing.mean=\[0.4, 0.5, 0.5\], but .* give \[0.5, 0.5, 0.5"),
        (state_another_critic, r"states critic.width=16, but its config and files give 8"),
        (state_another_vocabulary, r"tokenizer.model has \d+ tokens, but .*vocab_size=7"),
        (leave_out_a_weight, r"score_bias is missing in model.safetensors, and float32 \(\)"),
        (widen_a_weight, r"score_bias is float32 \(3,\) in model.safetensors, and float32 \(\)"),
    ],
)
def test_parts_that_disagree_are_refused(
    folder: Path, tmp_path: Path, tamper: Callable[[Path], None], message: str
) -> None:
    changed = copy(folder, tmp_path / "changed")
    tamper(changed)
    with pytest.raises(CheckpointError, match=message):
        clip_lite_jax.load(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stated: stated.update(format=2), "format=2, and version .* reads 1"),
        (lambda stated: stated.pop("weights"), "lacks 'weights'"),
        (lambda stated: stated["tokenizer"].update(file="../x"), "is not a file's name"),
        (lambda stated: stated["tokenizer"].update(file="other"), "it is not there"),
        (lambda stated: stated["config"].update(stepz=1), "clip_lite_jax.json: Config.stepz"),
    ],
)
def test_json_that_is_damaged_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed = copy(folder, tmp_path / "changed")
    edit(changed, change)
    with pytest.raises(CheckpointError, match=message):
        clip_lite_jax.load(changed)


@pytest.mark.parametrize("tamper", [flip_a_weight, change_the_tokenizer, state_other_pixels])
def test_a_changed_folder_is_no_start_for_a_run(
    folder: Path, pairs: Path, tmp_path: Path, tamper: Callable[[Path], None]
) -> None:
    changed = copy(folder, tmp_path / "changed")
    tamper(changed)
    base = tiny_config(pairs)
    image = EncoderConfig(name="convnet", init_from=str(changed))
    with pytest.raises(CheckpointError, match=r"clip_lite_jax.json states"):
        resolve(replace(base, model=replace(base.model, image=image)))
