"""Numbers of the vhost-user protocol ("Vhost-user Protocol" in QEMU's documentation, docs/interop/vhost-user.rst)."""

# Requests
GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24
SET_DEVICE_STATE_FD = 42
CHECK_DEVICE_STATE = 43

NAMES = {number: name for name, number in globals().copy().items() if name[:4] in ("GET_", "SET_", "CHEC")}

# Flags of a message: the version of the protocol in the lowest two bits
VERSION = 1
VERSION_MASK = 3
REPLY = 4
NEED_REPLY = 8

F_PROTOCOL_FEATURES = 30  # a bit among the device's features

# Protocol features
P_MQ = 0
P_REPLY_ACK = 3
P_CONFIG = 9
P_DEVICE_STATE = 19

CONFIG_MAX = 256
