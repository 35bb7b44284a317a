"""The settings: how each is called and read, and what --help says of it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from functools import partial
from typing import Any, Callable, NamedTuple, Union

# Readers of env files may leave them around a value; word processors insert curly ones.
QUOTES = "'\"`\u00ab\u00bb\u2018-\u201f"
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class SettingError(ValueError):
    """A setting makes no sense; the message is one sentence that names it."""


class Setting(NamedTuple):
    """How a setting is read from its text, its default as text, and its meaning."""

    read: Callable[[Any], Any]
    default: str | None
    meaning: str


def read_settings(**given: Any) -> dict[str, Any]:
    """Return all settings: from `given`, else from the environment, else their defaults.

    An argument of None counts as not given, an empty variable as not set. Raises
    SettingError.
    """
    settings = {}
    for name, setting in SETTINGS.items():
        value = given.get(name)
        if value is None:
            value = os.environ.get(name)
        try:
            settings[name] = setting.read(value or setting.default)
        except ValueError as error:
            raise SettingError(f"{name}: {error}") from error
    return settings


def _read_networks(text: str | Iterable[str] | None) -> list[Network]:
    entries = text.split(",") if isinstance(text, str) else text or ()
    return [_read_network(entry.strip()) for entry in entries]


def _read_network(text: str) -> Network:
    network = ipaddress.ip_network(text)
    # An IPv4-mapped network is read as IPv4, as client.py does with addresses.
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        return ipaddress.IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


def _read_path(value: str | os.PathLike[str]) -> str:
    text = os.fspath(value)
    if not text.isprintable() or text != text.strip():
        raise ValueError(
            f"{text!r} has white space at an end, or characters that cannot be printed"
        )
    if re.search(f"^[{QUOTES}]|[{QUOTES}]$", text):
        raise ValueError(f"{text} has quotes around it, which would be part of the name")
    if text.lower().startswith("file:") or text == ":memory:":
        raise ValueError(f"{text} is not the path of a file")
    return text


def _read_listen(text: str) -> str:
    match = re.fullmatch(r"(?:([0-9.]+)|\[([0-9a-fA-F:.]*:[0-9a-fA-F:.]*)\]):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(
            f"{text!r} is not an address and port such as 127.0.0.1:8080 or [::1]:8080"
        )
    ipaddress.ip_address(match[1] or match[2])
    return text


def _read_hosts(text: str | None) -> list[str]:
    entries = text.split(",") if text else []
    # A final dot says that a name is complete.
    hosts = [entry.strip().lower().removesuffix(".") for entry in entries]
    for host in hosts:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f.]*:[0-9a-f.:]*\]", host):
            raise ValueError(f"{host!r} is not a host name without its port")
    return hosts


def _read_integer(lowest: int, highest: int, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        raise ValueError(f"{text!r} is not an integer from {lowest} to {highest}")
    return int(text)


SETTINGS = {
    "MANAGER_IPS": Setting(
        _read_networks,
        None,
        "Managers' addresses or networks, comma-separated.",
    ),
    "RAFFLE_DATABASE": Setting(
        _read_path,
        "raffle.db",
        "Path of the SQLite file, created if missing.",
    ),
    "RAFFLE_LISTEN": Setting(
        _read_listen,
        "127.0.0.1:8080",
        "Address and port; [::1]:8080 for IPv6. Port 0 picks one.",
    ),
    "RAFFLE_THREADS": Setting(
        partial(_read_integer, 1, 200),
        "64",
        "Requests handled at once, in each process.",
    ),
    "RAFFLE_PROCESSES": Setting(
        partial(_read_integer, 1, 64),
        "1",
        "Processes that serve one address and one file: up to one for each core.",
    ),
    "RAFFLE_TRUSTED_PROXIES": Setting(
        _read_networks,
        None,
        "Proxies whose X-Forwarded-For is trusted.",
    ),
    "RAFFLE_HOSTS": Setting(
        _read_hosts,
        None,
        "Host names to answer to; others get 421 (not /health). Unset: all.",
    ),
    "RAFFLE_IPV6_PREFIX": Setting(
        partial(_read_integer, 1, 128),
        "128",
        "Bits that identify an IPv6 client. On the internet: 64.",
    ),
}
