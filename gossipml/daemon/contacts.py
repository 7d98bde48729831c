"""`state/contacts`: whom to dial at the next start, so that a network comes back without the peers of its token."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from gossipml import codec
from gossipml.env import Disk, write_atomic
from gossipml.errors import RemoteError
from gossipml.ids import MAX_CONTACT_ADDRESSES, PEER_ID_SIZE, Contact, PeerId, checked_address

log = logging.getLogger("gossipml.node")

PATH = "state/contacts"
MAX_CONTACTS = 256  # half of them may be gone and the network is still found
MAX_FILE = 1 << 18
MAX_TEXT = 64


async def save_contacts(disk: Disk, contacts: Iterable[Contact]) -> None:
    """Keep the contacts, best first; a disk that does not take them is said and costs nothing else."""
    rows = [
        [contact.peer, [[host, port] for host, port in contact.addresses], contact.model, contact.name]
        for contact in list(contacts)[:MAX_CONTACTS]
    ]
    try:
        await write_atomic(disk, PATH, codec.pack(rows))
    except OSError as error:
        log.warning("cannot keep the contacts: %s; free or mend the disk", error)


async def load_contacts(disk: Disk) -> list[Contact]:
    """The contacts of the last run; none when there was none or the file is damaged."""
    try:
        rows = codec.unpack(await disk.read(PATH, limit=MAX_FILE), limit=MAX_FILE)
        if not isinstance(rows, list):
            raise RemoteError("not a list")
        return [_contact(row) for row in rows[:MAX_CONTACTS]]
    except FileNotFoundError:
        return []
    except (RemoteError, ValueError, OSError) as error:
        log.warning("%s cannot be read (%s); the contacts are found anew", PATH, error)
        return []


def _contact(row: codec.Value) -> Contact:
    match row:
        case [bytes(peer), list(addresses), str(model), str(name)] if len(peer) == PEER_ID_SIZE:
            pairs = [pair for pair in addresses[:MAX_CONTACT_ADDRESSES] if isinstance(pair, list) and len(pair) == 2]
            places = tuple(checked_address(host, port) for host, port in pairs)
            return Contact(PeerId(peer), places, model[:MAX_TEXT], name[:MAX_TEXT])
    raise RemoteError("not a contact")
