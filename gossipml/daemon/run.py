"""A peer as a process: the home, the log, the worker and the HTTP endpoint around the `Node`."""

from __future__ import annotations

import gc
import logging
import os
import platform
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from gossipml.api.server import ApiConfig, serve
from gossipml.config import PeerConfig, with_full_paths, write_config
from gossipml.daemon.audit import Audit, AuditConfig
from gossipml.daemon.exchange_rules import gossip_config, tuning
from gossipml.daemon.face import Face
from gossipml.daemon.home import Home, RunInfo, join
from gossipml.daemon.idle import IdleConfig
from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.logs import start_logging
from gossipml.daemon.node import Node, NodeConfig
from gossipml.daemon.orders import renewed
from gossipml.daemon.releases import ReleaseConfig
from gossipml.daemon.replication import ReplicationConfig
from gossipml.daemon.routing import Routing, RoutingConfig
from gossipml.daemon.schedule import parse_schedule
from gossipml.daemon.serving import Serving
from gossipml.daemon.usage import Observer
from gossipml.daemon.worker import open_predictor, open_worker
from gossipml.env import Credentials, Env, files
from gossipml.env.real import real_env
from gossipml.errors import UserError
from gossipml.ids import format_peer_id, short_peer_id
from gossipml.keys import NetworkKeys
from gossipml.models.data import check_source
from gossipml.models.partition import parse_rule
from gossipml.models.registry import check_model_name
from gossipml.models.store import StoreConfig
from gossipml.models.trainer import Trainer
from gossipml.models.tuning import parse_local_steps
from gossipml.peer.swarm_ports import SwarmConfig
from gossipml.token import JoinToken

log = logging.getLogger("gossipml")

DESCRIPTORS = 8192  # connections of the endpoint, of peers, and pieces of the store; bounded where they are opened
FIRST_TOKEN_SECONDS = 30 * 86400.0  # the token that a first start makes lets others in for so long


def run_peer(
    home: Home,
    config: PeerConfig,
    offered: JoinToken | None,
    *,
    verbose: bool = False,
    learner: LearnerConfig | None = None,
) -> None:
    """Run a peer on `home` until SIGTERM, SIGINT or SIGHUP. UserError when it cannot start."""
    learner = replace(
        learner or LearnerConfig(),
        max_rounds=config.max_rounds,
        target_accuracy=config.target_accuracy,
        local_steps=parse_local_steps(config.local_steps),
        releases=ReleaseConfig(seconds=config.publish_seconds),
    )
    config = with_full_paths(config)
    api = check_options(home, config)
    with home.lock():
        env = real_env(home.path)
        new = home.token() is None and offered is None
        token = join(home, offered, wall=env.clock.wall(), secrets=env.secrets, seconds=FIRST_TOKEN_SECONDS)
        home.membership(token, env.clock.wall())  # a damaged file or one that others can read is said now
        credentials = Credentials(home.identity(env.secrets), NetworkKeys.from_token(token))
        if not config.name:
            config = replace(config, name=platform.node()[:64] or short_peer_id(credentials.identity.peer_id))
        if not home.config_file.exists():
            files.write_atomic(home.config_file, write_config(config).encode())
        gc.collect()
        gc.freeze()  # the modules stay for ever: looking through them at each collection holds the loop for 20 ms
        start_logging(home.log_file, verbose=verbose, json=config.log_format == "json")
        _allow_descriptors()
        api = replace(api, api_token=home.make_api_token(env.secrets), secrets=env.secrets)
        trio.run(_run, home, env, credentials, token, config, learner, api, new)


def check_options(home: Home, config: PeerConfig) -> ApiConfig:
    """How to serve HTTP. UserError for options that cannot be had, before anything is written or started."""
    check_model_name(config.model)
    if config.data:
        check_source(config.data)
    parse_rule(config.split)
    gossip_config(config)
    tuning(config)
    idle(config)
    return ApiConfig(listen=config.api, api_key=home.api_key())


