"""Crews for tests: helpers as threads, which start at once and run what the processes run."""

from __future__ import annotations

import os
import threading

from gossipml.models.crew import Crew, Link
from gossipml.models.crew_work import help_with
from gossipml.models.worker_wire import create_shared_file


def crew_of_threads(size: int) -> Crew:
    """The caller and helpers."""
    descriptor = create_shared_file("crew")
    links: list[Link] = []
    threads: list[threading.Thread] = []
    for number in range(1, size):
        (commands, command), (answers, answer) = os.pipe(), os.pipe()
        links.append(Link(answers, command))
        threads.append(threading.Thread(target=_help, args=(Link(commands, answer), os.dup(descriptor), number)))
        threads[-1].start()

    def dismiss() -> None:
        for thread in threads:
            thread.join()

    return Crew(links, descriptor, dismiss)


def _help(link: Link, descriptor: int, number: int) -> None:
    try:
        help_with(link, descriptor, number)
    finally:
        link.close()
        os.close(descriptor)
