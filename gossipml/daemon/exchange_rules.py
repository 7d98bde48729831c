"""From the names that a person chose to how gossip works: protocol, merge and compression, and what goes together."""

from __future__ import annotations

from dataclasses import replace

from gossipml.config import PeerConfig
from gossipml.errors import UserError
from gossipml.models.compression import parse_choice
from gossipml.models.merge_rules import parse_merge
from gossipml.models.tuning import Tuning, parse_outer
from gossipml.peer.ages import AgeConfig
from gossipml.peer.gossip import AUTO, GossipConfig
from gossipml.peer.protocols import parse_protocol


def gossip_config(config: PeerConfig) -> GossipConfig:
    """UserError for a name that there is not, and for two that exclude each other."""
    protocol, rule, form = (
        parse_protocol(config.protocol),
        parse_merge(config.merge),
        parse_choice(config.compression),
    )
    stack = rule.needs - 1
    parts = protocol.part != "whole"
    if parts and (form is None or form.share < 1.0):
        raise UserError(
            f"protocol {config.protocol} sends parts of a model, and compression {config.compression} does so, too; "
            "choose --compression int8, or another protocol"
        )
    if stack and (parts or protocol.weighing in ("mass", "edge")):
        raise UserError(
            f"merge {config.merge} compares whole models, which protocol {config.protocol} does not bring; choose "
            "--merge clipping, or --protocol push"
        )
    if stack and (form is None or form.share < 1.0):
        raise UserError(
            f"merge {config.merge} compares whole models, and compression {config.compression} sends parts of them; "
            "choose --merge clipping, or --compression int8"
        )
    if form is not None and form.fragments > 1:
        protocol = replace(protocol, part="fragment", parts=form.fragments)
    defaults = GossipConfig()
    return GossipConfig(
        protocol=protocol,
        encoding=AUTO if form is None else replace(form, fragments=1).name,
        stack=stack,
        incoming=max(defaults.incoming, stack),
        ages=AgeConfig(equal=rule.name == "mean"),
    )


def tuning(config: PeerConfig) -> Tuning:
    """UserError for names and numbers that cannot be; what the worker makes of it, it makes again."""
    return Tuning(
        merge=parse_merge(config.merge),
        optimiser=config.optimiser,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        batch=config.batch,
        outer=parse_outer(config.outer),
    )
