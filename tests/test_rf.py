"""rf.py against closed forms, through the functions that the trainers call.

The workhorse is Gaussian data: for data ~ N(mean, s²) in each dimension and noise ~ N(0, 1),
x_t is Gaussian with variance V(t) = (1 − t)²s² + t², and the best velocity is linear in x:
    v(x, t) = −mean + (t − (1 − t)s²) / V(t) · (x − (1 − t)·mean),
whose flow maps noise to data as x ↦ mean + s·x.
"""

import math

import numpy as np
import pytest
import torch
from helpers import close

import rf

F64 = torch.float64
MEAN, STD = 0.7, 0.4
# B, C, H, W all different; B = W and all equal, where a wrong broadcast would go unseen otherwise
SHAPES = [(2, 3, 4, 5), (5, 3, 4, 5), (4, 4, 4, 4), (3, 7), (6,)]
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_shift = pytest.mark.parametrize("shift", [1.0, 3.0])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def each(t, x):
    """t (B,), to meet x (B, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def gaussian(x, t, text=None):
    t = each(t, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: rf.sample(gaussian, x, None, solver="rk9"), "euler, heun"),
        (lambda x: rf.sample(gaussian, x, None, steps=0), "at least 1"),
        (lambda x: rf.sample(gaussian, x, None, cfg=2.0), "needs null_text"),
        (lambda x: rf.time_at(x, "normal"), "logit_normal"),
        (lambda x: rf.time_at(x, shift=0), "positive"),
        (lambda x: rf.rf_loss(gaussian, x, None, t=x[:, 0], noise=x, loss="l1"), "pseudo_huber"),
        (lambda x: rf.velocity_target(x, x[:, :1]), "differ in shape"),
        (lambda x: rf.interpolate(x, x[0], x[:, 0]), "differ in shape"),
        *[
            (lambda x, t=t: rf.interpolate(x, x, torch.zeros(t)), "one per sample")
            for t in [(5, 1), (4,), (), (1,)]
        ],
        (lambda x: rf.reflow_states(gaussian, x, x, segments=3), "50 must be a multiple"),
        (lambda x: rf.line(x, x, x, segments=3), "segments = 3 must divide the 4"),
        (lambda x: rf.line(x[:, :1], x, x, segments=2), "segments = 2 must divide the 0"),
        (lambda x: rf.line(x, x, x[:, 0], segments=4, beta=0.1), "needs segments = 1"),
        (lambda x: rf.gamma_from_sigma_rel(0.3), "0.2887"),
        (lambda x: rf.posthoc_coefficients([(10, 0.1)], 11, 0.1), "after the last"),
    ],
)
def test_bad_arguments_say_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(5, 5))


# --- the line and its times ----------------------------------------------------------------------


@each_shape
def test_the_line_of_each_sample_has_its_own_time_and_slope(shape):
    data, noise, t = randn(*shape), randn(*shape, seed=1), torch.linspace(0, 1, shape[0], dtype=F64)
    x = rf.interpolate(data, noise, t)
    for i in range(shape[0]):
        assert torch.equal(x[i], (1 - t[i]) * data[i] + t[i] * noise[i])
    slope = (rf.interpolate(data, noise, t + 1e-4) - x) / 1e-4
    close(rf.velocity_target(data, noise), slope, atol=1e-9)


CDF = {
    "uniform": lambda t: t,
    "logit_normal": lambda t: torch.special.ndtr(torch.logit(t)),
    # RF++'s density e^{at} + e^{a(1−t)}, integrated here term by term
    "u_shaped": lambda t: (
        (torch.exp(4 * t) - torch.exp(4 * (1 - t)) + math.exp(4) - 1) / (2 * (math.exp(4) - 1))
    ),
}


@pytest.mark.parametrize("distribution", CDF)
def test_times_follow_their_distribution(distribution):
    u = torch.linspace(0, 1, 2001)
    t = rf.time_at(u, distribution)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    close(CDF[distribution](t.double()), u.double(), atol=1e-5)


def test_shift_moves_logits_by_log_alpha():
    t = torch.linspace(0.01, 0.99, 50)
    close(torch.logit(rf.shift_time(t, 3.0)), torch.logit(t) + math.log(3), atol=1e-5)
    assert rf.timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rf.timesteps(2, shift=3.0) == [1.0, 0.75, 0.0]
    plain, moved = (rf.time_at(t, shift=shift) for shift in (1, 3))
    close(moved, rf.shift_time(plain, 3.0))
    ends = rf.time_at(torch.tensor([0.0, 1.0]), "uniform", shift=1000.0)
    assert ends[0] > 0 and ends[1] < 1


def test_random_numbers_are_functions_of_seed_purpose_and_number():
    rows = [rf.uniform_at(*row, range(500)) for row in ((0, "step"), (1, "step"), (0, "text"))]
    u = rows[0]
    assert len({*rows[0], *rows[1], *rows[2]}) == 1500 and 0 <= min(u) < 0.01 < 0.99 < max(u) < 1
    assert u[7:9] == rf.uniform_at(0, "step", [7, 8])
    drawn = [torch.rand(3, generator=g) for g in rf.generators(0, "step", [4, 7])]
    (alone,) = rf.generators(0, "step", [7])
    assert torch.equal(drawn[1], torch.rand(3, generator=alone)) and (drawn[0] != drawn[1]).all()


def test_batches_and_positions_cover_time_evenly():
    slices = 1024 * rf.spread(1024, torch.Generator().manual_seed(0))
    assert torch.equal(slices.long(), torch.arange(1024)) and slices.frac().std() > 0.2
    u = rf.spread_at(0, range(6400))
    assert u.dtype == torch.float32 and torch.equal(u[64:96], rf.spread_at(0, range(64, 96)))
    for batch in u.split(64):  # a random one has gaps of 5/64
        assert batch.sort().values.diff().max() < 1.4 / 64
    assert (u != rf.spread_at(1, range(6400))).all()
    assert rf.spread_at(0, [24718775]) < 1  # 0.99999997, which fp32 rounds up


# --- loss ----------------------------------------------------------------------------------------


@each_shape
def test_losses_against_plain_loops(shape):
    """Also of a network in bf16, whose losses are fp32."""
    data, noise, t = randn(*shape), randn(*shape, seed=1), torch.linspace(0, 1, shape[0])

    def model(x, t, text=None):
        return gaussian(x, t).bfloat16()

    mse = rf.rf_loss(model, data, None, t=t, noise=noise)
    huber = rf.rf_loss(model, data, None, t=t, noise=noise, loss="pseudo_huber")
    assert mse.shape == huber.shape == shape[:1] and mse.dtype == huber.dtype == torch.float32
    for i in range(shape[0]):
        x = (1 - t[i]) * data[i] + t[i] * noise[i]
        error = (model(x[None], t[i : i + 1])[0] - (noise[i] - data[i])).flatten()
        c = 0.00054 * math.sqrt(len(error))
        close(mse[i], error.square().mean())
        close(huber[i], (error @ error + c * c).sqrt() - c)


def test_the_best_velocity_has_the_least_loss_and_it_is_known():
    """E‖v − target‖² at the optimum is the conditional variance s²/V(t): none does better."""
    n, t = 200_000, 0.3
    how = {"t": torch.full((n,), t, dtype=F64), "noise": randn(n, 1, seed=1)}
    data = MEAN + STD * randn(n, 1)
    best = rf.rf_loss(gaussian, data, None, **how).mean()
    close(best, torch.tensor(STD**2 / ((1 - t) ** 2 * STD**2 + t**2)), rtol=0.01)
    for wrong in (lambda x, t, c: gaussian(x, t) * 1.3, lambda x, t, c: -x):
        assert rf.rf_loss(wrong, data, None, **how).mean() > best * 1.01


@pytest.mark.parametrize("batch_size", [None, 3])
def test_validation_loss_is_the_mean_of_the_means_of_each_t(batch_size):
    data, noise = randn(11, 2).float(), randn(11, 2, seed=1).float()
    t_index = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6])
    text = torch.arange(11.0)[:, None]

    def model(x, t, text):
        return gaussian(x, t) + text

    means, mean = rf.validation_loss(model, data, text, t_index, noise, batch_size=batch_size)
    losses = rf.rf_loss(model, data, text, t=t_index / 8, noise=noise)
    expected = torch.stack([losses[t_index == i].mean() for i in range(7)])
    assert means[7].isnan()  # no sample
    close(means[:7], expected)
    close(mean, expected.mean())


# --- guidance and solvers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_guidance_extrapolates_from_null_to_text_in_one_batch(dtype):
    """The difference of bf16 velocities is taken in fp32."""
    batches, wide = [], torch.promote_types(dtype, torch.float32)

    def model(x, t, text):
        batches.append(len(x))
        return (x * text[:, :, None] + each(t, x)).to(dtype)

    x, t, text, null = randn(3, 2, 4), randn(3), randn(3, 2, seed=1), randn(1, 2, seed=2)
    v_text, v_null = model(x, t, text).to(wide), model(x, t, null.expand(3, -1)).to(wide)
    assert torch.equal(rf.guided_velocity(model, x, t, text).to(wide), v_text)
    for cfg in (0, 2.5):
        found = rf.guided_velocity(model, x, t, text, null, cfg)
        assert found.dtype == wide and torch.equal(found, v_null + cfg * (v_text - v_null))
    assert batches == [3, 3, 3, 6, 6]


@each_shape
def test_guided_sampling_keeps_samples_apart(shape):
    """Each sample of a guided run equals that sample run alone, at every shape."""

    def model(x, t, text):
        return x * each(text, x) + each(t, x)

    noise, text, null = randn(*shape), randn(shape[0], 1, seed=1), randn(1, 1, seed=2)
    how = {"null_text": null, "cfg": 2.0, "steps": 3}
    calls = [(rf.straightness, {})]
    calls += [(f, {"solver": s}) for f in (rf.sample, rf.invert) for s in rf.SOLVERS]
    for function, options in calls:
        out = function(model, noise, text, **how, **options)
        for i in range(shape[0]):
            alone = function(model, noise[i : i + 1], text[i : i + 1], **how, **options)
            close(out[i : i + 1], alone)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rf_solver", 2)])
@each_shift
def test_order_of_convergence(solver, order, shift):
    """dx/dt = −2t·x² takes x at t = 1 to x / (1 − x): not linear, which would flatter midpoints."""
    noise, steps, errors = torch.linspace(-2, 0.5, 64, dtype=F64), [32, 64, 128], []
    for n in steps:
        how = {"steps": n, "solver": solver, "shift": shift}
        out = rf.sample(lambda x, t, text: -2 * t * x * x, noise, None, **how)
        errors.append((out - noise / (1 - noise)).norm())
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + order) < 0.15, (slope, errors)


@pytest.mark.parametrize(
    "solver, asked",
    [
        ("euler", [1, 0.5]),
        ("heun", [1, 0.5, 0.5]),  # not at t = 0, a clean image
        ("rf_solver", [1, 0.75, 0.5, 0.25]),
    ],
)
def test_when_solvers_ask_and_what_they_pass_on(solver, asked):
    """States are fp32 though the model is bf16; a trajectory runs from the noise to the sample."""
    seen = []

    def model(x, t, text):
        seen.append(t[0].item())
        assert x.dtype == t.dtype == torch.float32 and t.shape == (3,)
        return gaussian(x, t).bfloat16()

    noise, how = randn(3, 2).bfloat16(), {"steps": 2, "solver": solver}
    path = rf.sample(model, noise, None, return_trajectory=True, **how)
    assert seen == asked and path.shape == (3, 3, 2) and torch.equal(path[0], noise.float())
    assert torch.equal(path[-1], rf.sample(model, noise, None, **how))


@each_shift
def test_inversion_then_sampling_returns_to_the_start(shift):
    data, options = MEAN + STD * randn(16, 3), {"steps": 50, "solver": "rf_solver", "shift": shift}
    noise = rf.invert(gaussian, data, None, **options)
    close(noise, (data - MEAN) / STD, atol=1e-2)  # the noise that it really is
    close(rf.sample(gaussian, noise, None, **options), data, atol=1e-3)


def test_straightness_of_the_gaussian_flow():
    """Along x_t = mean_t + √V(t)·z the integral is z²·(∫ (d√V/dt)² dt − (1 − s)²)."""
    z, t = randn(5, 2), torch.linspace(0, 1, 200_001, dtype=F64)
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    expected = (torch.trapezoid(slope**2, t) - (1 - STD) ** 2) * z.square().sum(1)
    close(rf.straightness(gaussian, z, None, steps=2000), expected, rtol=5e-3)


# --- reflow --------------------------------------------------------------------------------------


@each_shift
def test_reflow_states_are_the_paths_own(shift):
    noise = randn(6, 3)
    how = {"steps": 400, "solver": "rf_solver", "shift": shift}
    states = rf.reflow_states(gaussian, noise, noise, segments=4, **how)
    assert states.shape == (6, 5, 3) and torch.equal(states[:, 0], noise)
    for t, x in zip(rf.timesteps(4, shift), states.unbind(1), strict=True):
        close(x, (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise, atol=1e-4)


def test_reflow_does_not_raise_the_transport_cost():
    """Gaussians: any pairs cost mean² + s² + 1 in a dimension, the flow's own mean² + (1 − s)²."""
    noise, data = randn(20_000, 2), MEAN + STD * randn(20_000, 2, seed=1)
    states = rf.reflow_states(gaussian, noise, noise, steps=20, solver="rf_solver")
    for pair, cost in ((data, STD**2 + 1), (states[:, 1], (1 - STD) ** 2)):
        found = rf.transport_cost(pair, noise)
        assert found.shape == (20_000,)
        assert found.mean().item() == pytest.approx(2 * (MEAN**2 + cost), rel=0.03)


