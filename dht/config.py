"""The knobs of the DHT, with where each default comes from."""

from __future__ import annotations

from dataclasses import dataclass

from gossipml.dht.lookup import ALPHA
from gossipml.dht.messages import MAX_CONTACTS
from gossipml.dht.routing import K
from gossipml.ids import Address

# Networks whose addresses nobody can have by the thousand without being inside: loopback, private (RFC 1918,
# RFC 6598, RFC 4193) and link-local. A network of peers in one office is one /24, so the cap would cut it apart.
HOME_NETWORKS = (
    "127.0.0.0/8",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "::1/128",
    "fc00::/7",
    "fe80::/10",
)


@dataclass(frozen=True)
class DhtConfig:
    k: int = K
    alpha: int = ALPHA
    excepted_networks: tuple[str, ...] = HOME_NETWORKS
    """Networks without the cap of two contacts per /24 or /48 and bucket."""
    also_at: tuple[Address, ...] = ()
    """Addresses that lead to us though no interface has them: a forwarded port, a published container port."""
    soft_wait: tuple[float, float] = (0.1, 0.5)
    """Bounds of the soft wait, 4 x smoothed round trip (measured: DHT benchmark)."""
    hard_wait: float = 2.0
    """After this a query has failed: the slowest round trips of real networks are shorter."""
    upkeep_interval: float = 10.0
    """Between looks at what needs upkeep (guess)."""
    quiet_after: float = 120.0
    """A contact not heard from for this long is pinged (BEP 5 waits 15 minutes; gossip wants to know sooner)."""
    refresh_after: float = 900.0
    """A bucket without a lookup for this long is refreshed (BEP 5)."""
    sparse: int = 4
    """With fewer contacts than this the network is looked for again (guess)."""
    finds_per_second: float = 100.0
    """Requests answered per source address; a lookup asks each node once or twice (guess)."""
    stores_per_second: float = 50.0
    """Stores looked at per source address: 50 signatures are 7 ms of CPU a second (measured)."""
    burst: float = 2.0
    """Seconds worth of requests that may come at once."""
    put_quorum: float = 0.5
    """A put answers when more than this share of the nodes has acknowledged."""
    get_quorum: int = 3
    """A get that wants any answer ends when this many nodes gave records (alpha)."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_CONTACTS:
            raise ValueError(f"k is {self.k}; the contacts of a reply must fit one datagram: 1 to {MAX_CONTACTS}")
