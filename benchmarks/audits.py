"""Audits: how far honest servers differ, which faults show, and what a client finds within 200 steps.

    python -m benchmarks.audits MODEL [--calibrate] [--trials 300] [--threads 1]

MODEL is a Llama-like checkpoint, such as the one that scripts/fetch-model gets. With it goes a BLOOM of
random weights with planted outliers. The constants of `petal_swarm/client/audit.py` were chosen with the
half of prompts and models that `--calibrate` uses; without it, the other half is measured.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.audit_servers import (
    INT4,
    KINDS,
    PROMISED,
    SUBTLE,
    Fault,
    Kind,
    Model,
    Situation,
    random_bloom,
    smollm,
)
from benchmarks.perplexity import text_tokens
from petal_swarm.client.audit import Precision, Verdict, compare
from petal_swarm.client.audit_ledger import Audit, AuditLedger, AuditSampler, order_auditors
from petal_swarm.models.checkpoint import open_checkpoint
from petal_swarm.models.ends import load_ends
from petal_swarm.span import Span

LENGTHS = (96, 96, 96, 96, 256)
BLOOM_BLOCKS = 8
#: Tokens between the texts of the two halves.
APART = 60_000
#: The last steps of a session, whose rows are audited one by one and together.
DECODED = 12
TOGETHER = 8
STEPS = 200
RATE = 0.05
OTHERS = 4
PLAIN = Precision("bfloat16")


def models(path: str, calibrate: bool) -> list[Model]:
    """SmolLM2 and a random BLOOM, with the prompts of one half."""
    needed = sum(LENGTHS)
    ids = text_tokens(path, needed + APART)
    first = 0 if calibrate else APART
    parts = list(ids[first : first + needed].split(list(LENGTHS)))
    checkpoint = open_checkpoint(path)
    ends = load_ends(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        prompts = [ends.embed(part) for part in parts]
    bloom = random_bloom(BLOOM_BLOCKS, [part % 1000 for part in parts[:1]], seed=1 if calibrate else 4)
    return [smollm(checkpoint, prompts), bloom]


def starts_of(model: Model) -> list[int]:
    last = model.config.num_blocks - 1
    return sorted({0, 1, 2, last // 3, 2 * last // 3, last - 1, last})


def inputs_at(model: Model, prompt: int, travelled: torch.dtype) -> list[Tensor]:
    """What goes into each block when servers of float32 come before, as it arrives."""
    rows = model.prompts[prompt]
    outputs = model.run(Kind(Precision()), rows, Span(0, model.config.num_blocks))
    return [part.to(travelled).float() for part in (rows, *outputs)]


@dataclass
class Ratios:
    """Shares of what is allowed, of one class of audits; above 1 an audit fails."""

    values: list[float]
    worst: str = ""

    def add(self, verdict: Verdict, where: str) -> None:
        if not verdict.ok and verdict.ratio > max(self.values, default=1.0):
            self.worst = f"{where}: {verdict.difference}"
        self.values.append(verdict.ratio)

    def __str__(self) -> str:
        ordered = sorted(self.values)
        at = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99, 0.999)]
        failed = sum(value > 1 for value in ordered)
        figures = " ".join(f"{value:7.3f}" for value in (*at, ordered[-1]))
        return f"{len(ordered):8} {figures}   {failed:6}"


def class_of(one: Precision, other: Precision) -> str:
    quants = sorted((one.quant, other.quant), key=("none", "int8", "nf4").index)
    return " / ".join("plain" if quant == "none" else quant for quant in quants)


def honest_audits(model: Model, rng: random.Random) -> dict[str, Ratios]:
    """Every kind audited by every kind, at all depths, as decoding and as a prompt in chunks."""
    found: dict[str, Ratios] = defaultdict(lambda: Ratios([]))
    blocks = model.config.num_blocks
    for prompt in range(len(model.prompts)):
        travelled = torch.float32 if prompt % 2 else torch.bfloat16
        every = inputs_at(model, prompt, travelled)
        starts = starts_of(model) if len(every[0]) < 200 else [0, 2, blocks // 2]
        for start in starts:
            inputs, span = every[start], Span(start, blocks)
            size = len(inputs)
            decoded = {k: model.run(k, inputs, span, range(size - DECODED, size)) for k in KINDS}
            chunked = {k: model.run(k, inputs, span, range(17, size, 17)) for k in KINDS}
            whole = {k: model.run(k, inputs, span) for k in KINDS}
            for length in sorted({1, 3, 10, blocks - start}):
                if length > blocks - start:
                    continue
                for audited in KINDS:
                    for auditor in KINDS:
                        again = whole[auditor][length - 1].to(travelled)
                        ways = (decoded[audited][length - 1], chunked[audited][length - 1])
                        name = class_of(audited.precision, auditor.precision)
                        for how, slices in _ways(size, rng):
                            claimed = ways[how == "prompt"].to(travelled)
                            for part in slices:
                                verdict = compare(
                                    inputs[part],
                                    claimed[part],
                                    again[part],
                                    audited.precision,
                                    auditor.precision,
                                    blocks=length,
                                    position=part.start,
                                )
                                found[f"{name:13} {how}"].add(verdict, f"blocks {start}:{start + length}")
    return found


def _ways(size: int, rng: random.Random) -> Iterator[tuple[str, list[slice]]]:
    rows = rng.sample(range(size - DECODED, size), 3)
    yield "one row", [slice(row, row + 1) for row in rows]
    firsts = range(size - DECODED, size - TOGETHER + 1)
    yield f"{TOGETHER} rows", [slice(first, first + TOGETHER) for first in firsts]
    yield "prompt", [slice(0, size)]


@dataclass
class Rerun:
    """A situation and what honest servers of every kind make of it."""

    at: Situation
    again: Mapping[Kind, Tensor]

    @classmethod
    def of(cls, at: Situation) -> Rerun:
        rows = {kind: at.model.run(kind, at.inputs, at.span)[-1][-at.rows :] for kind in KINDS}
        return cls(at, rows)

    def verdict(
        self, claimed: Tensor, one: Precision, recomputed: Tensor, other: Precision, last: int, together: int
    ) -> Verdict:
        """Of the rows up to `last`, so many together."""
        part = slice(max(0, last + 1 - together), last + 1)
        first = len(self.at.inputs) - self.at.rows
        return compare(
            self.at.inputs[first:][part],
            claimed[part],
            recomputed[part],
            one,
            other,
            blocks=len(self.at.span),
            position=first + part.start,
        )


def situations(model: Model, rng: random.Random) -> list[Rerun]:
    blocks = model.config.num_blocks
    spans = [Span(start, start + 1) for start in (0, blocks // 2, blocks - 1)]
    spans += [Span(0, 4), Span(blocks // 2, blocks // 2 + 4), Span(0, blocks)]
    found = []
    every, other = (
        inputs_at(model, 0, torch.bfloat16),
        inputs_at(model, len(model.prompts) // 2, torch.bfloat16),
    )
    for span in spans:
        foreign = other[span.start] if len(model.prompts) > 1 else every[span.start].flip(0)
        found.append(Rerun.of(Situation(model, span, every[span.start], foreign, DECODED, rng)))
    return found


def tells(auditor: Kind, audited: Precision) -> bool:
    """Whether an auditor can tell small faults: 4-bit weights only from equal ones."""
    quants = {auditor.precision.quant, audited.quant}
    return "nf4" not in quants or len(quants) == 1


@dataclass
class Swarm:
    """The other servers of a span, of random kinds, of which at least `telling` can tell small faults."""

    rerun: Rerun
    claimed: Tensor
    audited: Precision
    others: Mapping[str, Kind]

    @classmethod
    def draw(
        cls, rerun: Rerun, claimed: Tensor, audited: Precision, rng: random.Random, telling: int = 0
    ) -> Swarm:
        able = [kind for kind in KINDS if tells(kind, audited)]
        drawn = [rng.choice(able if n < telling else KINDS) for n in range(OTHERS)]
        return cls(rerun, claimed, audited, {f"other-{n}": kind for n, kind in enumerate(drawn)})

    def audit(self, last: int, rng: random.Random) -> tuple[Verdict, frozenset[str]]:
        """One audit of the rows up to `last`: its verdict, and who is to blame after more opinions."""
        precisions = {peer: kind.precision for peer, kind in self.others.items()}
        blocks = len(self.rerun.at.span)
        first, *rest = order_auditors(self.audited, precisions, blocks=blocks, rng=rng)

        def judge(rows: Tensor, one: Precision, peer: str) -> Verdict:
            again = self.rerun.again[self.others[peer]]
            return self.rerun.verdict(rows, one, again, precisions[peer], last, TOGETHER)

        audit, verdict = Audit("audited", first), judge(self.claimed, self.audited, first)
        suspects = audit.suspects(verdict)
        for third in rest:
            if len(suspects) <= 1:
                break
            with_claim = judge(self.claimed, self.audited, third)
            with_auditor = judge(self.rerun.again[self.others[first]], precisions[first], third)
            suspects = audit.settled(verdict, third, with_claim, with_auditor)
        return verdict, suspects

    def banned(self, rng: random.Random) -> tuple[str | None, int]:
        """Who is banned within a client's next 200 steps, and how many audits it took."""
        sampler, ledger, audits = AuditSampler(RATE, rng), AuditLedger(), 0
        for step in range(STEPS):
            if not sampler.picks():
                continue
            audits += 1
            verdict, suspects = self.audit(rng.randrange(TOGETHER - 1, self.rerun.at.rows), rng)
            if verdict.ok:
                ledger.record_pass()
            elif ban := ledger.record(suspects, verdict.difference, now_s=step):
                return ban.peer_id, audits
        return None, audits


