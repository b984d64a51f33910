import pytest
import torch

from petal_swarm.cli.tuning.batches import collate
from petal_swarm.cli.tuning.loop import Tuner, loss_of, mean_loss
from petal_swarm.cli.tuning.run_folder import RunFolder
from petal_swarm.cli.tuning.settings import learning_rate_at
from petal_swarm.errors import CheckpointError, ConfigError, NetworkError, SwarmError
from tests.cli.tuning.models_of_tests import Bigrams, Watcher, examples, first_state

STEPS = 12
SETTINGS = {"steps": STEPS, "batch_size": 3, "learning_rate": 0.05, "seed": 4}


def tuner(model, folder=None, *, save_every=5, saves=None, **settings):
    """Saves in `folder`, or writes down in `saves` what it would have saved."""

    def save(state, tensors):
        if folder is not None:
            folder.save(state, tensors, model.save_pretrained)
        if saves is not None:
            saves.append(state.step)

    state = first_state(**SETTINGS | settings)
    return Tuner(model, examples(), state, save=save, save_every=save_every)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.make()
    return made


def uninterrupted():
    model, watcher = Bigrams(), Watcher()
    run = tuner(model)
    run.run(watcher)
    return model, run, watcher


def test_a_run_learns_and_tells_of_every_step():
    model, run, watcher = uninterrupted()
    assert [step for step, _, _ in watcher.steps] == list(range(1, STEPS + 1))
    assert run.state.losses == tuple(loss for _, loss, _ in watcher.steps)
    assert mean_loss(model, examples(), 4) < mean_loss(Bigrams(), examples(), 4) - 0.1
    assert sum(tokens for _, _, tokens in watcher.steps[:4]) == sum(len(each.tokens) for each in examples())


@pytest.mark.parametrize("stop_after", [1, 4, 5, 11])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(folder, stop_after):
    """Equal to the last bit: same batches, same losses, same parameters."""
    model, run, watcher = uninterrupted()
    stopped = tuner(Bigrams(), folder)
    stopped.run(Watcher(stop_after))
    other, rest = Bigrams(), Watcher()
    with torch.no_grad():
        other.embeddings.normal_()
    resumed = tuner(other, folder)
    resumed.restore(*folder.load())
    resumed.run(rest)
    assert resumed.state == run.state
    assert rest.steps == watcher.steps[stop_after:]
    assert other.seen == model.seen[stop_after:]
    assert torch.equal(other.embeddings, model.embeddings)


def test_a_run_is_saved_now_and_then_and_at_its_end():
    saves = []
    tuner(Bigrams(), saves=saves).run(Watcher())
    assert saves == [5, 10, 12]
    saves.clear()
    tuner(Bigrams(), saves=saves).run(Watcher(stop_after=5))
    assert saves == [5]
    saves.clear()
    tuner(Bigrams(), saves=saves).run(Watcher(stop_after=0))
    assert saves == [0]


def test_a_run_stopped_before_its_first_step_can_be_resumed(folder):
    _, run, _ = uninterrupted()
    tuner(Bigrams(), folder).run(Watcher(stop_after=0))
    resumed = tuner(Bigrams(), folder)
    resumed.restore(*folder.load())
    resumed.run(Watcher())
    assert resumed.state == run.state


def test_a_swarm_that_fails_costs_its_step_only(folder):
    _, run, _ = uninterrupted()
    failing = tuner(Bigrams(fail_at={8: NetworkError("gone")}), folder)
    with pytest.raises(SwarmError, match=r"step 8 failed: gone.*--resume"):
        failing.run(Watcher())
    resumed = tuner(Bigrams(), folder)
    resumed.restore(*folder.load())
    assert resumed.state.step == 7
    resumed.run(Watcher())
    assert resumed.state == run.state


def test_a_loss_that_is_no_number_is_not_saved(folder):
    model = Bigrams()
    run = tuner(model, folder, save_every=2)

    class Poison(Watcher):
        def on_step(self, step, *rest):
            if step == 3:
                with torch.no_grad():
                    model.embeddings.fill_(float("nan"))

    with pytest.raises(ConfigError, match=r"the loss of step 4 is nan.*--learning-rate below 0.05"):
        run.run(Poison())
    state, tensors = folder.load()
    assert state.step == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_only_what_can_be_trained_is_saved():
    run = tuner(Bigrams())
    assert set(run.tensors()) == {"parameter:embeddings"}
    run.run(Watcher(stop_after=1))
    moments = {f"{name}:embeddings" for name in ("step", "exp_avg", "exp_avg_sq")}
    assert set(run.tensors()) == {"parameter:embeddings"} | moments


def test_the_tensors_of_another_run_are_refused():
    run = tuner(Bigrams(frozen_head=False))
    run.run(Watcher(stop_after=1))
    with pytest.raises(CheckpointError, match="other parameters"):
        tuner(Bigrams()).restore(run.state, run.tensors())


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    assert rates[-1] == pytest.approx(1 / 97)
    assert learning_rate_at(0, 1, 1.0) == 1.0


def test_each_step_has_the_learning_rate_of_its_number():
    run = tuner(Bigrams())
    rates = []

    class Reader(Watcher):
        def on_step(self, step, *rest):
            rates.append(run._optimizer.param_groups[0]["lr"])

    run.run(Reader())
    assert rates == [learning_rate_at(step, STEPS, SETTINGS["learning_rate"]) for step in range(STEPS)]


def test_the_mean_loss_counts_every_prediction_alike():
    model, given = Bigrams(), examples(5)
    whole = loss_of(model, collate(given)).item()
    for batch_size in (1, 2, 5):
        assert mean_loss(model, given, batch_size) == pytest.approx(whole, rel=1e-6)
    assert not model.embeddings.grad
