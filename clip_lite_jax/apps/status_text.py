"""How a run is, as text of a screen."""

import textwrap
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from clip_lite_jax import status as written
from clip_lite_jax.apps.plan_text import binary
from clip_lite_jax.apps.status import DIED, RUNNING, SILENT, STALLED, command_of

COLUMNS = 80
LABEL = 14
LINES_OF_A_MESSAGE, LINES_OF_A_COMMAND = 4, 6
LONGEST_NAME = 30
DIRECTIONS = ("text_to_image", "image_to_text")
SHOWN = 3
"""Galleries, checkpoints and other folders, each."""
Row = tuple[str, str]


def describe(found: dict[str, Any]) -> str:
    """What `apps.status.status` has found, for a terminal of 80 columns.

    Whatever the files hold, nothing but printable characters comes out.
    """
    rows = [
        *_state(found),
        *_origin(found),
        *_training(found),
        *_evaluation(found, "evaluation"),
        *_evaluation(found, "results"),
        *_checkpoints(found),
        *_skipped(found),
        *_end(found),
    ]
    lines = [line for label, text in rows for line in _lines(label, text)]
    return "\n".join([_plain(_headline(found)), "", *lines])


def _lines(label: str, text: str) -> list[str]:
    """A row, on as many lines as it needs, within reason."""
    parts = textwrap.wrap(
        _plain(text),
        COLUMNS - LABEL,
        max_lines=LINES_OF_A_MESSAGE,
        placeholder=" ...",
        break_on_hyphens=False,
        break_long_words=False,  # paths and commands are copied
    )
    labels = [_plain(label), *[""] * len(parts)]
    return [f"{a:<{LABEL}}{b}".rstrip() for a, b in zip(labels, parts or [""], strict=False)]


def _plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _headline(found: dict[str, Any]) -> str:
    step, steps, left = found["step"], found["steps"], found["seconds_left"]
    parts = [found["verdict"].upper() if found["exit_status"] else found["verdict"]]
    if step is not None:
        share = f" of {steps:,} ({100 * step / steps:.0f} %)" if steps else ""
        parts.append(f"step {step:,}{share}")
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return f"{found['workdir']}: {', '.join(parts)}"


def _state(found: dict[str, Any]) -> Iterable[Row]:
    verdict, state, process = found["verdict"], found["state"], found["process"]
    sign, quiet = (duration(found[f"{name}_seconds"]) for name in ("last_sign", "quiet"))
    since = _age(found["since"], found)
    if not state:
        yield "state", f"not known: no {written.STATUS_FILE}; its files last changed {sign} ago"
    elif state in written.ENDED:
        yield "state", f"{state} {since} ago"
    elif verdict == RUNNING:
        yield "state", f"{state} for {since}, the last sign of it {sign} ago"
    else:
        yield "state", f"was {state}; the last sign of it {sign} ago"
    if process["pid"]:
        yield "process", f"{process['pid']} on {process['host']}{_whether(found, quiet)}"
    if found["problem"]:
        yield "problem", found["problem"]


def _whether(found: dict[str, Any], quiet: str) -> str:
    """How it is known whether the process is there."""
    verdict, process = found["verdict"], found["process"]
    if verdict in (written.FINISHED, written.INTERRUPTED, written.FAILED):
        return ", still there" if process["alive"] else ""
    known = {
        RUNNING: "",
        STALLED: f": it is there, but {quiet} without a sign are too long",
        DIED: " is gone, without a word",
        SILENT: f": another machine; {quiet} without a sign are too long",
    }[verdict]
    if verdict != RUNNING:
        return known
    return ", alive" if process["alive"] else ": another machine, told by its last sign"


def _origin(found: dict[str, Any]) -> Iterable[Row]:
    attempt, devices, version = found["attempt"], found["devices"], found["version"]
    yield "run", f"began {_date(found['began'])}, {_age(found['began'], found)} ago"
    if (attempt["number"] or 1) > 1:
        came = "" if attempt["step"] is None else f" from step {attempt['step']:,}"
        yield "attempt", f"{attempt['number']:,}{came}, begun {_age(attempt['began'], found)} ago"
    if devices["count"]:
        several = f" in {found['processes']:,} processes" if (found["processes"] or 1) > 1 else ""
        yield "devices", f"{devices['count']:,} × {devices['kind']}{several}, version {version}"


def _training(found: dict[str, Any]) -> Iterable[Row]:
    now, trend = found["training"], found["loss"]
    if "loss" in now:
        text = f"{now['loss']:.4g}"
        if trend is not None:
            text += (
                f", {trend['direction']}: mean {trend['mean']:.4g} of the last "
                f"{trend['lines']} lines, {trend['mean_before']:.4g} before"
            )
        yield "loss", text
    speed = [
        text.format(now[name])
        for name, text in (
            ("images_per_second", "{:,.4g} images/s"),
            ("data_wait", "data wait {:.0%}"),
            ("mfu", "MFU {:.1%}"),
            ("device_memory_gib", "{:.2f} GiB of a device"),
        )
        if name in now
    ]
    if speed:
        yield "speed", ", ".join(speed)
    if "data_wait_slowest" in now:
        yield (
            "slowest",
            (
                f"process: waits for data {now['data_wait_slowest']:.0%} of a step, busy in Python "
                f"{now.get('host_overhead_slowest', 0):.0%}"
            ),
        )
    for alarm in found["alarms"]:
        yield "alarm", alarm


