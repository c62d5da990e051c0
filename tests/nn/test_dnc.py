"""The DNC against an independent evaluation: one case at a time, one head, one slot, one pair of slots."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kfacrnn.kfac.capture import Tape
from kfacrnn.nn import DNC, dnc, pointwise
from kfacrnn.nn.dnc import content_weights

EPSILON = 1e-6
TOLERANCE = 1e-9
MAPS = ("controller", "interface", "output")


@pytest.fixture(params=["compiled", "torch"])
def steps(request, monkeypatch):
    """Either way to compute the steps."""
    if request.param == "torch":
        monkeypatch.setattr(dnc, "kernel_for", lambda *_: None)
    elif dnc.kernel_for(torch.float64, torch.device("cpu")) is None:
        pytest.skip(pointwise.status())


def softmax(scores):
    exponentials = [torch.exp(score) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def address(memory, key, strength):
    def norm(v):
        return torch.sqrt(v.dot(v) + EPSILON)

    beta = torch.log(1 + torch.exp(strength))
    return softmax([beta * key.dot(word) / (norm(key) * norm(word) + EPSILON) for word in memory])


def allocate(usage):
    free = [1 - (EPSILON + (1 - EPSILON) * u) for u in usage]
    weights, product = [None] * len(free), 1.0
    for slot in sorted(range(len(free)), key=lambda n: (-free[n].item(), n)):
        weights[slot] = free[slot] * product
        product = product * (1 - free[slot])
    return weights


class Reference:
    """Section by section: controller, interface, usage, allocation, write, link, read, output. No axis is ever batched.

    `preactivations[map][t]` and `inputs[map][t]` are those of the case that ran last.
    """

    def __init__(self, model, past_writes_are_constant=True):
        self.parameter = dict(model.named_parameters())
        self.H, self.N, self.W = model.hidden, model.slots, model.word
        self.R, self.K, self.clip = model.read_heads, model.write_heads, model.clip
        self.constant = torch.Tensor.detach if past_writes_are_constant else (lambda x: x)

    def affine(self, name, a):
        s = self.parameter[f"{name}_weight"] @ a + self.parameter[f"{name}_bias"]
        self.inputs[name].append(a)
        self.preactivations[name].append(s)
        return s

    def controller(self, x, reads, h, c):
        H = self.H
        s = self.affine("controller", torch.cat([x, *reads, h]))
        i, f, g, o = (s[k * H : (k + 1) * H] for k in range(4))
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.tanh(c) * torch.sigmoid(o)
        return h.clamp(-self.clip, self.clip), c.clamp(-self.clip, self.clip)

    def interface(self, h):
        W, R, K = self.W, self.R, self.K
        values = iter(self.affine("interface", h))

        def take(heads, width):
            return [torch.stack(list(itertools.islice(values, width))) for _ in range(heads)]

        v, e = take(K, W), [row.sigmoid() for row in take(K, W)]
        f, ga, gw = ([value[0].sigmoid() for value in take(heads, 1)] for heads in (R, K, K))
        modes = [softmax(row) for row in take(R, 1 + 2 * K)]
        kw, bw = take(K, W), [value[0] for value in take(K, 1)]
        kr, br = take(R, W), [value[0] for value in take(R, 1)]
        assert next(values, None) is None
        return v, e, f, ga, gw, modes, kw, bw, kr, br

    def write(self, M, u, ww, wr, v, e, f, ga, gw, kw, bw):
        N, R, K = self.N, self.R, self.K
        usage = []
        for n in range(N):
            untouched, kept = 1.0, 1.0
            for k in range(K):
                untouched = untouched * (1 - self.constant(ww[k][n]))
            for r in range(R):
                kept = kept * (1 - f[r] * wr[r][n])
            usage.append((u[n] + (1 - u[n]) * (1 - untouched)) * kept)
        weights, claimed = [], list(usage)
        for k in range(K):
            a, content = allocate(claimed), address(M, kw[k], bw[k])
            weights.append([gw[k] * (ga[k] * a[n] + (1 - ga[k]) * content[n]) for n in range(N)])
            claimed = [claimed[n] + (1 - claimed[n]) * ga[k] * gw[k] * a[n] for n in range(N)]
        memory = []
        for n in range(N):
            word = M[n]
            for k in range(K):
                word = word * (1 - weights[k][n] * e[k])
            for k in range(K):
                word = word + weights[k][n] * v[k]
            memory.append(word)
        return memory, usage, weights

    def links(self, L, p, ww):
        N = self.N
        zero = torch.zeros((), dtype=torch.float64)
        link = [
            [[zero if i == j else (1 - w[i] - w[j]) * L[k][i][j] + w[i] * p[k][j] for j in range(N)] for i in range(N)]
            for k, w in enumerate(ww)
        ]
        precedence = [[(1 - sum(w)) * p[k][n] + w[n] for n in range(N)] for k, w in enumerate(ww)]
        return link, precedence

    def read(self, M, L, wr, modes, kr, br):
        N, K = self.N, self.K
        weights = []
        for r, old in enumerate(wr):
            content = address(M, kr[r], br[r])
            row = [modes[r][2 * K] * content[n] for n in range(N)]
            for k, n, m in itertools.product(range(K), range(N), range(N)):
                row[n] = row[n] + modes[r][k] * L[k][m][n] * old[m]  # backward
                row[n] = row[n] + modes[r][K + k] * L[k][n][m] * old[m]  # forward
            weights.append(row)
        return weights, [sum(row[n] * M[n] for n in range(N)) for row in weights]

    def __call__(self, x):
        """Logits `[T, outputs]` of one case `[T, inputs]`."""
        H, N, W, R, K = self.H, self.N, self.W, self.R, self.K
        self.inputs, self.preactivations = {name: [] for name in MAPS}, {name: [] for name in MAPS}

        def zeros(*shape):
            return torch.zeros(*shape, dtype=torch.float64)

        M, u, ww, p, L = list(zeros(N, W)), zeros(N), zeros(K, N), zeros(K, N), zeros(K, N, N)
        wr, reads, h, c = zeros(R, N), list(zeros(R, W)), zeros(H), zeros(H)
        outputs = []
        for x_t in x:
            h, c = self.controller(x_t, reads, h, c)
            v, e, f, ga, gw, modes, kw, bw, kr, br = self.interface(h)
            M, u, ww = self.write(M, u, ww, wr, v, e, f, ga, gw, kw, bw)
            L, p = self.links(L, p, ww)
            wr, reads = self.read(M, L, wr, modes, kr, br)
            outputs.append(self.affine("output", torch.cat([h, *reads])).clamp(-self.clip, self.clip))
        return torch.stack(outputs)


def case_loss(logits, weights):
    """Any loss that is a sum over cases and uses every output differently. `weights` as `logits`."""
    return (weights * torch.nn.functional.softplus(logits)).sum()


def make(scale=1.0, steps=5, cases=2, **sizes):
    torch.manual_seed(3)
    sizes = {"inputs": 3, "outputs": 2, "hidden": 4, "slots": 5, "word": 3, "read_heads": 2, **sizes}
    model = DNC(**sizes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    x = torch.randn(steps, cases, sizes["inputs"], dtype=torch.float64)
    weights = torch.randn(steps, cases, sizes["outputs"], dtype=torch.float64)
    return model, x, weights


def gradients(loss, model):
    return dict(
        zip((n for n, _ in model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True)
    )


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


CLAMPS_ACTIVE = {"scale": 1.5, "clip": 0.4, "cases": 3, "outputs": 6}
CONFIGURATIONS = {
    "one write head": {},
    "two write heads": {"write_heads": 2},
    "three write heads, one read head": {"write_heads": 3, "read_heads": 1, "slots": 4},
    "clamps active": CLAMPS_ACTIVE,
    "one slot": {"slots": 1},
}


@pytest.mark.usefixtures("steps")
def test_gradients_are_the_same_where_saved_tensors_are_copied_at_once():
    model, x, weights = make()
    expected = gradients(case_loss(model(x), weights), model)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copied: copied):
        logits = model(x)
    for name, gradient in gradients(case_loss(logits, weights), model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_outputs_and_gradients_equal_the_case_by_case_evaluation(options):
    model, x, weights = make(**options)
    reference = Reference(model)
    expected = torch.stack([reference(x[:, b]) for b in range(x.shape[1])], 1)
    logits = model(x)
    assert relative_error(logits, expected) < TOLERANCE
    found = gradients(case_loss(logits, weights), model)
    for name, gradient in gradients(case_loss(expected, weights), model).items():
        assert relative_error(found[name], gradient) < TOLERANCE, name


def test_the_clamped_configuration_clamps_some_of_the_hidden_states_cells_and_logits(monkeypatch):
    model, x, _ = make(**CLAMPS_ACTIVE)
    states, step = [], model.step
    monkeypatch.setattr(dnc, "kernel_for", lambda *_: None)
    monkeypatch.setattr(model, "step", lambda *arguments: states.append(step(*arguments)) or states[-1])
    logits = model(x)
    hidden, cell = torch.stack([state.hidden for state in states]), torch.stack([state.cell for state in states])
    for values in (hidden, cell, logits):
        clamped = values.abs() == model.clip
        assert 0.05 < clamped.double().mean() < 0.95


@pytest.mark.usefixtures("steps")
def test_no_gradient_flows_through_the_past_write_weights_into_the_usage():
    model, x, weights = make()
    with_flow = Reference(model, past_writes_are_constant=False)
    expected = torch.stack([with_flow(x[:, b]) for b in range(x.shape[1])], 1)
    logits = model(x)
    assert relative_error(logits, expected) < TOLERANCE
    found = gradients(case_loss(logits, weights), model)
    otherwise = gradients(case_loss(expected, weights), model)
    assert relative_error(found["interface_weight"], otherwise["interface_weight"]) > 1e-6


def test_a_zero_memory_is_addressed_uniformly_with_finite_gradients():
    keys = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    strengths = torch.full((2, 3, 1), 5.0, requires_grad=True)
    memory = torch.zeros(2, 6, 4, requires_grad=True)
    weights = content_weights(memory, keys, strengths)
    torch.testing.assert_close(weights, torch.full((2, 3, 6), 1 / 6))
    weights[..., 0].sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (keys, strengths, memory))


def test_the_first_write_by_allocation_alone_goes_to_the_first_slot():
    model = DNC(2, 1, slots=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        rows = dict(
            zip(model.interface_rows, model.interface_bias.split([*model.interface_rows.values()]), strict=True)
        )
        rows["allocation_gate"].fill_(50)
        rows["write_gate"].fill_(50)
    drives = torch.zeros(3, 256), model.interface_bias.expand(3, -1)
    state = model.step(model.initial_state(3), drives, (torch.zeros(128, 256), model.interface_weight.t()))
    expected = torch.zeros(3, 1, 7)
    expected[:, :, 0] = 1
    torch.testing.assert_close(state.write_weights, expected, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("steps")
def test_float32_stays_finite_when_gates_and_strengths_saturate():
    torch.manual_seed(0)
    model = DNC(6, 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(50)
    logits = model(torch.randn(40, 4, 6))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("options", [{}, {"write_heads": 2}, CLAMPS_ACTIVE], ids=str)
def test_captured_inputs_and_preactivation_gradients_equal_brute_force(options):
    model, x, weights = make(**options)
    model.tape = Tape()
    loss = case_loss(model(x), weights)
    assert [tap.map for tap in model.tape] == list(model.maps())
    captured = torch.autograd.grad(loss, [tap.s for tap in model.tape])

    reference = Reference(model)
    for case in range(x.shape[1]):
        loss = case_loss(reference(x[:, case]), weights[:, case])
        for tap, g in zip(model.tape, captured, strict=True):
            expected = torch.autograd.grad(loss, reference.preactivations[tap.map.name], retain_graph=True)
            assert relative_error(g[:, case], torch.stack(expected)) < TOLERANCE
            assert relative_error(tap.a[:, case], torch.stack(reference.inputs[tap.map.name])) < TOLERANCE
            assert not tap.a.requires_grad


@pytest.mark.usefixtures("steps")
def test_weight_and_bias_gradients_are_sums_of_captured_products_over_time():
    model, x, weights = make(write_heads=2)
    model.tape = Tape()
    loss = case_loss(model(x), weights)
    captured = torch.autograd.grad(loss, [tap.s for tap in model.tape], retain_graph=True)
    expected = gradients(loss, model)
    for tap, g in zip(model.tape, captured, strict=True):
        weight = torch.einsum("tbo,tbi->oi", g, tap.a)
        assert relative_error(weight, expected[f"{tap.map.name}_weight"]) < TOLERANCE
        assert relative_error(g.sum((0, 1)), expected[f"{tap.map.name}_bias"]) < TOLERANCE


@pytest.mark.usefixtures("steps")
def test_recording_changes_neither_logits_nor_gradients():
    model, x, weights = make()
    plain = model(x)
    model.tape = Tape()
    taped = model(x)
    assert torch.equal(plain, taped)
    before, after = gradients(case_loss(plain, weights), model), gradients(case_loss(taped, weights), model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_splits_cover_the_rows_of_the_gates_and_of_the_ten_interface_maps():
    controller, interface, output = DNC(6, 5).maps()
    assert dict(controller.splits) == {"i": 64, "f": 64, "g": 64, "o": 64}
    assert list(interface.splits.values()) == [16, 16, 4, 1, 1, 12, 16, 1, 64, 4]
    assert sum(interface.splits.values()) == len(interface.weights[0]) == 135
    assert output.is_output
    assert not controller.is_output


def test_maps_are_the_same_objects_at_every_call():
    model = DNC(6, 5)
    assert all(first is second for first, second in zip(model.maps(), model.maps(), strict=True))


def test_initial_weights_are_normal_cut_off_at_two_standard_deviations_of_their_fan_in():
    torch.manual_seed(0)
    model = DNC(6, 5)
    assert sum(parameter.numel() for parameter in model.parameters()) == 43_980
    for name, fan_in in {"controller": 134, "interface": 64, "output": 128}.items():
        weight, bias = getattr(model, f"{name}_weight"), getattr(model, f"{name}_bias")
        assert weight.abs().max() <= 2 / math.sqrt(fan_in)
        truncated_std = 0.8796 / math.sqrt(fan_in)
        assert abs(weight.std().item() / truncated_std - 1) < 4 / math.sqrt(weight.numel())
        assert not bias.any()


@pytest.mark.usefixtures("steps")
def test_autocast_does_not_lower_the_precision():
    torch.manual_seed(0)
    model, x = DNC(6, 5), torch.randn(4, 2, 6)
    plain = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("argument", ["slots", "write_heads"])
def test_a_size_below_one_is_refused(argument):
    with pytest.raises(ValueError, match=argument):
        DNC(6, 5, **{argument: 0})


def test_a_clip_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="clip"):
        DNC(6, 5, clip=0.0)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 5)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[T, B, 6\]"):
        DNC(6, 5)(torch.zeros(shape))
