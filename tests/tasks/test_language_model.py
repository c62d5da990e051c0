from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from kfacrnn import settings
from kfacrnn.data.ptb import Corpus
from kfacrnn.errors import UserError
from kfacrnn.tasks import _language_model, ptb_char, ptb_word
from kfacrnn.tasks._language_model import Batch, Config, LanguageModel, LanguageModelTask
from kfacrnn.tasks.ptb_char import PTBChar
from kfacrnn.tasks.ptb_word import PTBWord

CPU = torch.device("cpu")
VOCABULARY = 11
CONFIGS = Path(__file__).parents[2] / "configs" / "task"


def yaml_config(name: str, **changes: Any) -> Config:
    return Config(**(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | changes))


def tiny_config(**changes: Any) -> Config:
    small = {"hidden": 6, "batch_size": 4, "bptt": 5, "eval_batch_size": 3, "init_scale": 0.8}
    return yaml_config("ptb_word", **(small | changes))


def random_corpus(train: int = 93, valid: int = 47, test: int = 20) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randint(VOCABULARY, (count,), generator=generator) for count in (train, valid, test)]
    return Corpus(*streams, vocabulary=["a", "b", "<eos>", *map(str, range(VOCABULARY - 3))], checksums={})


def tiny_task(corpus: Corpus | None = None, **changes: Any) -> PTBWord:
    return PTBWord(tiny_config(**changes), corpus or random_corpus(), CPU)


