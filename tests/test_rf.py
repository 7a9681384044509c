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


X = torch.rand(5, 5)
RULES = {
    "euler, heun": lambda: rf.sample(gaussian, X, X, solver="rk9"),
    "steps = 0 must be at least 1": lambda: rf.sample(gaussian, X, X, steps=0),
    "needs null_text": lambda: rf.sample(gaussian, X, X, cfg=2.0),
    "'normal' must be one of uniform, logit_normal": lambda: rf.time_at(X, "normal"),
    "shift = 0 must lie in": lambda: rf.time_at(X, shift=0),
    "mse, pseudo_huber": lambda: rf.rf_loss(gaussian, X, X, t=X[0], noise=X, loss="l1"),
    r"shapes \(5, 5\) and \(5, 1\) must be equal": lambda: rf.velocity_target(X, X[:, :1]),
    r"shapes \(5, 5\) and \(5,\) must be equal": lambda: rf.interpolate(X, X[0], X[0]),
    r"shapes \(1, 5\) and \(5, 5\) must be equal": lambda: rf.transport_cost(X[:1], X),
    r"t has shape \(5, 1\)": lambda: rf.interpolate(X, X, X[:, :1]),
    r"t has shape \(1,\), must be \(5,\): one per": lambda: rf.interpolate(X, X, X[0, :1]),
    "50 must be a multiple": lambda: rf.reflow_states(gaussian, X, X, segments=3),
    "segments = 3 must divide the 4": lambda: rf.line(X, X, X, segments=3),
    "segments = 2 must divide the 0": lambda: rf.line(X[:, :1], X, X, segments=2),
    "segments = 3 must divide the 4 of": lambda: rf.line_at(X, X, X[0], segments=3),
    "needs segments = 1": lambda: rf.line(X, X, X[0], segments=4, beta=0.1),
    r"0\.3 must lie in \[0\.001, 0\.2887\)": lambda: rf.gamma_from_sigma_rel(0.3),
    "no average 'ema_0.10' is kept": lambda: rf.exchange_averages(
        torch.optim.AdamW([X[0].clone()]), "ema_0.10"
    ),
    "after the last": lambda: rf.posthoc_coefficients([(10, 0.1)], 11, 0.1),
}


def test_guidance_begins_below_a_time():
    """Steps from t = 1 and 0.75 are unguided, those from 0.5 and 0.25 guided."""
    seen = []

    def model(x, t, text):
        seen.append((t[0].item(), len(x)))
        return x

    how = {"null_text": X[:1], "cfg": 3.0, "steps": 4}
    rf.sample(model, X, X, **how, cfg_below=0.5)
    assert seen == [(1.0, 5), (0.75, 5), (0.5, 10), (0.25, 10)]


@pytest.mark.parametrize("message", RULES)
def test_bad_arguments_say_the_rule(message):
    with pytest.raises(ValueError, match=message):
        RULES[message]()


# --- times and random numbers --------------------------------------------------------------------


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
    close(rf.time_at(t, shift=3.0), rf.shift_time(rf.time_at(t), 3.0))
    assert rf.timesteps(2, shift=3.0) == [1.0, 0.75, 0.0]
    ends = rf.time_at(torch.tensor([0.0, 1.0]), "uniform", shift=100.0)
    assert ends[0] > 0 and ends[1] < 1


def test_random_numbers_are_functions_of_seed_purpose_and_number():
    rows, numbers = [(0, "step"), (1, "step"), (0, "text")], range(500)
    u = [x for row in rows for x in rf.uniform_at(*row, numbers)]
    seeds = [g.initial_seed() for row in rows for g in rf.generators(*row, numbers)]
    assert len({*u}) == len({*seeds}) == 1500 and 0 <= min(u) < 0.01 < 0.99 < max(u) < 1
    assert u[507:509] == rf.uniform_at(1, "step", [7, 8])
    assert seeds[507] == rf.generators(1, "step", [7])[0].initial_seed()


