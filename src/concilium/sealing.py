"""Weights that one site seals for another, so that the server between them carries what it can neither read nor make.

The construction is that of the authenticated mode of HPKE (RFC 9180, sections 4.1 and 5.1.3): X25519 (RFC 7748) of a key made
for the one message, and of the sender's own key, both with the receiver's; HKDF with SHA-256 (RFC 5869); ChaCha20-Poly1305
(RFC 8439). Only the receiver can open it, and only the sender can have made it. It is bound to `About`, and refused as anything
else.

A site's sealing key is made at the site and stays there. Its public half travels on a `Card`, which between hospitals is signed
with the private key of the site's certificate: whoever receives a card checks it against the federation's authority, so that
the server cannot put a key of its own in its place. In a simulation, one owner's, cards are not signed.

What this does not do: whoever steals a site's sealing key can open what was sealed for that site before. And a receiver could
make what looks like a message from a sender to itself, as in all such constructions.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from concilium.errors import ContractError, PrivacyError
from concilium.messages import Card

VERSION = "concilium sealed 1"
KEY_BYTES = 32
LIMIT = 2**31 - 65
"""Bytes of tensors that can be sealed at once."""
NONCE = bytes(12)
"""Each key encrypts one message."""
NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Identity:
    """How a site between hospitals is known: the authority that all trust, its own certificate and key, and who else there is."""

    authority: Path
    certificate: Path
    key: Path
    sites: tuple[str, ...]


@dataclass(frozen=True)
class About:
    """What a sealed message is bound to."""

    run: str
    model: str
    round: int
    sender: str
    receiver: str
    purpose: str
    """`pass`: to go on from; `final`: to keep."""
    reveal: bool
    """Whether the server is to have the finished model: all sites of a chain were told the same."""

    @property
    def encoded(self) -> bytes:
        return json.dumps([VERSION, *astuple(self)]).encode()


# ----------------------------------------------------------------------------------------------------------------- keys


def own_key(path: Path) -> X25519PrivateKey:
    """The site's sealing key; made where there is none, readable by its owner only.

    Raises:
        ContractError: the file holds no key.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(X25519PrivateKey.generate().private_bytes_raw())
            os.fsync(file.fileno())
        unfinished.replace(path)
    raw = path.read_bytes()
    if len(raw) != KEY_BYTES:
        raise ContractError(f"{path} has {len(raw)} bytes. A sealing key has {KEY_BYTES}. Remove it; another is made.")
    return X25519PrivateKey.from_private_bytes(raw)


def make_card(site: str, run: str, key: X25519PrivateKey, identity: Identity | None) -> Card:
    """The site's card for a run, signed where the site has a certificate."""
    public = key.public_key().public_bytes_raw()
    if identity is None:
        return Card(site, as_tensor(public), NOTHING, NOTHING)
    certificate = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    private = serialization.load_pem_private_key(identity.key.read_bytes(), password=None)
    signed = _on_card(site, run, public)
    match private:
        case rsa.RSAPrivateKey():
            signature = private.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        case ec.EllipticCurvePrivateKey():
            signature = private.sign(signed, ec.ECDSA(hashes.SHA256()))
        case _:
            raise ContractError(
                f"{identity.key} holds a {type(private).__name__}. Allowed: RSA or an elliptic curve. Provision the kits again."
            )
    return Card(
        site, as_tensor(public), as_tensor(certificate.public_bytes(serialization.Encoding.DER)), as_tensor(signature)
    )


def check_card(card: Card, run: str, identity: Identity | None) -> X25519PublicKey:
    """The key on a card. A site with a certificate takes only cards of this run that sites of its federation have signed.

    Raises:
        PrivacyError: it is not signed so.
        ContractError: it holds no key.
    """
    public = as_bytes(card.key)
    if len(public) != KEY_BYTES:
        raise ContractError(
            f"The card of {card.site} has a key of {len(public)} bytes. Expected {KEY_BYTES}. Report this."
        )
    if identity is not None:
        try:
            _check_signature(card, _on_card(card.site, run, public), identity)
        except (ValueError, TypeError, InvalidSignature) as e:
            raise PrivacyError(
                f"The card of {card.site} is not signed by a site of this federation ({type(e).__name__}: {e}). Known sites: "
                f"{', '.join(identity.sites)}. Nothing is sealed for it, nor opened from it.",
                rule="card",
            ) from e
    return X25519PublicKey.from_public_bytes(public)


