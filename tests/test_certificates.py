"""Certificates: the same bytes everywhere, the id from the key alone, nothing secret inside."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gossipml import certificates
from gossipml.certificates import authority_certificate, leaf_certificate, peer_id_from_der
from gossipml.errors import RemoteError
from gossipml.identity import Identity
from gossipml.ids import format_peer_id
from gossipml.keys import NetworkKeys
from gossipml.token import JoinToken

TOKEN = JoinToken(network_id=b"network-id-of-16", cookie=b"c" * 32, expires=0, addresses=())
KEYS = NetworkKeys.from_token(TOKEN)
PEER = Identity(b"p" * 32)
OTHER = Identity(b"o" * 32)


def forged(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, *uris: str) -> bytes:
    """A leaf that a member could sign: any key, any names."""
    authority = Ed25519PrivateKey.from_private_bytes(KEYS.authority_seed)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossipml peer")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(certificates.NOT_BEFORE)
        .not_valid_after(certificates.NOT_AFTER)
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority, None).public_bytes(serialization.Encoding.DER)


def test_every_member_derives_the_same_bytes_for_the_authority() -> None:
    again = NetworkKeys.from_token(TOKEN)
    assert authority_certificate(KEYS) == authority_certificate(again)
    # Pinned: other bytes would part the network into those before and those after an upgrade.
    digest = hashlib.sha256(authority_certificate(KEYS)).hexdigest()
    assert digest == "026c057832a975211ddb318add3483704552e272ddd52b916caf9cb0c486b0ce"


def test_another_cookie_gives_another_authority() -> None:
    other = NetworkKeys.from_token(JoinToken(TOKEN.network_id, b"d" * 32, 0, ()))
    assert authority_certificate(other) != authority_certificate(KEYS)


def test_the_leaf_stands_for_the_peers_own_key() -> None:
    assert peer_id_from_der(leaf_certificate(KEYS, PEER)) == PEER.peer_id
    assert leaf_certificate(KEYS, PEER) == leaf_certificate(KEYS, PEER)
    assert leaf_certificate(KEYS, PEER) != leaf_certificate(KEYS, OTHER)


def test_the_leaf_is_signed_by_the_authority_and_never_expires() -> None:
    authority = x509.load_der_x509_certificate(authority_certificate(KEYS))
    leaf = x509.load_der_x509_certificate(leaf_certificate(KEYS, PEER))
    leaf.verify_directly_issued_by(authority)
    assert leaf.not_valid_before_utc.year == 2000
    assert leaf.not_valid_after_utc.year == 9999


def test_certificates_hold_no_secret_and_no_network_id() -> None:
    for certificate in (authority_certificate(KEYS), leaf_certificate(KEYS, PEER)):
        for secret in (TOKEN.cookie, TOKEN.network_id, KEYS.authority_seed, KEYS.datagram_key, PEER.seed):
            assert secret not in certificate
        assert len(certificate) < 1024


def test_a_name_that_is_not_the_keys_is_refused() -> None:
    lie = forged(PEER.private_key, certificates.URI_SCHEME + format_peer_id(OTHER.peer_id))
    with pytest.raises(RemoteError, match="names another peer"):
        peer_id_from_der(lie)


def test_two_names_are_refused() -> None:
    uris = [certificates.URI_SCHEME + format_peer_id(peer.peer_id) for peer in (PEER, OTHER)]
    with pytest.raises(RemoteError, match="names another peer"):
        peer_id_from_der(forged(PEER.private_key, *uris))


def test_a_leaf_without_a_name_is_refused() -> None:
    with pytest.raises(RemoteError, match="cannot be read"):
        peer_id_from_der(forged(PEER.private_key))


def test_a_key_of_another_kind_is_refused() -> None:
    with pytest.raises(RemoteError, match="not Ed25519"):
        peer_id_from_der(forged(ec.generate_private_key(ec.SECP256R1()), "gossipml:whoever"))


def test_an_oversized_certificate_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RemoteError, match="over the limit of 4096"):
        peer_id_from_der(bytes(5000))


@given(st.binary(max_size=600))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteError):
        peer_id_from_der(data)


@given(st.data())
def test_a_changed_byte_gives_the_same_id_or_is_refused(data: st.DataObject) -> None:
    """The signature is TLS's to check; whatever it let pass, the id is never anybody else's by accident."""
    certificate = bytearray(leaf_certificate(KEYS, PEER))
    place = data.draw(st.integers(0, len(certificate) - 1))
    certificate[place] ^= data.draw(st.integers(1, 255))
    try:
        assert peer_id_from_der(bytes(certificate)) == PEER.peer_id
    except RemoteError:
        pass
