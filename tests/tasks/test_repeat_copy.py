from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kfacrnn.settings import problems
from kfacrnn.tasks.repeat_copy import Config, build, draw

YAML = Path(__file__).parents[2] / "configs" / "task" / "repeat_copy.yaml"
DEFAULTS = Config(**yaml.safe_load(YAML.read_text()))

READINGS = {  # the changes to the default, as the YAML lists them
    "B": {},
    "B′": {"length": 1, "repeats": 8},
    "A": {"sequences": 1, "length": 1, "repeats": 18},
    "C": {"start_flag_each": False, "end_step": False, "length": 5, "repeats": 1},
    "D": {"episodes": 2, "sequences": 1, "length": 4, "repeats": 1},
    "E": {"sequences": 1, "length": 6, "pad_to": 22},
}
# One character a step: ^ start flag, # repeat channel, $ end flag, . padding; a b c … a new pattern is shown,
# A B C … the same pattern is asked for.
LAYOUTS = {
    "B": "^abc^def#ABCDEFABCDEF$",
    "B′": "^a^b#ABABABABABABABAB$",
    "A": "^a#AAAAAAAAAAAAAAAAAA$",
    "C": "^abcdefghij#ABCDEFGHIJ",
    "D": "^abcd#ABCD$^efgh#EFGH$",
    "E": "^abcdef#ABCDEFABCDEF$.",
}
CHANCE_BITS = {"B": 48, "B′": 64, "A": 72, "C": 40, "D": 32, "E": 48}


def configure(length=None, repeats=None, **changes):
    for name, value in {"length": length, "repeats": repeats}.items():
        if value is not None:
            changes |= {f"min_{name}": value, f"max_{name}": value}
    return dataclasses.replace(DEFAULTS, **changes)


def task(seed=1, **changes):
    return build(configure(**changes), seed=seed, device=torch.device("cpu"), data=None)


def draw_cases(config, cases, seed=0):
    return draw(config, cases, torch.Generator().manual_seed(seed))


def assert_follows(layout, batch, case, repeats, bits=4):
    """Reads a layout step by step, remembering every pattern where it is shown."""
    shown = {}
    assert len(layout) == len(batch.inputs)
    for step, character in enumerate(layout):
        inputs, targets = batch.inputs[step, case].tolist(), batch.targets[step, case].tolist()
        flags, answer = inputs[bits:], [0.0] * (bits + 1)
        if character.islower():
            shown[character] = inputs[:bits]
            assert set(inputs[:bits]) <= {0.0, 1.0}
        else:
            assert inputs[:bits] == [0.0] * bits
        if character.isupper():
            answer[:bits] = shown[character.lower()]
        if character == "$":
            answer[bits] = 1.0
        assert flags == pytest.approx([float(character == "^"), repeats / 10 if character == "#" else 0.0]), step
        assert targets == answer, step
        assert batch.mask[step, case].item() == (character.isupper() or character == "$"), step


class Constant(nn.Module):
    """Logits that do not depend on the input; `per_bit` `[bits + 1]`."""

    def __init__(self, per_bit):
        super().__init__()
        self.per_bit = torch.as_tensor(per_bit)

    def forward(self, x):
        return self.per_bit.expand(*x.shape[:2], -1)


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_of_22_steps_has_its_layout(reading):
    config = configure(**READINGS[reading])
    batch = draw_cases(config, 3)
    assert len(batch.inputs) == 22
    for case in range(3):
        assert_follows(LAYOUTS[reading], batch, case, config.max_repeats)
    if reading == "E":
        assert batch.lengths.tolist() == [21, 21, 21]
        assert batch.tokens == 63
    else:
        assert batch.lengths is None
        assert batch.tokens == 66


def test_readings_are_those_that_the_yaml_lists():
    listed = {
        name: dict(re.findall(r"(\w+)=(\w+)", changes))
        for name, changes in re.findall(r"^#   (\S+) +(.*)$", YAML.read_text(), re.MULTILINE)
    }
    for name, changes in listed.items():
        config = configure(**READINGS[name])
        expected = {key: getattr(config, key) for key in changes}
        assert yaml.safe_load("\n".join(f"{key}: {value}" for key, value in changes.items())) == expected
        assert dataclasses.replace(DEFAULTS, **expected) == config
    assert set(listed) == set(READINGS) - {"B"}


@pytest.mark.parametrize("reading", READINGS)
def test_chance_is_one_bit_of_entropy_for_every_bit_asked_for(reading):
    assert task(**READINGS[reading]).chance == pytest.approx(math.log(2) * CHANCE_BITS[reading])


def test_chance_of_varying_lengths_is_the_mean_over_sequences():
    varying = {"max_length": 4, "min_length": 1, "max_repeats": 3, "min_repeats": 1}
    batch = draw_cases(configure(**varying), 4000)
    asked_for = (batch.mask.sum(0) - 1).double() * 4 * math.log(2)  # less the step of the end flag
    standard_error = asked_for.std() / math.sqrt(4000)
    assert abs(asked_for.mean() - task(**varying).chance) < 4 * standard_error


