"""One weight for an embedding and a linear map: against dense matrices, the exact Fisher and an untied twin."""

from __future__ import annotations

import copy
from itertools import product as every

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn import KFAC
from kfacrnn.nn import LSTM
from kfacrnn.predictive import Categorical
from tests.kfac import dense
from tests.kfac.brute_force import Given

T, B, V, H = 5, 4, 6, 3
LAMBDA, N = 1e-2, float(T)


class Tied(nn.Module):
    def __init__(self, bias: bool = True, padding: int | None = None, layer: type = LSTM, decoder_first: bool = False):
        super().__init__()
        if decoder_first:
            self.decoder = nn.Linear(H, V, bias=bias)
        self.embedding, self.rnn = nn.Embedding(V, H, padding), layer(H, H)
        if not decoder_first:
            self.decoder = nn.Linear(H, V, bias=bias)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.rnn(self.embedding(tokens))
        return self.decoder(h[0] if isinstance(h, tuple) else h)


def model(seed: int = 0, **options) -> Tied:
    torch.manual_seed(seed)
    return Tied(**options).double()


def untied(tied: Tied) -> Tied:
    twin = copy.deepcopy(tied)
    twin.decoder.weight = nn.Parameter(twin.embedding.weight.detach().clone())
    return twin


def tokens(seed: int, steps: int = T, cases: int = B) -> Tensor:
    return torch.randint(V, (steps, cases), generator=torch.Generator().manual_seed(seed))


def optimizer(of: nn.Module, **options) -> KFAC:
    settings = {"lr": 1.0, "momentum": 0.0, "kl_clip": 1e10, "compute_dtype": torch.float64}
    return KFAC(of, "option1", loss_scale=N, **{"damping": LAMBDA, **settings, **options})


def averages(kfac: KFAC, name: str) -> list[Tensor]:
    return kfac._estimator.blocks[name].average.values()


def observed(of: Tied, **options) -> KFAC:
    """After one pass, on sequences of two lengths."""
    kfac = optimizer(of, **options)
    lengths = torch.tensor([5, 3, 5, 3])
    kfac.update_statistics(lambda: Given(tokens(2), logits=of(tokens(1)), lengths=lengths))
    return kfac


CASES = {
    "dense": ({}, {}),
    "without a bias": ({"bias": False}, {}),
    "diagonal outputs": ({}, {"max_dense": V - 1}),
    "diagonal": ({}, {"max_dense": H - 1}),
    "diagonal inputs of the linear map alone": ({}, {"max_dense": H}),
    "a token that does not learn": ({"padding": 2}, {}),
    "linear map first": ({"decoder_first": True}, {}),
}


@pytest.mark.parametrize(("build", "options"), CASES.values(), ids=CASES)
def test_a_step_is_that_of_the_dense_sum_of_both_uses(build, options):
    tied = model(**build)
    kfac = observed(tied, **options)
    twin = untied(tied)
    apart = observed(twin, **options)
    for name in ("embedding", "decoder"):
        torch.testing.assert_close(averages(kfac, name), averages(apart, name), rtol=1e-12, atol=0)

    frequencies, G_e = (dense.matrix(M) for M in averages(apart, "embedding"))
    A0, G0 = (dense.matrix(M) for M in averages(apart, "decoder"))
    if "padding" in build:
        frequencies[2, 2] = 0
    if options.get("max_dense", 100) < H + 1:
        G_e = np.diag(np.diag(G_e))
    A, G = dense.damped_factors(A0, G0, LAMBDA)
    of_embedding = np.pad(G_e, (0, len(A0) - H))
    fisher = 4.0 * (np.kron(A, G) + np.kron(of_embedding, frequencies))  # E[T] = 4

    before = copy.deepcopy(tied)
    F.cross_entropy(tied(tokens(1)).flatten(0, 1), tokens(2).flatten()).backward()
    kfac.step()
    gradients, moved = [tied.embedding.weight.grad], [before.embedding.weight - tied.embedding.weight]
    if tied.decoder.bias is not None:
        gradients.append(tied.decoder.bias.grad[:, None])
        moved.append((before.decoder.bias - tied.decoder.bias)[:, None])
    Z = torch.cat(gradients, 1)
    expected = N * np.linalg.solve(fisher, Z.T.flatten().numpy())
    torch.testing.assert_close(
        torch.cat(moved, 1).T.flatten().detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12
    )


