"""Whether others can reach this peer, through what, and what its owner can do about it.

`ask` and `survey` ask other peers; `judge` decides, `sentence` and `advice` say it in plain words. The last
three are pure: `petal-swarm doctor` and a server's log say the same.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petal_swarm.errors import PetalSwarmError
from petal_swarm.net.addresses import (
    ip_address,
    is_circuit,
    is_loopback,
    scope_of,
    split_address,
    tcp_port,
)
from petal_swarm.net.channel import Channel
from petal_swarm.net.relay import Candidate
from petal_swarm.net.transport import Transport
from petal_swarm.wire.announcement import Announcement
from petal_swarm.wire.connection import DIRECTORY_TABLE, Role
from petal_swarm.wire.messages.directory import MAX_DIALED_PORTS, DialBack, DialedBack
from petal_swarm.wire.protocols import DIRECTORY

ASK_TIMEOUT_S = 8.0
#: How many are asked. One may lie, be behind the same router, or be unable to dial anybody.
HELPERS = 4
#: What is not worth mentioning between two clocks; records allow 5 s.
CLOCK_TOLERANCE_S = 2.0

_SCOPES = {
    "internet": "",
    "network": " from the same local network",
    "machine": " from this machine alone",
}


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one peer said: which IP address it sees, None through a relay, and at which ports it was answered.

    `clock_ahead_s` is by how much its clock is ahead of ours.
    """

    peer_id: str
    ip: str | None
    tried: tuple[int, ...] = ()
    reached: tuple[int, ...] = ()
    clock_ahead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reachability:
    """The verdict.

    `kind`: `direct`, `relay`, `none`, or `unknown` (nobody could say). `scope` is from where: `internet`,
    `network` (the local one), `machine`. `addresses` are those by which it works; `observed_ips` those that
    others see, `ports` those at which this peer listens. `tries`: how many peers dialled it.
    """

    kind: str
    scope: str = "internet"
    addresses: tuple[str, ...] = ()
    observed_ips: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    tries: int = 0

    @property
    def reachable(self) -> bool:
        return self.kind in ("direct", "relay")


def candidates(initial_peers: Sequence[str], announcements: Sequence[Announcement] = ()) -> list[Candidate]:
    """Whom to ask, and be relayed by: the initial peers, then others that announce a direct address."""
    addresses: dict[str, tuple[str, ...]] = {}
    for address in initial_peers:
        peer_id = split_address(address)[1]
        addresses[peer_id] = (*addresses.get(peer_id, ()), address)
    for announcement in announcements:
        direct = tuple(address for address in announcement.addresses if not is_circuit(address))
        if direct:
            addresses.setdefault(announcement.peer_id, direct)
    return [Candidate(peer_id, tuple(known)) for peer_id, known in addresses.items()]


def listening_ports(addresses: Sequence[str]) -> tuple[int, ...]:
    """The TCP ports of this peer's own addresses, at most as many as may be asked for."""
    ports = dict.fromkeys(port for port in map(tcp_port, addresses) if port is not None)
    return tuple(ports)[:MAX_DIALED_PORTS]


async def ask(transport: Transport, helper: Candidate, *, now: Callable[[], float] = time.time) -> Sighting:
    """Have one peer dial this one.

    Raises:
        NetworkError: it cannot be reached, or does not answer in time.
        RemoteError, RemoteProtocolError: it will not, as peers of an older version.
    """
    ports = listening_ports(transport.addresses())
    stream = await transport.open_stream(
        helper.peer_id, DIRECTORY, addresses=helper.addresses, timeout_s=ASK_TIMEOUT_S
    )
    channel = Channel(stream, DIRECTORY_TABLE, Role.DIALER)
    try:
        channel.send(DialBack(ports))
        answer = await channel.expect(DialedBack, timeout_s=ASK_TIMEOUT_S)
    finally:
        channel.abort()
    tried = tuple(port for port in ports if port in answer.tried)
    reached = tuple(port for port in tried if port in answer.reached)
    # Its clock was read as the answer left, half a round trip ago: next to nothing.
    return Sighting(helper.peer_id, ip_address(answer.observed), tried, reached, answer.time_s - now())


async def survey(transport: Transport, helpers: Sequence[Candidate]) -> list[Sighting]:
    """Ask the first `HELPERS` others at once. Those that do not answer are left out, without an error."""
    others = [helper for helper in helpers if helper.peer_id != transport.peer_id][:HELPERS]
    answers = await asyncio.gather(*(ask(transport, helper) for helper in others), return_exceptions=True)
    sightings = []
    for answer in answers:
        if isinstance(answer, Sighting):
            sightings.append(answer)
        elif not isinstance(answer, PetalSwarmError):
            raise answer
    return sightings


