"""A plan as text."""

import math
from collections.abc import Iterable
from typing import Any

GIB = 2**30
Row = tuple[str, str, str]
"""What, how much, and a remark."""


def describe(plan: dict[str, Any]) -> str:
    """The plan, `plan_process.Plan` as plain data, as a table."""
    sections = [_head(plan), _parameters(plan), _memory(plan)]
    if plan["attempts"]:
        sections.append(_attempts(plan))
    if plan["planned"]["work"]:
        sections += [_work(plan), _time(plan)]
    if plan["batches"]:
        sections.append(_batches(plan))
    text = "\n\n".join(_table(section) for section in sections)
    return "\n".join([text, *(f"\nnote: {note}" for note in plan["notes"])])


def _table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    return "\n".join(
        f"{what:<{widths[0]}}  {value:>{widths[1]}}  {remark}".rstrip()
        for what, value, remark in rows
    )


def _head(plan: dict[str, Any]) -> list[Row]:
    return [
        ("config", "", plan["config"]),
        ("devices", "", f"{plan['devices']} × {plan['device_kind']} ({plan['target']})"),
        (
            "batch",
            "",
            f"{plan['batch_size']:,} = {plan['devices']} × "
            f"{plan['batch_size'] / plan['devices']:g}, {plan['steps']:,} steps, {plan['dtype']}",
        ),
        ("vocabulary", "", f"{plan['vocabulary']:,} ({plan['vocabulary_source']})"),
        ("compiled in", "", f"{plan['program']['seconds']:.0f} s"),
    ]


def _parameters(plan: dict[str, Any]) -> list[Row]:
    parts = plan["parameters"]
    rows = [("parameters", f"{sum(parts.values()):,}", "")]
    return rows + [(f"  {name}", f"{count:,}", "") for name, count in parts.items()]


def _memory(plan: dict[str, Any]) -> list[Row]:
    program, limit = plan["program"], plan["memory"]
    needed = program["needed"]
    rows = [("memory of a device", binary(needed), "needed")]
    rows += [(f"  {name}", binary(size), "") for name, size in program["memory"].items()]
    if limit is None:
        return [*rows, ("  it has", "?", "not stated: --memory GIB")]
    rows.append(("  it has", binary(limit), ""))
    if plan["fits"]:
        return [*rows, ("  left", binary(limit - needed), "it fits")]
    return [*rows, ("  missing", binary(needed - limit), "IT DOES NOT FIT")]


def _attempts(plan: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("to make it fit", "", "")]
    for attempt in plan["attempts"]:
        flags = " ".join(f"--config.{name}={value}" for name, value in attempt["change"].items())
        if attempt["program"] is None:
            rows.append((f"  {flags}", "-", attempt["reason"]))
        else:
            verdict = "fits: the figures below are of it" if attempt["fits"] else "does not fit"
            rows.append((f"  {flags}", binary(attempt["program"]["needed"]), verdict))
    return rows


def _work(plan: dict[str, Any]) -> list[Row]:
    work, devices = plan["planned"]["work"], plan["devices"]
    rows = [
        ("a step of a device", "", ""),
        (
            "  products",
            f"{number(work['flops'] / 1e9)} GFLOP",
            f"{devices * work['flops']:.4g} FLOP on all",
        ),
        ("  main memory", f"{number(work['bytes_moved'] / 1e9)} GB", "read and written"),
        ("  sent", f"{number(sum(work['sent'].values()) / 1e6)} MB", ""),
    ]
    for kind, times in work["exchanges"].items():
        if times:
            sent = f"{number(work['sent'][kind] / 1e6)} MB"
            rows.append((f"    {kind}", sent, f"{times} times"))
            rows += [
                (f"      {c['purpose']}", f"{number(c['sent'] / 1e6)} MB", f"in {c['times']}")
                for c in work["collectives"]
                if c["kind"] == kind
            ]
    return rows


def _time(plan: dict[str, Any]) -> list[Row]:
    found = plan["estimate"]
    if found is None:
        return [("time", "?", f"no speed is known of {plan['device_kind']}")]
    seconds, bound = found["seconds"], found["bound"]
    remarks = {
        "compute": f"at {found['utilization']:.0%} of the peak",
        "memory": "at full speed",
        "network": "at full speed, all links",
    }
    rows = [("time of a step", f"{number(seconds[bound] * 1e3)} ms", f"bound by {bound}")]
    rows += [
        (f"  {name}", f"{number(value * 1e3)} ms", remarks[name]) for name, value in seconds.items()
    ]
    rows += [
        ("steps/s", number(found["steps_per_second"]), "input and launch not counted"),
        ("images/s", number(found["images_per_second"]), ""),
        ("hours", number(found["hours"]), f"for {plan['steps']:,} steps"),
        ("chip-hours", number(found["chip_hours"]), ""),
    ]
    if found["cost"] is not None:
        price = found["cost"] / found["chip_hours"]
        rows.append(("cost", f"{found['cost']:,.2f} USD", f"at {price:g} USD per chip-hour"))
    return rows


def _batches(plan: dict[str, Any]) -> list[Row]:
    found = plan["batches"]
    more = found["too_large"]
    remark = "the search stops here" if more is None else f"{more:,} does not fit"
    rows: list[Row] = [("largest batch", f"{found['largest']:,}", remark)]
    tried = sorted(found["tried"].items(), key=lambda item: int(item[0]))
    return rows + [(f"  {int(batch):,}", binary(needed), "") for batch, needed in tried]


def number(value: float) -> str:
    """Four digits, or as many as there are before the point."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 6)}f}"


def binary(size: int) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