def _evaluation(found: dict[str, Any], which: str) -> Iterable[Row]:
    values = found[which]
    if values is None:
        return
    what = "on test data, " if which == "results" else ""
    took = f", took {duration(values['seconds'])}" if values.get("seconds") is not None else ""
    when = f", {_age(values['time'], found)} ago" if values["time"] else ""
    step = "?" if values["step"] is None else f"{values['step']:,}"
    yield which, f"{what}of step {step}{when}{took}"
    table = list(_table(values["numbers"]))
    names = min(max((len(row[0]) for row in table), default=0), LONGEST_NAME)
    for name, *cells in table:
        yield "", f"{name[:names]:<{names}}" + "".join(f"  {cell:<14}" for cell in cells)


def _table(numbers: dict[str, float]) -> Iterable[tuple[str, ...]]:
    """Retrieval beside chance, and what is certain about the information."""
    galleries = dict.fromkeys(n.split("/")[1] for n in numbers if n.startswith("retrieval/"))
    if galleries:
        yield "R@10 (chance)", "text → image", "image → text"
    for name in list(galleries)[:SHOWN]:
        yield name, *(_recall(numbers, f"retrieval/{name}/{way}") for way in DIRECTIONS)
    if len(galleries) > SHOWN:
        yield (f"and {len(galleries) - SHOWN} more",)
    bound = numbers.get("information/jsd_lower_bound")
    if bound is not None:
        yield "information, at least", f"{bound:.3f} nats"


def _recall(numbers: dict[str, float], way: str) -> str:
    value, chance = (numbers.get(f"{way}_r10{end}") for end in ("", "_chance"))
    return "" if value is None else f"{value:.3f}" + (f" ({chance:.3f})" if chance else "")


def _checkpoints(found: dict[str, Any]) -> Iterable[Row]:
    saved, others = found["checkpoints"], found["no_checkpoints"]
    if not saved:
        yield "checkpoints", "none yet" if found["verdict"] == RUNNING else "none"
    # What is wrong is never among those that are left out.
    shown = [one for n, one in enumerate(saved) if n < SHOWN or one["problem"] or not one["sealed"]]
    for number, one in enumerate(shown[: 2 * SHOWN]):
        state = "sealed" if one["sealed"] else _unsealed(found)
        if one["problem"]:
            state = f"DAMAGED: {one['problem']}"
        text = f"step {one['step']:,}, {_age(one['time'], found)} ago, {binary(one['bytes'])}"
        yield "" if number else "checkpoints", f"{text}, {state}"
    if len(saved) > len(shown):
        yield "", f"and {len(saved) - len(shown)} older ones"
    for kind, names in (
        ("damaged", [name for name in others if ".damaged" in name]),
        (_unsealed(found), [name for name in others if ".damaged" not in name]),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield "", f"{kind}, not used: {', '.join(names[:SHOWN])}{more}"


def _unsealed(found: dict[str, Any]) -> str:
    return "being written" if found["verdict"] == RUNNING else "not finished"


def _skipped(found: dict[str, Any]) -> Iterable[Row]:
    examples, steps = found["skipped_examples"], found["skipped_steps"]
    parts = []
    if examples:
        parts.append(f"{examples:,} examples (skipped.jsonl)")
    if steps:
        parts.append(f"{steps:,} steps that were not finite, in this attempt")
    if parts:
        yield "skipped", ", ".join(parts)


def _end(found: dict[str, Any]) -> Iterable[Row]:
    if found["message"] or found["error"]:
        name = f"{found['error']}: " if found["verdict"] == written.FAILED else ""
        yield "message", f"{name}{found['message']}"
    if found["next"]:
        yield "next", found["next"]
    if found["next"] and found["command"]:
        yield from _command(command_of(found))


def _command(words: Iterable[str]) -> Iterable[Row]:
    """On lines that a shell takes for one."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > COLUMNS - LABEL - 3:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    if len(lines) > LINES_OF_A_COMMAND:
        lines[LINES_OF_A_COMMAND - 1 :] = ["... (--json prints the rest)"]
    for number, line in enumerate(lines, 1):
        yield "command" if number == 1 else "", line + " \\" * (number < len(lines))


def duration(seconds: float) -> str:
    """With two units where the first is small."""
    if round(seconds) < 100:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24:,} d {hours % 24} h"


def _age(time: str | None, found: dict[str, Any]) -> str:
    if time is None:
        return "?"
    passed = datetime.fromisoformat(found["now"]) - datetime.fromisoformat(time)
    return duration(max(passed.total_seconds(), 0))


def _date(time: str | None) -> str:
    return "?" if time is None else f"{time[:16].replace('T', ' ')} UTC"
