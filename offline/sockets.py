"""The sockets of a process tree that CRIU needs options for, or cannot dump: asked from the kernel.

Source: proc_pid_net(5), sock_diag(7), the kernel's include/uapi/linux/unix_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME, _UDIAG_SHOW_PEER = 1, 4
_UNIX_DIAG_NAME, _UNIX_DIAG_PEER = 0, 2
_HEADER = struct.Struct("<IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("<BBHIIIII")  # unix_diag_req: family, protocol, pad, states, inode, show, cookie
_MESSAGE = struct.Struct("<BBBBIII")  # unix_diag_msg: family, type, state, pad, inode, cookie
_ATTRIBUTE = struct.Struct("<HH")  # nlattr: length, type
_TIMEOUT = 5.0


@dataclass(frozen=True)
class UnixSocket:
    """peer: the inode of the socket that it is connected to, 0 if none. name: its path, or empty."""

    inode: int
    kind: int
    peer: int
    name: str


def has_tcp_sockets(pid: int, inodes: set[int]) -> bool:
    """Whether one of these sockets, of a process in pid's network namespace, is a TCP socket, be it a listening one."""
    for table in ("tcp", "tcp6"):
        try:
            with Path(f"/proc/{pid}/net/{table}").open() as file:
                next(file, None)
                if any(int(line.split()[9]) in inodes for line in file):
                    return True
        except OSError:
            continue  # no IPv6
    return False


def unix_sockets() -> dict[int, UnixSocket]:
    """All unix sockets of this network namespace, by inode; none where the kernel does not tell."""
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_NAME | _UDIAG_SHOW_PEER, 0, 0)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_TIMEOUT)
            netlink.send(header + request)
            return {found.inode: found for found in _replies(netlink)}
    except OSError:
        return {}


def _replies(netlink: socket.socket) -> Iterator[UnixSocket]:
    while True:
        data = netlink.recv(1 << 17)
        position = 0
        while position + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, position)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER.size:
                return
            yield _unix_socket(data[position + _HEADER.size : position + length])
            position += (length + 3) & ~3


def _unix_socket(message: bytes) -> UnixSocket:
    _, kind, _, _, inode, *_ = _MESSAGE.unpack_from(message)
    peer, name = 0, ""
    position = _MESSAGE.size
    while position + _ATTRIBUTE.size <= len(message):
        length, attribute = _ATTRIBUTE.unpack_from(message, position)
        value = message[position + _ATTRIBUTE.size : position + length]
        if attribute == _UNIX_DIAG_PEER:
            (peer,) = struct.unpack("<I", value)
        elif attribute == _UNIX_DIAG_NAME:
            # An abstract name begins with a null byte and is written with @, as in /proc/net/unix.
            name = os.fsdecode(b"@" + value[1:] if value[:1] == b"\0" else value.rstrip(b"\0"))
        position += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return UnixSocket(inode, kind, peer, name)
