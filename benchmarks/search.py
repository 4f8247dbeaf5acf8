"""How long a search among many embeddings takes, exact and by FAISS's graph, and what it finds.

    python -m benchmarks.search --model runs/warm_start

The rows are the embeddings of the built-in drawings, each many times with noise of its own, and
scaled to length 1: as clustered as pictures are, which pure noise is not.  The queries are the
captions of drawings.  Times are those of the clock and those of the processors: on a machine that
is busy with other things the first are longer than a person would wait on a quiet one.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import clip_lite_jax
from clip_lite_jax.apps import index_faiss, index_files
from clip_lite_jax.apps.encoding import encode_pictures, encode_texts, open_splits
from clip_lite_jax.apps.identity import identity_of
from clip_lite_jax.apps.index import Index
from clip_lite_jax.apps.index_files import COLUMNS, FORMAT, Manifest, Set
from clip_lite_jax.apps.queries import ModelEncoder, Query
from clip_lite_jax.config import DataConfig
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.rows import TEXT, array
from clip_lite_jax.inference import DualEncoderModel
from clip_lite_jax.vectors import unit

NOISE = 0.6
"""Length of the noise beside a drawing's embedding of length 1: copies have a cosine of about .74
with each other, as drawings of one thing by different artists have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/warm_start", help="folder of a run")
    parser.add_argument("--rows", default="10000,50000,100000", help="sizes, with commas")
    parser.add_argument("--drawings", type=int, default=2000, help="that the rows are made of")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    sizes = [int(size) for size in known.rows.split(",")]
    found = measure(clip_lite_jax.load(known.model), sizes, known.drawings, known.queries)
    print(table(found))
    if known.json:
        known.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    model: DualEncoderModel, sizes: list[int], drawings: int, queries: int
) -> dict[str, Any]:
    """All numbers, for each size."""
    source = open_splits(DataConfig(), "both", ["train"], BadExamples())["train"]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(source))[:drawings].tolist()
    threads = os.cpu_count() or 1
    list(encode_pictures(model, source, chosen[:1], threads))  # compiles
    pictures = np.zeros((0, 0))

    def encode() -> None:
        nonlocal pictures
        pictures = unit(np.stack(list(encode_pictures(model, source, chosen, threads))), np.float32)

    seconds, used = clocked(encode)
    texts = [source.metadata(index).captions[0] for index in chosen[:queries]]
    encoder = ModelEncoder(model)
    start = time.perf_counter()
    encoder.text(texts[0])
    first = time.perf_counter() - start
    encoding = [clocked(encoder.text, text) for text in texts]
    asked = [Query(row, "text") for row in encode_texts(model, texts)]
    results = [
        of_size(model, rows_like(pictures, size, rng), asked, texts, encoder) for size in sizes
    ]
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "pictures_per_second": len(pictures) / seconds,
        "pictures_per_processor_second": len(pictures) / used,
        "first_query_text_ms": 1e3 * first,
        "query_text_ms": percentiles(encoding),
        "sizes": results,
    }


