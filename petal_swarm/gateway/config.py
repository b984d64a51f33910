"""Settings of one gateway."""

from __future__ import annotations

from dataclasses import dataclass

from petal_swarm.client.generation.request import MAX_SEQUENCES
from petal_swarm.errors import ConfigError

DEFAULT_CHOICES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What visitors may ask for. Times in seconds.

    An answer has at most `max_tokens`, and one request at most `max_choices` answers. A stream in which
    nothing happens carries a comment every `heartbeat_s`, so that nothing between takes it for dead.

    Raises:
        ConfigError: a number out of range, or no name.
    """

    model_name: str
    max_tokens: int = 2048
    max_choices: int = DEFAULT_CHOICES
    heartbeat_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.model_name:
            raise ConfigError("the model needs a name")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 1 <= self.max_choices <= MAX_SEQUENCES:
            raise ConfigError(f"max_choices must be 1 to {MAX_SEQUENCES}, got {self.max_choices}")
        if not self.heartbeat_s > 0:
            raise ConfigError(f"heartbeat_s must be above 0, got {self.heartbeat_s}")
