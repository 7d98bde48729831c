"""What `gossipml peer list` says of a peer that misbehaved."""

from __future__ import annotations

import datetime

from gossipml.cli.peer import _trouble


def test_a_quarantine_says_until_when_and_why_and_a_strike_what_for() -> None:
    peer = {"problem": "", "strike_reason": "update holds the value nan", "quarantined_until": None}
    assert _trouble(peer) == "last strike: update holds the value nan"
    assert _trouble({**peer, "problem": "does not answer"}) == "does not answer"
    until = datetime.datetime(2030, 1, 2, 3, 4, 5)
    said = _trouble({**peer, "quarantined_until": until.timestamp()})
    assert said == "until 2030-01-02 03:04:05: update holds the value nan"
    assert _trouble({"problem": "", "strike_reason": "", "quarantined_until": None}) == ""
