"""Python's garbage collection while a simulation runs.

The heap is that of all peers at once, and next to nothing in it is garbage with cycles. With Python's own limits a
seventh of the time of simulated daemons went into walking it, and a tenth of that of a population of 1,000.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_AFTER = (100_000, 50, 100)  # objects, and so on


@contextmanager
def few_collections() -> Iterator[None]:
    """Hardly walk the heap, and never what is there now."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
