"""A run that is killed three times, with damage to its checkpoints, is the undisturbed one.

``CHAOS_SEED=7`` repeats the moments of a failure, which names its seed.
"""

import os
import random
from pathlib import Path

from chaos import DAMAGE, EVERY, IN_SAVING, IN_THE_LOOP, assert_equal, everything, prepare
from conftest import write_pairs

STEPS = 8 * EVERY


def test_kills_and_damage_leave_no_trace(tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    config = everything(write_pairs(tmp_path / "pairs"), STEPS)
    undisturbed = prepare(tmp_path / "undisturbed", config)
    chaos = prepare(tmp_path / "chaos", config, seed)
    ways = chaos.dice.sample(sorted(DAMAGE), 3)
    first, *rest = (chaos.dice.choice(among) for among in (IN_SAVING, IN_THE_LOOP, IN_SAVING))
    chaos.run(chaos.strike(first, 3 * EVERY, 0))  # the others find it compiled
    chaos.damage(ways[0])
    other = undisturbed.start()
    try:
        for number, (how, moment) in enumerate(zip(ways[1:], rest, strict=True)):
            chaos.run(chaos.strike(moment, (5 + 2 * number) * EVERY, 0))
            chaos.damage(how)
        assert chaos.run() == 0, chaos.story(chaos.log.read_text())
        assert other.wait(1800) == 0, undisturbed.log.read_text()
    finally:
        other.kill()
    assert_equal(chaos, undisturbed, STEPS)