def build(task: LanguageModelTask, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(1)
    return task.build_model().to(dtype)


def reference(model: LanguageModel, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Log-probabilities `[T, B, V]` by torch's own LSTM and matrix products, and the last state."""
    lstm = nn.LSTM(model.recurrent.input_size, model.recurrent.hidden_size, model.recurrent.num_layers).double()
    lstm.load_state_dict(model.recurrent.state_dict())
    output, state = lstm(model.embedding.weight[tokens], state)
    return (output @ model.softmax.weight.T + model.softmax.bias).log_softmax(-1), state


def nats_of(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def epoch(task: LanguageModelTask) -> list[Batch]:
    assert task.updates_per_epoch
    return [task.next_batch() for _ in range(task.updates_per_epoch)]


# ---- training: truncated back-propagation through time -----------------------------------------------------------


def assert_batches_walk_through_every_stream(task: LanguageModelTask, tokens: Tensor) -> None:
    batches = epoch(task)
    inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in ("inputs", "targets"))
    length = len(tokens) // task.config.batch_size
    steps = (length - 1) // task.config.bptt * task.config.bptt
    for case in range(task.config.batch_size):
        stream = tokens[case * length : (case + 1) * length]
        assert torch.equal(inputs[:, case], stream[:steps])
        assert torch.equal(targets[:, case], stream[1 : steps + 1])
    assert torch.equal(task.next_batch().inputs, batches[0].inputs)


def test_batches_side_by_side_give_back_every_stream_and_then_start_over() -> None:
    corpus = random_corpus()
    assert_batches_walk_through_every_stream(tiny_task(corpus), corpus.train)


def test_a_batch_counts_words_steps_and_sequences() -> None:
    batch = tiny_task().next_batch()
    assert (batch.units, batch.tokens, batch.cases) == (20, 20, 4)


@torch.no_grad()
def test_the_carried_state_makes_the_batches_one_unbroken_pass() -> None:
    task = tiny_task()
    model = build(task)
    batches, losses = [], []
    for _ in range(task.updates_per_epoch):
        batches.append(task.next_batch())
        losses.append(task.loss(model, batches[-1]))
    log_probabilities, state = reference(model, torch.cat([batch.inputs for batch in batches]))
    nats = nats_of(log_probabilities, torch.cat([batch.targets for batch in batches]))
    expected = nats.view(len(batches), -1).mean(-1)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-12, atol=0)
    carried = task.state_dict()["carried"]
    torch.testing.assert_close(carried, state, rtol=1e-12, atol=1e-14)


def test_the_state_is_zero_at_the_start_of_every_epoch() -> None:
    task = tiny_task()
    model = build(task)
    first, second = ([task.loss(model, task.next_batch()).item() for _ in range(task.updates_per_epoch)] for _ in "12")
    assert first == second


def test_gradients_stop_at_the_start_of_a_batch() -> None:
    task = tiny_task()
    model = build(task)
    task.loss(model, task.next_batch())
    batch = task.next_batch()
    task.loss(model, batch).backward()
    found = model.embedding.weight.grad.clone()
    model.zero_grad()
    assert batch.state is not None
    constants = tuple(part.detach().clone() for part in batch.state)
    nats_of(reference(model, batch.inputs, constants)[0], batch.targets).mean().backward()
    torch.testing.assert_close(found, model.embedding.weight.grad, rtol=1e-10, atol=1e-14)


def test_the_loss_times_loss_scale_is_a_sequences_nats() -> None:
    task = tiny_task()
    model = build(task)
    batch = task.next_batch()
    sequences = task.predict(model, batch, slice(None)).log_loss(batch.targets)
    torch.testing.assert_close(task.loss(model, batch) * task.loss_scale, sequences.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cases", [slice(1, 3), torch.tensor([3, 0])], ids=["slice", "indices"])
def test_predict_is_the_model_on_some_sequences_and_changes_no_state(cases: Any) -> None:
    task = tiny_task()
    model = build(task)
    task.loss(model, task.next_batch())
    batch = task.next_batch()
    before = task.state_dict()
    logits = task.predict(model, batch, cases).logits
    expected, _ = reference(model, batch.inputs, batch.state)
    torch.testing.assert_close(logits.log_softmax(-1), expected[:, cases], rtol=1e-10, atol=1e-12)
    assert task.state_dict() == before


def test_a_restored_task_goes_on_bit_for_bit() -> None:
    task, file = tiny_task(), io.BytesIO()
    model = build(task)
    for _ in range(2):
        task.loss(model, task.next_batch())
    torch.save(task.state_dict(), file)
    file.seek(0)
    restored = tiny_task()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(task.updates_per_epoch + 1):
        batch, again = task.next_batch(), restored.next_batch()
        assert torch.equal(batch.inputs, again.inputs)
        assert torch.equal(task.loss(model, batch), restored.loss(model, again))


def test_losses_are_float32_and_states_carry_over_under_autocast() -> None:
    task = tiny_task()
    model = build(task, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            batch = task.next_batch()
            assert task.predict(model, batch, slice(0, 2)).logits.dtype == torch.bfloat16
            assert task.loss(model, batch).dtype == torch.float32


def test_a_text_too_short_for_one_batch_is_refused_by_the_keys_to_change() -> None:
    assert tiny_task(batch_size=15).updates_per_epoch == 1
    with pytest.raises(UserError, match=r"^task\.batch_size=16: each stream has 5 of 93 tokens, task\.bptt=5 needs 6"):
        tiny_task(batch_size=16)


# ---- evaluation --------------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """A model without memory: the logits are a row of a table. The state counts the steps that it was carried over."""

    def __init__(self, vocabulary: int):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.table[tokens], (0 if state is None else state) + len(tokens)

    def nats(self, stream: list[int], context: int) -> float:
        pairs = zip([context, *stream[:-1]], stream, strict=True)
        log_probabilities = self.table.log_softmax(-1).tolist()
        return -math.fsum(log_probabilities[before][token] for before, token in pairs) / len(stream)


@torch.no_grad()
def test_evaluation_in_one_stream_is_token_by_token() -> None:
    corpus = random_corpus()
    task = tiny_task(corpus, eval_batch_size=1)
    model = build(task)
    for split in ("valid", "test"):
        before, state, nats = corpus.line_end, None, []
        for token in getattr(corpus, split).tolist():
            log_probabilities, state = reference(model, torch.tensor([[before]]), state)
            nats.append(-log_probabilities[0, 0, token].item())
            before = token
        assert task.evaluate(model, split) == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)


@pytest.mark.parametrize("streams", [1, 2, 3, 7, 47, 48, 100])
def test_every_token_is_scored_once_after_its_true_predecessor(streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # All tokens differ, so that one left out or counted twice cannot hide behind another.
    tokens = torch.arange(47)
    corpus = dataclasses.replace(random_corpus(), valid=tokens, vocabulary=[*map(str, range(47)), "<eos>"])
    task = tiny_task(corpus, eval_batch_size=streams)
    scored: list[int] = []

    class Counting(_language_model.Categorical):
        def log_loss(self, targets: Tensor) -> Tensor:
            assert self.mask is not None
            scored.extend(targets[self.mask].tolist())
            return super().log_loss(targets)

    monkeypatch.setattr(_language_model, "Categorical", Counting)
    model = Bigram(48)
    found = task.evaluate(model, "valid")
    assert sorted(scored) == tokens.tolist()
    assert found == pytest.approx(model.nats(tokens.tolist(), corpus.line_end), rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_training_as_it_was(training: bool) -> None:
    task = tiny_task(dropout=0.5)
    model = build(task).train(training)
    task.loss(model, task.next_batch())
    before, generator = task.state_dict(), torch.get_rng_state()
    nats = task.evaluate(model, "valid")
    assert nats == task.evaluate(model, "valid")
    assert all(module.training == training for module in model.modules())
    assert task.state_dict() == before
    assert torch.equal(torch.get_rng_state(), generator)
    without = tiny_task(dropout=0.0)
    assert nats == without.evaluate(build(without), "valid")


# ---- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_weights_and_biases_start_uniform_as_zarembas(layer_norm: bool, scale: float) -> None:
    model = build(tiny_task(layer_norm=layer_norm, init_scale=scale, hidden=100), torch.float32)
    for name, parameter in model.named_parameters():
        if not (layer_norm and name.startswith(("recurrent.gain", "recurrent.bias"))):
            assert parameter.abs().max() <= scale
            if parameter.dim() == 2:
                assert parameter.std().item() == pytest.approx(scale / math.sqrt(3), rel=0.06)
            else:
                assert parameter.abs().max() > 0.7 * scale


def test_gains_of_layer_norm_start_at_one_and_shifts_at_zero() -> None:
    model = build(tiny_task(layer_norm=True))
    starts = {"gain": 1.0, "bias": 0.0}
    normed = {name: p for name, p in model.recurrent.named_parameters() if name[:4] in starts}
    assert len(normed) == 2 * 5
    assert all((parameter == starts[name[:4]]).all() for name, parameter in normed.items())


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = (build(tiny_task()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_acts_on_what_enters_a_layer_or_the_softmax() -> None:
    model = build(tiny_task(dropout=0.5, hidden=50)).train()
    entering: dict[str, Tensor] = {}
    for name in ("recurrent", "softmax"):
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: entering.update({name: args[0]}))
    model(torch.randint(VOCABULARY, (20, 4)))
    assert model.recurrent.dropout == 0.5
    for tensor in entering.values():
        assert (tensor == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_one_layer_with_dropout_raises_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert build(tiny_task(layers=1, dropout=0.5)).dropout.p == 0.5
    assert not recwarn.list


# ---- units, settings, builders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_type", "unit", "metric", "chance"),
    [(PTBWord, "word", "perplexity", 11.0), (PTBChar, "character", "bits per character", math.log2(11))],
)
def test_metrics_are_perplexity_of_words_and_bits_of_characters(
    task_type: Callable[..., LanguageModelTask], unit: str, metric: str, chance: float
) -> None:
    task = task_type(tiny_config(), random_corpus(), CPU)
    assert (task.unit, task.metric, task.loss_scale) == (unit, metric, 5.0)
    assert task.chance == pytest.approx(chance, rel=1e-12)


@pytest.mark.parametrize("name", ["ptb_word", "ptb_char"])
def test_the_yaml_file_has_a_valid_value_for_every_setting(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    assert values["name"] == name
    assert not list(settings.problems(Config(**values)))


@pytest.mark.parametrize(("module", "tokens"), [(ptb_word, 11), (ptb_char, 31)])
def test_a_task_is_built_from_the_files(module: Any, tokens: int, tiny_ptb: Path) -> None:
    data = SimpleNamespace(root=str(tiny_ptb), source="files")
    task = module.build(tiny_config(eval_batch_size=1), seed=0, device=CPU, data=data)
    assert sorted(task.checksums) == ["ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]
    scored = task._held_out["valid"][2]
    assert int(scored.sum()) == tokens


# ---- the real corpus ---------------------------------------------------------------------------------------------

REAL = {"ptb_word": (ptb_word, 132, 10_000), "ptb_char": (ptb_char, 250, 50)}


@pytest.fixture(scope="module", params=REAL)
def real_task(request: pytest.FixtureRequest, ptb_folder: str) -> LanguageModelTask:
    module = REAL[request.param][0]
    data = SimpleNamespace(root=ptb_folder, source="files")
    return module.build(yaml_config(request.param), seed=0, device=CPU, data=data)


@pytest.mark.ptb
def test_the_real_text_gives_the_known_number_of_updates_an_epoch(real_task: LanguageModelTask) -> None:
    _, updates, vocabulary = REAL[real_task.config.name]
    assert (real_task.updates_per_epoch, real_task.vocabulary) == (updates, vocabulary)
    batch = real_task.next_batch()
    assert (batch.cases, batch.units) == (200, 200 * real_task.config.bptt)


@pytest.mark.ptb
def test_real_batches_side_by_side_give_back_every_stream(ptb_folder: str) -> None:
    corpus = ptb_word.ptb.load("word", root=ptb_folder)
    assert_batches_walk_through_every_stream(PTBWord(yaml_config("ptb_word"), corpus, CPU), corpus.train)


@pytest.mark.ptb
@torch.no_grad()
def test_the_full_model_starts_at_chance(real_task: LanguageModelTask) -> None:
    torch.manual_seed(0)
    batch = real_task.next_batch()
    some = Batch(batch.inputs[:, :10], batch.targets[:, :10], None)
    loss = real_task.loss(real_task.build_model(), some).item()
    assert loss == pytest.approx(math.log(real_task.vocabulary), rel=0.01)
    assert real_task.chance == pytest.approx(real_task.vocabulary if real_task.unit == "word" else math.log2(50))


@pytest.mark.ptb
@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_real_character_is_scored_once(ptb_folder: str, split: str) -> None:
    corpus = ptb_char.ptb.load("char", root=ptb_folder)
    task = PTBChar(yaml_config("ptb_char"), corpus, CPU)
    model = Bigram(50)
    expected = model.nats(getattr(corpus, split).tolist(), corpus.line_end)
    assert task.evaluate(model, split) == pytest.approx(expected, rel=1e-12)
