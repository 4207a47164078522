"""Network interfaces: which one carries an address."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def interface_of(address: str) -> str | None:
    """Name of the interface that holds `address`; None if no one does, as behind a translated address.

    gloo left to itself takes what the host name resolves to, which on many machines is the loopback address, and finds
    no way to other nodes.
    """
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            held = ipaddress.ip_address(one.address.partition("%")[0])
            if held == wanted or (wanted.is_loopback and held.is_loopback):
                return str(name)
    return None
