"""A process that trains its share of a network for another one: `python -m gossipml.models.crew_main`.

It is told what to do and how it lies in shared memory (`crew_work`), knows neither samples nor the loss, runs no
code of the user's, and ends when the caller does.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from gossipml.models.crew import Link
from gossipml.models.crew_work import help_with


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends us in order
    descriptor, number, threads = (int(argument) for argument in sys.argv[1:])
    link = Link(os.dup(0), os.dup(1))
    os.dup2(2, 1)  # what libraries print goes to the log
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # see `worker_main`
    help_with(link, descriptor, number)
    os._exit(0)  # taking torch down in order saves nothing


if __name__ == "__main__":
    main()
