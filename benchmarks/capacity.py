"""How many blocks of well-known models fit graphics cards, by the plan that servers make at their start.

    python -m benchmarks.capacity [--gpus 8 12 16 24 48 80]

Nothing is loaded and no GPU is needed. A card has its nominal memory free, less what a desktop and a
driver take. A cell: blocks of the whole, and the KV cache in tokens.
"""

from __future__ import annotations

import argparse

import torch

from petal_swarm.errors import ConfigError
from petal_swarm.models.config import ModelConfig
from petal_swarm.models.quantization import Quant
from petal_swarm.server.config import ServerConfig
from petal_swarm.server.hardware import block_bytes, kv_bytes_per_token
from petal_swarm.server.memory_plan import Needs, Room, plan_memory, working_bytes

#: Of a card's memory, to others: a desktop, a driver.
TAKEN_GIB = 0.7
LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072}
MODELS = {
    "BLOOM-7b1": {"architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "BLOOM-176B": {"architectures": ["BloomForCausalLM"], "hidden_size": 14336, "n_layer": 70, "n_head": 112},
    "Llama-3.1-8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama-3.1-70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Llama-3.1-405B": {
        **LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
}


def cell(config: ModelConfig, quant: Quant, gib: float) -> str:
    """Blocks, and tokens of KV cache."""
    defaults = ServerConfig(model="", new_swarm=True)
    dtype = torch.bfloat16
    needs = Needs(
        block_bytes=block_bytes(config, dtype, quant),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype, "auto"),
        working_bytes=working_bytes(config, dtype, quant, "cuda", defaults.max_batch_tokens),
        adapter_bytes=defaults.adapter_mib << 20,
        model_blocks=config.num_blocks,
    )
    try:
        plan = plan_memory(needs, Room(device="cuda", free_bytes=int((gib - TAKEN_GIB) * 2**30)))
    except ConfigError:
        return "none"
    return f"{plan.num_blocks} of {config.num_blocks}; {plan.kv_tokens:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=float, nargs="+", default=[8, 12, 16, 24, 48, 80], metavar="GIB")
    parser.add_argument("--quants", nargs="+", default=["int8", "nf4"], choices=("none", "int8", "nf4"))
    arguments = parser.parse_args()
    print(f"| model | MiB a block | {' | '.join(f'{gib:g} GiB' for gib in arguments.gpus)} |")
    print("| --- |" + " --- |" * (1 + len(arguments.gpus)))
    for name, fields in MODELS.items():
        config = ModelConfig.from_hf({"vocab_size": 250_880, **fields})
        for quant in arguments.quants:
            size = block_bytes(config, torch.bfloat16, quant) / 2**20
            cells = " | ".join(cell(config, quant, gib) for gib in arguments.gpus)
            print(f"| {name}, {quant} | {size:,.0f} | {cells} |")


if __name__ == "__main__":
    main()
