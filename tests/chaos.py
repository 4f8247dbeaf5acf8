"""A training that is killed again and again, and its checkpoints damaged in between.

Used by `test_chaos` (3 kills) and ``long/test_chaos_full`` (30).  The run is ``python -m
clip_lite_jax.main`` with a configuration file that calls `install`: it notes the examples of every
step, and ends the process at the moment that the environment variable ``CHAOS`` names.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conftest import FLAGS, tiny_config

from clip_lite_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    NegativesConfig,
    ObjectiveConfig,
    OptimConfig,
    to_dict,
)
from clip_lite_jax.files import read_json_lines
from clip_lite_jax.metrics import FROM_THE_MACHINE, read_metrics

EVERY = 5
"""Steps between checkpoints."""

# --- In the process that trains -------------------------------------------------------------------

CONFIG = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import chaos
from clip_lite_jax.config import Config, from_dict
chaos.install()

def get_config():
    return from_dict(Config, json.loads(Path(__file__).with_suffix(".json").read_text()))
"""

AT_START = ("clock", "before", "restore", "rewrite", "renamed")
"""Moments that come before the first step; the others wait for their step."""
IN_SAVING = ("write", "seal", "sealing", "sealed", "delete", "stopping")
IN_THE_LOOP = ("step", "logged", "evaluation", "evaluated")
"""``test`` is after the last one."""


