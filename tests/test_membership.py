"""Which generations of the cookie count and who is out, whatever order the orders come in."""

from __future__ import annotations

import itertools
import random

import pytest

from gossipml.errors import RemoteError, UserError
from gossipml.ids import PeerId, node_id_of
from gossipml.keys import NetworkKeys
from gossipml.membership import MAX_ACCEPTED, MAX_REVOKED, NO_ORDERS, Membership
from gossipml.orders import NetworkKey, Rotation

KEY = NetworkKey(b"k" * 32)
DAY = 86400
NOW = 1_800_000_000


def keys(generation: int, cookie: str = "") -> NetworkKeys:
    return NetworkKeys.derive(KEY.network_id, generation, (cookie or f"cookie {generation}").encode().ljust(32))


def rotation(generation: int, cookie: str = "", *, made: int = NOW, window: int = 7 * DAY) -> Rotation:
    return KEY.rotation(generation, keys(generation, cookie).cookie, made=made, old_until=made + window)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "little"))


def generations(membership: Membership) -> list[int]:
    return [one.generation for one in membership.accepted]


def test_a_member_that_heard_nothing_accepts_its_own_key_alone() -> None:
    membership = Membership(keys(1))
    assert list(membership.accepted) == [keys(1)] and membership.newest == keys(1)
    assert membership.orders() == [] and membership.digest == NO_ORDERS
    assert not membership.tick(NOW + 1e9)


def test_old_and_new_count_during_the_window_and_only_the_new_one_after_it() -> None:
    membership = Membership(keys(1))
    assert membership.take(rotation(2).raw, NOW)
    assert generations(membership) == [2, 1]
    assert membership.accepts(keys(1).key_id)
    assert not membership.tick(NOW + 7 * DAY - 1)
    version = membership.version
    assert membership.tick(NOW + 7 * DAY)
    assert generations(membership) == [2] and membership.version > version
    assert not membership.accepts(keys(1).key_id)


def test_the_same_order_again_is_no_news() -> None:
    membership = Membership(keys(1))
    order = rotation(2).raw
    assert membership.take(order, NOW)
    version = membership.version
    assert not membership.take(order, NOW)
    assert membership.version == version


def test_a_replayed_order_brings_no_old_key_back() -> None:
    membership = Membership(keys(1))
    old, new = rotation(2).raw, rotation(3, made=NOW + DAY).raw
    membership.take(old, NOW)
    membership.take(new, NOW + DAY)
    membership.tick(NOW + 30 * DAY)
    assert generations(membership) == [3]
    assert not membership.take(old, NOW + 30 * DAY)
    assert generations(membership) == [3]


def test_a_newcomer_is_not_talked_into_an_older_key() -> None:
    newcomer = Membership(keys(3))  # joined with the newest token and has heard no order yet
    assert not newcomer.take(rotation(2).raw, NOW)
    assert generations(newcomer) == [3]
    assert newcomer.take(rotation(3, made=NOW + DAY).raw, NOW + DAY)  # says that older ones still count
    assert newcomer.take(rotation(2).raw, NOW + DAY)
    assert generations(newcomer) == [3, 2]


def test_a_later_rotation_shortens_an_earlier_window_and_never_lengthens_it() -> None:
    membership = Membership(keys(1))
    membership.take(rotation(2, window=7 * DAY).raw, NOW)
    membership.take(rotation(3, window=DAY).raw, NOW)
    assert membership.ends(keys(1)) == membership.ends(keys(2)) == NOW + DAY
    other = Membership(keys(1))
    other.take(rotation(2, window=DAY).raw, NOW)
    other.take(rotation(3, window=7 * DAY).raw, NOW)
    assert other.ends(keys(1)) == NOW + DAY
    assert other.ends(keys(2)) == NOW + 7 * DAY


def test_any_order_of_the_orders_comes_to_the_same_end() -> None:
    orders = [rotation(2).raw, rotation(3, "one").raw, rotation(3, "two").raw, KEY.revocation(peer(1), made=NOW).raw]
    ends = set()
    for permutation in itertools.permutations(orders):
        membership = Membership(keys(1))
        for order in permutation:
            membership.take(order, NOW)
        ends.add((membership.accepted, membership.digest, tuple(membership.orders())))
    assert len(ends) == 1
    accepted, digest, _ = ends.pop()
    assert len(accepted) == 4 and digest != NO_ORDERS


