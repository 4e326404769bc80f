"""What the interface has and this version not yet, declared with its limits.

Not on the way to a running guest: imported for help, for the documentation, and to word an error (`cli/refusals.py`).
"""

from __future__ import annotations

from stratovirt.config.schema import (
    U32_MAX,
    U64_MAX,
    Bool,
    Choice,
    Group,
    Int,
    Key,
    Path,
    StrictBool,
    String,
)

_BOOL, _STRICT, _STRING, _FD = Bool(), StrictBool(), String(), Int(0, (1 << 31) - 1)
_ID = Key("id", _STRING, "the name by which other options and QMP refer to it", required=True)
_CHARDEV = Key("chardev", _STRING, "the id of its -chardev", required=True)

NETDEVS: dict[str, Group] = {}

OBJECTS = {
    "tls-creds-x509": Group("-object tls-creds-x509", "certificates for VNC", (
        _ID,
        Key("dir", Path(), "directory of the certificates", required=True),
        Key("endpoint", Choice("server"), "side", "server"),
        Key("verify-peer", _STRICT, "ask the client for a certificate", True),
    ), works=False),
    "authz-simple": Group("-object authz-simple", "who may use VNC", (
        _ID,
        Key("identity", _STRING, "name"),
    ), works=False),
}

DEVICES: dict[str, Group] = {}

# Devices of the machines with PCI, and of the desktop.
PCI_DEVICES = (
    "virtio-blk-pci", "vhost-user-blk-pci", "virtio-net-pci", "virtio-serial-pci", "virtio-balloon-pci", "virtio-mem-pci",
    "virtio-pmem-pci", "virtio-rng-pci", "virtio-input-pci", "virtio-multitouch-pci", "vhost-user-fs-pci", "vhost-vsock-pci",
    "virtio-scsi-pci", "pcie-root-port", "vfio-pci", "pvpanic", "virtio-gpu-pci", "vhost-user-gpu-pci", "nec-usb-xhci",
    "ivshmem-scream", "pcie-demo-dev",
)
OTHER_DEVICES = (
    "virtio-mem-device", "virtio-pmem-device", "virtio-input-device", "virtio-multitouch-device", "scsi-hd", "scsi-cd",
    "ramfb", "usb-kbd", "usb-tablet", "usb-consumer", "usb-storage", "usb-uas", "usb-camera", "usb-host",
)

# Options that take a single value with a kind of their own.
VALUES = {
    "hardware-signature": Key("hardware-signature", Int(0, U32_MAX), ""),
    "windows_emu_pid": Key("windows_emu_pid", Int(1, U64_MAX), ""),
}
