"""`petal-swarm tune`: LoRA on the blocks of a swarm, from a file of texts to a folder in PEFT's format."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petal_swarm.cli.chat import say
from petal_swarm.cli.common import (
    EXIT_INTERRUPTED,
    add_client_options,
    add_loading_options,
    load_client,
    load_tokenizer,
    new_parser,
    not_negative,
    positive,
    run_program,
    share,
)
from petal_swarm.errors import ConfigError

if TYPE_CHECKING:
    from petal_swarm.cli.tuning.loop import Tuner
    from petal_swarm.cli.tuning.plan import Material, Plan
    from petal_swarm.cli.tuning.settings import TuneSettings

DESCRIPTION = """\
Teach a model whose blocks are in a swarm: LoRA matrices beside the blocks' weights learn from a file, and
are saved in PEFT's format. The weights themselves stay as they are, and so do the servers: what is learned
is yours alone."""
EXAMPLES = """\
  petal-swarm tune MODEL --data poems.txt --out poems --initial-peers ADDR
      a text: cut into windows of --max-length tokens, three times over
  petal-swarm tune MODEL --data answers.jsonl --out answers --steps 200 --rank 16 --initial-peers ADDR
      JSON lines, alike or mixed:
        {"text": "..."}                               learned as a whole
        {"prompt": "...", "completion": "..."}        only the completion is learned
        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
                                                      only what the assistant says is learned
  petal-swarm tune MODEL --data poems.txt --out poems --resume --initial-peers ADDR
      after Ctrl-C, or a crash: goes on as if nothing had happened, with the settings it was started with
  petal-swarm generate MODEL "Roses are" --adapter poems --initial-peers ADDR
      use what was learned"""
#: Options that say how to learn; not given, they are those of the run that is resumed, or the defaults.
SETTINGS = (
    "rank",
    "alpha",
    "targets",
    "learning_rate",
    "steps",
    "epochs",
    "batch_size",
    "max_length",
    "seed",
    "held_out",
)
SAVE_EVERY = 50


def build_parser(prog: str = "petal-swarm tune") -> argparse.ArgumentParser:
    parser = new_parser(prog, DESCRIPTION, EXAMPLES)
    add_client_options(parser)
    add_loading_options(parser)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="a text, or JSON lines (.jsonl)"
    )
    files.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="where to save; must not exist yet"
    )
    files.add_argument("--resume", action="store_true", help="go on with the run that is saved in --out")
    files.add_argument(
        "--save-every",
        type=positive,
        default=SAVE_EVERY,
        metavar="N",
        help="save after every N steps (default: %(default)s)",
    )
    parser.set_defaults(adapter=None)  # of `load_client`: one is trained here, not used
    _add_settings(parser)
    parser.add_argument(
        "--sample",
        metavar="PROMPT",
        help="what the model is given before and after (default: how an example begins; empty: nothing)",
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    learned = parser.add_argument_group("what is learned")
    learned.add_argument(
        "--rank", type=positive, metavar="N", help="rank of the LoRA matrices: room to learn (default: 8)"
    )
    learned.add_argument(
        "--alpha", type=not_negative, metavar="X", help="they are scaled by alpha / rank (default: 16)"
    )
    learned.add_argument(
        "--targets",
        type=_names,
        metavar="NAMES",
        help="linear layers that get some, by the ends of their names, such as q_proj,v_proj"
        " (default: all-linear)",
    )
    how = parser.add_argument_group("how it is learned")
    how.add_argument(
        "--learning-rate",
        type=not_negative,
        metavar="X",
        help="at its height, after the first 3 %% of the steps; then it falls to zero (default: 3e-4)",
    )
    length = how.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="how many batches to learn from")
    length.add_argument(
        "--epochs", type=not_negative, metavar="X", help="how many times to go through the data (default: 3)"
    )
    how.add_argument("--batch-size", type=positive, metavar="N", help="examples in a step (default: 8)")
    how.add_argument("--max-length", type=positive, metavar="N", help="tokens of an example (default: 256)")
    how.add_argument("--seed", type=int, metavar="N", help="the order of the data, and where LoRA begins")
    how.add_argument(
        "--held-out",
        type=_share_or_none,
        metavar="SHARE",
        help="part of the examples that is not learned, but looked at before and after (default: 0.05)",
    )


def main(argv: list[str] | None = None, prog: str = "petal-swarm tune") -> int:
    return run_program(run, build_parser(prog).parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    import torch

    from petal_swarm.cli.tuning.plan import Plan
    from petal_swarm.models.adapter_settings import Lora
    from petal_swarm.models.checkpoint import open_checkpoint

    given = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    model_key = open_checkpoint(arguments.model).model_key
    plan = Plan.make(arguments.out, arguments.data, given, model=model_key, resume=arguments.resume)
    tokenizer = load_tokenizer(arguments)
    material = plan.read(tokenizer)
    plan.folder.make()
    with load_client(arguments) as model:
        check_length(plan.settings.max_length, model.config)
        torch.manual_seed(plan.settings.seed)
        settings = plan.settings
        model.add_adapter(Lora(rank=settings.rank, alpha=settings.alpha, targets=lora_targets(settings)))
        return tune(model, tokenizer, plan, material, arguments)


def lora_targets(settings: TuneSettings) -> tuple[str, ...] | str:
    """`all-linear` is no name among others."""
    return settings.targets[0] if len(settings.targets) == 1 else settings.targets


def check_length(max_length: int, config: Any) -> None:
    """
    Raises:
        ConfigError: examples may be longer than the model's context.
    """
    from petal_swarm.models.prompts import context_length

    limit = context_length(config)
    if limit is not None and max_length > limit:
        raise ConfigError(f"--max-length is {max_length}, and the model was made for {limit} tokens at most")


def tune(model: Any, tokenizer: Any, plan: Plan, material: Material, arguments: argparse.Namespace) -> int:
    """Learn, save, and show what has changed; the exit status."""
    from petal_swarm.cli.tuning.loop import Tuner
    from petal_swarm.cli.tuning.progress import Progress, stopped_by_signals
    from petal_swarm.cli.tuning.samples import continuation, sample_prompt

    prompt = sample_prompt(tokenizer, material, arguments.sample)
    state = plan.first_state
    if plan.saved is None:
        before = continuation(model, tokenizer, prompt) if prompt is not None else None
        state = replace(state, held_out_loss=held_out_loss(model, plan, material), sample=before)
    tuner = Tuner(
        model,
        material.learned,
        state,
        save=lambda state, tensors: plan.folder.save(state, tensors, model.save_pretrained),
        save_every=arguments.save_every,
    )
    if plan.saved is not None:
        tuner.restore(*plan.saved)
    say(opening(material, tuner))
    with Progress(state.step, tuner.total_steps) as progress, stopped_by_signals(progress.stop):
        tuner.run(progress)
    if tuner.state.step < tuner.total_steps:
        say(f"stopped after step {tuner.state.step} of {tuner.total_steps}, and saved; to go on:")
        say(f"  {resume_command(arguments)}")
        return EXIT_INTERRUPTED
    print(f"saved in {arguments.out}")
    if state.held_out_loss is not None:
        after_loss = held_out_loss(model, plan, material)
        print(f"held-out loss: {state.held_out_loss:.4f} before, {after_loss:.4f} after")
    if prompt is not None and state.sample is not None:
        asked = tokenizer.decode(prompt[0], skip_special_tokens=True)
        after = continuation(model, tokenizer, prompt)
        print(f"prompt: {asked}\nbefore: {state.sample}\nafter:  {after}")
    return 0


def held_out_loss(model: Any, plan: Plan, material: Material) -> float | None:
    """What the model makes of examples that it does not learn; None if there are none."""
    from petal_swarm.cli.tuning.loop import mean_loss

    return mean_loss(model, material.held_out, plan.settings.batch_size) if material.held_out else None


def opening(material: Material, tuner: Tuner) -> str:
    """What is about to happen, in one line."""
    held_out = f", {len(material.held_out)} held out" if material.held_out else ""
    cut = f" ({material.cut} cut at --max-length)" if material.cut else ""
    done = f" after {tuner.state.step} that are done" if tuner.state.step else ""
    return (
        f"{len(material.learned)} examples to learn{held_out}{cut}; {tuner.num_parameters:,} parameters;"
        f" {tuner.total_steps - tuner.state.step} steps{done}"
    )


def resume_command(arguments: argparse.Namespace) -> str:
    """What to type to go on."""
    words = [
        "petal-swarm",
        "tune",
        arguments.model,
        "--data",
        arguments.data,
        "--out",
        arguments.out,
        "--resume",
    ]
    if arguments.transport != "auto":
        words += ["--transport", arguments.transport]
    for option in ("swarm_key", "identity", "sample"):
        if getattr(arguments, option) is not None:
            words += ["--" + option.replace("_", "-"), getattr(arguments, option)]
    return shlex.join([*map(str, words), "--initial-peers", *arguments.initial_peers])


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"expected names such as q_proj,v_proj, got {text!r}")
    return names


def _share_or_none(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else share(text)


if __name__ == "__main__":
    sys.exit(main())
