"""Plans of two recipes at full size, and for chips of every kind.

Kept out of the ordinary run because compiling them takes seven minutes; `tests/test_plan.py`
compiles the same steps on small pictures or with few devices.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import flops
from test_plan import (
    LIBTPU,
    flags,
    needs_libtpu,
    quickstart_flops,
)

from clip_lite_jax import cli
from clip_lite_jax.apps.plan import Request, plan
from clip_lite_jax.config import load_config

pytestmark = needs_libtpu

RESNET50 = {
    "batch_size": "64",
    "data.image_size": "32",
    "negatives.block": "16",
    "model.text.options.layers": "1",
    "model.critic.options.width": "64",
    "model.critic.options.hidden": "64",
    "objective.prior_weight": "0",
    "optim.lookahead_steps": "0",
}


@pytest.fixture(autouse=True)
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(LIBTPU))


def planned(config: str, topology: str) -> dict[str, Any]:
    found = plan(load_config(config), Request(topology))
    assert found["fits"] is True
    memory = found["program"]["memory"]
    assert memory["parameters"] == 4 * sum(found["parameters"].values())
    return found


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x1", 4), ("v5p:2x2x1", 4), ("v6e:2x4", 8), ("v5e:1x1", 1)],
)
def test_other_chips(topology: str, devices: int) -> None:
    found = plan(load_config("configs/quickstart.py"), Request(topology))
    assert found["fits"] is True
    assert found["devices"] == devices  # a v4 chip of two cores is one device
    flops_of_all = devices * found["program"]["work"]["flops"]
    assert flops_of_all == pytest.approx(quickstart_flops(128), rel=1e-3)


def test_a_step_that_tpus_refuse() -> None:
    found = plan(load_config("configs/vit_l14.py"), Request("v5e:8x8"))
    assert found["fits"] is False
    assert found["program"]["needed"] > found["memory"] == 15.75 * 2**30
    assert [a["fits"] for a in found["attempts"]] == [False, False, True]
    assert "negatives.block=128: with accumulate=2" in found["attempts"][0]["reason"]
    assert found["attempts"][-1]["change"] == {"batch_size": "16384"}
    assert found["estimate"]["bound"] == "compute"


def test_the_main_recipe_of_the_paper() -> None:
    found = planned("configs/paper.py", "v5e:2x4")
    assert found["parameters"]["image_encoder"] == 23_508_032
    image, text = flops.resnet50(224), flops.transformer(12, 768, 30)
    heads = flops.head(2048, 2048, 2048) + flops.head(768, 2048, 2048)
    forward = sum(image.values()) + sum(text.values()) + heads
    # Of drawn features, that have no gradient, and of the encoders' own.
    priors = sum(2 * (2 * n * 1000 + 3 * (1000 * 200 + 200)) + n * 1000 for n in (2048, 768))
    expected = 2 * 128 * (3 * forward - image["stem"] + priors)
    assert found["program"]["work"]["flops"] == pytest.approx(expected, rel=1e-3)


def test_vit_l14_with_a_batch_of_32768() -> None:
    found = planned("configs/vit_l14.py", "v5e:16x16")
    image, text = flops.transformer(24, 1024, 257), flops.transformer(12, 768, 77)
    patches = 256 * 14**2 * 3 * 1024
    heads = flops.head(1024, 768, 768) + flops.head(768, 768, 768) + 768**2
    forward = sum(image.values()) + sum(text.values()) + patches + heads
    # Computed again: all of a block but the perceptron's second layer, which nothing needs.
    again = sum(
        part["attention"] + part["attention's and perceptron's weights"] * 2 // 3
        for part in (image, text)
    )
    expected = 2 * 128 * (3 * forward - patches + again)
    assert found["program"]["work"]["flops"] == pytest.approx(expected, rel=1e-3)
    # Gradients in the bfloat16 that made them, all of them, and nothing else.
    count = sum(found["parameters"].values())
    sent = found["program"]["work"]["sent"]
    assert sent["all-reduce"] == pytest.approx(2 * 255 / 256 * 2 * count, rel=0.01)
    assert sum(sent.values()) == sent["all-reduce"]


def test_resnet50_on_tpus(libtpu: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The step of a published recipe on small pictures: compiling it takes half a minute."""
    file = tmp_path / "plan.json"
    arguments = ["--config", "configs/paper.py:resnet50", "--topology", "v5e:2x2"]
    arguments += ["--price", "2", "--json", str(file)]
    assert cli.main(["plan", *arguments, *flags(RESNET50)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["parameters"]["image_encoder"] == 23_508_032  # torchvision's, without its head
    assert found["vocabulary"] == 30_522
    assert "assumed, of the published bert" in printed
    memory, work = found["program"]["memory"], found["program"]["work"]
    count = sum(found["parameters"].values())
    assert memory["parameters"] == 4 * count
    assert memory["optimizer state"] == pytest.approx(4 * count, rel=1e-3)  # momentum
    # A ring of four sends 3/4 of the gradient twice, in the bfloat16 that made it but for words.
    gradient = 2 * count + 2 * 30_522 * 768
    assert work["sent"]["all-reduce"] == pytest.approx(2 * 3 / 4 * gradient, rel=0.01)
    # Statistics of a batch stay on their device, so not every layer waits for the network.
    assert work["exchanges"]["all-reduce"] < 20
    assert 4 * work["flops"] == pytest.approx(resnet50_flops(64), rel=1e-3)
    assert "bound by" in printed
    assert "USD" in printed


def resnet50_flops(batch: int) -> int:
    """Of ResNet-50 on pictures of 32 pixels, one layer of BERT on 30 tokens, and the critic."""
    image, text = flops.resnet50(32), flops.transformer(1, 768, 30)
    heads = flops.head(2048, 64, 64) + flops.head(768, 64, 64)
    forward = sum(image.values()) + sum(text.values()) + 768**2 + heads  # with BERT's pooler
    return 2 * batch * (3 * forward - image["stem"])