def test_a_linear_map_that_is_used_once_per_sequence_counts_its_steps_once():
    class Last(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(self.rnn(self.embedding(tokens))[0][-1]).expand(T, -1, -1)

    torch.manual_seed(0)
    last = Last().double()
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[-1] = True
    kfac, apart = optimizer(last), optimizer(twin := untied(last))
    for each, of in ((kfac, last), (apart, twin)):
        each.update_statistics(lambda of=of: Given(tokens(2), logits=of(tokens(1)), mask=mask))
    F.cross_entropy(last(tokens(1))[-1], tokens(2)[-1]).backward()
    before = torch.cat([last.embedding.weight, last.decoder.bias[:, None]], 1).detach().clone()
    kfac.step()

    frequencies, G_e = (dense.matrix(M) for M in averages(apart, "embedding"))
    A0, _, G0, _ = (dense.matrix(M) for M in averages(apart, "decoder"))  # its lags are 0: T = 1
    fisher = np.kron(*dense.damped_factors(A0, G0, LAMBDA)) + T * np.kron(np.pad(G_e, (0, 1)), frequencies)
    Z = torch.cat([last.embedding.weight.grad, last.decoder.bias.grad[:, None]], 1)
    expected = torch.from_numpy(N * np.linalg.solve(fisher, Z.T.flatten().numpy()))
    moved = before - torch.cat([last.embedding.weight, last.decoder.bias[:, None]], 1).detach()
    torch.testing.assert_close(moved.T.flatten(), expected, rtol=1e-9, atol=1e-12)


def exact_fisher(of: Tied, inputs: Tensor) -> np.ndarray:
    """Of the weight, with column-stacking vec: the mean over the sequences, and over all targets by their odds."""
    total = torch.zeros(V * H, V * H, dtype=torch.float64)
    steps, cases = inputs.shape
    for case in range(cases):
        log_p = of(inputs[:, case : case + 1]).squeeze(1).log_softmax(-1)
        for targets in every(range(V), repeat=steps):
            likelihood = sum(log_p[t, y] for t, y in enumerate(targets))
            (gradient,) = torch.autograd.grad(likelihood, [of.embedding.weight], retain_graph=True)
            g = gradient.T.flatten()
            total += likelihood.exp().detach() * torch.outer(g, g) / cases
    return total.numpy()


def test_the_sum_of_both_uses_is_nearer_to_the_exact_fisher_than_either_is():
    tied = model(bias=False, seed=3)
    for parameter in tied.rnn.parameters():
        nn.init.normal_(parameter)
    inputs = tokens(5, steps=3, cases=6)
    exact = exact_fisher(tied, inputs)
    apart = optimizer(twin := untied(tied), statistics_decay=0.999)
    for _ in range(400):  # targets are sampled: the mean over them
        apart.update_statistics(lambda: Categorical(twin(inputs)))
    frequencies, G_e = (dense.matrix(M) for M in averages(apart, "embedding"))
    A0, G0 = (dense.matrix(M) for M in averages(apart, "decoder"))
    decoder, embedding = 3 * np.kron(A0, G0), 3 * np.kron(G_e, frequencies)

    def error(approximation):
        return np.linalg.norm(approximation - exact) / np.linalg.norm(exact)

    assert error(decoder + embedding) < 0.9 * min(error(decoder), error(embedding))


def test_a_tied_model_continues_bit_for_bit_from_its_state():
    def trained(updates: range, of: Tied, kfac: KFAC) -> None:
        for update in updates:
            x = tokens(update, T + 1)
            if kfac.statistics_due:
                kfac.update_statistics(lambda x=x: Categorical(of(x[:-1])))
            kfac.zero_grad()
            F.cross_entropy(of(x[:-1]).flatten(0, 1), x[1:].flatten()).backward()
            kfac.step()

    options = {"kl_clip": 1e-2, "refresh_every": 3, "refresh_delay": 2}
    one = model()
    kfac = optimizer(one, **options)
    trained(range(5), one, kfac)
    other = model(seed=1)
    other.load_state_dict(one.state_dict())
    continued = optimizer(other, **options)
    continued.load_state_dict(copy.deepcopy(kfac.state_dict()))
    trained(range(5, 12), one, kfac)
    trained(range(5, 12), other, continued)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_the_coverage_table_says_what_is_tied():
    rows = {row.block: row for row in optimizer(model()).coverage()}
    assert rows["embedding"].approximation == rows["decoder"].approximation == "tied"
    assert rows["decoder"].parameters == "embedding.weight, decoder.bias"
    assert rows["rnn.l0.i"].approximation == "option1"


def test_a_tied_model_that_uses_its_weight_elsewhere_too_is_refused_by_name_in_the_first_pass():
    class More(Tied):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + self.embedding.weight.sum()

    torch.manual_seed(0)
    more = More().double()
    with pytest.raises(ValueError, match=r"embedding\.weight, decoder\.bias: the loss depends on it in other ways"):
        optimizer(more).update_statistics(lambda: Categorical(more(tokens(1)).cumsum(-1)))


@pytest.mark.parametrize("several", ["two linear maps", "two embeddings", "one embedding and two linear maps"])
def test_other_maps_that_share_a_weight_are_refused_by_name(several):
    first, second, third = {
        "two linear maps": (nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, V)),
        "two embeddings": (nn.Embedding(V, V), nn.Embedding(V, V), nn.Linear(V, V)),
        "one embedding and two linear maps": (nn.Embedding(V, V), nn.Linear(V, V), nn.Linear(V, V)),
    }[several]
    second.weight = first.weight
    if "one" in several:
        third.weight = first.weight
    pair = "1 and 2" if "one" in several else "0 and 1"
    with pytest.raises(
        ValueError, match=rf"0\.weight is shared by {pair}: only an nn\.Embedding and an nn\.Linear may"
    ):
        optimizer(nn.Sequential(first, second, third))