def idle(config: PeerConfig) -> IdleConfig:
    """When training is to pause; UserError for a schedule that is none."""
    return IdleConfig(
        pause_on_battery=config.pause_on_battery,
        pause_on_load=config.pause_on_load or None,
        schedule=parse_schedule(config.schedule) if config.schedule else None,
    )


async def _run(
    home: Home,
    env: Env,
    credentials: Credentials,
    token: JoinToken,
    config: PeerConfig,
    learner: LearnerConfig,
    api: ApiConfig,
    new: bool,
) -> None:
    @asynccontextmanager
    async def open_trainer() -> AsyncIterator[Trainer]:
        async with open_worker(config, credentials.keys.network_id) as worker:
            serving.info = worker.info
            yield worker

    node = Node(
        env,
        credentials,
        NodeConfig(
            name=config.name,
            listen=config.listen,
            trains=config.train,
            first_contacts=token.addresses,
            learner=learner,
            gossip=gossip_config(config),
            idle=idle(config),
            store=StoreConfig(quota=config.quota, keep_last=config.keep),
            swarm=SwarmConfig(upload_rate=config.upload_rate),
            replication=ReplicationConfig(replicas=config.replicas),
            lan=config.lan,
        ),
        open_trainer,
        on_progress=lambda progress: face.on_progress(progress),  # noqa: PLW0108  # face comes after node
        observe=Observer(env, load=bool(config.pause_on_load)),
    )
    serving = Serving(node, config, partial(open_predictor, config, credentials.keys.network_id))
    face = Face(node, config, serving)
    routing = face.routing = Routing(node, serving, RoutingConfig(pull_after=config.pull_after), face.record)

    if config.audit:
        own = format_peer_id(credentials.identity.peer_id)
        face.audit = Audit(home.path, env.clock, AuditConfig(inputs=config.audit_inputs, days=config.audit_days), own)

    @asynccontextmanager
    async def recording() -> AsyncIterator[None]:
        if face.audit is None:
            yield
            return
        async with node.supervisor.running("audit", face.audit.run):
            yield

    async def endpoint(*, task_status: trio.TaskStatus[object]) -> None:
        await serve(face, api, task_status=task_status)

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        try:
            async with (
                node.running(),
                node.supervisor.running("predictions", serving.run),
                node.supervisor.running("routing", routing.run),
                recording(),
                node.supervisor.running("news", face.tell_neighbours),
                node.supervisor.running("api", endpoint) as bound,
            ):
                face.api = bound
                if new or not token.addresses:
                    home.keep_token(renewed(token, credentials.membership).with_addresses(node.addresses))
                info = RunInfo(
                    pid=os.getpid(),
                    name=config.name,
                    peer=format_peer_id(credentials.identity.peer_id),
                    addresses=[str(address) for address in node.addresses],
                    api=str(bound),
                    started=env.clock.wall(),
                )
                home.write_run_info(info)
                _greet(home, info, new)
                await _until_stopped(signals, node)
        except* UserError as group:
            raise _first(group) from None
    if node.mistake is not None:
        raise node.mistake


async def _until_stopped(signals: AsyncIterator[int], node: Node) -> None:
    """Until a signal comes, or it turns out that the model, the data or the device cannot be had as they were asked
    for: a person who has just typed that is to see it, and a service manager, too."""

    async def watch() -> None:
        await node.mistaken.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async for number in signals:
            log.info("stopping on %s", signal.Signals(number).name)
            nursery.cancel_scope.cancel()


def _allow_descriptors() -> None:
    """As many open files and connections as this user may have: many systems begin with 1,024, which the endpoint's
    own limit of connections is."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else min(DESCRIPTORS, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _greet(home: Home, info: RunInfo, new: bool) -> None:
    log.info("peer %s (%s) listens on %s", info.name, info.peer[:8], ", ".join(info.addresses))
    log.info("predictions and status: http://%s", info.api)
    if new:
        log.info("made a new network; its token lies in %s: copy it to each machine, then there:", home.token_file)
        log.info("  gossipml peer start --join %s", home.token_file.name)


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    inner = group.exceptions[0]
    return inner if isinstance(inner, UserError) else _first(inner)