def _check_signature(card: Card, signed: bytes, identity: Identity) -> None:
    """Raise ValueError, TypeError or InvalidSignature where the card is not that of a site of the federation."""
    root = x509.load_pem_x509_certificate(identity.authority.read_bytes())
    certificate = x509.load_der_x509_certificate(as_bytes(card.certificate))
    certificate.verify_directly_issued_by(root)
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise ValueError(f"its certificate is valid until {certificate.not_valid_after_utc}")
    names = [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [card.site] or card.site not in identity.sites:  # the server has a certificate too
        raise ValueError(f"its certificate is that of {names}")
    match certificate.public_key():
        case rsa.RSAPublicKey() as key:
            key.verify(as_bytes(card.signature), signed, padding.PKCS1v15(), hashes.SHA256())
        case ec.EllipticCurvePublicKey() as key:
            key.verify(as_bytes(card.signature), signed, ec.ECDSA(hashes.SHA256()))
        case key:
            raise ValueError(f"its certificate has a {type(key).__name__}")


def _on_card(site: str, run: str, public: bytes) -> bytes:
    """What a card's signature is of."""
    return json.dumps([f"{VERSION} card", run, site, public.hex()]).encode()


# -------------------------------------------------------------------------------------------------------------- messages


def seal(tensors: Mapping[str, Tensor], about: About, *, own: X25519PrivateKey, receiver: X25519PublicKey) -> Tensor:
    """The tensors, for the receiver alone: uint8 (n,), the public key of the message and what it encrypts.

    Raises:
        ContractError: they are too large.
    """
    plain = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    if len(plain) > LIMIT:
        raise ContractError(
            f"Weights of {len(plain)} bytes are to be sealed. At most {LIMIT} can be. Choose a smaller network."
        )
    once = X25519PrivateKey.generate()
    public = once.public_key().public_bytes_raw()
    secret = once.exchange(receiver) + own.exchange(receiver)
    key = _derive(secret, about, public, own.public_key(), receiver)
    return as_tensor(public + ChaCha20Poly1305(key).encrypt(NONCE, plain, about.encoded))


def unseal(sealed: Tensor, about: About, *, own: X25519PrivateKey, sender: X25519PublicKey) -> dict[str, Tensor]:
    """What `seal` was given.

    Raises:
        ContractError: it was not sealed by this sender, for this receiver, as this; or it was changed on the way.
    """
    raw = as_bytes(sealed)
    public = raw[:KEY_BYTES]
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(public)) + own.exchange(sender)
        key = _derive(secret, about, public, sender, own.public_key())
        return load(ChaCha20Poly1305(key).decrypt(NONCE, raw[KEY_BYTES:], about.encoded))
    except (InvalidTag, ValueError, SafetensorError) as e:
        raise ContractError(
            f"What came from {about.sender} for {about.receiver} ({about.model}, round {about.round}, {len(raw)} bytes) cannot "
            f"be opened ({type(e).__name__}). Expected what was sealed there, for this, and not changed on the way."
        ) from e


def _derive(secret: bytes, about: About, once: bytes, sender: X25519PublicKey, receiver: X25519PublicKey) -> bytes:
    """The key of one message."""
    info = about.encoded + once + sender.public_bytes_raw() + receiver.public_bytes_raw()
    return HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(secret)


def as_tensor(raw: bytes) -> Tensor:
    """Bytes as they travel in messages: uint8 (n,)."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else NOTHING.clone()


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of such a tensor.

    Raises:
        ContractError: it is none.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise ContractError(
            f"A tensor of {tensor.dtype} {tuple(tensor.shape)} came in place of bytes. Expected uint8 (n,). Report this."
        )
    return tensor.contiguous().numpy().tobytes()
