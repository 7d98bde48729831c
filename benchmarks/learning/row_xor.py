"""XOR: do two and three peers that average learn what one learns alone?

Each seed is another network: other initial parameters (all peers start from the same), another cut of the 400 points
into parts, another order. After ROUNDS rounds of STEPS steps a seed counts when every peer has all four corners right.
Alone, a peer has all the points and takes as many steps.
"""

from __future__ import annotations

from collections import Counter

from rows import Chart, Outcome, Record, Settings, in_processes

ROUNDS, STEPS = 20, 10
SEEDS = 100
MERGES = ("mean", "slerp", "clipping")
CELLS = (("alone", 1), *((merge, peers) for merge in MERGES for peers in (2, 3)))


def measure(settings: Settings) -> Outcome:
    cells = [(*cell, seed) for cell in CELLS for seed in range(1 if settings.quick else SEEDS)]
    records = [record for records in in_processes(one_network, cells, settings) for record in records]
    last = [record for record in records if record["round"] == ROUNDS]
    right = Counter(str(record["variant"]) for record in last if record["right"] == 100)
    seeds = len(last) // len(CELLS)
    ours = ", ".join(f"{variant}: {right[variant]}" for variant in dict.fromkeys(str(r["variant"]) for r in last))
    text = f"seeds of {seeds} after {ROUNDS * STEPS} steps: {ours}"
    chart = Chart("variant", "right", "round", "seeds with all answers right, %", "round of 10 steps", aim=100)
    return Outcome(text, all(count == seeds for count in right.values()) and len(right) == len(CELLS), records, chart)


def one_network(cell: tuple[str, int, int]) -> list[Record]:
    """Of each round whether all is right: 100 or 0."""
    from gossipml.config import PeerConfig
    from gossipml.models.data import load_source
    from gossipml.models.registry import load_spec
    from gossipml.simulations.lockstep import Network, Setting

    merge, peers, seed = cell
    options = PeerConfig(merge="clipping" if peers == 1 else merge, seed=seed, local_steps=str(STEPS))
    network = Network(Setting(load_spec("xor"), load_source("xor"), peers, options))
    variant = "alone" if peers == 1 else f"{merge}, {peers} peers"
    records: list[Record] = []
    for number in range(1, ROUNDS + 1):
        network.round()
        right = 100 * (min(network.served()) == 1.0)
        records.append({"variant": variant, "seed": seed, "round": number, "right": right})
    return records
