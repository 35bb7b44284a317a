"""Who sent a request, whether they are a manager, and whether its Host and Origin are allowed.

Functions of a WSGI environ (PEP 3333) and of settings, without Bottle.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple, Union

from settings import Network

Environ = dict[str, Any]
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

# Behind a proxy that is not trusted, or that does not say for whom it asks, every client has the
# proxy's address: often 127.0.0.1, which is often a manager's.
UNTRUSTED_PROXY = (
    "This request was forwarded by {}, which is not in RAFFLE_TRUSTED_PROXIES, so it cannot be a "
    "manager's"
)
UNNAMED_CLIENT = (
    "{} is in RAFFLE_TRUSTED_PROXIES but sent no X-Forwarded-For, so this request cannot be a "
    "manager's: send X-Forwarded-For, or connect from an address that is no proxy's"
)
# What a proxy adds to a request that it forwards, beside X-Forwarded-*.
FORWARDING_HEADERS = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_CF_CONNECTING_IP")
# Through these, IPv6 networks reach clients that have IPv4 only (NAT64: RFC 6052, RFC 8215).
NAT64_NETWORKS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
DEFAULT_PORTS = {"http": "80", "https": "443"}
# An entry of X-Forwarded-For with a port, as Azure's gateways write it.
ADDRESS_WITH_PORT = r"(?:([0-9.]+)|\[([0-9a-fA-F:.]*:[0-9a-fA-F:.]*)\])(?::[0-9]{1,5})?"


class UnknownAddress(Exception):
    """The client's address is not an IP address; the argument is the text that was found."""


class NotAManager(Exception):
    """The request is not a manager's; the argument is one sentence on why."""


class Sender(NamedTuple):
    """Who sent a request.

    peer: the address that is connected, a client's or a proxy's. address: the
    client's. fault: one sentence on why it cannot be told whether a manager sent it,
    or None.
    """

    peer: Address
    address: Address
    fault: str | None


def find_sender(environ: Environ, trusted_proxies: list[Network]) -> Sender:
    """Return who sent the request. Raises UnknownAddress.

    The client's address is that of the peer, or what trusted proxies say in
    X-Forwarded-For: from its right end, the first address that is not a trusted
    proxy's; if all are proxies', the leftmost.
    """
    peer = _read_address(environ.get("REMOTE_ADDR", ""))
    if not _is_in(peer, trusted_proxies):
        return Sender(peer, peer, _forwarding_fault(environ, peer))
    if "HTTP_X_FORWARDED_FOR" not in environ:
        return Sender(peer, peer, UNNAMED_CLIENT.format(peer))

    address = peer
    entries = environ["HTTP_X_FORWARDED_FOR"].split(",")
    while entries and _is_in(address, trusted_proxies):
        entry = entries.pop().strip(" \t")
        match = re.fullmatch(ADDRESS_WITH_PORT, entry)
        address = _read_address(match[1] or match[2] if match else entry)
    return Sender(peer, address, None)


def _read_address(text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise UnknownAddress(text) from None

    if isinstance(address, ipaddress.IPv6Address):
        # An IPv4-mapped address is its IPv4, and the bytes leave out the zone of fe80::1%eth0.
        return address.ipv4_mapped or ipaddress.IPv6Address(address.packed)
    return address


def _is_in(address: Address, networks: list[Network]) -> bool:
    return any(address in network for network in networks)


def _forwarding_fault(environ: Environ, peer: Address) -> str | None:
    """Return the fault of a request that a stranger has forwarded, or None."""
    for name in environ:
        if name.startswith("HTTP_X_FORWARDED_") or name in FORWARDING_HEADERS:
            return UNTRUSTED_PROXY.format(peer)
    return None


def require_manager(sender: Sender, manager_ips: list[Network]) -> Address:
    """Return the address of the sender, a manager's. Raises NotAManager."""
    if sender.fault:
        raise NotAManager(sender.fault)
    if not _is_in(sender.address, manager_ips):
        raise NotAManager(f"Your ip address {sender.address} is not a manager's")
    return sender.address


def participant_bytes(address: Address, ipv6_prefix: int) -> bytes:
    """Return what identifies a participant: an IPv4 address, or the network of an IPv6 address.

    ipv6_prefix: 1 to 128, how many leading bits of an IPv6 address count. All do of an
    address that stands for an IPv4 address, because its network is everybody's.
    """
    if address.version == 4 or any(address in network for network in NAT64_NETWORKS):
        return address.packed
    host_bits = 128 - ipv6_prefix
    # Not by ip_network(), which takes four times as long.
    return (int(address) >> host_bits << host_bits).to_bytes(16, "big")


def is_served_host(environ: Environ, hosts: list[str]) -> bool:
    """Return whether the Host of the request is one of `hosts`; if these are none, any is."""
    host = re.sub(":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower().removesuffix(".")
    return not hosts or host in hosts


def is_same_origin(environ: Environ) -> bool:
    """Return whether a request is safe, not a browser's, or from a page of this server (CSRF).

    The rule is that of Go 1.25's net/http.CrossOriginProtection. Clients that are
    no browsers send neither header.
    """
    if environ["REQUEST_METHOD"] in ("GET", "HEAD", "OPTIONS"):
        return True
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site:
        return site in ("same-origin", "none")
    origin = environ.get("HTTP_ORIGIN")
    if not origin:
        return True
    scheme, _, origin_host = origin.lower().partition("://")
    default_port = f":{DEFAULT_PORTS.get(scheme, '')}"
    host = environ.get("HTTP_HOST", "").lower()
    return host != "" and _without(default_port, origin_host) == _without(default_port, host)


def _without(end: str, text: str) -> str:
    return text[: -len(end)] if text.endswith(end) else text
