"""Generate through a swarm over py-libp2p, in a process of its own: hivemind and libp2p cannot share one.

    libp2p_generate.py MODEL ADDRESS [KEY]

Prints `ok` if greedy and sampled tokens are those of transformers, and if without the swarm key, where there
is one, there are none. Run by test_libp2p_client.py.
"""

import sys
import threading
from pathlib import Path

import pytest
import torch

from petal_swarm import AutoSwarmModelForCausalLM
from petal_swarm.errors import PeerUnreachableError, PrivateSwarmError
from tests.checkpoints import assert_lively, reference

NEW_TOKENS = 32


def generate(model, prompt, **options):
    torch.manual_seed(7)
    return model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options)


def main(folder, address, key=None):
    prompt = torch.tensor([[5, 99, 140, 3, 260]])
    local = reference(Path(folder))
    with AutoSwarmModelForCausalLM.from_pretrained(
        folder, initial_peers=[address], transport="libp2p", progress=False, swarm_key=key
    ) as model:
        for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}):
            expected = generate(local, prompt, **options)
            assert_lively(expected, prompt.shape[1])
            assert generate(model, prompt, **options).tolist() == expected.tolist()
    if key is not None:
        with (
            AutoSwarmModelForCausalLM.from_pretrained(
                folder, initial_peers=[address], transport="libp2p", progress=False
            ) as model,
            pytest.raises(PrivateSwarmError, match="this swarm is private"),
        ):
            generate(model, prompt)
    assert "libp2p" in sys.modules
    assert "hivemind" not in sys.modules
    assert not [thread.name for thread in threading.enumerate() if "petal" in thread.name]

    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{address.rpartition('/')[2]}"
    with pytest.raises(PeerUnreachableError, match="tcp/1: connection refused") as caught:
        AutoSwarmModelForCausalLM.from_pretrained(
            folder, initial_peers=[nobody], transport="libp2p", progress=False
        )
    assert "\n" not in str(caught.value)


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("ok")
