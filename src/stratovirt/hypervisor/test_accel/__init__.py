"""The test accelerator: a machine without KVM and vCPUs, whose registers and memory somebody drives through a socket.

`commands` is the text protocol, `peer` the socket, `clock` the guest's time, `accelerator` all of it as the board takes it.
"""
