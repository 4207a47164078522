"""Network interfaces: which of them has a given address."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address.

    Without a named interface, gloo uses the address to which the host name resolves. On many machines that is the
    loopback address, from which no other node can be reached.

    Args:
        address: An IPv4 or IPv6 address.

    Returns:
        The name; None if no interface has the address, for example because it is translated (NAT).
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
