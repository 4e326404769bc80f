"""What a clone has of its own, as it was asked for: read, completed, and kept apart from what other clones have.

A request names the template and then, in any order:

    name=NAME       a name that no other clone of this launcher has; `%d` is the clone's number. Left out: TEMPLATE-%d
    mac=MAC,…       of its network devices, in the order of the template's; those left out are drawn at random
    tap=TAP,…       the taps of its -netdev, in order; `%d` as above. Needed for every -netdev of the template
    cid=N           of its vhost-vsock-device. Left out: the first above the template's that no other clone has
    qmp=ADDRESS     as in -qmp; may be repeated, `%d` as above
    detach=1        the machine goes on when the connection ends

A clone's number is the lowest, from 1 on, that no living clone of its template has.
"""

from __future__ import annotations

import os

from stratovirt.errors import ConfigError
from stratovirt.launcher.template import NAMES_ACCEPTED, NET, VSOCK, Template, is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_KEYS = ("name", "mac", "tap", "cid", "qmp", "detach")
_MIN_CID, _MAX_CID = 3, 0xFFFF_FFFE
_MAX_TAP = 15
_MAX_QMP = 8
_OUI = bytes((0x52, 0x54, 0x00))


class Identity:
    """Of one clone, complete. Strings and numbers only: it goes over a socket as `words`."""

    __slots__ = ("cid", "detach", "macs", "name", "number", "qmp", "taps", "template")

    def __init__(self, template: str, name: str, number: int, macs: list[str], taps: list[str], cid: int, qmp: list[str],
                 detach: bool) -> None:
        self.template = template
        self.name = name
        self.number = number
        self.macs = macs
        self.taps = taps
        self.cid = cid  # 0: it has no vsock
        self.qmp = qmp
        self.detach = detach

    def words(self) -> list[str]:
        """As a request that names everything."""
        return [self.template, f"name={self.name}", f"mac={','.join(self.macs)}", f"tap={','.join(self.taps)}",
                f"cid={self.cid}", *(f"qmp={address}" for address in self.qmp), f"detach={int(self.detach)}"]

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "template": self.template, "mac": self.macs, "tap": self.taps,
                "cid": self.cid or None, "qmp": self.qmp}


def parse(words: list[str]) -> tuple[str, dict[str, list[str]]]:
    """The template's name and the values by their keys. Raises: ConfigError."""
    if not words:
        raise ConfigError("the name of a template is missing", option="clone")
    values: dict[str, list[str]] = {key: [] for key in _KEYS}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in values:
            raise ConfigError("no such property of a clone", option="clone", value=word, accepted=", ".join(_KEYS))
        values[key].append(value)
    for key in _KEYS:
        if key != "qmp" and len(values[key]) > 1:
            raise ConfigError("given twice", option="clone", value=key, accepted="each once")
    return words[0], values


def read(words: list[str]) -> Identity:
    """What `Identity.words` has written. Raises: ConfigError."""
    template, values = parse(words)

    def one(key: str) -> str:
        return values[key][0] if values[key] else ""

    def several(key: str) -> list[str]:
        return one(key).split(",") if one(key) else []

    cid = one("cid")
    return Identity(template, one("name"), 0, several("mac"), several("tap"), int(cid) if cid.isdigit() else 0,
                    values["qmp"], one("detach") == "1")


def complete(template: Template, values: dict[str, list[str]], living: Iterable[Identity]) -> Identity:
    """Check what was asked for against the template and the `living`, and fill in the rest. Raises: ConfigError."""
    living = list(living)
    number = _first_free(1, {other.number for other in living if other.template == template.name})
    name = _name(template, values["name"], number, {other.name for other in living})
    macs = _macs(template, values["mac"], {mac for other in living for mac in other.macs})
    taps = _taps(template, values["tap"], number, {tap for other in living for tap in other.taps})
    cid = _cid(template, values["cid"], {other.cid for other in living})
    qmp = [address.replace("%d", str(number)) for address in values["qmp"]]
    if len(qmp) > _MAX_QMP:
        raise ConfigError(f"more than {_MAX_QMP} QMP sockets", option="clone --qmp", value=qmp[_MAX_QMP])
    detach = values["detach"][0] if values["detach"] else "0"
    if detach not in ("0", "1"):
        raise ConfigError("neither 0 nor 1", option="clone", value=f"detach={detach}")
    return Identity(template.name, name, number, macs, taps, cid, qmp, detach == "1")


