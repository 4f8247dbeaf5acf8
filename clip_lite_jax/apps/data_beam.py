"""``clip-lite data convert --beam``: the conversion as an Apache Beam pipeline.

For what outgrows one machine: shards are spread over the workers of any runner (Spark, Flink,
Dataflow).  Source and folder must be where all workers see them: on a shared disk, or in buckets.
"""

import shlex
from typing import Any

from clip_lite_jax.apps.data_convert import (
    Conversion,
    convert_shard,
    finish,
    plan,
    read_notes,
    unfinished,
)
from clip_lite_jax.errors import ConfigError


def convert_with_beam(conversion: Conversion, options: str) -> dict[str, Any]:
    """As `data_convert.convert`, by a pipeline with these options: ``--runner=SparkRunner ...``.

    Raises:
      ConfigError: Apache Beam is not installed; or as `convert`.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError(
            f"--beam needs Apache Beam ({error}): pip install 'clip_lite_jax[beam]'"
        ) from error
    jobs, bad = plan(conversion)
    missing = unfinished(jobs)
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        shards = pipeline | "shards" >> beam.Create(missing)
        # Without it a runner would take the whole list for one piece of work.
        spread = shards | "spread" >> beam.Reshuffle()
        _ = spread | "convert" >> beam.Map(convert_shard)
    return finish(conversion, read_notes(jobs), bad)
