"""Processes, memory and time to `ready` of two servers of a tiny model.

    python -m benchmarks.footprint

Memory is proportional (PSS: pages shared by several processes count in part for each), in MB, after
some tokens have been generated. Linux only.
"""

from __future__ import annotations

import psutil
import torch

from benchmarks.harness import checkpoint, servers, workspace
from petal_swarm import AutoSwarmModelForCausalLM


def main() -> None:
    with workspace() as folder:
        path = checkpoint("tiny", folder)
        with servers(path, ["0:4", "4:8"], "--threads", "1") as running:
            with AutoSwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=[running[0].address], progress=False
            ) as model:
                model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=50, min_new_tokens=50)
            for index, server in enumerate(running):
                parent = psutil.Process(server.process.pid)
                processes = [parent, *parent.children(recursive=True)]
                sizes = [process.memory_full_info().pss / 1e6 for process in processes]
                named = ", ".join(f"{p.name()} {s:.0f}" for p, s in zip(processes, sizes, strict=True))
                print(
                    f"server {index}: {sum(sizes):.0f} MB in {len(processes)} processes ({named}),", end=" "
                )
                print(f"ready after {server.ready_s:.1f} s")


if __name__ == "__main__":
    main()