def test_a_batch_has_a_time_in_each_slice_and_positions_lie_a_golden_step_apart():
    seeded = torch.Generator().manual_seed
    i, u = torch.arange(64), torch.rand(64, generator=seeded(3))
    assert torch.equal(rf.spread(64, seeded(3)), (i + u) / 64)
    for stratified, shares in {True: (i + u) / 64, False: u}.items():
        how = {"distribution": "u_shaped", "shift": 2.0, "stratified": stratified}
        t = rf.sample_time(64, **how, generator=seeded(3))
        assert torch.equal(t, rf.time_at(shares, "u_shaped", 2.0))
    positions = [5, 3, *range(6000, 6064)]
    start = np.random.default_rng((3, 1)).random()
    u = (start + np.array(positions) * (5**0.5 - 1) / 2) % 1
    close(rf.spread_at(3, positions), torch.tensor(u))
    assert rf.spread_at(0, [24718775]) < 1  # 0.99999997, which fp32 rounds up


# --- loss ----------------------------------------------------------------------------------------


@each_shape
def test_lines_and_losses_against_plain_loops(shape):
    """Also of a network in bf16, whose losses are fp32."""
    data, noise, t = randn(*shape), randn(*shape, seed=1), torch.linspace(0, 1, shape[0])

    def model(x, t, text=None):
        return gaussian(x, t).bfloat16()

    mse, huber = (rf.rf_loss(model, data, None, t=t, noise=noise, loss=x) for x in rf.LOSSES)
    assert mse.dtype == huber.dtype == torch.float32
    for i, line in enumerate(rf.interpolate(data, noise, t)):
        x = (1 - t[i]) * data[i] + t[i] * noise[i]
        close(line, x)
        error = (model(x[None], t[i : i + 1])[0] - (noise[i] - data[i])).flatten()
        c = 0.00054 * math.sqrt(len(error))
        close(mse[i], error.square().mean())
        close(huber[i], (error @ error + c * c).sqrt() - c)


def test_the_least_loss_is_the_conditional_variance():
    """E‖v − target‖² of the best velocity is s²/V(t)."""
    n, t = 200_000, 0.3
    how = {"t": torch.full((n,), t, dtype=F64), "noise": randn(n, 1, seed=1)}
    best = rf.rf_loss(gaussian, MEAN + STD * randn(n, 1), None, **how).mean()
    assert best.item() == pytest.approx(STD**2 / ((1 - t) ** 2 * STD**2 + t**2), rel=0.01)


def test_validation_loss_is_the_mean_of_the_means_of_each_t():
    data, noise = randn(11, 2).float(), randn(11, 2, seed=1).float()
    t_index = torch.arange(11).clamp(max=6)
    text = torch.arange(11.0)[:, None]

    def model(x, t, text):
        return gaussian(x, t) + text

    means, mean = rf.validation_loss(model, data, text, t_index, noise)
    losses = rf.rf_loss(model, data, text, t=t_index / 8, noise=noise)
    expected = torch.stack([losses[t_index == i].mean() for i in range(7)])
    assert means[7].isnan()  # no sample
    close(means[:7], expected)
    close(mean, expected.mean())


# --- guidance and solvers ------------------------------------------------------------------------


def test_guidance_extrapolates_from_null_to_text_in_one_batch():
    """The difference of bf16 velocities is taken in fp32."""
    batches = []

    def model(x, t, text):
        batches.append(len(x))
        return (x * text[:, :, None] + each(t, x)).bfloat16()

    x, t, text, null = randn(3, 2, 4), randn(3), randn(3, 2, seed=1), randn(1, 2, seed=2)
    v_text, v_null = (model(x, t, words).float() for words in (text, null.expand(3, -1)))
    assert torch.equal(rf.guided_velocity(model, x, t, text).float(), v_text)
    for cfg in (0, 2.5):
        found = rf.guided_velocity(model, x, t, text, null, cfg)
        assert torch.equal(found, v_null + cfg * (v_text - v_null))
    assert batches == [3, 3, 3, 6, 6] and found.dtype == torch.float32