def judge(sightings: Sequence[Sighting], addresses: Sequence[str], *, private: bool = False) -> Reachability:
    """The verdict on a peer with these `addresses`: its own, and those through relays that gave it a place.

    What those say counts that see it from farthest away. Of them at least half must have reached it: some may
    lie, or be unable to dial. `private`: it needs relays, whatever they say.
    """
    ports = listening_ports(addresses)
    circuits = tuple(address for address in addresses if is_circuit(address))
    seen = [(scope_of(s.ip), s.ip, s) for s in sightings if s.ip is not None]
    ips = tuple(dict.fromkeys(ip for _, ip, _ in seen))
    tries = sum(bool(s.tried) for s in sightings)
    for scope in ("internet", "network", "machine"):
        tried = [(ip, s) for seen_from, ip, s in seen if seen_from == scope and s.tried]
        reached = [(ip, s) for ip, s in tried if s.reached]
        if private:
            break
        if tried and 2 * len(reached) >= len(tried):
            places = dict.fromkeys(_multiaddr(ip, port) for ip, s in reached for port in s.reached)
            return Reachability("direct", scope, tuple(places), ips, ports, tries)
        if tried:
            break
    if circuits:
        scope = "machine" if all(map(is_loopback, circuits)) else "internet"
        return Reachability("relay", scope, circuits, ips, ports, tries)
    # Who listens nowhere needs no witness for it.
    known = private or tries or (sightings and not ports)
    return Reachability("none" if known else "unknown", "internet", (), ips, ports, tries)


def sentence(verdict: Reachability) -> str:
    """The verdict in plain words, in one line."""
    if verdict.kind == "direct":
        places = " and ".join(_plain(address) for address in verdict.addresses)
        return f"others can reach this machine directly{_SCOPES[verdict.scope]}, at {places}"
    if verdict.kind == "relay":
        relays = dict.fromkeys(address.split("/p2p-circuit")[0] for address in verdict.addresses)
        return f"others can reach this machine only through a relay ({', '.join(relays)}): slower"
    if verdict.kind == "none":
        tried = f": {_peers(verdict.tries)} tried in vain" if verdict.tries else ", and no relay was found"
        seen = f"; others see it at {', '.join(verdict.observed_ips)}" if verdict.observed_ips else ""
        return f"others cannot reach this machine at all{tried}{seen}"
    return "whether others can reach this machine is not known: nobody could be asked"


def advice(verdict: Reachability) -> str:
    """What to do next, in one line; empty where nothing need be done."""
    if verdict.kind == "direct" and verdict.scope == "machine":
        return "to let other machines join, start with --listen /ip4/0.0.0.0/tcp/31330"
    if verdict.kind == "direct" and verdict.scope == "network":
        return "nobody outside could be asked; name an initial peer out there to find out about the internet"
    if verdict.kind == "direct":
        return ""
    if verdict.kind == "unknown":
        return "name servers that are up with --initial-peers; those of an older version cannot tell"
    return _forwarding(verdict)


def clock_ahead_s(sightings: Sequence[Sighting]) -> float | None:
    """By how much the others' clocks are ahead of ours, the median in seconds; None if nobody said."""
    return statistics.median(s.clock_ahead_s for s in sightings) if sightings else None


def _forwarding(verdict: Reachability) -> str:
    outside = [ip for ip in verdict.observed_ips if scope_of(ip) == "internet"]
    port = verdict.ports[0] if verdict.ports else 31330
    ip = outside[0] if outside else "YOUR-PUBLIC-IP"
    kind = "ip6" if ":" in ip else "ip4"
    anywhere = "::" if kind == "ip6" else "0.0.0.0"
    relay = "; or name a public server in --initial-peers, to be relayed by it"
    return (
        f"to be reached directly, forward TCP port {port} in your router (or open it in your firewall) to"
        f" this machine, then start with --listen /{kind}/{anywhere}/tcp/{port}"
        f" --announce /{kind}/{ip}/tcp/{port}{relay if verdict.kind == 'none' else ''}"
    )


def _multiaddr(ip: str, port: int) -> str:
    return f"/ip6/{ip}/tcp/{port}" if ":" in ip else f"/ip4/{ip}/tcp/{port}"


def _plain(address: str) -> str:
    """`/ip4/203.0.113.7/tcp/31330` as people write it."""
    ip, port = ip_address(address), tcp_port(address)
    return f"[{ip}]:{port}" if ip and ":" in ip else f"{ip}:{port}"


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"