def _first_free(first: int, taken: set[int]) -> int:
    while first in taken:
        first += 1
    return first


def _name(template: Template, given: list[str], number: int, taken: set[str]) -> str:
    if given:
        name = given[0].replace("%d", str(number))
    else:
        name = f"{template.name}-{number}"
        while name in taken:  # somebody has called another clone so
            number += 1
            name = f"{template.name}-{number}"
    if not is_name(name):
        raise ConfigError("not a name for a clone", option="clone --name", value=name, accepted=NAMES_ACCEPTED)
    if name in taken:
        raise ConfigError("a clone has this name already", option="clone --name", value=name,
                          accepted="a name of its own for each, or a pattern such as web-%d")
    return name


def _own_macs(template: Template) -> list[str]:
    """Of the machine that the template was made from, as far as its arguments say; it may be running still."""
    return [device.options.optional_string("mac") or f"52:54:00:12:34:{0x56 + number & 0xFF:02x}"
            for number, device in enumerate(template.devices(NET))]


def _macs(template: Template, given: list[str], taken: set[str]) -> list[str]:
    own = [mac.lower() for mac in _own_macs(template)]
    asked = [mac.lower() for mac in given[0].split(",")] if given and given[0] else []
    if len(asked) > len(own):
        raise ConfigError(f"{len(asked)} addresses, and the template {template.name} has {len(own)} network devices",
                          option="clone --mac", value=given[0], accepted=f"at most {len(own)}")
    taken = taken | set(own)
    macs: list[str] = []
    for mac in asked:
        if not _is_mac(mac):
            raise ConfigError("not a MAC address", option="clone --mac", value=mac,
                              accepted="six pairs of hexadecimal digits with colons; no multicast address, not all zero")
        if mac in taken:
            raise ConfigError("the template or another clone has this address", option="clone --mac", value=mac,
                              accepted="an address of its own for each")
        taken.add(mac)
        macs.append(mac)
    while len(macs) < len(own):
        mac = ":".join(f"{byte:02x}" for byte in _OUI + os.urandom(3))
        if mac not in taken:
            taken.add(mac)
            macs.append(mac)
    return macs


def _is_mac(text: str) -> bool:
    parts = text.split(":")
    if len(parts) != 6 or any(len(part) != 2 or set(part) - set("0123456789abcdef") for part in parts):
        return False
    return not int(parts[0], 16) & 1 and any(part != "00" for part in parts)


def _taps(template: Template, given: list[str], number: int, taken: set[str]) -> list[str]:
    own = list(template.config.netdevs.values())
    taps = given[0].replace("%d", str(number)).split(",") if given and given[0] else []
    if len(taps) < len(own):
        netdev = own[len(taps)]
        raise ConfigError(f"the -netdev {netdev.id} of the template {template.name} is on {netdev.ifname}, and a clone needs a "
                          "tap of its own", option="clone --tap", accepted="the name of a tap, or a pattern such as tap%d")
    if len(taps) > len(own):
        raise ConfigError(f"{len(taps)} taps, and the template {template.name} has {len(own)} -netdev", option="clone --tap",
                          value=given[0], accepted=f"{len(own)}")
    for tap in taps:
        if not 0 < len(tap) <= _MAX_TAP or "/" in tap or not tap.isprintable() or " " in tap:
            raise ConfigError("not the name of a tap", option="clone --tap", value=tap,
                              accepted=f"1 to {_MAX_TAP} letters, none of them a slash or a space")
        if tap in taken:
            raise ConfigError("another clone is on this tap", option="clone --tap", value=tap,
                              accepted="a tap of its own for each, or a pattern such as tap%d")
        taken = taken | {tap}
    return taps


def _cid(template: Template, given: list[str], taken: set[int]) -> int:
    devices = template.devices(VSOCK)
    if not devices:
        if given:
            raise ConfigError(f"the template {template.name} has no vhost-vsock-device", option="clone --cid", value=given[0],
                              accepted="leaving it out")
        return 0
    if not given:
        return _first_free(min(devices[0].options.integer("guest-cid") + 1, _MAX_CID), taken)
    text = given[0]
    cid = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    if not _MIN_CID <= cid <= _MAX_CID:
        raise ConfigError("not a CID", option="clone --cid", value=text, accepted=f"{_MIN_CID} to {_MAX_CID}")
    if cid in taken:
        raise ConfigError("another clone has this CID", option="clone --cid", value=text, accepted="a CID of its own for each")
    return cid
