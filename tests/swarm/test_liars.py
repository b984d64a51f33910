"""Servers that announce what is not so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from petal_swarm.span import Span
from tests.checkpoints import VOCABULARY, reference
from tests.swarm.local import LocalSwarm


def test_a_hop_that_lies_about_its_span_is_found_out_and_avoided(
    bloom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(5, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    with (
        LocalSwarm(bloom, ["0:2", "2:4", "0:2"]) as swarm,
        caplog.at_level(logging.INFO, logger="petal_swarm"),
    ):
        liar = swarm.servers[2]
        liar.span = Span(0, 4)  # which would be the fastest route
        announcer = liar._announcer
        assert announcer is not None
        announcer.update(liar.announcement())
        swarm.run(announcer.refresh_now())
        model = swarm.model()
        tokens = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(tokens, reference(bloom).generate(ids, max_new_tokens=10, do_sample=False))
        assert model.last_route is not None
        lying = liar.announcement().peer_id
        assert lying not in {hop.peer_id for hop in model.last_route.hops}
        assert f"avoiding {lying}: this server hosts blocks 0:2, not 0:4" in caplog.text
