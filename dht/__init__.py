"""The Kademlia DHT of gossipml on trio: sealed datagrams, proven node ids, signed records, a directory of peers.

Node ids and buckets come from the `kademlia` package; the RPC, the lookup and the record rules are its own.
Start reading at `messages` (the wire) and `service` (the trio shell); `directory` (who is there) and `catalogue`
(which models there are) are what the daemon uses.
"""
