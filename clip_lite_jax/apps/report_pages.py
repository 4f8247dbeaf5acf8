"""Templates of pages: self-contained HTML about things that come from strangers."""

from pathlib import Path

import jinja2

from clip_lite_jax.apps.report_tables import number, percent


def environment() -> jinja2.Environment:
    """Finds the templates beside this file; escapes everything, lets nothing undefined pass."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions, ids and file names come from strangers
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "duration": duration,
        "flop": flop,
    }
    return environment


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if 0 < seconds < 0.5:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def flop(operations: float) -> str:
    """With the unit that leaves a number of one to three digits."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
    for unit in units:
        if operations < 1000 or unit == units[-1]:
            break
        operations /= 1000
    return f"{operations:.3g} {unit}"
