"""What a person who watches a run would be told: it no longer learns, and why."""

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

PATIENCE = 20
"""Logged steps in a row for which something holds before it is told of."""
SMALLEST_SPREAD = 0.01
SMALLEST_LOSS = 1e-3
"""Of the Jensen–Shannon bound, which is 2 log 2 by chance: no gradient is left."""


class Alarms:
    """Tells, once every time it comes, of collapse, saturation and a temperature at its limit."""

    def __init__(self, objective: str, temperature_range: tuple[float, float] | None) -> None:
        self._objective, self._range = objective, temperature_range
        self._times: dict[str, int] = {}

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at what was logged for a step."""
        found = problems(values, self._objective, self._range)
        self._times = {name: self._times.get(name, 0) + 1 for name in found}
        for name, message in found.items():
            if self._times[name] == PATIENCE:
                log.warning("step %d, and %d logged ones before: %s", step, PATIENCE - 1, message)


def problems(
    values: Mapping[str, float], objective: str, temperature_range: tuple[float, float] | None
) -> dict[str, str]:
    """What is wrong with the numbers of a step, by a name for it."""
    found = {}
    for side in ("image", "text"):
        spread = values.get(f"{side}_spread", 1.0)
        if spread < SMALLEST_SPREAD:
            found[f"{side} collapse"] = (
                f"all {side}s have nearly the same embedding ({side}_spread {spread:.2g}, of 1): "
                "a lower optim.learning_rate, a longer optim.warmup_steps or a smaller "
                "objective.prior_weight may help; check that the data differs"
            )
    if objective == "jsd" and values.get("bound_loss", 1.0) < SMALLEST_LOSS:
        found["saturation"] = (
            f"the critic tells all pairs from their negatives (loss {values['bound_loss']:.2g}) "
            "and learns nothing more: try harder negatives (negatives.name=hard) or more data"
        )
    temperature = values.get("temperature")
    if temperature is not None and temperature_range is not None:
        for limit, name in zip(temperature_range, ("lower", "upper"), strict=True):
            if abs(temperature / limit - 1) < 1e-3:
                found["temperature"] = (
                    f"the temperature is at its {name} limit {limit:g}: "
                    "model.critic.options.temperature_range allows it no further"
                )
    return found