def rows_like(pictures: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 ``[size, D]`` of length 1: every picture as often, each time with other noise."""
    rows = np.resize(pictures, (size, pictures.shape[1]))
    noise = rng.standard_normal(rows.shape, np.float32) * (NOISE / rows.shape[1] ** 0.5)
    return unit(rows + noise, np.float32)


def of_size(
    model: DualEncoderModel,
    rows: np.ndarray,
    queries: list[Query],
    texts: list[str],
    encoder: ModelEncoder,
) -> dict[str, Any]:
    """An index of these rows in a folder, opened and asked as `clip-lite search` does."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CLIP_LITE_CACHE"] = str(folder / "cache")
        write_index(folder, model, rows)
        start = time.perf_counter()
        exact = Index.open(folder, "exact")
        exact.search(queries[0], 10)
        opened = time.perf_counter() - start
        truth = [exact.search(query, 10) for query in queries]
        found: dict[str, Any] = {
            "rows": len(rows),
            "width": rows.shape[1],
            "open_and_first_search_ms": 1e3 * opened,
            "exact_ms": percentiles([clocked(exact.search, q, 10) for q in queries]),
            "exact_with_text_ms": together(exact, encoder, texts),
        }
        if index_faiss.available():
            start = time.perf_counter()
            graph = Index.open(folder, "faiss")
            graph.search(queries[0], 10)
            found["faiss_build_seconds"] = time.perf_counter() - start
            answers = [graph.search(query, 10) for query in queries]
            found["faiss_ms"] = percentiles([clocked(graph.search, q, 10) for q in queries])
            found["faiss_with_text_ms"] = together(graph, encoder, texts)
            found["faiss_recall_at_10"] = float(
                np.mean(
                    [
                        len({h.row for h in a} & {h.row for h in b}) / len(b)
                        for a, b in zip(answers, truth, strict=True)
                    ]
                )
            )
            start = time.perf_counter()
            index_faiss.read(next((folder / "cache" / "faiss").iterdir()), rows.shape)
            found["faiss_read_ms"] = 1e3 * (time.perf_counter() - start)
        return found


def write_index(folder: Path, model: DualEncoderModel, rows: np.ndarray) -> None:
    """An index as `build_index` writes it."""
    generation = index_files.new_generation()
    matrix, names = index_files.paths(folder, "images", generation)
    np.save(matrix, rows)
    column = array([f"picture {number}" for number in range(len(rows))], TEXT)
    index_files.write_table(names, index_files.pa.table(dict.fromkeys(COLUMNS["images"], column)))
    sets = {"images": Set(len(rows), generation)}
    index_files.write_manifest(
        folder,
        Manifest(FORMAT, identity_of(model), "benchmark", "image", None, "float32", sets=sets),
    )


def together(index: Index, encoder: ModelEncoder, texts: list[str]) -> dict[str, float]:
    """From the text to the hits."""

    def both(text: str) -> None:
        index.search(encoder.text(text), 10)

    return percentiles([clocked(both, text) for text in texts])


def clocked(call: Callable[..., object], *given: Any) -> tuple[float, float]:
    """Seconds that ``call(*given)`` takes on the clock, and of all processors together."""
    start, used = time.perf_counter(), time.process_time()
    call(*given)
    return time.perf_counter() - start, time.process_time() - used


def percentiles(seconds: list[tuple[float, float]]) -> dict[str, float]:
    """In milliseconds."""
    clock, used = 1e3 * np.array(seconds).T
    p50, p95 = np.percentile(clock, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "cpu_p50": float(np.median(used))}


def table(found: dict[str, Any]) -> str:
    text = found["query_text_ms"]
    lines = [
        f"{found['machine']}; {found['pictures_per_second']:.0f} pictures encoded in a second, "
        f"{found['pictures_per_processor_second']:.0f} in a second of a processor",
        f"text of a query: p50 {text['p50']:.1f} ms, p95 {text['p95']:.1f} ms, processors "
        f"{text['cpu_p50']:.1f} ms; the first in a process {found['first_query_text_ms']:.0f} ms",
        "",
        "| rows | method | search p50 | p95 | processors | with the text p50 | p95 | processors "
        "| recall@10 | built in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in found["sizes"]:
        for method in ("exact", "faiss"):
            if f"{method}_ms" not in size:
                continue
            alone, both = size[f"{method}_ms"], size[f"{method}_with_text_ms"]
            recall = size["faiss_recall_at_10"] if method == "faiss" else 1.0
            built = f"{size['faiss_build_seconds']:.0f} s" if method == "faiss" else "–"
            lines.append(
                f"| {size['rows']:,} | {method} | {_times(alone)} | {_times(both)} | {recall:.3f} "
                f"| {built} |"
            )
    return "\n".join(lines)


def _times(known: dict[str, float]) -> str:
    return " | ".join(f"{known[name]:.1f} ms" for name in ("p50", "p95", "cpu_p50"))


if __name__ == "__main__":
    main()
