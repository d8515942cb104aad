"""Variational dropout of recurrent layers and cells."""

import copy

import pytest
import torch
from hosts import DEVICE, PLAIN
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import tridrop
from tridrop.contract.mask import ONE, fold_in, threshold
from tridrop.nn import LockedDropout, VariationalCell, VariationalRNN

LENGTHS = torch.tensor([3, 5, 1, 5])
STEPS, BATCH, INPUTS, HIDDEN = 5, 4, 6, 8


def inputs(**options):
    return torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(3), **options)


def pack(x):
    return pack_padded_sequence(x, LENGTHS, enforce_sorted=False)


def factor(seed, features, p, dtype=torch.float64):
    keep = tridrop.keep_mask(seed, (BATCH, features), p)
    return keep.to(dtype) * (ONE / (ONE - threshold(p)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------- locked dropout


@pytest.mark.parametrize("backend", [PLAIN, "triton"])
@pytest.mark.parametrize("form", ["time", "batch", "packed", "alone"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_mask_for_all_steps_whatever_the_layout(form, backend, as_tensor):
    device = DEVICE if backend == "triton" else "cpu"
    p = torch.tensor(0.4, dtype=torch.float64, device=device) if as_tensor else 0.4
    x = inputs().to(device).requires_grad_()
    drop = factor(7, INPUTS, 0.4, x.dtype).to(device)
    with tridrop.backend(backend):
        if form == "time":
            out, expected = tridrop.locked_dropout(x, p, seed=7), x * drop
        elif form == "batch":
            out = tridrop.locked_dropout(x.transpose(0, 1), p, batch_first=True, seed=7)
            expected = (x * drop).transpose(0, 1)
        elif form == "packed":
            out, expected = tridrop.locked_dropout(pack(x), p, seed=7).data, pack(x * drop).data
        else:
            out, expected = tridrop.locked_dropout(x[:, 0], p, seed=7), x[:, 0] * drop[0]
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out.square().sum(), x)
    wanted = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_a_sequence_in_pieces_keeps_its_mask():
    x = torch.ones(7, 3, 16)
    whole = tridrop.locked_dropout(x, 0.5, seed=2)
    parts = [tridrop.locked_dropout(part, 0.5, seed=2) for part in x.split(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_packed_without_an_order_counts_its_rows():
    x = torch.ones(STEPS, BATCH, INPUTS)
    given = pack_padded_sequence(x, LENGTHS.sort(descending=True).values)
    assert given.sorted_indices is None
    out, _ = pad_packed_sequence(tridrop.locked_dropout(given, 0.5, seed=1))
    assert torch.equal(out[0], factor(1, INPUTS, 0.5, x.dtype))


def test_the_ends_of_the_range_and_evaluation():
    for x in (inputs(), pack(inputs())):
        assert tridrop.locked_dropout(x, 0.0) is x
        assert tridrop.locked_dropout(x, 0.5, False) is x
        assert LockedDropout(0.5).eval()(x) is x
        out = tridrop.locked_dropout(x, 1.0)
        assert not (out.data if isinstance(out, PackedSequence) else out).any()
    with pytest.raises(ValueError, match=r"takes \[T, B, C\]"):
        tridrop.locked_dropout(torch.ones(2, 2, 2, 2))
    with pytest.raises(TypeError, match="int64"):
        tridrop.locked_dropout(pack(torch.ones(STEPS, BATCH, 2)).to(torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        LockedDropout(1.5)


def test_packed_dropout_saves_row_numbers_alone_and_has_two_derivatives():
    x = torch.randn(STEPS, BATCH, 64, requires_grad=True)
    given, kept = pack(x), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = tridrop.locked_dropout(given, 0.3)
    assert sum(t.nbytes for t in kept) == 16 + 8 * len(out.data)
    wide = torch.randn(int(LENGTHS.sum()), 3, dtype=torch.float64, requires_grad=True)

    def call(data):
        return tridrop.locked_dropout(given._replace(data=data), 0.3, seed=1).data

    torch.autograd.gradcheck(call, wide)
    torch.autograd.gradgradcheck(call, wide)


def test_half_precision_is_scaled_in_full():
    data = torch.randn(int(LENGTHS.sum()), 32).bfloat16()
    given = pack(torch.ones(STEPS, BATCH, 32))._replace(data=data)
    drop = given._replace(data=pack(factor(1, 32, 0.1).expand(STEPS, -1, -1)).data)
    expected = (data.double() * drop.data).bfloat16()
    for p in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        assert torch.equal(tridrop.locked_dropout(given, p, seed=1).data, expected)


# ------------------------------------------------------------------------------------ whole layers

LAYERS = {
    "rnn": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"num_layers": 2}),
    "lstm, projected": (nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True}),
    "lstm, no bias": (nn.LSTM, {"bias": False, "proj_size": 3, "batch_first": True}),
    "gru": (nn.GRU, {"num_layers": 3, "bidirectional": True, "batch_first": True}),
    "gru, no bias": (nn.GRU, {"bias": False}),
}
FORMS = ("padded", "packed", "alone")


def layer_of(name):
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    return kind(INPUTS, HIDDEN, dtype=torch.float64, **options)


def given_to(rnn, form, with_state):
    """(input, hx) for a layer, of each form that torch takes."""
    x = inputs(dtype=torch.float64)
    rows = rnn.num_layers * (1 + rnn.bidirectional)
    generator = torch.Generator().manual_seed(4)
    sizes = [rnn.proj_size or HIDDEN] + [HIDDEN] * (rnn.mode == "LSTM")
    state = [torch.randn(rows, BATCH, n, generator=generator, dtype=torch.float64) for n in sizes]
    if form == "alone":
        x, state = x[:, 1], [s[:, 1] for s in state]
    elif form == "packed":
        x = pack(x)
    elif rnn.batch_first:
        x = x.transpose(0, 1)
    if not with_state:
        return x, None
    return x, tuple(state) if len(state) == 2 else state[0]


def flat(result):
    """Every tensor of (output, state)."""
    output, state = result
    if isinstance(output, PackedSequence):
        output = output.data
    return [output, *(state if isinstance(state, tuple) else (state,))]


def with_tensor_rates(model, where):
    """Rates of 0 as tensors: everything runs as with dropout, and nothing drops."""
    for site in where(model):
        site.p = torch.tensor(0.0, dtype=torch.float64)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("road", ["whole", "layers", "loop"])
def test_without_dropping_it_is_torchs_layer(name, form, with_state, road):
    rnn = layer_of(name)
    model = VariationalRNN(rnn)
    assert {key.removeprefix("rnn.") for key in model.state_dict()} == set(rnn.state_dict())
    if road == "layers":
        with_tensor_rates(model, lambda m: m.layer_dropout)
    elif road == "loop":
        with_tensor_rates(model, lambda m: m.recurrent_dropout)
    x, hx = given_to(rnn, form, with_state)
    expected, found = flat(rnn(x, hx)), flat(model(x, hx))
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    weights = list(rnn.parameters())
    total = [sum(t.square().sum() for t in outs) for outs in (found, expected)]
    for a, b in zip(*(torch.autograd.grad(t, weights) for t in total), strict=True):
        close(a, b)


def reference(rnn, x, hx, seeds, rates, place):
    """A loop over samples, steps, directions and layers, in torch's cells and with masks given."""
    directions = 1 + rnn.bidirectional
    cell = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[rnn.mode](INPUTS, HIDDEN)
    lengths = LENGTHS.tolist()
    finals = []
    x = x * factor(seeds["input"], INPUTS, rates["input"])
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            w_ih, w_hh, b_ih, b_hh = rnn.all_weights[row]
            mask = factor(seeds["recurrent"][row], HIDDEN, rates["recurrent"])
            out = torch.zeros(STEPS, BATCH, HIDDEN, dtype=torch.float64)
            final = torch.zeros(2, BATCH, HIDDEN, dtype=torch.float64)
            for b in range(BATCH):
                h, c = (s[row, b : b + 1] for s in hx)
                steps = range(lengths[b])
                for t in reversed(steps) if direction else steps:
                    gi = nn.functional.linear(x[t, b : b + 1], w_ih, b_ih)
                    into = h * mask[b] if place == "hidden" else h
                    gh = nn.functional.linear(into, w_hh, b_hh)
                    m = mask[b] if place == "candidate" else 1.0
                    if isinstance(cell, nn.LSTMCell):
                        i, f, g, o = (gi + gh).chunk(4, 1)
                        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g) * m
                        h = torch.sigmoid(o) * torch.tanh(c)
                    else:
                        (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, 1), gh.chunk(3, 1)
                        n = torch.tanh(ni + torch.sigmoid(ri + rh) * nh) * m
                        z = torch.sigmoid(zi + zh)
                        h = (1 - z) * n + z * h
                    out[t, b] = h
                final[0, b], final[1, b] = h, c
            outputs.append(out)
            finals.append(final)
        x = torch.cat(outputs, -1)
        if layer < rnn.num_layers - 1:
            x = x * factor(seeds["layer"][layer], x.shape[-1], rates["layer"])
    x = x * factor(seeds["output"], x.shape[-1], rates["output"])
    return x, torch.stack([f[0] for f in finals]), torch.stack([f[1] for f in finals])


@pytest.mark.parametrize("place", ["hidden", "candidate"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_every_mask_is_the_contracts_at_its_place(kind, place):
    """Packed, two layers, both directions; values and gradients."""
    torch.manual_seed(0)
    rnn = kind(INPUTS, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64)
    rates = {"input": 0.2, "output": 0.3, "layer": 0.4, "recurrent": 0.5}
    model = VariationalRNN(rnn, 0.2, 0.3, 0.4, 0.5, recurrent_place=place)
    assert tridrop.nn.number_sites(model) == 7
    seeds = {
        "input": fold_in(11, model.input_dropout.site),
        "output": fold_in(11, model.output_dropout.site),
        "layer": [fold_in(11, site.site) for site in model.layer_dropout],
        "recurrent": [fold_in(11, site.site) for site in model.recurrent_dropout],
    }
    x = inputs(dtype=torch.float64)
    hx = tuple(torch.randn(4, BATCH, HIDDEN, dtype=torch.float64) for _ in range(2))
    with tridrop.rng(11):
        output, state = model(pack(x), hx if kind is nn.LSTM else hx[0])
    padded, lengths = pad_packed_sequence(output)
    assert torch.equal(lengths, LENGTHS)
    expected = reference(rnn, x, hx, seeds, rates, place)
    found = (padded, *(state if kind is nn.LSTM else (state,)))
    for a, b in zip(found, expected, strict=kind is nn.LSTM):
        close(a, b)
    weights = list(rnn.parameters())
    total = [sum(t.square().sum() for t in outs[: len(found)]) for outs in (found, expected)]
    for a, b in zip(*(torch.autograd.grad(t, weights) for t in total), strict=True):
        close(a, b)


@pytest.mark.parametrize("place", ["hidden", "candidate"])
def test_padded_and_packed_and_alone_agree(place):
    torch.manual_seed(0)
    lstm = nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True, proj_size=5, dtype=torch.float64)
    model = VariationalRNN(lstm, 0.2, 0.3, 0.4, 0.5, recurrent_place=place)
    tridrop.nn.number_sites(model)
    x = inputs(dtype=torch.float64).transpose(0, 1)

    def run(x):
        with tridrop.rng(3):
            return model(x)

    output, (h, _) = run(x)
    packed, (ends, _) = run(pack_padded_sequence(x, LENGTHS, True, enforce_sorted=False))
    rows, _ = pad_packed_sequence(packed, batch_first=True)
    for b, length in enumerate(LENGTHS):
        close(rows[b, :length], output[b, :length])
    close(ends[:, 1], h[:, 1])  # a sequence of full length
    alone, (last, _) = run(x[0])
    close(alone, output[0])
    close(last, h[:, 0])


def test_every_rate_is_met_and_the_same_for_all_steps():
    """A layer that passes its input on: what falls of inputs, states and outputs."""
    rnn = nn.RNN(64, 64, nonlinearity="relu", bias=False)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(torch.eye(64))
        rnn.weight_hh_l0.copy_(torch.eye(64))
    model = VariationalRNN(rnn, 0.2, recurrent_dropout=0.5)
    x = torch.ones(3, 200, 64)
    out, h = model(x)
    assert torch.equal(out[-1], h[0])
    first = out[0] != 0
    n = first.numel()
    assert abs(float(first.double().mean()) - 0.8) < 6 * (0.16 / n) ** 0.5
    # h1 = x m_x, h2 = x m_x + h1 m_h, h3 = x m_x + h2 m_h, with the same m_h
    gains = ((out[1] / out[0]) - 1)[first], ((out[2] - out[0]) / out[1])[first]
    torch.testing.assert_close(*gains)
    assert set(gains[0].round(decimals=3).unique().tolist()) == {0.0, 2.0}
    assert abs(float((gains[0] > 1).double().mean()) - 0.5) < 6 * (0.25 / int(first.sum())) ** 0.5


def test_its_rates_are_its_own_and_torchs_is_taken_over():
    gru = nn.GRU(4, 4, 3, dropout=0.25)
    model = VariationalRNN(gru)
    assert gru.dropout == 0.0
    assert [site.p for site in model.layer_dropout] == [0.25, 0.25]
    other = VariationalRNN(nn.GRU(4, 4, 2, dropout=0.25), layer_dropout=0.0)
    assert [site.p for site in other.layer_dropout] == [0.0]
    calls = []
    gru.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 2, 4)
    model(x)
    assert not calls  # layer by layer
    model.eval()
    assert torch.equal(model(x)[0], gru(x)[0])
    assert len(calls) == 2


@pytest.mark.parametrize("form", FORMS)
def test_states_that_do_not_fit_are_refused_as_torch_refuses_them(form):
    rnn = nn.LSTM(INPUTS, HIDDEN, dtype=torch.float64)
    model = VariationalRNN(rnn, recurrent_dropout=0.5)
    x, (h, c) = given_to(rnn, form, True)
    for hx in ((h[..., :-1], c), (h, c[:, :-1]), (h[None], c)):
        with pytest.raises(RuntimeError):
            rnn(x, hx)
        with pytest.raises(RuntimeError):
            model(x, hx)
    with pytest.raises(RuntimeError):
        model(inputs(dtype=torch.float64)[..., :-1])
    with pytest.raises(ValueError, match="takes"):
        model(torch.ones(1, 1, 1, INPUTS, dtype=torch.float64))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"give a torch\.nn\.RNN, LSTM or GRU"):
        VariationalRNN(nn.LSTMCell(2, 2))
    with pytest.raises(TypeError, match=r"give a torch\.nn\.LSTMCell, GRUCell or RNNCell"):
        VariationalCell(nn.LSTM(2, 2))
    for name in ("input_dropout", "output_dropout", "layer_dropout", "recurrent_dropout"):
        with pytest.raises(ValueError, match=name):
            VariationalRNN(nn.GRU(2, 2), **{name: 1.5})
    for module, wrap in ((nn.RNN(2, 2), VariationalRNN), (nn.RNNCell(2, 2), VariationalCell)):
        with pytest.raises(ValueError, match="Elman"):
            wrap(module, recurrent_place="candidate")
        with pytest.raises(ValueError, match="known: 'hidden', 'candidate'"):
            wrap(module, recurrent_place="memory")


def test_it_is_recomputed_copied_and_repeated():
    model = VariationalRNN(nn.LSTM(INPUTS, HIDDEN, 2), 0.2, 0.3, 0.4, 0.5)
    x = inputs().requires_grad_()
    weights = list(model.parameters())
    for numbered in (False, True):
        if numbered:
            tridrop.nn.number_sites(model)
        torch.manual_seed(1)
        with tridrop.rng(4) if numbered else tridrop.backend("reference"):
            plain = model(x)[0].square().sum()
            expected = torch.autograd.grad(plain, weights)
        torch.manual_seed(1)
        with tridrop.rng(4) if numbered else tridrop.backend("reference"):
            again = checkpoint(lambda x: model(x)[0], x, use_reentrant=False).square().sum()
            found = torch.autograd.grad(again, weights)
        assert torch.equal(plain, again)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    twin = copy.deepcopy(model)
    with tridrop.rng(5):
        first = model(x)[0]
    with tridrop.rng(5):
        assert torch.equal(twin(x)[0], first)
    with tridrop.rng(6):
        assert not torch.equal(model(x)[0], first)


def test_bf16_states_are_scaled_without_bias():
    """The factor is fp32: in bf16 1 / 0.9 would be 0.2 % off."""
    model = VariationalRNN(nn.GRU(4, HIDDEN, dtype=torch.bfloat16), recurrent_dropout=0.1)
    out, h = model(torch.randn(3, BATCH, 4, dtype=torch.bfloat16))
    assert out.dtype == h.dtype == torch.bfloat16
    site = model.recurrent_dropout[0]
    site.site = 5
    h = torch.randn(BATCH, HIDDEN).bfloat16()
    with tridrop.rng(2):
        drops = model._drops(site, (h,), None)
    expected = h.double() * factor(fold_in(2, 5), HIDDEN, 0.1)
    assert torch.equal(drops.hidden(h), expected.bfloat16())


def test_autocast_is_as_narrow_as_torchs_layer():
    model = VariationalRNN(nn.LSTM(INPUTS, HIDDEN, 2), recurrent_dropout=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(model(inputs()))
        try:
            expected = flat(model.rnn(inputs()))
        except RuntimeError:  # torch has no such LSTM for processors without AVX-512
            expected = None
    narrow = [torch.bfloat16] * 3
    assert [t.dtype for t in found] == narrow
    assert expected is None or [t.dtype for t in expected] == narrow
    found[0].float().sum().backward()


# ------------------------------------------------------------------------------------------- cells

CELLS = {
    "lstm": (nn.LSTMCell, nn.LSTM),
    "gru": (nn.GRUCell, nn.GRU),
    "rnn": (nn.RNNCell, nn.RNN),
}


def cell_and_layer(name, bias=True):
    torch.manual_seed(0)
    cell, layer = (kind(INPUTS, HIDDEN, bias=bias, dtype=torch.float64) for kind in CELLS[name])
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    return cell, layer


def unroll(cell, x, state=None, **options):
    outputs = []
    for step in x:
        state = cell(step, state, **options)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), state


@pytest.mark.parametrize("place", ["hidden", "candidate"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_a_loop_over_the_cell_is_the_layer(name, bias, place):
    if name == "rnn" and place == "candidate":
        return
    cell, layer = cell_and_layer(name, bias)
    cell = VariationalCell(cell, 0.3, 0.4, recurrent_place=place)
    layer = VariationalRNN(layer, 0.3, recurrent_dropout=0.4, recurrent_place=place)
    layer.input_dropout.site, layer.recurrent_dropout[0].site = 0, 1
    x = inputs(dtype=torch.float64)
    with tridrop.rng(9):
        expected, _ = layer(x)
    close(unroll(cell, x, seed=9)[0], expected)
    close(unroll(cell, x[:, 0], seed=9)[0], expected[:, 0])
    cell.input_dropout.site, cell.recurrent_dropout.site = 0, 1
    with tridrop.rng(9):
        close(unroll(cell, x)[0], expected)


@pytest.mark.parametrize("name", CELLS)
def test_an_idle_cell_is_torchs(name):
    plain, _ = cell_and_layer(name)
    cell = VariationalCell(plain, 0.3, 0.4).eval()
    x = inputs(dtype=torch.float64)
    assert torch.equal(unroll(cell, x)[0], unroll(plain, x)[0])
    with_tensor_rates(cell.train(), lambda m: (m.input_dropout, m.recurrent_dropout))
    close(unroll(cell, x)[0], unroll(plain, x)[0])
    close(unroll(cell, x[:, 0])[0], unroll(plain, x[:, 0])[0])


def test_masks_last_until_a_new_sequence():
    cell = VariationalCell(nn.GRUCell(64, 64), 0.5, 0.5)
    x = torch.ones(2, 64)
    h = cell(x)
    kept = cell._kept
    cell(x, h)
    assert cell._kept is kept
    cell(x)  # no state: a sequence begins
    assert not torch.equal(cell._kept[0], kept[0])
    kept = cell._kept
    cell.reset()
    cell(x, h)
    assert not torch.equal(cell._kept[1], kept[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_cell_is_recomputed_with_its_own_masks(reentrant):
    cell = VariationalCell(nn.LSTMCell(INPUTS, HIDDEN), 0.4, 0.4)
    x = inputs().requires_grad_()
    weights = list(cell.parameters())

    def gradients(loop):
        torch.manual_seed(2)
        loss = loop().square().sum()
        with torch.no_grad():
            unroll(cell, inputs())  # another sequence has begun before backward
        loss.backward()
        found = [w.grad for w in weights]
        for w in weights:
            w.grad = None
        return found

    def same(found, expected):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    plain = gradients(lambda: unroll(cell, x)[0])
    whole = gradients(lambda: checkpoint(lambda x: unroll(cell, x)[0], x, use_reentrant=reentrant))
    assert same(whole, plain)

    def by_steps(**options):
        state = None
        for step in x:
            state = checkpoint(cell, step, state, use_reentrant=False, **options)
        return state[0]

    with pytest.raises(RuntimeError, match="pass seed to every step"):
        by_steps().sum().backward()
    # A later step alone, after the whole of another sequence in the same backward.
    _, state = unroll(cell, x[:2])
    later = checkpoint(cell, x[2], state, use_reentrant=False)[0]
    other = checkpoint(lambda x: unroll(cell, x)[0], x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="pass seed to every step"):
        (later.sum() + other.sum()).backward()
    plain = gradients(lambda: unroll(cell, x, seed=5)[1][0])
    assert same(gradients(lambda: by_steps(seed=5)), plain)


def test_cells_refuse_what_does_not_fit():
    cell = VariationalCell(nn.LSTMCell(4, 8), 0.5, 0.5)
    with pytest.raises(ValueError, match=r"takes \[B, C\] or \[C\]"):
        cell(torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match=r"shape \(1, 8\); with this input it must be \(2, 8\)"):
        cell(torch.ones(2, 4), (torch.ones(2, 8), torch.ones(1, 8)))


# ---------------------------------------------------------------------------- with the rest of it


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = tridrop.nn.EmbeddingDropout(20, INPUTS, p=0.3)
        self.rnn = VariationalRNN(nn.GRU(INPUTS, HIDDEN, 2, batch_first=True), 0.2, 0.3, 0.4, 0.5)
        self.out = nn.Linear(HIDDEN, 3)

    def forward(self, words):
        return self.out(self.rnn(self.words(words))[0])


def test_monte_carlo_schedules_and_swap_know_them():
    model = Tagger().eval()
    with tridrop.mc_dropout(model) as names:
        assert set(names) == {
            "words", "rnn.input_dropout", "rnn.layer_dropout.0", "rnn.recurrent_dropout.0",
            "rnn.recurrent_dropout.1", "rnn.output_dropout",
        }  # fmt: skip
    tridrop.nn.number_sites(model)
    words = torch.arange(12).view(2, 6)
    options = {"samples": 3, "seed": 1, "vectorize": False, "keep_samples": True}
    both = tridrop.mc_predict(model, words, **options).samples
    alone = tridrop.mc_predict(model, words[1:], **options).samples
    torch.testing.assert_close(both[:, 1:], alone)
    assert not torch.equal(both[0], both[1])
    schedule = tridrop.DropoutSchedule(model.train(), lambda step: 0.1 * step, relative=True)
    for _ in range(2):
        schedule.step()
    assert abs(float(model.rnn.recurrent_dropout[0].p) - 0.1) < 1e-12
    assert abs(float(model.words.p) - 0.06) < 1e-12
    model(words).sum().backward()
    schedule.release()
    tridrop.swap(model)
    with tridrop.rng(1):
        first = model(words)
    tridrop.unswap(model)
    with tridrop.rng(1):
        assert torch.equal(model(words), first)


def test_vectorised_members_are_those_of_single_calls():
    """Of the loop: torch's fused layers have no vmap rule on every device."""
    model = nn.Sequential(
        VariationalRNN(nn.GRU(3, 4, batch_first=True), 0.2, recurrent_dropout=0.5)
    )
    tridrop.nn.number_sites(model)
    x = torch.randn(3, 5, 3)
    options = {"samples": 3, "seed": 1, "keep_samples": True, "call": lambda x: model(x)[0]}
    slow = tridrop.mc_predict(model.eval(), x, vectorize=False, **options)
    fast = tridrop.mc_predict(model.eval(), x, **options)
    torch.testing.assert_close(fast.samples, slow.samples)


def test_compiled():
    model = VariationalRNN(nn.GRU(INPUTS, HIDDEN), 0.2, recurrent_dropout=0.4)
    tridrop.nn.number_sites(model)
    x, seed = inputs(), tridrop.new_seed()

    def call(x):
        with tridrop.rng(seed):
            return model(x)[0]

    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))
    cell = VariationalCell(nn.LSTMCell(INPUTS, HIDDEN), 0.4, 0.4)
    loop = torch.compile(
        lambda x: unroll(cell, x, seed=seed)[0], backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(loop(x), unroll(cell, x, seed=seed)[0])
