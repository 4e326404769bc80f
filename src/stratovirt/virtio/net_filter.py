"""Which frames a network driver wants, and the control queue's commands that say so (VIRTIO 1.2, 5.1.6.5).

A command is one chain: u8 class, u8 command, data from the driver; u8 ack to the driver. Classes and their commands:
    0 RX      u8 on/off: 0 PROMISC, 1 ALLMULTI, 2 ALLUNI, 3 NOMULTI, 4 NOUNI, 5 NOBCAST
    1 MAC     0 TABLE_SET: {u32 entries, mac[entries]} for unicast, the same for multicast; 1 ADDR_SET: mac
    2 VLAN    u16 id: 0 ADD, 1 DEL
    4 MQ      u16 pairs: 0 VQ_PAIRS_SET, in `net.py`
Everything else (announcements) was not offered and is refused.

Until a driver has set a mode it gets every frame: one without a control queue has no way to ask. Its sets are bounded: a
table of more than 64 addresses counts as "all of them", and there are 4096 VLANs. No I/O here.
"""

from __future__ import annotations

from stratovirt.errors import GuestError
from stratovirt.virtio.queue import Chain, split

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from stratovirt.snapshot.saved import Saved

CLASS_RX, CLASS_MAC, CLASS_VLAN, CLASS_MQ = 0, 1, 2, 4
MQ_PAIRS_SET = 0  # of CLASS_MQ, which is the device's own
RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST = range(6)
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1

ACK_OK, ACK_ERR = b"\x00", b"\x01"

MAC_SIZE = 6
MAX_ADDRESSES = 64
MAX_VLAN = 4096
MAX_COMMAND = 2 + 2 * (4 + MAC_SIZE * 4096)  # longer ones are refused unread
HEAD_SIZE = 16  # of a frame, that `accepts` looks at: two addresses, type and VLAN tag

_BROADCAST = b"\xff" * MAC_SIZE
_VLAN_TYPE = b"\x81\x00"


