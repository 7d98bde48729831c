"""Peers talking to peers: wire messages, sessions, gossip, the peer view, failure detection, and the trio shell."""
