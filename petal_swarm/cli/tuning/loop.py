"""The training loop: AdamW over a model's trainable parameters, step by step, saved and gone on with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from petal_swarm.cli.tuning.batches import Batch, Order, collate
from petal_swarm.cli.tuning.data import Example
from petal_swarm.cli.tuning.run_folder import RunState
from petal_swarm.cli.tuning.settings import learning_rate_at
from petal_swarm.errors import CheckpointError, ConfigError, PetalSwarmError, SwarmError

#: Gradients that are longer, as one vector, are shortened to this.
GRADIENT_NORM = 1.0
#: What AdamW keeps for each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Watcher(Protocol):
    """Is told of every step, and may end the run."""

    def on_step(self, step: int, loss: float, tokens: int, elapsed_s: float) -> None:
        """`step` steps are done; the last had this loss and `tokens` tokens, and took `elapsed_s`."""

    @property
    def stopping(self) -> bool:
        """Whether to end after the step that is being computed."""


class Tuner:
    """A run, from the state in which it is made or to which it is `restore`d, up to its last step.

    `model` is called as Hugging Face's are, with `labels`, and answers with a `loss`. `save` is called every
    `save_every` steps and at the end, with the state and the tensors that `restore` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        state: RunState,
        *,
        save: Callable[[RunState, dict[str, Tensor]], None],
        save_every: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.state = state
        self._model = model
        self._examples = examples
        self._order = Order(len(examples), state.settings.batch_size, state.settings.seed)
        self._save = save
        self._save_every = save_every
        self._clock = clock
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=state.settings.learning_rate, weight_decay=0.0
        )

    @property
    def total_steps(self) -> int:
        return self.state.settings.total_steps(self._order.steps_per_epoch)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters.values())

    def run(self, watcher: Watcher) -> None:
        """Go on to the last step, or until the watcher stops it; saved in both cases.

        Raises:
            SwarmError: the swarm failed in a step; all steps before it are saved.
            ConfigError: the loss is not a number any more; what was saved last stays.
        """
        saved = self.state.step
        while self.state.step < self.total_steps and not watcher.stopping:
            started_s = self._clock()
            batch = collate([self._examples[n] for n in self._order.batch(self.state.step)])
            try:
                loss = self._step(batch)
            except ConfigError:
                raise
            except PetalSwarmError as error:
                self._save(self.state, self.tensors())
                raise SwarmError(
                    f"step {self.state.step + 1} failed: {error}; all before it is saved: go on with --resume"
                ) from error
            self.state = replace(self.state, step=self.state.step + 1, losses=(*self.state.losses, loss))
            watcher.on_step(self.state.step, loss, batch.num_tokens, self._clock() - started_s)
            if self.state.step % self._save_every == 0:
                self._save(self.state, self.tensors())
                saved = self.state.step
        if saved < self.state.step or not self.state.step:
            self._save(self.state, self.tensors())

    def _step(self, batch: Batch) -> float:
        settings = self.state.settings
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(self.state.step, self.total_steps, settings.learning_rate)
        self._optimizer.zero_grad()
        answer = loss_of(self._model, batch)
        answer.backward()  # type: ignore[no-untyped-call]
        loss = answer.item()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), GRADIENT_NORM).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ConfigError(
                f"the loss of step {self.state.step + 1} is {loss:g}, the length of its gradient"
                f" {norm:g}: try again with a --learning-rate below {settings.learning_rate:g}"
            )
        self._optimizer.step()
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and what the optimizer knows of each."""
        found = {f"parameter:{name}": p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            found |= {f"{moment}:{name}": moments[moment] for moment in MOMENTS if moment in moments}
        return found

    def restore(self, state: RunState, tensors: dict[str, Tensor]) -> None:
        """Go back to what `tensors` was saved from.

        Raises:
            CheckpointError: these are not the tensors of this model.
        """
        stepped = MOMENTS if state.step else ()
        expected = {
            f"{kind}:{name}": () if kind == "step" else tuple(parameter.shape)
            for name, parameter in self._parameters.items()
            for kind in ("parameter", *stepped)
        }
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
            raise CheckpointError("the run that was saved is one of other parameters than these")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"parameter:{name}"])
        kept = self._optimizer.state_dict()
        kept["state"] = {
            number: {moment: tensors[f"{moment}:{name}"] for moment in stepped}
            for number, name in enumerate(self._parameters)
            if stepped
        }
        self._optimizer.load_state_dict(kept)
        self.state = state


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of what is to be learned."""
    answer: Any = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    loss: Tensor = answer.loss
    return loss


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    """Over all that is to be learned in the examples, each prediction counting the same."""
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        total += loss_of(model, batch).item() * batch.num_learned
        count += batch.num_learned
    return total / count