@each_shape
def test_guided_samples_are_each_one_alone_with_the_extrapolated_text(shape):
    """Of a model that is linear in the text, at every shape."""

    def model(x, t, text):
        return x * each(text, x) + each(t, x)

    noise, text, null = randn(*shape), randn(shape[0], 1, seed=1), randn(1, 1, seed=2)
    calls = [(rf.straightness, {})]
    calls += [(f, {"solver": s}) for f in (rf.sample, rf.invert) for s in rf.SOLVERS]
    for function, how in calls:
        out = function(model, noise, text, null_text=null, cfg=2.0, steps=3, **how)
        for i in range(shape[0]):
            alone = function(model, noise[i : i + 1], 2 * text[i : i + 1] - null, steps=3, **how)
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
def test_when_solvers_ask_the_model(solver, asked):
    """States are fp32 though the model is bf16."""
    seen = []

    def model(x, t, text):
        seen.append(t[0].item())
        assert x.dtype == t.dtype == torch.float32 and t.shape == (3,)
        return gaussian(x, t).bfloat16()

    out = rf.sample(model, randn(3, 2).bfloat16(), None, steps=2, solver=solver)
    assert seen == asked and out.dtype == torch.float32


@each_shift
def test_inversion_finds_the_noise_of_the_data(shift):
    data = MEAN + STD * randn(16, 3)
    close(rf.invert(gaussian, data, None, shift=shift), randn(16, 3), atol=1e-2)


def test_straightness_of_the_gaussian_flow():
    """Along x_t = mean_t + √V(t)·z the integral is z²·(∫ (d√V/dt)² dt − (1 − s)²)."""
    z, t = randn(5, 2), torch.linspace(0, 1, 200_001, dtype=F64)
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    expected = (torch.trapezoid(slope**2, t) - (1 - STD) ** 2) * z.square().sum(1)
    close(rf.straightness(gaussian, z, None, steps=2000), expected, rtol=5e-3)


# --- reflow --------------------------------------------------------------------------------------


