"""The tables of `train_step`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.pages import table
from clip_lite_jax.chips import peak_flops

COMMAND = "python -m benchmarks.train_step"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Those of the parts that are there, by name."""
    makers = {
        "loop": _loop,
        "steps cpu": _steps,
        "steps gpu": _steps,
        "jitter gpu": _jitter,
        "parts gpu": _parts,
    }
    found = {name: make(results[name]) for name, make in makers.items() if name in results}
    if "steps gpu" in results:
        traced = [r for r in results["steps gpu"]["records"] if _trace(r)]
        found |= {"kernels gpu": _kernels(traced[0])} if traced else {}
    return found


def _origin(part: dict[str, Any], command: str, more: str = "") -> str:
    facts = part["provenance"]
    where = facts["machine"]
    if "driver" in facts:
        where += f", {facts['devices']}, driver and memory {facts['driver']}"
    return (
        f"`{command}`, commit {facts['commit']}, {where}, Python {facts['python']}, "
        f"jax {facts['jax']}, {facts['date']}{more}."
    )


def _quartiles(values: Sequence[float], form: str = "{:.2f}") -> str:
    low, middle, high = map(form.format, values)
    return f"{middle} ({low} to {high})"


def _loop(part: dict[str, Any]) -> str:
    labels = {
        "bare": "the compiled step by itself, batches on the device",
        "ready": "the loop, batches ready in memory",
        "whole": "the loop with its input pipeline",
    }
    head = ("", "ms of a step", "over the step by itself", "ms of all cores", "over the step")
    lines: list[Sequence[str]] = [head, ("---",) * len(head)]
    for kind, label in labels.items():
        line = [label]
        for what in ("seconds", "work"):
            line.append(f"{1000 * np.median(part[what][kind]):.1f}")
            over = np.divide(part[what][kind], part[what]["bare"]) - 1
            middle = np.quantile(over, (0.25, 0.5, 0.75)).tolist()
            line.append(_quartiles(middle, "{:+.1%}") if kind != "bare" else "")
        lines.append(line)
    share = np.divide(part["waited"], part["seconds"]["whole"])
    waited = _quartiles(np.quantile(share, (0.25, 0.5, 0.75)).tolist(), "{:.2%}")
    text = f"Of the loop with its input pipeline, time spent waiting for a batch: {waited}."
    more = f"; {part['turns']} turns of {part['steps']} steps"
    return f"{table(lines)}\n\n{text}\n\n{_origin(part, COMMAND, more)}"


def _steps(part: dict[str, Any]) -> str:
    gpu = "driver" in part["provenance"]
    last = part["records"][-1]
    time = "ms of a step" if last["clock"] == "wall" else "ms of a core for a step"
    head = ["towers", "trained by", time, "pairs/s", "of open_clip's fastest"]
    head += ["MFU", "GiB", "s to compile"] if gpu else []
    lines: list[Sequence[str]] = [head, ["---"] * len(head)]
    for record in part["records"]:
        flops = next(w["facts"]["flops"] for w in record["ways"].values() if _has_flops(w))
        for name, way in record["ways"].items():
            if not way["seconds"]:
                lines.append([record["label"], name, "failed", *[""] * (len(head) - 3)])
                continue
            seconds = float(np.median(way["seconds"]))
            ratio = record["ratios"].get(name)
            line = [
                record["label"],
                name,
                f"{1000 * seconds:.1f}" if gpu else f"{1000 * seconds:.0f}",
                f"{record['rates'][name]:,.0f}",
                _quartiles(ratio) if ratio else "",
            ]
            if gpu:
                peak = peak_flops(way["facts"]["device"], record["case"]["dtype"])
                line += [
                    f"{flops / seconds / peak:.1%}" if peak else "",
                    f"{way['facts']['bytes'] / 2**30:.1f}",
                    f"{way['facts']['compile_seconds']:.0f}",
                ]
            lines.append(line)
    peers: dict[str, Any] = next(
        (w["facts"] for n, w in last["ways"].items() if _is_peer(n, w)), {}
    )
    versions = f", torch {peers.get('torch')}, open_clip {peers.get('open_clip')}"
    command = COMMAND + (" --gpu" if gpu else "")
    if last["cores"]:
        command += f" --cores {last['cores']} --clock {last['clock']}"
    more = f"{versions}; {last['rounds']} turns"
    return f"{table(lines)}\n\n{_parameters(last)}\n\n{_origin(part, command, more)}"


def _is_peer(name: str, way: dict[str, Any]) -> bool:
    return name.startswith("open_clip") and "parameters" in way["facts"]


def _has_flops(way: dict[str, Any]) -> bool:
    return "flops" in way["facts"]


def _parameters(record: dict[str, Any]) -> str:
    """What the towers have in common, in words."""
    sizes = [way["facts"]["parameters"] for way in record["ways"].values() if way["seconds"]]
    ours, theirs = sizes[0], sizes[-1]
    return (
        f"Parameters of the last towers: image {ours['image']:,} and text {ours['text']:,} here, "
        f"{theirs['image']:,} and {theirs['text']:,} in open_clip; what makes embeddings of "
        f"features, {ours['head']:,} here and {theirs['head']:,} there."
    )


def _trace(record: dict[str, Any]) -> Any:
    return record["ways"].get("ours, JSD", {}).get("trace")


def _kernels(record: dict[str, Any]) -> str:
    trace = _trace(record)
    lines: list[Sequence[str]] = [("where our step's time goes", "ms", "share"), ("---",) * 3]
    for name, milliseconds in sorted(trace["layers"].items(), key=lambda item: -item[1])[:12]:
        lines.append((name, f"{milliseconds:.2f}", f"{milliseconds / trace['total']:.0%}"))
    text = f"{record['label']}; {trace['total']:.1f} ms of kernels in a step under the profiler."
    return f"{table(lines)}\n\n{text}"


def _jitter(part: dict[str, Any]) -> str:
    lines: list[Sequence[str]] = [("colour jitter of a batch", "pixels", "ms"), ("---",) * 3]
    for size in part["sizes"]:
        what = "with hue" if size["hue"] else "without hue"
        lines.append(
            (f"{size['batch']} images, {what}", str(size["size"]), f"{1000 * size['seconds']:.2f}")
        )
    return f"{table(lines)}\n\n{_origin(part, COMMAND + ' --gpu --parts jitter')}"


def _parts(part: dict[str, Any]) -> str:
    lines: list[Sequence[str]] = [("part", "how", "ms"), ("---",) * 3]
    for name, versions in part["parts"].items():
        lines += [(name, how, f"{ms:,.2f}") for how, ms in versions.items()]
    note = f" {part['note']}" if "note" in part else ""
    return f"{table(lines)}\n\n{_origin(part, 'python -m benchmarks.gpu_parts')}{note}"
