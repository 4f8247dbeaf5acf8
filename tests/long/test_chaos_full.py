"""Thirty kills across one training, at every moment that we know of, with damage in between.

Some thirty starts of the command take minutes.  ``CHAOS_SEED=7`` repeats the moments of a failure,
which names its seed; ``-s`` shows the whole story.
"""

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos import (
    AT_START,
    DAMAGE,
    EVERY,
    IN_SAVING,
    IN_THE_LOOP,
    assert_equal,
    everything,
    prepare,
)
from conftest import write_pairs

STEPS = 40 * EVERY
MOMENTS = (*AT_START, *IN_SAVING, *IN_THE_LOOP) * 2


def test_thirty_kills_and_damage_leave_no_trace(tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    print(f"CHAOS_SEED={seed}")
    config = everything(write_pairs(tmp_path / "pairs"), STEPS)
    chaos, undisturbed = (
        prepare(tmp_path / name, config, seed) for name in ("chaos", "undisturbed")
    )
    begun = time.monotonic()
    assert undisturbed.run() == 0, undisturbed.log.read_text()
    seconds = time.monotonic() - begun

    dice = chaos.dice
    moments = dice.sample(MOMENTS, len(MOMENTS))
    number, count = 0, sum(moment not in AT_START for moment in moments)
    for moment in moments:
        number += moment not in AT_START
        from_step = 2 * EVERY + number * (STEPS - 8 * EVERY) // count
        chaos.run(chaos.strike(moment, from_step, min(seconds / 2, 20.0)))
        assert "CHAOS: " in chaos.log.read_text(), chaos.story()
        what = dice.random()
        if what < 0.6:
            chaos.damage(dice.choice(sorted(DAMAGE)))
        elif what < 0.7:
            chaos.lose()
        elif what < 0.8 and chaos.sealed():
            chaos.damage_all()
    chaos.run(chaos.strike("test", 0, 0))  # trained, and not yet evaluated
    assert chaos.run() == 0, chaos.story(chaos.log.read_text())
    print(chaos.story())
    print(f"{len(moments) + 1} kills in {time.monotonic() - begun:.0f} s")
    assert len(moments) >= 30
    assert_equal(chaos, undisturbed, STEPS)
