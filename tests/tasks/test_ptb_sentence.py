from __future__ import annotations

import math
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from kfacrnn import KFAC
from kfacrnn.data.ptb import Corpus
from kfacrnn.errors import UserError
from kfacrnn.tasks.ptb_sentence import Config, PTBSentence

CPU = torch.device("cpu")
END = 2  # the line end's id
SPLITS = {"train": [3, 1, 6, 2, 9, 4, 1, 5], "valid": [4, 1, 7], "test": [2, 2]}  # symbols before each line end


def sentences(split: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(SPLITS[split]))
    drawn = [torch.randint(3, 11, (count,), generator=generator).tolist() for count in SPLITS[split]]
    return [[*symbols, END] for symbols in drawn]


def task(**changes: Any) -> PTBSentence:
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/task/ptb_sentence.yaml").read_text())
    config = Config(**{**shipped, "hidden": 6, "batch_size": 3, "eval_batch_size": 2, "init_scale": 0.8, **changes})
    streams = {split: torch.tensor(list(chain(*sentences(split)))) for split in SPLITS}
    corpus = Corpus(**streams, vocabulary=["a", "b", "<eos>", *map(str, range(8))], checksums={})
    return PTBSentence(config, corpus, seed=5, device=CPU)


def model_of(task: PTBSentence) -> Any:
    torch.manual_seed(1)
    return task.build_model().double()


def nats(model: Any, sentence: list[int], torchs: type[nn.GRU | nn.LSTM | nn.RNN]) -> Tensor:
    """Of every symbol of one sentence, by torch's own layer from a zero state."""
    layer = torchs(6, 6, 2).double()
    layer.load_state_dict(model.recurrent.state_dict())
    inputs, targets = torch.tensor([END, *sentence[:-1]]), torch.tensor(sentence)
    output, _ = layer(model.embedding.weight[inputs][:, None])
    logits = output[:, 0] @ model.softmax.weight.T + model.softmax.bias
    return -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def test_an_epoch_has_sentences_of_every_length_each_at_most_once_and_the_next_another_order() -> None:
    found = task()
    epochs = []
    for _ in range(2):
        epoch = []
        for _ in range(found.updates_per_epoch or 0):
            batch = found.next_batch()
            assert batch.inputs.shape == batch.targets.shape == (int(batch.lengths.max()), 3)
            assert (batch.tokens, batch.cases) == (int(batch.lengths.sum()), 3)
            for case, length in enumerate(batch.lengths.tolist()):
                symbols = batch.targets[:, case].tolist()
                assert batch.inputs[:length, case].tolist() == [END, *symbols[: length - 1]]
                assert set(symbols[length:]) | set(batch.inputs[length:, case].tolist()) <= {END}
                epoch.append(symbols[:length])
        epochs.append(epoch)
    whole = sentences("train")
    for epoch in epochs:
        assert len(epoch) == 6
        assert all(epoch.count(sentence) <= whole.count(sentence) for sentence in epoch)
    assert epochs[0] != epochs[1]


def test_a_loaded_cursor_goes_on_where_it_was() -> None:
    first, second = task(), task()
    for _ in range(3):  # over the end of an epoch
        first.next_batch()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.next_batch().targets, second.next_batch().targets)


@pytest.mark.parametrize(("cell", "torchs"), [("gru", nn.GRU), ("lstm", nn.LSTM), ("rnn", nn.RNN)])
@torch.no_grad()
def test_the_loss_is_the_mean_over_sentences_one_by_one_in_nats_per_symbol_of_an_average_one(
    cell: str, torchs: Any
) -> None:
    found = task(cell=cell)
    model, batch = model_of(found), found.next_batch()
    alone = [batch.targets[:length, case].tolist() for case, length in enumerate(batch.lengths.tolist())]
    of_each = torch.stack([nats(model, sentence, torchs).sum() for sentence in alone])
    expected = of_each.mean() / (sum(SPLITS["train"]) / 8 + 1)
    torch.testing.assert_close(found.loss(model, batch), expected, rtol=1e-12, atol=0)
    some = found.predict(model, batch, torch.tensor([2, 0])).log_loss(batch.targets[:, [2, 0]])
    torch.testing.assert_close(some, of_each[[2, 0]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("split", ["valid", "test"])
@torch.no_grad()
def test_evaluation_scores_every_symbol_once(split: str) -> None:
    found = task()
    model = model_of(found)
    expected = torch.cat([nats(model, sentence, nn.GRU) for sentence in sentences(split)]).mean().item()
    assert found.evaluate(model, split) == pytest.approx(expected, rel=1e-12)
    assert model.training


def test_a_case_is_as_long_as_a_sentence_on_average_and_chance_is_the_vocabulary() -> None:
    found = task()
    assert found.loss_scale == sum(SPLITS["train"]) / 8 + 1
    assert found.chance == pytest.approx(math.log2(11))


def test_a_corpus_of_too_few_sentences_is_refused() -> None:
    with pytest.raises(UserError, match=r"task.batch_size=9: the corpus has 8 sentences; lower it"):
        task(batch_size=9)


@pytest.mark.parametrize("method", ["indep", "option1", "option2"])
def test_kfac_learns_from_batches_of_all_lengths(method: str) -> None:
    found = task(hidden=16)
    model = model_of(found)
    optimizer = KFAC(model, method, loss_scale=found.loss_scale, statistics_fraction=1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)  # few sentences a batch
    everything = found.sentences.batch(torch.arange(8), CPU)
    before = found.loss(model, everything).item()
    for _ in range(200):
        batch = found.next_batch()
        if optimizer.statistics_due:
            chosen = optimizer.statistics_cases(batch.cases)
            optimizer.update_statistics(partial(found.predict, model, batch, chosen))
        optimizer.zero_grad()
        found.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    assert found.loss(model, everything).item() < 0.6 * before
