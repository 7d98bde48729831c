"""Whose fault an error is: the user's, the other side's, or ours.

A message holds the value, the bound and the remedy, in one short paragraph, because the user sees it
without a traceback.
"""


class GossipmlError(Exception):
    """Base of every error that gossipml raises on purpose."""


class UserError(GossipmlError):
    """The user asked for something that cannot be done; the message says what to do instead."""


class RemoteError(GossipmlError):
    """The other side of a connection broke the protocol. Ends that session, never the daemon."""


class LocalError(GossipmlError):
    """We broke our own rules: a bug in gossipml."""
