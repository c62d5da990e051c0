"""Predictive distributions: losses and variances against enumeration, samples against their probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfacrnn.predictive import Bernoulli, Categorical, Gaussian, Part

T, B, V = 3, 4, 5


def logits(seed: int = 0, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*(shape or (T, B, V)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_log_loss_sums_over_the_steps_of_every_case():
    z = logits()
    y = torch.randint(V, (T, B), generator=generator())
    expected = [sum(z[t, b].logsumexp(0) - z[t, b, y[t, b]] for t in range(T)) for b in range(B)]
    torch.testing.assert_close(Categorical(z).log_loss(y), torch.stack(expected))


def test_the_log_loss_of_bits_sums_over_steps_and_bits():
    z = logits()
    y = (torch.rand(T, B, V, generator=generator()) < 0.5).double()
    p = z.sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum((0, 2))
    torch.testing.assert_close(Bernoulli(z).log_loss(y), expected)


@pytest.mark.parametrize("variance", [0.3, torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)])
def test_the_log_loss_of_real_numbers_is_that_of_a_normal_distribution(variance):
    mean, y = logits(), logits(1)
    expected = -torch.distributions.Normal(mean, torch.as_tensor(variance).sqrt()).log_prob(y).sum((0, 2))
    torch.testing.assert_close(Gaussian(mean, variance).log_loss(y), expected, rtol=1e-6, atol=1e-6)


def test_the_mean_squared_error_times_its_loss_scale_is_the_log_loss_but_for_a_constant():
    y, variance = logits(1), 0.3
    losses = [Gaussian(mean, variance).log_loss(y).mean() for mean in (logits(2), logits(3))]
    errors = [torch.nn.functional.mse_loss(mean, y) for mean in (logits(2), logits(3))]
    torch.testing.assert_close(losses[0] - losses[1], T * V / (2 * variance) * (errors[0] - errors[1]))


def test_masked_steps_have_no_loss_no_gradient_and_no_variance_whatever_their_targets():
    mask = torch.rand(T, B, generator=generator(2)) < 0.5
    classes, bits = torch.randint(V, (T, B)), torch.rand(T, B, V).round()
    for distribution, y in ((Categorical, classes), (Bernoulli, bits), (Gaussian, torch.randn(T, B, V).double())):
        z = logits().requires_grad_()
        junk = -100 if y.dtype == torch.int64 else torch.nan
        masked = distribution(z, mask=mask)
        loss = masked.log_loss(y.masked_fill(~mask.reshape(T, B, *[1] * (y.dim() - 2)), junk))
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert not g[~mask].any()
        assert g[mask].all()
        assert not masked.output_variance()[~mask].any()
        by_step = distribution(z[mask].unsqueeze(0)).log_loss(y[mask].unsqueeze(0))
        torch.testing.assert_close(loss.sum(), by_step.sum())


def test_lengths_mask_what_lies_behind_them():
    lengths = torch.tensor([1, 3, 2, 1])
    expected = [[True] * 4, [False, True, True, False], [False, True, False, False]]
    assert Categorical(logits(), lengths=lengths).mask.tolist() == expected
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[0] = True
    assert Categorical(logits(), mask=mask, lengths=lengths).mask.tolist() == mask.tolist()


def test_the_variance_is_the_expected_square_of_the_gradient_over_all_targets():
    z = logits().requires_grad_()
    classes = Categorical(z)
    expected = torch.zeros_like(z)
    for y in range(V):
        (g,) = torch.autograd.grad(classes.log_loss(torch.full((T, B), y)).sum(), z)
        expected += z.softmax(-1)[..., y : y + 1].detach() * g**2
    torch.testing.assert_close(classes.output_variance(), expected)

    bits, p, expected = Bernoulli(z), z.sigmoid().detach(), torch.zeros_like(z)
    for y, probability in ((torch.ones_like(z), p), (torch.zeros_like(z), 1 - p)):
        (g,) = torch.autograd.grad(bits.log_loss(y).sum(), z)
        expected += probability * g**2
    torch.testing.assert_close(bits.output_variance(), expected)

    numbers = Gaussian(z, torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0]))
    expected = torch.zeros_like(z)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)  # exact for the squares of a gradient that is linear in y
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        y = z.detach() + node * numbers.variance.sqrt()
        (g,) = torch.autograd.grad(numbers.log_loss(y).sum(), z)
        expected += weight * g**2
    torch.testing.assert_close(numbers.output_variance(), expected)


def test_samples_have_the_frequencies_of_the_model():
    number = 20_000
    z = logits(0, 1, 1, V).expand(1, number, V)
    for sample, p in (
        (torch.nn.functional.one_hot(Categorical(z).sample(generator()), V), z.softmax(-1)[0, 0]),
        (Bernoulli(z).sample(generator()), z.sigmoid()[0, 0]),
    ):
        errors = (sample.double().mean((0, 1)) - p) / (p * (1 - p) / number).sqrt()
        assert errors.abs().max() < 4.5  # standard errors


def test_samples_of_real_numbers_have_the_mean_and_the_variance_of_the_model():
    number, variance = 20_000, torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    mean = logits(0, 1, 1, V).expand(1, number, V)
    errors = Gaussian(mean, variance).sample(generator()) - mean
    assert (errors.mean((0, 1)) / (variance / number).sqrt()).abs().max() < 4.5  # standard errors
    assert ((errors.square().mean((0, 1)) / variance - 1) / (2 / number) ** 0.5).abs().max() < 4.5


def test_samples_are_independent_across_steps_and_cases():
    z = torch.zeros(200, 200, 2)
    y = Categorical(z).sample(generator()).double() - 0.5
    bits = Bernoulli(z).sample(generator())[..., 0] - 0.5
    for x in (y, bits):
        for other in (x.roll(1, 0), x.roll(1, 1)):
            assert abs((x * other).mean()) < 4.5 * 0.25 / 200


def test_sampling_depends_on_its_generator_alone():
    state = torch.get_rng_state()
    for distribution in (Categorical(logits()), Bernoulli(logits()), Gaussian(logits())):
        assert torch.equal(distribution.sample(generator(1)), distribution.sample(generator(1)))
        assert not torch.equal(distribution.sample(generator(1)), distribution.sample(generator(2)))
        assert not distribution.sample(generator(1)).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_batch_comes_first_gives_the_same_distribution():
    z, mask = logits(), torch.rand(T, B, generator=generator()) < 0.5
    for distribution in (Categorical, Bernoulli, Gaussian):
        one = distribution(z, mask=mask)
        other = distribution(z.transpose(0, 1), mask=mask.T, batch_first=True)
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.sample(generator()), other.sample(generator()))


@pytest.mark.parametrize("distribution", [Categorical, Bernoulli, Gaussian])
def test_half_precision_logits_are_scored_in_float32(distribution):
    z = logits().to(torch.bfloat16).requires_grad_()
    half, full = distribution(z), distribution(z.float())
    y = half.sample(generator())
    assert torch.equal(y, full.sample(generator()))
    assert half.log_loss(y).dtype == torch.float32
    assert torch.equal(half.log_loss(y), full.log_loss(y))
    assert torch.equal(half.output_variance(), full.output_variance())


def test_lengths_may_be_a_list():
    assert torch.equal(Categorical(logits(), lengths=[1, 3, 2, 1]).lengths, torch.tensor([1, 3, 2, 1]))


@pytest.mark.parametrize("distribution", [Categorical, Bernoulli, Gaussian])
def test_targets_in_another_layout_are_refused(distribution):
    y = torch.zeros(B, T, dtype=torch.int64) if distribution is Categorical else torch.zeros(B, T, V)
    with pytest.raises(ValueError, match=r"targets must be \[3, 4.* got \[4, 3"):
        distribution(logits()).log_loss(y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(T, 0, V)}, r"logits must have at least one step, sequence and output, got \[3, 0, 5\]"),
        ({"logits": torch.zeros(T, V)}, r"logits must be \[T, B, outputs\], got \[3, 5\]"),
        ({"mask": torch.ones(T, dtype=torch.bool)}, r"mask must be bool \[T, B\] = \[3, 4\], got torch.bool \[3\]"),
        ({"mask": torch.ones(T, B)}, r"mask must be bool .* got torch.float32"),
        ({"lengths": torch.ones(T, dtype=torch.int64)}, r"lengths must be integers \[B\] = \[4\], got .* \[3\]"),
        ({"lengths": torch.ones(B)}, "lengths must be integers"),
        ({"lengths": torch.tensor([1, 2, 3, 4])}, r"lengths must lie between 1 and T = 3, got \[1, 2, 3, 4\]"),
        ({"lengths": torch.tensor([0, 2, 3, 3])}, "lengths must lie between 1 and T = 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Categorical(**{"logits": logits(), **options})


@pytest.mark.parametrize(
    ("variance", "message"),
    [
        (0.0, r"variance must be positive, got 0\.0"),
        (torch.nan, "variance must be positive"),
        (torch.ones(3), r"variance must be a number or \[outputs\] = \[5\], got \[3\]"),
        (torch.ones(T, B, V), r"variance must be a number or"),
    ],
    ids=str,
)
def test_a_variance_that_is_none_is_refused(variance, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(logits(), variance)
    with pytest.raises(ValueError, match=r"mean must be \[T, B, outputs\], got \[3, 4\]"):
        Gaussian(torch.zeros(T, B))


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Gaussian])
def test_a_sequence_has_the_same_targets_whoever_holds_it(kind: type) -> None:
    logits = torch.randn(3, 7, 4)
    together = kind(logits).sample(torch.Generator().manual_seed(1))
    for first in range(3):
        generator = torch.Generator().manual_seed(1)
        part = kind(logits[:, first::3]).sample(generator, Part(7, first, 3))
        assert torch.equal(part, together[:, first::3])