@pytest.mark.parametrize("time", rf.TIME_DISTRIBUTIONS)
def test_data_meets_any_noise_and_pairs_their_own(time):
    """Only where the noise is fresh is time shifted: a pair's shift is that of its grid."""
    states, fresh, u = randn(5, 3, 4, 6), randn(5, 4, 6, seed=1), torch.rand(5)
    how = {"time": time, "shift": 3.0}
    for K, noise, t in (
        (0, fresh, rf.time_at(u, time, 3.0)),
        (2, states[:, 0], rf.time_at(u, time)),
    ):
        found = rf.line(states[:, 2 - K :], fresh, u, **how)
        for one, expected in zip(found, (states[:, 2], noise, t), strict=True):
            close(one, expected)
        at = rf.line_at(states[:, 2 - K :], fresh, t, shift=3.0)
        assert torch.equal(at[0], found[0]) and torch.equal(at[1], found[1])
    data, noise, _ = rf.line(states, fresh, u, beta=0.6, **how)
    assert torch.equal(data, states[:, 2])
    close(noise, 0.8 * states[:, 0] + 0.6 * fresh)


@each_shift
@pytest.mark.parametrize("K", [4, 8])
def test_each_piece_of_a_path_has_its_times_and_its_line(K, shift):
    times, states = rf.timesteps(4, shift), randn(400, K + 1, 2)
    u = (torch.arange(400) + 0.5) / 400
    how = {"segments": 4, "shift": shift}
    data, noise, t = rf.line(states, None, u, time="uniform", **how)
    x, slope = rf.interpolate(data, noise, t), rf.velocity_target(data, noise)
    for k in range(4):
        piece = slice(100 * k, 100 * k + 100)
        length = times[k] - times[k + 1]
        share = (t[piece] - times[k + 1]) / length
        close(share, (torch.arange(100) + 0.5) / 100, atol=1e-4)
        upper, lower = states[piece, k * K // 4], states[piece, (k + 1) * K // 4]
        close(x[piece], lower + each(share, lower) * (upper - lower), atol=1e-5)
        close(slope[piece], (upper - lower) / length, atol=1e-5)
    *_, t = rf.line(states, None, u, time="start", **how)
    close(t, torch.tensor(times[:-1]).repeat_interleave(100), atol=2e-6)


def test_a_flow_trained_on_pieces_walks_them_in_as_many_steps():
    """The velocity that has no loss on the pieces draws the last state in K Euler steps."""
    noise, how = randn(7, 3), {"segments": 4, "shift": 2.0}
    states = rf.reflow_states(gaussian, noise, noise, steps=400, **how)

    def piecewise(x, t, text):
        data, start = rf.line_at(states, None, t, **how)
        return start - data

    data, start, t = rf.line(states, None, torch.full((7,), 0.6), time="start", **how)
    assert rf.rf_loss(piecewise, data, None, t=t, noise=start).max() < 1e-9
    close(rf.sample(piecewise, noise, None, steps=4, shift=2.0), states[:, -1], atol=1e-5)
    usual = rf.sample(gaussian, noise, None, steps=4, shift=2.0)
    assert (usual - states[:, -1]).abs().max() > 1e-2


# --- averages of the weights ---------------------------------------------------------------------


def averaging(*shapes, widths=(0.05, 0.10), lr=0.1):
    """Weights in groups of their own, and AdamW that keeps their averages."""
    weights = [randn(*shape).float().requires_grad_() for shape in shapes]
    groups = [{"params": [w], "lr": lr * 2**i} for i, w in enumerate(weights)]
    adamw = torch.optim.AdamW(groups, fused=True)
    rf.keep_averages(adamw, widths)
    return weights, adamw


def step_on(weights, adamw, step):
    for w in weights:
        w.grad = randn(*w.shape, seed=step).float()
    groups = list(adamw.param_groups)
    for group in groups:  # one after the other, as ZeRO-2 does
        adamw.param_groups = [group]
        adamw.step()
    adamw.param_groups = groups


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_averages_have_the_power_function_profile(width):
    """p(τ) = (γ + 1)·τ^γ has the standard deviation `width`, and step k of T real steps has the
    share ∫ p over ((k − 1)/T, k/T) = (k/T)^{γ+1} − ((k − 1)/T)^{γ+1} in the average."""
    gamma = rf.gamma_from_sigma_rel(width)
    tau = torch.linspace(0, 1, 100_001, dtype=F64)
    p = (gamma + 1) * tau**gamma
    mean = torch.trapezoid(p * tau, tau)
    assert torch.trapezoid(p * (tau - mean) ** 2, tau).sqrt() == pytest.approx(width, rel=1e-6)
    weights, adamw = averaging((3,), (2, 5), widths=[width, 0.15])
    history = [[] for _ in weights]
    for step in range(60):
        step_on(weights, adamw, step)
        for kept, w in zip(history, weights, strict=True):
            kept.append(w.detach().clone())
        shares = (torch.linspace(0, 1, step + 2) ** (gamma + 1)).diff()
        for kept, w in zip(history, weights, strict=True):
            average = adamw.state[w][rf.average_name(width)]
            close(average, torch.tensordot(shares, torch.stack(kept), 1), atol=1e-5)
    assert [group["updates"] for group in adamw.param_groups] == [60, 60]


def test_a_saved_optimizer_goes_on_with_its_averages(tmp_path):
    (weight,), adamw = averaging((2, 5))
    (again,), resumed = averaging((2, 5))
    for step in range(6):
        step_on([weight], adamw, step)
        if step == 2:
            torch.save([weight.detach(), adamw.state_dict()], tmp_path / "saved")
    again.data, state = torch.load(tmp_path / "saved", weights_only=True)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        step_on([again], resumed, step)
    expected, found = adamw.state[weight], resumed.state[again]
    assert torch.equal(weight, again) and found.keys() == expected.keys() > {"ema_0.05", "ema_0.10"}
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_exchanged_averages_are_the_weights_and_twice_changes_nothing():
    """Also of a weight of more than one part of 64 MiB, and beside one that never moved."""
    weights, adamw = averaging((2**24 + 3,), (2, 5), (4,))
    *moving, frozen = weights
    for step in range(2):
        step_on(moving, adamw, step)
    name = "ema_0.10"

    def now():
        return [x.clone() for w in moving for x in (w.detach(), adamw.state[w][name])]

    before, never = now(), frozen.detach().clone()
    rf.exchange_averages(adamw, name)
    for found, w, average in zip(now()[::2], before[::2], before[1::2], strict=True):
        assert torch.equal(found, average) and not torch.equal(found, w)
    rf.exchange_averages(adamw, name)
    assert all(map(torch.equal, now(), before)) and torch.equal(frozen, never)


def test_averages_of_two_widths_make_a_third_afterwards():
    """Two profiles stored at several steps reproduce one of another width that was kept beside."""
    steps, widths = 4096, (0.05, 0.10, 0.075)
    (weight,), adamw = averaging((2,), widths=widths, lr=0.0)
    weight.grad, snapshots, stored = torch.zeros(2), [], []
    for step in range(1, steps + 1):
        weight.data = torch.tensor([math.sin(step / 700), (step / steps) ** 2])
        adamw.step()
        *kept, wanted = (adamw.state[weight][rf.average_name(width)] for width in widths)
        if step % 512 == 0:
            snapshots += [(step, width) for width in widths[:2]]
            stored += [average.clone() for average in kept]
    shares = rf.posthoc_coefficients(snapshots, steps, 0.075)
    assert shares.sum() == pytest.approx(1, abs=0.01)
    combined = sum(share * average for share, average in zip(shares, stored, strict=True))
    error = (combined - wanted).abs().max()
    assert error < 2e-3 and error < min((k - wanted).abs().max() for k in kept) / 10
