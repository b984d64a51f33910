from dataclasses import replace

import pytest

from petal_swarm.cli.tuning.plan import MOST_HELD_OUT, Plan
from petal_swarm.cli.tuning.settings import TuneSettings
from petal_swarm.errors import ConfigError
from tests.cli.tokenizers_of_tests import characters
from tests.cli.tuning.models_of_tests import Bigrams

GIVEN = {"rank": 4, "targets": ("q_proj",), "steps": 6, "max_length": 10}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("0123456789" * 30)
    return path


@pytest.fixture
def started(tmp_path, data):
    """The folder of a run with three of its six steps done."""
    plan = Plan.make(tmp_path / "run", data, GIVEN, model="m", resume=False)
    plan.folder.make()
    state = replace(plan.first_state, step=3, losses=(3.0, 2.0, 1.0), held_out_loss=9.0, sample="abc")
    plan.folder.save(state, {}, Bigrams().save_pretrained)
    return tmp_path / "run"


def resumed(started, data, *, model="m", **given):
    return Plan.make(started, data, given, model=model, resume=True)


def test_a_new_run_has_what_was_given_and_defaults(tmp_path, data):
    plan = Plan.make(tmp_path / "run", data, GIVEN, model="m", resume=False)
    assert plan.settings == TuneSettings(**GIVEN)
    assert plan.settings.learning_rate == TuneSettings().learning_rate
    assert (plan.saved, plan.first_state.step, plan.first_state.model) == (None, 0, "m")
    assert not plan.folder.path.exists()


def test_a_part_is_held_out_and_not_too_much(tmp_path, data):
    plan = Plan.make(tmp_path / "run", data, GIVEN, model="m", resume=False)
    material = plan.read(characters())
    assert (len(material.learned), len(material.held_out)) == (28, 2)
    data.write_text("0123456789" * 3000)
    material = plan.read(characters())
    assert len(material.held_out) == MOST_HELD_OUT


def test_a_resumed_run_has_the_settings_it_was_started_with(started, data):
    plan = resumed(started, data)
    assert plan.settings == TuneSettings(**GIVEN)
    assert plan.first_state.losses == (3.0, 2.0, 1.0)
    assert (plan.first_state.held_out_loss, plan.first_state.sample) == (9.0, "abc")
    assert resumed(started, data, rank=4, targets=("q_proj",)).settings == plan.settings
    plan.read(characters())


def test_a_resumed_run_may_become_longer(started, data):
    assert resumed(started, data, steps=9).first_state.settings.steps == 9
    longer = resumed(started, data, epochs=2.0).settings
    assert (longer.steps, longer.epochs) == (None, 2.0)
    with pytest.raises(ConfigError, match=r"has done its 3 steps: more --steps or --epochs"):
        resumed(started, data, steps=3).read(characters())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rank": 8}, "started with --rank 4, not 8"),
        ({"targets": ("q_proj", "k_proj")}, "started with --targets q_proj, not q_proj,k_proj"),
        ({"learning_rate": 1.0}, "started with --learning-rate 0.0003, not 1.0"),
        ({"model": "other"}, "is one of another model"),
    ],
)
def test_a_run_can_only_be_resumed_as_it_is(started, data, given, reason):
    with pytest.raises(ConfigError, match=reason):
        resumed(started, data, **given)


def test_data_that_has_changed_is_told(started, data):
    data.write_text(data.read_text() + "x")
    with pytest.raises(ConfigError, match="not any more, what the run"):
        resumed(started, data)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        resumed(started, data.parent / "nowhere")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"max_length": 1}, "--max-length must be at least 2"),
        ({"held_out": 1.0}, "--held-out must be less than 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be more than 0"),
        ({"epochs": 0.0}, "--epochs must be more than 0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, data, given, reason):
    with pytest.raises(ConfigError, match=reason):
        Plan.make(tmp_path / "run", data, given, model="m", resume=False)


def test_steps_or_epochs():
    assert TuneSettings(steps=7).total_steps(100) == 7
    assert TuneSettings(epochs=2.5).total_steps(3) == 8
    assert TuneSettings(epochs=0.001).total_steps(3) == 1
