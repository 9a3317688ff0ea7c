"""Who can open what is sealed, who can have made it, and whose cards are taken."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID

from concilium.errors import ContractError, PrivacyError
from concilium.messages import Card
from concilium.sealing import About, Identity, as_bytes, as_tensor, check_card, make_card, own_key, seal, unseal

ABOUT = About("run1", "cyclic", 3, "north", "south", "pass", False)
NORTH, SOUTH, OTHER = (X25519PrivateKey.generate() for _ in range(3))
WEIGHTS = {
    "conv": torch.arange(600, dtype=torch.float32).view(20, 30),
    "count": torch.tensor(7),
    "none": torch.empty(0),
}


def sealed(**changes: Any) -> torch.Tensor:
    given: dict[str, Any] = {"own": NORTH, "receiver": SOUTH.public_key()} | changes
    return seal(WEIGHTS, ABOUT, **given)


def opened(box: torch.Tensor, about: About = ABOUT, **changes: Any) -> dict[str, torch.Tensor]:
    return unseal(box, about, **{"own": SOUTH, "sender": NORTH.public_key()} | changes)


def refused(box: torch.Tensor, about: About = ABOUT, **changes: Any) -> None:
    with pytest.raises(ContractError, match=r"cannot be opened \(.*\)\. Expected what was sealed there"):
        opened(box, about, **changes)


def test_what_is_sealed_is_opened_as_it_was() -> None:
    found = opened(sealed())
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in WEIGHTS.items())


def test_nobody_sees_through_it_and_no_two_are_alike() -> None:
    raw = as_bytes(sealed())
    plain = WEIGHTS["conv"].numpy().tobytes()
    assert not any(plain[i : i + 16] in raw for i in range(0, len(plain), 16))
    assert raw != as_bytes(sealed())
    assert raw[:32] != as_bytes(sealed())[:32], "each message has a key of its own"


def test_only_the_receiver_opens_it() -> None:
    refused(sealed(), own=OTHER)
    refused(sealed(), own=NORTH)


def test_only_the_sender_can_have_made_it() -> None:
    """The server has no key of a site: what it makes itself is refused."""
    refused(sealed(own=OTHER))


@pytest.mark.parametrize(
    "other",
    [{"run": "run2"}, {"model": "another"}, {"round": 2}, {"round": 4}, {"sender": "west"}, {"receiver": "west"},
     {"purpose": "final"}, {"reveal": True}],
    ids=str,
)  # fmt: skip
def test_it_is_bound_to_what_it_is_for(other: dict[str, Any]) -> None:
    refused(sealed(), replace(ABOUT, **other))


@pytest.mark.parametrize("place", [0, 31, 32, 40, 1000, -17, -1])
def test_a_changed_bit_is_noticed(place: int) -> None:
    raw = bytearray(as_bytes(sealed()))
    raw[place] ^= 1
    refused(as_tensor(bytes(raw)))


@pytest.mark.parametrize("length", [0, 1, 31, 32, 47, 48, 500, -1])
def test_what_is_cut_off_is_refused(length: int) -> None:
    refused(as_tensor(as_bytes(sealed())[:length]))


def test_a_message_key_that_gives_no_secret_is_refused() -> None:
    """The all-zero point: with it anyone could compute one half of what the key is derived from."""
    refused(as_tensor(bytes(32) + as_bytes(sealed())[32:]))


def test_bytes_travel_as_bytes_only() -> None:
    with pytest.raises(ContractError, match=r"float32 \(3,\) came in place of bytes"):
        opened(torch.zeros(3))
    with pytest.raises(ContractError, match=r"uint8 \(1, 2\)"):
        as_bytes(torch.zeros(1, 2, dtype=torch.uint8))


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "sealing.key"
    key = own_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert own_key(path).private_bytes_raw() == key.private_bytes_raw() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["sealing.key"]
    path.write_bytes(b"half of it")
    with pytest.raises(ContractError, match=r"has 10 bytes\. A sealing key has 32"):
        own_key(path)


# ----------------------------------------------------------------------------------------------------------------- cards


@dataclass
class Authority:
    """Issues certificates into a folder."""

    folder: Path
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def issue(self, name: str, own: Any = None, *, days: int = 1) -> Identity:
        own = own or rsa.generate_private_key(65537, 2048)
        root, certificate, key = (self.folder / f for f in ("root.pem", f"{name}.crt", f"{name}.key"))
        root.write_bytes(self._signed("root", self.key, days))
        certificate.write_bytes(self._signed(name, own, days))
        plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        key.write_bytes(own.private_bytes(*plain))
        return Identity(root, certificate, key, ("north", "south"))

    def _signed(self, name: str, key: Any, days: int) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, "root"))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=2))
        builder = builder.not_valid_after(now + datetime.timedelta(days=days))
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def not_taken(card: Card, reader: Identity, run: str = "run1") -> None:
    with pytest.raises(
        PrivacyError, match=r"is not signed by a site of this federation .*Known sites: north, south\."
    ) as e:
        check_card(card, run, reader)
    assert e.value.rule == "card"


@pytest.mark.parametrize(
    "make", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP256R1())]
)
def test_a_card_signed_by_a_site_is_taken_by_the_others(make: Any, authority: Authority) -> None:
    north, south = authority.issue("north", make()), authority.issue("south")
    card = make_card("north", "run1", NORTH, north)
    assert check_card(card, "run1", south).public_bytes_raw() == NORTH.public_key().public_bytes_raw()


def test_a_server_that_puts_a_key_of_its_own_on_a_card_is_found(authority: Authority, tmp_path: Path) -> None:
    """The man in the middle: what it has is the certificate of the server, and the cards that sites sent."""
    north, south, server = (authority.issue(name) for name in ("north", "south", "server"))
    card = make_card("north", "run1", NORTH, north)
    its_own = as_tensor(OTHER.public_key().public_bytes_raw())
    not_taken(replace(card, key=its_own), south)  # signed is another key
    not_taken(make_card("north", "run1", OTHER, server), south)  # the server's certificate says `server`
    not_taken(make_card("server", "run1", OTHER, server), south)  # which is no site
    not_taken(make_card("north", "run1", OTHER, None), south)  # no certificate at all
    signature = make_card("north", "run1", OTHER, server).signature
    not_taken(Card("north", its_own, card.certificate, signature), south)  # signed with another key
    (tmp_path / "elsewhere").mkdir()
    not_taken(make_card("north", "run1", OTHER, Authority(tmp_path / "elsewhere").issue("north")), south)


def test_a_card_is_of_one_run_and_one_name(authority: Authority) -> None:
    north, south = authority.issue("north"), authority.issue("south")
    card = make_card("north", "run1", NORTH, north)
    not_taken(card, south, run="run2")
    not_taken(replace(card, site="south"), north)
    not_taken(
        make_card("west", "run1", NORTH, authority.issue("west")), south
    )  # of the authority, but not of this federation


def test_a_certificate_that_has_run_out_is_not_taken(authority: Authority) -> None:
    north, south = authority.issue("north", days=-1), authority.issue("south")
    not_taken(make_card("north", "run1", NORTH, north), south)


def test_a_kind_of_key_that_no_kit_has_is_told(authority: Authority) -> None:
    identity = authority.issue("north", ec.generate_private_key(ec.SECP256R1()))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    identity.key.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*plain))
    with pytest.raises(ContractError, match=r"holds a Ed25519PrivateKey\. Allowed: RSA"):
        make_card("north", "run1", NORTH, identity)


def test_a_card_has_a_key() -> None:
    with pytest.raises(ContractError, match=r"has a key of 31 bytes\. Expected 32"):
        check_card(Card("north", as_tensor(bytes(31)), as_tensor(b""), as_tensor(b"")), "run1", None)