class ReceiveFilter:
    """State of one interface with address `mac`. Thread: the device's loop, or any while the device is inactive."""

    def __init__(self, mac: bytes) -> None:
        self.own_mac = mac
        self.reset()

    def reset(self) -> None:
        self.mac = self.own_mac
        self._modes = [True, False, False, False, False, False]
        self._unicast: frozenset[bytes] | None = frozenset()  # None: all
        self._multicast: frozenset[bytes] | None = frozenset()
        self._vlans: set[int] | None = None
        self._everything = True

    def filter_vlans(self) -> None:
        """The driver negotiated CTRL_VLAN: tagged frames pass once it has added their VLAN."""
        if self._vlans is None:
            self._vlans = set()
        self._everything = False

    # -- snapshots

    def save(self) -> dict[str, object]:
        return {
            "mac": self.mac.hex(), "modes": [int(mode) for mode in self._modes],
            "unicast": None if self._unicast is None else {"addresses": b"".join(sorted(self._unicast)).hex()},
            "multicast": None if self._multicast is None else {"addresses": b"".join(sorted(self._multicast)).hex()},
            "vlans": None if self._vlans is None else {"ids": sorted(self._vlans)},
        }

    def restore(self, state: Saved) -> None:
        """Raises: SnapshotError."""
        self.mac = state.data("mac", MAC_SIZE)
        modes = state.integers("modes", 0, 1, len(self._modes))
        if len(modes) != len(self._modes):
            raise state.error("modes", f"not {len(self._modes)} of them")
        self._modes = [mode != 0 for mode in modes]
        self._unicast, self._multicast = self._addresses(state, "unicast"), self._addresses(state, "multicast")
        vlans = state.optional_section("vlans")
        self._vlans = None
        if vlans is not None:
            self._vlans = set(vlans.integers("ids", 0, MAX_VLAN - 1, MAX_VLAN))
            vlans.end()
        state.end()
        self._everything = self._modes[RX_PROMISC] and self._vlans is None

    @staticmethod
    def _addresses(state: Saved, name: str) -> frozenset[bytes] | None:
        section = state.optional_section(name)
        if section is None:
            return None
        table = section.data("addresses", limit=MAX_ADDRESSES * MAC_SIZE)
        if len(table) % MAC_SIZE:
            raise section.error("addresses", f"not addresses of {MAC_SIZE} bytes")
        section.end()
        return _table(table)

    # -- frames

    def accepts(self, head: bytes) -> bool:
        """Does the driver want the frame that begins with these HEAD_SIZE bytes (fewer if it is shorter)?"""
        if self._everything:
            return True
        vlans = self._vlans
        if vlans is not None and head[12:14] == _VLAN_TYPE and int.from_bytes(head[14:16], "big") & 0xFFF not in vlans:
            return False
        promisc, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast = self._modes
        if promisc:
            return True
        destination = head[:MAC_SIZE]
        if destination == _BROADCAST:
            return not no_broadcast
        if head[:1] and head[0] & 1:
            if no_multicast:
                return False
            return all_multicast or self._multicast is None or destination in self._multicast
        if no_unicast:
            return False
        return all_unicast or destination == self.mac or self._unicast is None or destination in self._unicast

    @property
    def plain_mac(self) -> bytes | None:
        """Frames for this address that have no VLAN tag are wanted; b"": all frames are; None: there is no such address. For
        compiled code, which asks `accepts` about all others.
        """
        if self._everything:
            return b""
        return None if self._modes[RX_NOUNI] or self.mac[0] & 1 else self.mac

    # -- commands

    def answer(self, name: str, chain: Chain, set_pairs: Callable[[int, bytes], bool]) -> int:
        """Carry out the command in a chain of the control queue of device `name`; how many bytes were written into the chain.

        `set_pairs` gets command and data of class MQ. Raises: GuestError.
        """
        if chain.readable_length < 2 or chain.writable_length < 1:
            raise GuestError(name, f"a command of {chain.readable_length} readable and {chain.writable_length} writable "
                             "bytes has no header or no ack", "VIRTIO 1.2, 5.1.6.5")
        done = False
        if chain.readable_length <= MAX_COMMAND:
            request = b"".join(chain.readable)
            if request[0] == CLASS_MQ:
                done = set_pairs(request[1], request[2:])
            else:
                done = self.command(request[0], request[1], request[2:])
        ack, _ = split(chain.writable, 1)
        ack[0][:] = ACK_OK if done else ACK_ERR
        return 1

    def command(self, kind: int, command: int, data: bytes) -> bool:
        """Carry out one command of the control queue. False: it is unknown or malformed, and nothing has changed."""
        if kind == CLASS_RX:
            done = self._set_mode(command, data)
        elif kind == CLASS_MAC:
            done = self._set_addresses(command, data)
        elif kind == CLASS_VLAN:
            done = self._set_vlan(command, data)
        else:
            done = False
        self._everything = self._modes[RX_PROMISC] and self._vlans is None
        return done

    def _set_mode(self, command: int, data: bytes) -> bool:
        if command >= len(self._modes) or len(data) != 1:
            return False
        self._modes[command] = data[0] != 0
        return True

    def _set_addresses(self, command: int, data: bytes) -> bool:
        if command == MAC_ADDR_SET and len(data) == MAC_SIZE:
            self.mac = data
            return True
        if command != MAC_TABLE_SET:
            return False
        first = _table_end(data, 0)
        if first is None or _table_end(data, first) != len(data):
            return False
        self._unicast, self._multicast = _table(data[4:first]), _table(data[first + 4 :])
        return True

    def _set_vlan(self, command: int, data: bytes) -> bool:
        vlan = int.from_bytes(data, "little")
        if self._vlans is None or len(data) != 2 or vlan >= MAX_VLAN:
            return False
        if command == VLAN_ADD:
            self._vlans.add(vlan)
        elif command == VLAN_DEL:
            self._vlans.discard(vlan)
        else:
            return False
        return True


def _table_end(data: bytes, start: int) -> int | None:
    """Where the table of addresses at `start` ends, None if not inside `data`."""
    if len(data) < start + 4:
        return None
    end = start + 4 + MAC_SIZE * int.from_bytes(data[start : start + 4], "little")
    return end if end <= len(data) else None


def _table(addresses: bytes) -> frozenset[bytes] | None:
    if len(addresses) > MAX_ADDRESSES * MAC_SIZE:
        return None
    return frozenset(addresses[at : at + MAC_SIZE] for at in range(0, len(addresses), MAC_SIZE))