def test_sequences_of_varying_length_are_padded_at_their_end_in_the_order_drawn():
    config = configure(sequences=1, min_length=1, max_length=2, min_repeats=1, max_repeats=2)
    batch = draw_cases(config, 40)
    layouts = {(1, 1): "^a#A$", (1, 2): "^a#AA$", (2, 1): "^ab#AB$", (2, 2): "^ab#ABAB$"}
    seen = set()
    for case in range(40):
        length = int((batch.inputs[:, case, 5] > 0).nonzero()) - 1
        repeats = round(10 * batch.inputs[:, case, 5].sum().item())
        layout = layouts[length, repeats]
        assert_follows(layout.ljust(9, "."), batch, case, repeats)
        assert batch.lengths[case] == len(layout)
        seen.add((length, repeats))
    assert seen == set(layouts)
    assert batch.tokens == batch.lengths.sum()


def test_bits_are_fair_and_differ_between_sequences():
    batch = draw_cases(DEFAULTS, 2000)
    bits = batch.inputs[[1, 2, 3, 5, 6, 7], :, :4]
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / math.sqrt(bits.numel())
    correlations = torch.corrcoef(bits.permute(0, 2, 1).flatten(0, 1))
    assert (correlations - torch.eye(24)).abs().max() < 4.5 / math.sqrt(2000)


def test_same_seed_same_batches_whatever_the_global_generator_does():
    first, second, other = task(seed=5), task(seed=5), task(seed=6)
    for _ in range(3):
        torch.rand(7)
        batch = first.next_batch()
        assert torch.equal(batch.inputs, second.next_batch().inputs)
        assert not torch.equal(batch.inputs, other.next_batch().inputs)


def test_batches_after_a_resume_are_those_that_would_have_followed():
    original, resumed = task(seed=5), task(seed=5)
    original.next_batch()
    state = original.state_dict()
    following = [original.next_batch() for _ in range(3)]
    resumed.load_state_dict(state)
    assert all(torch.equal(batch.inputs, resumed.next_batch().inputs) for batch in following)


def test_held_out_sets_are_the_same_for_every_seed_and_differ_from_each_other():
    first, second = task(seed=1), task(seed=2)
    for split in ("valid", "test"):
        assert torch.equal(first.held_out[split].inputs, second.held_out[split].inputs)
        assert first.held_out[split].cases == DEFAULTS.eval_sequences
    assert not torch.equal(first.held_out["valid"].inputs, first.held_out["test"].inputs)


def test_evaluation_disturbs_neither_the_batches_nor_the_gradients():
    plain, evaluated = task(hidden=4, eval_sequences=3), task(hidden=4, eval_sequences=3)
    model = evaluated.build_model()
    evaluated.evaluate(model, "valid")
    evaluated.wrong_bits(model, "test")
    assert torch.equal(plain.next_batch().inputs, evaluated.next_batch().inputs)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_is_the_cross_entropy_summed_over_predicted_bits_and_averaged_over_sequences():
    repeat_copy = task(min_length=1, max_length=3, batch_size=5)
    batch = repeat_copy.next_batch()
    logits = [0.3, -1.0, 2.0, 0.0, -0.5]
    total = 0.0
    for case in range(5):
        for step in range(len(batch.inputs)):
            if batch.mask[step, case]:
                for logit, target in zip(logits, batch.targets[step, case].tolist(), strict=True):
                    p = 1 / (1 + math.exp(-logit))
                    total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert repeat_copy.loss(Constant(logits), batch).item() == pytest.approx(total / 5, rel=1e-6)
    assert batch.units == batch.cases == 5


def test_a_model_that_knows_only_the_layout_is_at_chance_with_one_bit_in_two_wrong():
    # The end flag is always 0 where there is no end step.
    repeat_copy = task(**READINGS["C"])
    even = Constant([0.0, 0.0, 0.0, 0.0, -30.0])
    assert repeat_copy.evaluate(even, "valid") == pytest.approx(repeat_copy.chance, rel=1e-5)
    ones = Constant([1.0, 1.0, 1.0, 1.0, -30.0])
    assert repeat_copy.wrong_bits(ones, "valid") == pytest.approx(0.5 * 4 / 5, abs=0.01)


def test_prediction_for_some_cases_equals_those_of_the_whole_batch():
    repeat_copy = task(min_length=1, hidden=4)
    torch.manual_seed(0)
    model, batch = repeat_copy.build_model(), repeat_copy.next_batch()
    whole = repeat_copy.predict(model, batch, slice(None))
    for cases in (slice(2, 5), torch.tensor([2, 3, 4])):
        some = repeat_copy.predict(model, batch, cases)
        torch.testing.assert_close(some.logits, whole.logits[:, 2:5])
        assert torch.equal(some.mask, batch.mask[:, 2:5])
        assert torch.equal(some.lengths, batch.lengths[2:5])


def test_model_has_the_configured_sizes():
    model = task(hidden=3, slots=5, word_size=2, read_heads=2, write_heads=2, bits=6, clip=7.0).build_model()
    assert model.controller_weight.shape == (12, 8 + 2 * 2 + 3)
    assert model.output_weight.shape == (7, 3 + 2 * 2)
    state = model.initial_state(1)
    assert state.memory.shape == (1, 5, 2)
    assert state.write_weights.shape == (1, 2, 5)
    assert model.clip == 7.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"min_length": 4}, "min_length=4: must be at most max_length=3"),
        ({"max_repeats": 1}, "min_repeats=2: must be at most max_repeats=1"),
        ({"pad_to": 21}, "pad_to=21: must be at least 22, the steps of the longest sequence"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, complaint):
    assert list(problems(configure(**changes))) == [complaint]


def test_the_defaults_have_no_problems():
    assert list(problems(DEFAULTS)) == []