@each_shift
def test_reflow_states_are_the_paths_own_and_what_they_cost(shift):
    noise = randn(6, 3, 2)
    how = {"steps": 400, "solver": "rf_solver", "shift": shift}
    states = rf.reflow_states(gaussian, noise, noise, segments=4, **how)
    assert states.shape == (6, 5, 3, 2) and torch.equal(states[:, 0], noise)
    for t, x in zip(rf.timesteps(4, shift), states.unbind(1), strict=True):
        close(x, (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * noise, atol=1e-4)
    cost = (MEAN + (STD - 1) * noise).square().sum((1, 2))
    close(rf.transport_cost(states[:, 4], noise), cost, atol=1e-3)


@pytest.mark.parametrize("time", rf.TIME_DISTRIBUTIONS)
def test_data_meets_any_noise_and_pairs_their_own(time):
    """Only where the noise is fresh is time shifted: a pair's shift is that of its grid."""
    states, fresh, u = randn(5, 3, 4, 6), randn(5, 4, 6, seed=1), torch.rand(5)
    data, how = states[:, 2], {"time": time, "shift": 3.0}
    shifted, t = (rf.time_at(u, time, shift) for shift in (3.0, 1.0))
    for known, expected in (
        (states[:, 2:], (data, fresh, shifted)),
        (states, (data, states[:, 0], t)),
    ):
        close(rf.line(known, fresh, u, **how), expected)
        close(rf.line_at(known, fresh, expected[2], shift=3.0), expected[:2])
    mixed = 0.8 * states[:, 0] + 0.6 * fresh
    close(rf.line(states, fresh, u, beta=0.6, **how), (data, mixed, t))


@each_shift
@pytest.mark.parametrize("K", [4, 8])
def test_each_piece_of_a_path_has_its_times_and_its_line(K, shift):
    """Where two pieces meet it is the lower one: a walk in as many steps follows each."""
    times, states = torch.tensor(rf.timesteps(4, shift)), randn(400, K + 1, 2)
    rows, how = torch.arange(400), {"segments": 4, "shift": shift}
    u, k = (rows + 0.5) / 400, rows // 100
    *inside, t = rf.line(states, None, u, time="uniform", **how)
    close(t, times[k + 1] + (4 * u - k) * (times[k] - times[k + 1]))
    for data, noise in (inside, rf.line_at(states, None, times[k], **how)):
        for end in (k, k + 1):
            close(rf.interpolate(data, noise, times[end]), states[rows, end * K // 4], atol=1e-5)
    *_, start = rf.line(states, None, u, time="start", **how)
    close(start, times[k], atol=2e-6)


# --- averages of the weights ---------------------------------------------------------------------


def averaging(width, *shapes):
    """Weights in groups of their own, and AdamW that keeps their averages."""
    weights = [randn(*shape).float().requires_grad_() for shape in shapes]
    groups = [{"params": [w], "lr": 0.1 * 2**i} for i, w in enumerate(weights)]
    adamw = torch.optim.AdamW(groups, fused=True)
    rf.keep_averages(adamw, [width, 0.15])
    return weights, adamw


def step_on(weights, adamw, step):
    for w in weights:
        w.grad = randn(*w.shape, seed=step).float()
    groups = adamw.param_groups
    for group in groups:  # one after the other, as ZeRO-2 does
        adamw.param_groups = [group]
        adamw.step()
    adamw.param_groups = groups


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_averages_have_the_power_function_profile(width):
    """p(τ) = (γ + 1)·τ^γ has the standard deviation `width`, and step k of T real steps the share
    ∫ p over ((k − 1)/T, k/T) = (k/T)^{γ+1} − ((k − 1)/T)^{γ+1} of the average."""
    power = rf.gamma_from_sigma_rel(width) + 1
    assert torch.distributions.Beta(power, 1).stddev.item() == pytest.approx(width, rel=1e-5)
    weights, adamw = averaging(width, (3,), (2, 5))
    history = [[] for _ in weights]
    for step in range(60):
        step_on(weights, adamw, step)
        shares = (torch.linspace(0, 1, step + 2) ** power).diff()
        for kept, w in zip(history, weights, strict=True):
            kept.append(w.detach().clone())
            average = adamw.state[w][rf.average_name(width)]
            close(average, torch.tensordot(shares, torch.stack(kept), 1), atol=1e-5)


def test_exchanged_averages_are_the_weights_and_twice_changes_nothing():
    """Also of a weight of more than one part of 64 MiB, and beside one that never moved."""
    weights, adamw = averaging(0.1, (2**24 + 3,), (2, 5), (4,))
    for step in range(2):
        step_on(weights[:2], adamw, step)

    def now():
        averages = [adamw.state[w]["ema_0.10"] for w in weights[:2]]
        return [x.detach().clone() for x in (*averages, *weights)]

    before = now()
    assert not any(map(torch.equal, before[:2], before[2:]))
    for order in ([2, 3, 0, 1, 4], [0, 1, 2, 3, 4]):
        rf.exchange_averages(adamw, "ema_0.10")
        assert all(map(torch.equal, now(), [before[i] for i in order]))


@pytest.mark.parametrize("step", [8, 6])
def test_averages_of_two_widths_make_a_third_afterwards(step):
    """The profiles of stored averages combine to one of another width, also at an earlier step."""
    tau = np.linspace(0, 1, 10_001)

    def profile(end, width):
        gamma = rf.gamma_from_sigma_rel(width)
        return (8 * tau <= end) * (gamma + 1) * tau**gamma / (end / 8) ** (gamma + 1)

    snapshots = [(s, width) for s in range(1, 9) for width in (0.05, 0.10)]
    shares = rf.posthoc_coefficients(snapshots, step, 0.075)
    assert shares.sum() == pytest.approx(1)
    combined = shares @ [profile(*snapshot) for snapshot in snapshots]
    assert np.abs(combined - profile(step, 0.075)).mean() < 0.03
