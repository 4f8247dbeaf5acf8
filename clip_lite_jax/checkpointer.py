"""Orbax's checkpointer as `checkpoints` uses it: for one process, several, or several apart."""

import logging

import jax
import orbax.checkpoint as ocp

WEIGHTS, OPTIMIZER, META = "weights", "optimizer", "meta"

SENT_WITHIN = 3_600_000
"""Milliseconds in which all processes have sent their parts of a checkpoint to a bucket."""
SMALLEST_SLICE = 2**20
"""Bytes.  Of an array that lies whole on all devices each writes a slice, if it is no smaller: to
cut one is a program to compile and run, and each is a file in a bucket."""
MEANT = (
    "Global object size logging disabled",
    "[process=%s][thread=%s] Skipping merge of OCDBT",
)
"""How warnings of Orbax begin that are about what is meant to be so."""


def build_checkpointer(own_folder: bool) -> ocp.AsyncCheckpointer:
    """With `own_folder`, of several processes each writes its part into a folder of its own, such
    that all files together are a checkpoint."""
    apart = own_folder and jax.process_count() > 1
    if apart:
        logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(MEANT))
    options = ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)
    types = ocp.type_handlers
    arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_SLICE)
    registry = types.create_type_handler_registry((jax.Array, arrays))
    items = {
        part: ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry,
            multiprocessing_options=options,
            use_ocdbt=not apart,  # files of its own for each array, not a database of each process
        )
        for part in (WEIGHTS, OPTIMIZER)
    }
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
        **items,
        **{META: ocp.JsonCheckpointHandler(multiprocessing_options=options)},
    )
    return ocp.AsyncCheckpointer(
        handler,
        # A folder that cannot be made is an error at once, not of threads that wait for it.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        multiprocessing_options=options,
    )


def wait_for_all(moment: str) -> None:
    """Waits in a thread of its own until all processes have come to the same moment."""
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"bucket_{moment}", timeout_ms=SENT_WITHIN)
