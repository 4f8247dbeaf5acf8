"""The subcommands of ``clip-lite``, a module each: flags, and one call.

What a command needs is imported when it runs, so that ``--help`` does not wait for jax.
"""

from clip_lite_jax.commands import (
    data,
    demo,
    embed,
    evaluate,
    export,
    plan,
    score,
    search,
    status,
    train,
)

COMMANDS = (
    train.add,
    plan.add,
    status.add,
    evaluate.add,
    embed.add,
    search.add,
    score.add,
    demo.add,
    data.add,
    export.add,
)
"""Each adds its parsers, with ``call(known, rest)`` and, where a configuration's fields may be
set, ``takes_fields``."""