def single_audits(
    rerun: Rerun, claimed: Tensor, audited: Precision, together: int, rng: random.Random
) -> list[float]:
    """Ratios of audits by servers that can tell, 40 of them."""
    able = [kind for kind in KINDS if tells(kind, audited)]
    ratios = []
    for _ in range(40):
        kind, last = rng.choice(able), rng.randrange(together - 1, DECODED)
        verdict = rerun.verdict(claimed, audited, rerun.again[kind], kind.precision, last, together)
        ratios.append(min(verdict.ratio, 999.0))
    return ratios


def fault_report(
    reruns: list[Rerun], faults: Mapping[str, Fault], kind: Kind, trials: int, rng: random.Random
) -> None:
    """One line for each fault: what single audits see, and how many trials end with a ban."""
    audited = kind.precision
    for name, fault in faults.items():
        claims = [(rerun, fault(rerun.at, kind)) for rerun in reruns]
        one, many = (
            [ratio for pair in claims for ratio in single_audits(*pair, audited, together, rng)]
            for together in (1, TOGETHER)
        )
        shares = []
        for telling in (2, 0):
            banned = [
                Swarm.draw(*pair, audited, rng, telling).banned(rng)[0]
                for _ in range(max(1, trials // len(claims)))
                for pair in claims
            ]
            if set(banned) - {None, "audited"}:
                print("  AN HONEST SERVER WAS BANNED")
            shares.append(sum(peer == "audited" for peer in banned) / len(banned))
        seen = [sum(ratio > 1 for ratio in ratios) / len(ratios) for ratios in (one, many)]
        figures = " ".join(f"{share:8.1%}" for share in (*seen, *shares))
        print(f"  {name:44} {statistics.median(many):7.2f} {figures}", flush=True)


def honest_bans(reruns: list[Rerun], trials: int, rng: random.Random) -> tuple[int, int]:
    """Honest servers of all kinds among each other: audits, and bans."""
    audits = bans = 0
    for _ in range(trials):
        for rerun in reruns:
            kind = rng.choice(KINDS)
            peer, made = Swarm.draw(rerun, rerun.again[kind], kind.precision, rng).banned(rng)
            audits, bans = audits + made, bans + (peer is not None)
    return audits, bans


def print_honest(every: list[Model], rng: random.Random) -> None:
    print("\nhonest audits: share of what is allowed (above 1 fails)")
    print("  class                          audits  median     99%   99.9%     max   failed")
    total = failed = 0
    for model in every:
        print(f"  {model.name}")
        for name, ratios in sorted(honest_audits(model, rng).items()):
            print(f"    {name:24} {ratios}", flush=True)
            if ratios.worst:
                print(f"      worst: {ratios.worst}")
            total += len(ratios.values)
            failed += sum(value > 1 for value in ratios.values)
    print(f"  {failed} of {total} honest audits failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = random.Random(1 if arguments.calibrate else 2)
    started = time.perf_counter()
    every = models(arguments.model, arguments.calibrate)
    print_honest(every, rng)
    for model in every:
        reruns = situations(model, rng)
        audits, bans = honest_bans(reruns, math.ceil(arguments.trials / 2), rng)
        print(f"\n{model.name}, {OTHERS} other servers, audit rate {RATE:.0%}, {STEPS} steps")
        print(f"  all honest, random kinds: {bans} bans, {audits} audits")
        print(f"  {'':44}  median   seen in 1, {TOGETHER} rows   banned: two can tell, random kinds")
        for kind, faults in (
            (Kind(PLAIN), {**PROMISED, **INT4, **SUBTLE}),
            (Kind(Precision("bfloat16", "int8", "int8")), PROMISED),
            (Kind(Precision("bfloat16", "nf4")), PROMISED),
        ):
            print(f"  announced: {kind.precision}")
            fault_report(reruns, faults, kind, arguments.trials, rng)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
