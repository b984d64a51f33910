"""The guard at the front door: connections, hosts, origins, keys, rates and bodies. Begin at `Guard`."""

from petal_swarm.gateway.guard.accounts import Usage, Visitor
from petal_swarm.gateway.guard.config import PRIVATE, PUBLIC, ConnectionLimits, GuardConfig, Limits, hosts_of
from petal_swarm.gateway.guard.entrance import visitor_of
from petal_swarm.gateway.guard.guard import Guard

__all__ = [
    "PRIVATE",
    "PUBLIC",
    "ConnectionLimits",
    "Guard",
    "GuardConfig",
    "Limits",
    "Usage",
    "Visitor",
    "hosts_of",
    "visitor_of",
]
