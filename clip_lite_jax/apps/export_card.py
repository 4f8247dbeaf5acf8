"""The model card of an exported folder, filled from the run."""

from pathlib import Path
from typing import Any

import jinja2

from clip_lite_jax._version import __version__
from clip_lite_jax.apps.export_towers import detectron2_settings, torchvision_naming
from clip_lite_jax.apps.report_tables import directions
from clip_lite_jax.checkpoints import Checkpoints
from clip_lite_jax.config import Config, describe
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.sources import build_sources, fingerprint
from clip_lite_jax.errors import UserError
from clip_lite_jax.evaluate import read_results
from clip_lite_jax.files import write_atomic
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.pretrained import hub, packages
from clip_lite_jax.pretrained.own import portable, preprocessing

CARD_FILE = "README.md"
BUILT_IN = ("emoji", "shapes")
POOLED = {
    "pooler": "`model(**inputs).pooler_output`",
    "cls": "`model(**inputs).last_hidden_state[:, 0]`",
    "mean": "the mean of `model(**inputs).last_hidden_state` over tokens with attention_mask 1",
}
"""Where transformers has the features, by our name of the pooling."""


def write_card(
    folder: Path, model: DualEncoderModel, path: Path, format_name: str, name: str
) -> None:
    """Writes ``README.md``; `name` is what the folder will be called."""
    config = model.config
    results = _results(path)
    context = {
        "config": config,
        "name": name,
        "format": format_name,
        "version": __version__,
        "fingerprint": model.data_fingerprint,
        "counts": _counts(config, model.data_fingerprint),
        "built_in": set(config.data.sources) <= set(BUILT_IN),
        "source": ", ".join(s if s in BUILT_IN else "the user's data" for s in config.data.sources),
        "started_from": _started_from(config),
        "recipe": _recipe(config),
        "results": results,
        "recalls": directions(results["test"]) if results else [],
        "information": (results["test"].get("information", {}) if results else {}),
        "pixels": preprocessing(config),
        "has_tokenizer": model.has_tokenizer,
        **_of_format(model, format_name),
    }
    card = _environment().get_template("model_card.md.j2").render(context)
    write_atomic(folder / CARD_FILE, card)


def _of_format(model: DualEncoderModel, format_name: str) -> dict[str, Any]:
    """What the section on loading needs in this format."""
    if format_name == "torchvision":
        naming = torchvision_naming(model)
        return {"naming": naming.name if naming else ""}
    if format_name == "detectron2":
        return {"settings": detectron2_settings(model)}
    if format_name == "hf":
        pooling = model.model.module.text_encoder.pooling
        return {"pooling": pooling, "pooled": POOLED[pooling]}
    return {"size": model.model.image_size, "length": model.model.max_tokens}


def _counts(config: Config, known: str) -> dict[str, tuple[int, int]] | None:
    """Pictures and captions by split, where the data are still there and still the same."""
    try:
        sources = build_sources(config.data, BadExamples())
    except (UserError, OSError):
        return None
    if fingerprint(sources) != known:
        return None
    return {
        split: (len(source), sum(len(source.metadata(i).captions) for i in range(len(source))))
        for split, source in sources.items()
    }


def _started_from(config: Config) -> dict[str, str]:
    """The names, without folders of the run's machine, of the weights each tower began with."""
    towers = {"image": config.model.image.init_from, "text": config.model.text.init_from}
    return {
        tower: source if source.startswith((hub.SCHEME, packages.SCHEME)) else Path(source).name
        for tower, source in towers.items()
        if source
    }


def _recipe(config: Config) -> str:
    """What was trained and how, as the indented text of ``clip-lite config``."""
    config = portable(config)
    told = ("seed", "steps", "batch_size", "accumulate")
    lines = [f"{field}: {getattr(config, field)}" for field in told]
    for section in ("model", "objective", "negatives", "optim"):
        lines += [f"{section}:", describe(getattr(config, section), 1)]
    return "\n".join([*lines, "augment:", describe(config.data.augment, 1)])


def _results(path: Path) -> dict[str, Any] | None:
    """The test results of the checkpoint that is exported."""
    results = read_results(path)
    if results is None:
        return None
    with Checkpoints.open(path) as checkpoints:
        return results if results["step"] == checkpoints.latest_step() else None


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; what it prints are numbers and names of the configuration
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
