"""X.509 for mutual TLS: a certificate authority out of the cookie, a leaf for each peer's own key.

Every member derives the same authority, and its certificate has the same bytes everywhere (Ed25519 signatures
are deterministic, serial and dates are fixed), so nothing has to be handed out. A certificate signed by it
proves possession of the cookie; the key inside it, which TLS proves, is the identity of the peer.

Any member can sign a leaf with any name in it: the peer id comes from the public key alone. A stranger who
connects sees our certificates: they hold no secret and nothing about a person or a network. Left out:
revocation and expiry (clocks need not be right): `gossipml.membership` knows who is out and which cookie counts.
"""

from __future__ import annotations

import datetime
import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gossipml.errors import RemoteError
from gossipml.identity import Identity
from gossipml.ids import PeerId, PublicKey, format_peer_id, peer_id_of
from gossipml.keys import NetworkKeys

NOT_BEFORE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280: "no expiry"
AUTHORITY_SERIAL = 1
URI_SCHEME = "gossipml:"
MAX_CERTIFICATE = 4096  # ours are about 500 bytes

_AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossipml members")])
_LEAF_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossipml peer")])


def authority_certificate(keys: NetworkKeys) -> bytes:
    """The certificate of the network's authority, DER: the same bytes at every member."""
    key = Ed25519PrivateKey.from_private_bytes(keys.authority_seed)
    certificate = (
        _builder(_AUTHORITY_NAME, key.public_key(), AUTHORITY_SERIAL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def leaf_certificate(keys: NetworkKeys, identity: Identity) -> bytes:
    """A certificate for the peer's own key, signed by the network's authority, DER."""
    authority = Ed25519PrivateKey.from_private_bytes(keys.authority_seed)
    public_key = identity.private_key.public_key()
    uri = x509.UniformResourceIdentifier(URI_SCHEME + format_peer_id(identity.peer_id))
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    # RFC 5280 wants a serial of its own for each certificate of an authority, positive, of at most 20 bytes.
    serial = int.from_bytes(hashlib.sha256(b"serial" + identity.public_key).digest()[:16]) | 2
    certificate = (
        _builder(_LEAF_NAME, public_key, serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def peer_id_from_der(certificate: bytes) -> PeerId:
    """The peer id that a proven certificate stands for, from its public key alone.

    RemoteError when it is not an Ed25519 certificate of ours or names another peer than its key is.
    """
    if len(certificate) > MAX_CERTIFICATE:
        raise RemoteError(f"certificate of {len(certificate)} bytes is over the limit of {MAX_CERTIFICATE}")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        public_key = parsed.public_key()
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except Exception as error:  # the parser's errors are of many types, some without a common base
        raise RemoteError(f"the certificate cannot be read: {type(error).__name__}") from None
    if not isinstance(public_key, Ed25519PublicKey):
        raise RemoteError("the certificate's key is not Ed25519")
    peer = peer_id_of(PublicKey(public_key.public_bytes_raw()))
    if uris != [URI_SCHEME + format_peer_id(peer)]:  # a sanity check: whoever lies here is broken or worse
        raise RemoteError("the certificate names another peer than its key belongs to")
    return peer


def _builder(subject: x509.Name, public_key: Ed25519PublicKey, serial: int) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY_NAME)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
