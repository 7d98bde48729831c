"""`gossipml peer doctor`: looks at what a peer needs from its machine and its network, and says how to mend it.

Works while the peer of this home runs (it is asked by HTTP, and its ports are held by it) and while it does not (its
ports are bound here, for a moment). Nothing is changed: a home that does not exist is not made. The checks are in
`gossipml.daemon.doctor_machine` and `gossipml.daemon.doctor_network`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from gossipml.daemon import doctor_machine as machine
from gossipml.daemon import doctor_network as network
from gossipml.daemon.doctor_patient import Ask, Check, Patient, split
from gossipml.daemon.home import Home
from gossipml.env import Env
from gossipml.errors import UserError


async def examine(
    home: Home,
    env: Env,
    environ: Mapping[str, str],
    ask: Ask,
    on_check: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """All checks, in order, each told as soon as it is done."""
    patient = Patient(home, env)
    checks: list[Check] = []

    def done(*found: Check) -> None:
        for check in found:
            checks.append(check)
            on_check(check)

    done(*machine.check_home(patient, environ))
    done(await machine.check_peer(patient, ask))
    steps: tuple[Callable[[Patient], Awaitable[Check]], ...] = (
        machine.check_disk,
        network.check_ports,
        network.check_reachable,
        network.check_members,
        network.check_lan,
        machine.check_clock,
    )
    for step in steps:
        try:
            done(await step(patient))
        except UserError as error:
            seen, fix = split(error)
            done(Check(step.__name__.removeprefix("check_"), "failed", seen, fix))
    return checks