def test_two_makers_that_rotate_at_once_cut_nobody_off() -> None:
    ann, bob = Membership(keys(1)), Membership(keys(1))
    ann.take(rotation(2, "ann").raw, NOW)
    bob.take(rotation(2, "bob").raw, NOW)
    for order in ann.orders():
        bob.take(order, NOW)
    for order in bob.orders():
        ann.take(order, NOW)
    assert ann.accepted == bob.accepted and len(ann.accepted) == 3
    assert ann.digest == bob.digest


def test_more_rotations_than_are_kept_drop_the_oldest() -> None:
    membership = Membership(keys(1))
    for generation in range(2, 10):
        membership.take(rotation(generation).raw, NOW)
    assert generations(membership) == [9, 8, 7, 6] and len(membership.accepted) == MAX_ACCEPTED


def test_orders_of_another_network_and_forged_ones_are_faults() -> None:
    membership = Membership(keys(1))
    foreign = NetworkKey(b"o" * 32).rotation(2, b"c" * 32, made=NOW, old_until=NOW + DAY).raw
    forged = bytearray(rotation(2).raw)
    forged[-1] ^= 1
    for order in (foreign, bytes(forged), b"", b"x" * 5000):
        with pytest.raises(RemoteError):
            membership.take(order, NOW)
    assert membership.version == 0 and generations(membership) == [1]


def test_a_revoked_peer_is_out_for_good() -> None:
    membership = Membership(keys(1))
    assert membership.take(KEY.revocation(peer(5), made=NOW).raw, NOW)
    assert membership.is_revoked(peer(5)) and membership.is_revoked_node(node_id_of(peer(5)))
    assert not membership.is_revoked(peer(6)) and not membership.is_revoked_node(node_id_of(peer(6)))
    membership.take(rotation(2).raw, NOW)
    membership.tick(NOW + 8 * DAY)
    assert membership.is_revoked(peer(5))
    assert not membership.take(KEY.revocation(peer(5), made=NOW + DAY).raw, NOW), "once is enough"


def test_revocations_are_told_before_rotations() -> None:
    membership = Membership(keys(1))
    membership.take(rotation(2).raw, NOW)
    membership.take(KEY.revocation(peer(5), made=NOW).raw, NOW)
    membership.take(rotation(3).raw, NOW)
    assert membership.orders() == [KEY.revocation(peer(5), made=NOW).raw, rotation(3).raw, rotation(2).raw]


def test_revocations_are_bounded() -> None:
    membership = Membership(keys(1))
    for number in range(MAX_REVOKED):
        assert membership.take(KEY.revocation(peer(number), made=NOW).raw, NOW)
    assert not membership.take(KEY.revocation(peer(MAX_REVOKED), made=NOW).raw, NOW)
    assert len(membership.revoked) == MAX_REVOKED
    again = Membership(keys(1))
    again.load(membership.state(), NOW)
    assert again.digest == membership.digest


def test_the_state_gives_it_all_back_after_a_restart() -> None:
    membership = Membership(keys(1))
    membership.take(KEY.revocation(peer(5), made=NOW).raw, NOW)
    membership.take(rotation(2).raw, NOW)
    membership.take(rotation(3, window=DAY).raw, NOW)
    for token in (keys(1), keys(3)):  # the token file may be from before or after
        again = Membership(token)
        again.load(membership.state(), NOW)
        assert again.accepted == membership.accepted
        assert again.orders() == membership.orders() and again.digest == membership.digest
        assert again.is_revoked(peer(5))
        late = Membership(token)
        late.load(membership.state(), NOW + 2 * DAY)
        assert generations(late) == [3]


def test_a_home_that_joins_anew_keeps_its_old_key_until_it_hears_when_that_ends() -> None:
    before = Membership(keys(1))
    again = Membership(keys(2))  # a token of today was put in, no order has been heard
    again.load(before.state(), NOW)
    assert generations(again) == [2, 1]
    assert again.take(rotation(2, window=DAY).raw, NOW)
    assert again.tick(NOW + DAY) and generations(again) == [2]


def test_a_damaged_state_is_said_and_nothing_else() -> None:
    membership = Membership(keys(1))
    membership.take(rotation(2).raw, NOW)
    state = membership.state()
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(state)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        again = Membership(keys(1))
        try:
            again.load(bytes(damaged[: rng.choice((len(state), rng.randrange(len(state))))]), NOW)
        except UserError as error:
            assert "HOME/keys is damaged" in str(error)
    with pytest.raises(UserError, match="another network"):
        Membership(NetworkKeys.derive(b"o" * 16, 1, b"c" * 32)).load(state, NOW)


def test_no_secret_is_shown() -> None:
    membership = Membership(keys(1))
    membership.take(rotation(2).raw, NOW)
    assert "cookie" not in repr(membership) and keys(2).cookie.hex()[:8] not in repr(membership)
