"""Greedy generation on one device by an engine, against `generate` of transformers, in turns.

    python -m benchmarks.gpu_generate [--shape bloom-7b1] [--sessions 1 32] [--modes bfloat16 int8]
    python -m benchmarks.gpu_generate --device cpu --shape tiny --modes float32 --sessions 1 2

The same random weights for both, and prompts of random tokens. Hidden states go to the engine from the host
and its answers stay on the device, where embeddings and head are, for which transformers has its own. Both
start with the prompts, and each figure is a median of rounds in turns. "of one" compares with one sequence in
transformers, "of as many" with a batch of as many there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor

from petal_swarm.engine.engine import Engine
from petal_swarm.engine.steps import StepRequest
from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.devices import wait_for
from petal_swarm.models.ends import Ends
from petal_swarm.models.families import family_of
from petal_swarm.models.kernels import permit
from petal_swarm.models.quantization import Quant, Weight, quantize
from petal_swarm.models.stack import BlockStack
from petal_swarm.server.capacity import device_name
from petal_swarm.server.hardware import resolve_device
from petal_swarm.span import Slice, Span
from petal_swarm.wire.tensors import DTYPES

SHAPES = {
    "tiny": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500},
    "bloom-560m": {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880},
    "bloom-7b1": {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880},
}


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """With some features of activations that are far larger than others, as large models have them."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(**SHAPES[shape])
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("layernorm.weight"):
            tensor.data[:: max(1, len(tensor) // 6)] = 20.0
    return model


class Ours:
    """An engine over the weights of `model`, and the ends beside it."""

    def __init__(self, model: Any, quant: Quant, sequences: int, tokens: int) -> None:
        hf = model.config.to_dict() | {"architectures": ["BloomForCausalLM"]}
        config = ModelConfig.from_hf(hf)
        family, span = family_of(config), Span(0, config.num_blocks)
        tensors = {name: tensor.data for name, tensor in model.named_parameters()}
        blocks = []
        for number in span.blocks():
            prefix = family.block_prefix.format(number)
            own: dict[str, Weight] = {
                name: quantize(name, tensors[prefix + name], quant)
                if len(shape) > 1 and quant != "none"
                else tensors[prefix + name]
                for name, shape in family.block_shapes(config).items()
            }
            blocks.append(family.build_block(config, own))
        stack = BlockStack(config, span, blocks, dtype=model.dtype, device=model.device)
        room = -(-tokens // 16) * 16
        self._engine = Engine(stack, kv_tokens=sequences * room, max_batch_tokens=tokens)
        self._engine.quicken()
        self._ends = Ends(config, tensors)
        self.kernels = stack.decoder is not None

    def generate(self, prompts: Tensor, count: int) -> Tensor:
        """`prompts [sequences, tokens]` -> the tokens that follow, `[sequences, count]`."""
        sessions, length = prompts.shape
        for session in range(sessions):
            self._engine.open_session(session, max_length=length + count)
        ids = torch.cat(
            [self._step([session], prompts[session : session + 1], 0) for session in range(sessions)]
        )
        found = [ids]
        for position in range(length, length + count - 1):
            ids = self._step(range(sessions), ids[:, None], position)
            found.append(ids)
        for session in range(sessions):
            self._engine.close_session(session)
        return torch.stack(found, 1)

    def _step(self, sessions: Iterable[int], ids: Tensor, position: int) -> Tensor:
        piece, span = Slice(0, position, ids.shape[1]), self._engine.stack.span
        hidden = self._ends.embed(ids).cpu()
        requests = [
            StepRequest(session, span, (piece,), rows, rows="last")
            for session, rows in zip(sessions, hidden, strict=True)
        ]
        rows = []
        for result in self._engine.run(requests):
            if result.error is not None:
                raise result.error
            assert result.hidden is not None
            rows.append(result.hidden)
        return self._ends.logits(torch.cat(rows)).argmax(-1)


def in_turns(works: list[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """Medians of seconds, after a round to warm up."""
    took: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, own in zip(works, took, strict=True):
            started = time.perf_counter()
            work()
            wait_for(device)
            if number:
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in took]


def report(shape: str, mode: str, device: torch.device, arguments: argparse.Namespace) -> None:
    plain = mode in DTYPES
    model = random_model(shape, DTYPES[mode] if plain else torch.bfloat16, device)
    quant: Any = "none" if plain else mode
    most, length, count = max(arguments.sessions), arguments.prompt, arguments.tokens
    ours = Ours(model, quant, most, length + count)
    one_s = 0.0
    for sessions in sorted({1, *arguments.sessions}):
        ids = torch.randint(3, SHAPES[shape]["vocab_size"], (sessions, length), device=device)

        def theirs(ids: Tensor = ids) -> Tensor:
            mask = torch.ones_like(ids)
            found: Tensor = model.generate(
                ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
            return found[:, ids.shape[1] :]

        def own(ids: Tensor = ids) -> Tensor:
            return ours.generate(ids, count)

        own_s, their_s = in_turns([own, theirs], arguments.rounds, device)
        one_s = one_s or their_s
        same = float((ours.generate(ids, count) == theirs()).float().mean())
        print(
            f"| {shape} | {mode}{', kernels' if ours.kernels else ''} | {sessions}"
            f" | {sessions * count / own_s:.1f} | {sessions * count / their_s:.1f}"
            f" | {sessions * one_s / own_s:.2f} | {their_s / own_s:.2f} | {same:.0%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="bloom-7b1", choices=SHAPES)
    parser.add_argument("--modes", nargs="+", default=["bfloat16", "int8"], choices=(*DTYPES, "int8", "nf4"))
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    permit()
    try:
        device = resolve_device(arguments.device)
    except ConfigError as error:
        print(f"nothing measured: {error}")
        return
    print(f"{device_name(device)}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"prompts of {arguments.prompt} tokens, {arguments.tokens} generated\n")
    print("| model | weights | sessions | tokens/s | transformers | of one | of as many | same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for mode in arguments.modes:
            report(arguments.shape, mode, device, arguments)


if __name__ == "__main__":
    main()
