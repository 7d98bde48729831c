"""gossipml: peer-to-peer gossip learning. Every process that runs it is an equal peer."""

__version__ = "0.1.0"