class Striker:
    """Kills its own process when the moment has come."""

    def __init__(
        self, moment: str, step: int, signal: int, delay: float, then: float | None
    ) -> None:
        """Once, at the first `moment` from `step` on, after `delay` seconds; `then` seconds later
        with SIGKILL."""
        self.moment, self.from_step, self.signal = moment, step, signal
        self.delay, self.then = delay, then
        self.step = -1
        self.struck = False

    def at(self, moment: str) -> None:
        late = moment == "step" and self.moment in AT_START  # there was nothing to rename
        if self.struck or not (moment == self.moment or late):
            return
        if self.moment in (*IN_SAVING, *IN_THE_LOOP) and self.step < self.from_step:
            return
        self.struck = True
        print(f"CHAOS: {self.moment}, {signal.Signals(self.signal).name}", flush=True)
        if self.then is not None:
            threading.Timer(self.delay + self.then, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.delay:
            threading.Timer(self.delay, os.kill, (os.getpid(), self.signal)).start()
        else:
            os.kill(os.getpid(), self.signal)


def install() -> None:
    """Watches this process as ``CHAOS`` says: ``{"ids": FILE, "strike": {...} or null}``."""
    from clip_lite_jax import checkpoints, main, manifest, metrics
    from clip_lite_jax import train as training

    given = json.loads(os.environ["CHAOS"])
    striker = Striker(**(given["strike"] or NEVER))

    def around(place: Any, name: str, before: str = "", after: str = "") -> None:
        real = getattr(place, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            striker.at(before)
            result = real(*arguments, **named)
            striker.at(after)
            return result

        setattr(place, name, watched)

    around(training, "make_train_step", "before")
    around(training, "_evaluated", "evaluation", "evaluated")
    around(metrics.MetricWriter, "write", after="logged")
    around(checkpoints.Checkpoints, "restore", "restore")
    around(checkpoints.Checkpoints, "_finish", "write")
    around(checkpoints, "seal", "seal", "sealed")
    around(main, "evaluate", "test")
    _watch_files(striker, manifest)
    _watch_batches(striker, training, Path(given["ids"]))
    striker.at("clock")


NEVER = {"moment": "never", "step": 0, "signal": 0, "delay": 0.0, "then": None}


def _watch_files(striker: Striker, manifest: Any) -> None:
    """Moments at which a file is half written, or a folder half deleted."""
    rename, move, rmtree, atomic = Path.replace, Path.rename, shutil.rmtree, manifest.write_atomic

    def replaced(path: Path, target: Any) -> Path:
        if path.name == "metrics.tmp":
            striker.at("rewrite")
        return rename(path, target)

    def moved(path: Path, target: Any) -> Path:
        result = move(path, target)
        striker.at("renamed")
        return result

    def deleted(path: Any, *arguments: Any, **named: Any) -> None:
        if striker.moment == "delete" and Path(path).name.isdigit():
            if striker.step >= striker.from_step and not striker.struck:
                files = sorted(file for file in Path(path).rglob("*") if file.is_file())
                for file in files[::2]:
                    file.unlink()
            striker.at("delete")
        rmtree(path, *arguments, **named)

    def sealed(path: Path, content: bytes) -> None:
        if striker.moment == "sealing" and striker.step >= striker.from_step:
            path.with_name(f"{path.name}.0.tmp").write_bytes(content[: len(content) // 2])
            striker.at("sealing")
            path.with_name(f"{path.name}.0.tmp").unlink()
        atomic(path, content)

    Path.replace, Path.rename = replaced, moved  # type: ignore[method-assign, assignment]
    shutil.rmtree, manifest.write_atomic = deleted, sealed  # type: ignore[assignment]


def _watch_batches(striker: Striker, training: Any, ids: Path) -> None:
    """Notes the examples of every step before it is taken."""
    train_batches, put_batch = training.train_batches, training.put_batch

    def batches(transform: Any, batch_size: int, seed: int, start: int, *rest: Any) -> Any:
        striker.step = start - 1
        return train_batches(transform, batch_size, seed, start, *rest)

    def put(mesh: Any, batch: Any, *rest: Any) -> Any:
        striker.step += 1
        with ids.open("a") as file:
            file.write(json.dumps({"step": striker.step, "ids": batch.index.ravel().tolist()}))
            file.write("\n")
        placed = put_batch(mesh, batch, *rest)
        striker.at("step")
        striker.at("stopping")
        return placed

    training.train_batches, training.put_batch = batches, put


# --- Damage ---------------------------------------------------------------------------------------


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if not data:
        path.write_bytes(b"\0")
        return
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def cut(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    if data:
        path.write_bytes(data[: dice.randrange(len(data))])
    else:
        path.unlink()


def delete(path: Path, dice: random.Random) -> None:
    del dice
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "bit-flipped": flip,
    "truncated": cut,
    "deleted": delete,
}


# --- The one who kills ----------------------------------------------------------------------------


def everything(table: Path, steps: int) -> Config:
    """A run whose state has all that can go from step to step, with many checkpoints."""
    config = tiny_config(
        table,
        steps=steps,
        optim=OptimConfig(warmup_steps=1, ema_decay=0.9, lookahead_steps=3),
        objective=ObjectiveConfig(name="dv"),
        negatives=NegativesConfig(name="queue", sides="both", block=4, lanes=2, memory=4),
        checkpoint=CheckpointConfig(every=EVERY, keep=3, keep_every=4 * EVERY),
        eval=EvalConfig(every=2 * EVERY, batch_size=16),
    )
    return replace(config, data=replace(config.data, augment=AugmentConfig(hue=0.1)))


@dataclass
class Chaos:
    """One training in `folder`, and what was done to it."""

    folder: Path
    seed: int
    history: list[str] = field(default_factory=list)
    damaged: dict[Path, int] = field(default_factory=dict)
    """Folders that were damaged, and their inodes: another may take the place of one."""

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.starts = 0

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def start(self, strike: dict[str, Any] | None = None) -> subprocess.Popen[bytes]:
        self.starts += 1
        flags = [flag for flag in FLAGS if "device_count" not in flag]
        flags.append("--xla_force_host_platform_device_count=2")
        given = {"ids": str(self.folder / "ids.jsonl"), "strike": strike}
        arguments = ["--config", str(self.folder / "config.py"), "--workdir", str(self.workdir)]
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "clip_lite_jax.main", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"XLA_FLAGS": " ".join(flags), "CHAOS": json.dumps(given)},
            )

    @property
    def log(self) -> Path:
        return self.folder / f"log.{self.starts}"

    def run(self, strike: dict[str, Any] | None = None) -> int:
        """Starts it, waits for its end, and looks at what it said; returns its status."""
        expected, unusable = self.newest_sound()
        sealed = bool(self.sealed())
        begun = time.monotonic()
        process = self.start(strike)
        try:
            status = process.wait(1800)
        finally:
            process.kill()
        text = self.log.read_text()
        self.history.append(
            f"start {self.starts} from {expected}: {strike}: status {status} after "
            f"{time.monotonic() - begun:.0f} s, struck: {'CHAOS: ' in text}"
        )
        allowed = {0, 2 if sealed and expected is None else 0}
        if strike is not None:
            allowed |= {-strike["signal"], 75 if strike["signal"] == signal.SIGTERM else 0}
            allowed |= {0 if strike["then"] is None else -signal.SIGKILL}
        assert status in allowed, self.story(text)
        if status == 75:
            assert "; the same command goes on from there" in text, self.story(text)
        if status == 2:
            assert f"error: all checkpoints in {self.checkpoints} are damaged" in text
        before = text.partition("training examples,")[0]  # evaluation restores it once more
        if said := [line for line in before.splitlines() if line.startswith("restored ")]:
            assert said[0] == f"restored checkpoint {expected} of {self.workdir}", self.story(text)
            for path in unusable:
                lines = [line for line in text.splitlines() if f"checkpoint {path} " in line]
                assert any("not used" in line for line in lines), self.story(text)
        elif status == 0:
            assert expected is None, self.story(text)
        return status

    def story(self, text: str = "") -> str:
        return "\n".join([f"CHAOS_SEED={self.seed}", *self.history, text[-4000:]])

    def sealed(self) -> dict[int, Path]:
        found = {p.name: p for p in self.checkpoints.glob("*") if (p / "manifest.json").exists()}
        return {int(name): found[name] for name in found if name.isdigit()}

    def sound(self) -> dict[int, Path]:
        steps = self.sealed().items()
        return {n: path for n, path in steps if self.damaged.get(path) != path.stat().st_ino}

    def newest_sound(self) -> tuple[int | None, list[Path]]:
        """The step to go on from by what we know, and the newer folders that must not be used."""
        newest = max(self.sound(), default=None)
        folders = {int(p.name): p for p in self.checkpoints.glob("*") if p.name.isdigit()}
        return newest, [p for step, p in folders.items() if newest is None or step > newest]

    def damage(self, how: str) -> None:
        """Damages a file of one of the checkpoints, most often of the newest.

        The last sound one is spared: `damage_all` is what has nothing left.
        """
        sound = self.sound()
        if len(sound) < 2:
            self.history.append(f"not damaged: {len(sound)} sound checkpoint")
            return
        path = sound[max(sound) if self.dice.random() < 0.7 else self.dice.choice([*sound])]
        file = self.dice.choice(sorted(p for p in path.rglob("*") if p.is_file()))
        DAMAGE[how](file, self.dice)
        self.damaged[path] = path.stat().st_ino
        self.history.append(f"{how}: {file.relative_to(self.checkpoints)}")

    def damage_all(self) -> None:
        """Nothing sound is left: the run must refuse; then a copy comes back."""
        copy = self.folder / "copy"
        shutil.copytree(self.checkpoints, copy)
        known = dict(self.damaged)
        for path in self.sealed().values():
            files = [p for p in path.rglob("*") if p.is_file() and p.stat().st_size]
            flip(self.dice.choice(sorted(files)), self.dice)
            self.damaged[path] = path.stat().st_ino
        assert self.run() == 2, self.story(self.log.read_text())
        broken = [path for path in known if known[path] == self.damaged[path]]
        shutil.rmtree(self.checkpoints)
        copy.rename(self.checkpoints)
        self.damaged = {p: p.stat().st_ino for p in broken if p.exists()}
        self.history.append("all were damaged, refused, and came back from a copy")

    def lose(self) -> None:
        """The newest checkpoint is gone as a whole."""
        sound = self.sound()
        if len(sound) > 1:
            shutil.rmtree(sound[max(sound)])
            self.history.append(f"lost: {max(sound)}")

    def strike(self, moment: str, from_step: int, seconds: float) -> dict[str, Any]:
        """A kill at `moment`, at once or a little later; `seconds` is how long a start takes."""
        asked = signal.SIGTERM if self.dice.random() < 0.4 else signal.SIGKILL
        delay = 0.0 if self.dice.random() < 0.5 else self.dice.uniform(0, 0.1)
        then = None
        if moment == "clock":
            delay = self.dice.uniform(0.1, 1.0) * seconds
        if moment == "stopping":  # killed while it saves because it was asked to end
            asked, delay, then = signal.SIGTERM, 0.0, self.dice.uniform(0.0, 0.4)
        return {
            "moment": moment,
            "step": from_step,
            "signal": int(asked),
            "delay": delay,
            "then": then,
        }


def prepare(folder: Path, config: Config, seed: int = 0) -> Chaos:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "config.py").write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    return Chaos(folder, seed)


# --- What came of it ------------------------------------------------------------------------------


def arrays(workdir: Path, step: int) -> dict[str, Any]:
    """All arrays of a checkpoint, of the weights and the optimizer, by their paths."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found: dict[str, Any] = {}
    for part in ("weights", "optimizer"):
        tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / part)
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        found |= {part + jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return found


def curve(workdir: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what a clock measured."""
    return [
        {k: v for k, v in line.items() if k not in FROM_THE_MACHINE}
        for line in read_metrics(workdir)
    ]


def ids(folder: Path) -> dict[int, list[int]]:
    """The examples of every step; one that was begun again had the same."""
    steps: dict[int, list[int]] = {}
    for line in read_json_lines(folder / "ids.jsonl"):
        assert steps.setdefault(line["step"], line["ids"]) == line["ids"], line["step"]
    return steps


def assert_equal(disturbed: Chaos, undisturbed: Chaos, steps: int) -> None:
    """Bit for bit: parameters and optimizer, examples, curve, results."""
    story = disturbed.story()
    one, other = (arrays(chaos.workdir, steps) for chaos in (disturbed, undisturbed))
    assert one.keys() == other.keys(), story
    assert len(one) > 20
    changed = [path for path in one if one[path].tobytes() != other[path].tobytes()]
    assert not changed, f"{story}\n{changed}"
    assert ids(disturbed.folder) == ids(undisturbed.folder), story
    assert sorted(ids(disturbed.folder)) == list(range(steps)), story
    assert curve(disturbed.workdir) == curve(undisturbed.workdir), story
    results = [
        json.loads((chaos.workdir / "results.json").read_text())["test"]
        for chaos in (disturbed, undisturbed)
    ]
    assert results[0] == results[1], story
