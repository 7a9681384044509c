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

import rf

F64 = torch.float64
MEAN, STD = 0.7, 0.4


def gaussian_velocity(x, t, text=None):
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the line ------------------------------------------------------------------------------------

# B, C, H, W all different; B = W and all equal, where a wrong broadcast would go unseen otherwise
SHAPES = [(2, 3, 4, 5), (5, 3, 4, 5), (4, 4, 4, 4), (3, 7), (6,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_interpolate_each_sample_has_its_own_time(shape):
    data, noise, t = randn(*shape), randn(*shape, seed=1), torch.linspace(0, 1, shape[0], dtype=F64)
    x = rf.interpolate(data, noise, t)
    for i in range(shape[0]):
        assert torch.equal(x[i], (1 - t[i]) * data[i] + t[i] * noise[i])


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_target_is_the_time_derivative(shape):
    data, noise, t = randn(*shape), randn(*shape, seed=1), torch.full((shape[0],), 0.3, dtype=F64)
    slope = (rf.interpolate(data, noise, t + 1e-4) - rf.interpolate(data, noise, t)) / 1e-4
    assert torch.allclose(slope, rf.velocity_target(data, noise), atol=1e-9)


def test_ends_of_the_line_are_data_and_noise():
    data, noise = randn(2, 3), randn(2, 3, seed=1)
    assert torch.equal(rf.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(rf.interpolate(data, noise, torch.ones(2)), noise)


@pytest.mark.parametrize("t_shape", [(5, 1), (4,), (), (1,)])
def test_time_of_another_shape_is_an_error(t_shape):
    with pytest.raises(ValueError, match="one per sample"):
        rf.interpolate(randn(5, 3, 4, 5), randn(5, 3, 4, 5), torch.zeros(t_shape))


def test_data_and_noise_never_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        rf.velocity_target(randn(5, 5), randn(5, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        rf.interpolate(randn(5, 5), randn(5), torch.zeros(5))


# --- time ----------------------------------------------------------------------------------------

CDF = {
    "uniform": lambda t: t,
    "logit_normal": lambda t: torch.special.ndtr(torch.logit(t)),
    # RF++'s density e^{at} + e^{a(1−t)}, integrated here term by term
    "u_shaped": lambda t: (
        (torch.exp(4 * t) - torch.exp(4 * (1 - t)) + math.exp(4) - 1) / (2 * (math.exp(4) - 1))
    ),
}


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("distribution", [d for d in rf.TIME_DISTRIBUTIONS if d != "start"])
def test_sample_time_follows_its_distribution(distribution, stratified):
    n, generator = 20_000, torch.Generator().manual_seed(0)
    t = rf.sample_time(n, distribution=distribution, stratified=stratified, generator=generator)
    assert t.dtype == torch.float32 and t.shape == (n,) and t.min() > 0 and t.max() < 1
    u = CDF[distribution](t.double()).sort().values  # uniform if and only if the CDF is right
    distance = (u - torch.arange(n) / n).abs().max()  # Kolmogorov-Smirnov
    assert distance < (1.5 / n if stratified else 1.63 / math.sqrt(n))  # 1 % level


def test_shift_moves_logits_by_log_alpha():
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)  # shifting adds log α to logit(t)
    shifted = rf.shift_time(t, 3.0)
    assert torch.allclose(torch.logit(shifted), torch.logit(t) + math.log(3))
    assert rf.shift_time(0.0, 3.0) == 0 and rf.shift_time(1.0, 3.0) == 1
    generator = torch.Generator().manual_seed(0)
    plain = rf.sample_time(8, generator=generator)
    moved = rf.sample_time(8, shift=3.0, generator=generator.manual_seed(0))
    assert torch.allclose(moved, rf.shift_time(plain, 3.0))
    extreme = rf.sample_time(10_000, shift=1000.0, generator=generator)
    assert extreme.min() > 0 and extreme.max() < 1


def test_timesteps_run_from_noise_to_data():
    assert rf.timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rf.timesteps(2, shift=3.0) == [1.0, 0.75, 0.0]


# --- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_against_plain_loops(shape):
    data, noise = randn(*shape, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32)
    t = torch.linspace(0, 1, shape[0])
    mse = rf.rf_loss(gaussian_velocity, data, None, t=t, noise=noise)
    huber = rf.rf_loss(gaussian_velocity, data, None, t=t, noise=noise, loss="pseudo_huber")
    assert mse.shape == huber.shape == (shape[0],) and mse.dtype == torch.float32
    for i in range(shape[0]):
        x = (1 - t[i]) * data[i] + t[i] * noise[i]
        error = gaussian_velocity(x[None], t[i : i + 1])[0] - (noise[i] - data[i])
        assert math.isclose(mse[i], error.square().mean(), rel_tol=1e-5)
        c = 0.00054 * math.sqrt(error.numel())
        assert math.isclose(huber[i], math.hypot(error.norm(), c) - c, rel_tol=1e-5)


def test_the_best_velocity_has_the_least_loss_and_it_is_known():
    """E‖v − target‖² at the optimum is the conditional variance s²/V(t): none does better."""
    n, t_value = 200_000, 0.3
    data = MEAN + STD * randn(n, 1)
    noise, t = randn(n, 1, seed=1), torch.full((n,), t_value, dtype=F64)
    best = rf.rf_loss(gaussian_velocity, data, None, t=t, noise=noise).mean()
    variance = (1 - t_value) ** 2 * STD**2 + t_value**2
    assert math.isclose(best, STD**2 / variance, rel_tol=0.01)
    for wrong in (lambda x, t, c: gaussian_velocity(x, t) * 1.3, lambda x, t, c: -x):
        assert rf.rf_loss(wrong, data, None, t=t, noise=noise).mean() > best * 1.01


def test_loss_of_a_bf16_model_is_fp32():
    x = torch.ones(2, 3)
    loss = rf.rf_loss(lambda x, t, c: x.bfloat16(), x, None, t=torch.zeros(2), noise=x)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [None, 3])
def test_validation_loss_is_the_mean_of_the_means_of_each_t(batch_size):
    n = 11
    data, noise = randn(n, 2, dtype=torch.float32), randn(n, 2, seed=1, dtype=torch.float32)
    t_index = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7])
    text = torch.zeros(n, 1)
    means, mean = rf.validation_loss(
        gaussian_velocity, data, text, t_index, noise, batch_size=batch_size
    )
    losses = rf.rf_loss(gaussian_velocity, data, text, t=t_index / 8, noise=noise)
    expected = torch.stack([losses[t_index == i].mean() for i in range(8)])
    assert torch.allclose(means, expected) and torch.allclose(mean, expected.mean())
    assert not torch.allclose(mean, losses.mean(), rtol=1e-3)  # not the mean over samples


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_extrapolates_from_null_to_text():
    def model(x, t, text):
        return x * text[:, :, None] + t[:, None, None]

    x, t = randn(3, 2, 4), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    text, null = randn(3, 2, seed=1), randn(1, 2, seed=2)
    v_text, v_null = model(x, t, text), model(x, t, null.expand(3, -1))
    assert torch.equal(rf.guided_velocity(model, x, t, text, None, cfg=1.0), v_text)
    for cfg, expected in [(0.0, v_null), (1.0, v_text), (2.5, v_null + 2.5 * (v_text - v_null))]:
        assert torch.allclose(rf.guided_velocity(model, x, t, text, null, cfg), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_guided_sampling_keeps_samples_apart(shape):
    """Each sample of a guided run equals that sample run alone, at every shape."""

    def model(x, t, text):
        return x * text.reshape(-1, *[1] * (x.ndim - 1)) + t.reshape(-1, *[1] * (x.ndim - 1))

    noise, text, null = randn(*shape), randn(shape[0], 1, seed=1), randn(1, 1, seed=2)
    how = {"null_text": null, "cfg": 2.0, "steps": 3}
    for solver in rf.SOLVERS:
        out = rf.sample(model, noise, text, solver=solver, **how)
        back = rf.invert(model, noise, text, solver=solver, **how)
        assert out.shape == back.shape == shape
        for i in range(shape[0]):
            one = (noise[i : i + 1], text[i : i + 1])
            assert torch.allclose(out[i], rf.sample(model, *one, solver=solver, **how)[0])
            assert torch.allclose(back[i], rf.invert(model, *one, solver=solver, **how)[0])
    bent = rf.straightness(model, noise, text, **how)
    assert bent.shape == (shape[0],)
    for i in range(shape[0]):
        alone = rf.straightness(model, noise[i : i + 1], text[i : i + 1], **how)
        assert torch.allclose(bent[i], alone[0])


def test_guidance_of_a_bf16_model_is_combined_in_fp32():
    def model(x, t, text):
        return (x + text).bfloat16()

    x, t = randn(3, 2, dtype=torch.float32), torch.zeros(3)
    text, null = randn(3, 2, seed=1, dtype=torch.float32), torch.zeros(1, 2)
    v = rf.guided_velocity(model, x, t, text, null, cfg=3.0)
    v_text, v_null = model(x, t, text).float(), model(x, t, null).float()
    assert v.dtype == torch.float32 and torch.equal(v, v_null + 3 * (v_text - v_null))


def test_heun_does_not_ask_at_a_clean_image():
    asked = []

    def model(x, t, text):
        asked.append(t[0].item())
        return gaussian_velocity(x, t)

    rf.sample(model, randn(2, 2), None, steps=4, solver="heun")
    assert len(asked) == 7 and min(asked) == 0.25


def test_guidance_is_one_batch_and_needs_a_null_text():
    batches = []

    def model(x, t, text):
        batches.append(len(x))
        return x

    rf.guided_velocity(model, randn(3, 2), torch.zeros(3), randn(3, 2), randn(1, 2), cfg=2.0)
    assert batches == [6]
    with pytest.raises(ValueError, match="null_text"):
        rf.guided_velocity(model, randn(3, 2), torch.zeros(3), randn(3, 2), cfg=2.0)


# --- solvers -------------------------------------------------------------------------------------


WEIGHTS, MEANS = torch.tensor([0.4, 0.6], dtype=F64), torch.tensor([-0.6, 0.9], dtype=F64)


def mixture_velocity(x, t, text=None):
    """The best velocity for two Gaussians mixed in one dimension, x (B,): each component's own,
    weighted by how likely x_t came from it. Nonlinear, so that no order is flattered."""
    x, t = x[:, None], t[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEANS
    each = -MEANS + (t - (1 - t) * STD**2) / variance * centred
    share = torch.softmax(WEIGHTS.log() - centred**2 / (2 * variance), dim=1)
    return (share * each).sum(1)


def mixture_flow(noise):
    """Where that velocity takes noise (B,): a flow in one dimension keeps quantiles; bisection."""
    low, high = torch.full_like(noise, -9), torch.full_like(noise, 9)
    for _ in range(60):
        middle = (low + high) / 2
        cdf = (WEIGHTS * torch.special.ndtr((middle[:, None] - MEANS) / STD)).sum(1)
        below = cdf < torch.special.ndtr(noise)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("rf_solver", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(solver, order, shift):
    noise, steps, errors = randn(64), np.array([32, 64, 128, 256]), []
    for n in steps.tolist():
        out = rf.sample(mixture_velocity, noise, None, steps=n, solver=solver, shift=shift)
        errors.append((out - mixture_flow(noise)).square().mean().sqrt().item())
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + order) < 0.15, (slope, errors)


@pytest.mark.parametrize("solver", rf.SOLVERS)
def test_gaussian_noise_becomes_the_gaussian_data(solver):
    noise = randn(64, 2, 3)
    out = rf.sample(gaussian_velocity, noise, None, steps=400, solver=solver)
    assert (out - (MEAN + STD * noise)).abs().max() < 0.01


def test_rf_solver_is_its_taylor_step():
    """x + h·v + ½h²·v' with v' a finite difference over half a step, as the paper writes it."""
    x, t, h = randn(4, 3), 0.6, -0.1

    def v(x, t):
        return gaussian_velocity(x, torch.full((len(x),), t, dtype=F64))

    slope = (v(x + h / 2 * v(x, t), t + h / 2) - v(x, t)) / (h / 2)
    assert torch.allclose(rf.rf_solver_step(v, x, t, h), x + h * v(x, t) + h * h / 2 * slope)


def test_trajectory_runs_from_noise_to_sample():
    noise = randn(3, 2)
    path = rf.sample(gaussian_velocity, noise, None, steps=5, return_trajectory=True)
    assert path.shape == (6, 3, 2) and torch.equal(path[0], noise)
    assert torch.equal(path[-1], rf.sample(gaussian_velocity, noise, None, steps=5))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_inversion_then_sampling_returns_to_the_start(shift):
    data = MEAN + STD * randn(16, 3)
    options = {"steps": 50, "solver": "rf_solver", "shift": shift}
    noise = rf.invert(gaussian_velocity, data, None, **options)
    assert (noise - (data - MEAN) / STD).abs().max() < 1e-2  # the noise that it really is
    back = rf.sample(gaussian_velocity, noise, None, **options)
    assert (back - data).abs().max() < 1e-3


def test_bf16_models_are_integrated_in_fp32():
    seen = set()

    def model(x, t, text):
        seen.add((x.dtype, t.dtype))
        return gaussian_velocity(x, t).bfloat16()

    out = rf.sample(model, randn(2, 3).bfloat16(), None, steps=2)
    assert out.dtype == torch.float32 and seen == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rf.sample(gaussian_velocity, randn(2, 2), None, solver="rk9"), "euler, heun"),
        (lambda: rf.sample(gaussian_velocity, randn(2, 2), None, steps=0), "at least 1"),
        (lambda: rf.sample_time(3, distribution="normal"), "logit_normal"),
        (lambda: rf.sample_time(3, shift=0), "positive"),
        (lambda: rf.PowerEMA([torch.zeros(1)], 0.5), "0.2887"),
        (lambda: rf.posthoc_coefficients([(10, 0.1)], 11, 0.1), "after the last"),
        (
            lambda: rf.rf_loss(
                gaussian_velocity, randn(2, 2), None, t=torch.zeros(2), noise=randn(2, 2), loss="l1"
            ),
            "pseudo_huber",
        ),
    ],
)
def test_bad_arguments_say_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- straightness --------------------------------------------------------------------------------


def test_straightness_of_a_straight_flow_is_zero():
    """Data = noise + c: the velocity is −c everywhere."""
    flat = rf.straightness(lambda x, t, c: torch.full_like(x, -2.0), randn(4, 3, 2), None)
    assert flat.shape == (4,) and flat.abs().max() < 1e-20


def test_straightness_of_the_gaussian_flow():
    """Along x_t = mean_t + √V(t)·z the integral is z²·(∫ (d√V/dt)² dt − (1 − s)²)."""
    z = randn(5, 2)
    t = torch.linspace(0, 1, 200_001, dtype=F64)
    root = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    slope = (t - (1 - t) * STD**2) / root
    expected = (torch.trapezoid(slope**2, t) - (1 - STD) ** 2) * z.square().sum(1)
    found = rf.straightness(gaussian_velocity, z, None, steps=2000)
    assert torch.allclose(found, expected, rtol=5e-3)


# --- EMA -----------------------------------------------------------------------------------------


def test_gamma_of_the_published_widths():
    assert math.isclose(rf.gamma_from_sigma_rel(0.05), 16.97, abs_tol=0.01)
    assert math.isclose(rf.gamma_from_sigma_rel(0.10), 6.94, abs_tol=0.01)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_ema_is_the_power_function_profile(sigma_rel):
    """Weights θ(t) = t: the profile's mean is its closed form; each step's share is τ^γ's."""
    steps, weights = 500, torch.zeros(3)
    ema = rf.PowerEMA([weights], sigma_rel)
    for step in range(1, steps + 1):
        weights.fill_(step)
        ema.update(step)
    gamma = ema.gamma
    edges = (torch.arange(steps + 1, dtype=F64) / steps) ** (gamma + 1)  # ∫ τ^γ, exactly
    expected = ((edges[1:] - edges[:-1]) * torch.arange(1, steps + 1)).sum()
    assert torch.allclose(ema.averages[0].double(), expected.expand(3), rtol=1e-5)
    mean, std = (gamma + 1) / (gamma + 2), sigma_rel  # of the profile on [0, 1]
    assert math.isclose(ema.averages[0][0] / steps, mean, abs_tol=0.005)
    second = ((edges[1:] - edges[:-1]) * (torch.arange(1, steps + 1) / steps) ** 2).sum()
    assert math.isclose(math.sqrt(second - (expected / steps) ** 2), std, abs_tol=0.002)


def test_ema_first_step_copies_and_average_is_fp32():
    weights = torch.full((4,), 3.0, dtype=torch.bfloat16)
    ema = rf.PowerEMA([torch.zeros(4, dtype=torch.bfloat16)], 0.1)
    ema.sources = [weights]
    ema.update(1)
    assert ema.averages[0].dtype == torch.float32 and torch.equal(ema.averages[0], weights.float())
    target = torch.zeros(4, dtype=torch.bfloat16)
    ema.copy_to([target])
    assert torch.equal(target, weights)


def test_ema_state_round_trips_and_checks_its_width():
    weights = randn(3, dtype=torch.float32)
    ema, other = rf.PowerEMA([weights], 0.1), rf.PowerEMA([torch.zeros(3)], 0.1)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.averages[0], weights)
    with pytest.raises(ValueError, match="sigma_rel"):
        rf.PowerEMA([weights], 0.05).load_state_dict(ema.state_dict())


def test_posthoc_combination_of_two_profiles_makes_a_third():
    """Two profiles stored at several steps reproduce one of another width that was run beside."""
    steps, every, weights = 4096, 512, torch.zeros(2)
    stored = [rf.PowerEMA([weights], s) for s in (0.05, 0.10)]
    wanted, snapshots, tensors = rf.PowerEMA([weights], 0.075), [], []
    for step in range(1, steps + 1):
        weights.copy_(torch.tensor([math.sin(step / 700), (step / steps) ** 2]))
        for ema in (*stored, wanted):
            ema.update(step)
        if step % every == 0:
            snapshots += [(step, ema.sigma_rel) for ema in stored]
            tensors += [[a.clone() for a in ema.averages] for ema in stored]
    coefficients = rf.posthoc_coefficients(snapshots, steps, 0.075)
    (combined,) = rf.combine(tensors, coefficients)
    assert math.isclose(coefficients.sum(), 1, abs_tol=0.01)
    assert torch.allclose(combined, wanted.averages[0], atol=2e-3)
    error = (combined - wanted.averages[0]).abs().max()
    nearest = min((e.averages[0] - wanted.averages[0]).abs().max() for e in stored)
    assert error < nearest / 10  # far better than the nearest stored one


# --- reflow --------------------------------------------------------------------------------------


def test_reflow_states_end_where_the_flow_ends():
    noise = randn(6, 3)
    states = rf.reflow_states(gaussian_velocity, noise, noise, steps=64, solver="rf_solver")
    assert states.shape == (6, 2, 3) and torch.equal(states[:, 0], noise)
    assert torch.allclose(states[:, 1], MEAN + STD * noise, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_reflow_states_between_are_the_paths_own(shift):
    noise = randn(6, 3)
    states = rf.reflow_states(
        gaussian_velocity, noise, noise, segments=4, steps=400, solver="rf_solver", shift=shift
    )
    for t, x in zip(rf.timesteps(4, shift), states.unbind(1), strict=True):
        spread = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
        assert torch.allclose(x, (1 - t) * MEAN + spread * noise, atol=1e-4)


@pytest.mark.parametrize("segments, steps", [(3, 50), (0, 50), (51, 50)])
def test_segments_that_do_not_divide_the_steps_are_an_error(segments, steps):
    with pytest.raises(ValueError, match="must be a multiple of segments"):
        rf.reflow_states(
            gaussian_velocity, randn(2, 3), randn(2, 3), segments=segments, steps=steps
        )


@pytest.mark.parametrize("distribution", rf.TIME_DISTRIBUTIONS)
def test_time_on_one_segment_is_the_ordinary_one(distribution):
    u = torch.linspace(0, 0.999, 200)
    expected = rf.time_at(u, distribution)
    assert torch.allclose(rf.segment_time(u, 1, distribution), expected, atol=1e-6)


def test_time_on_segments_lies_where_the_digit_says():
    times = rf.timesteps(4, shift=3.0)
    u = (torch.arange(400) + 0.5) / 400
    t = rf.segment_time(u, 4, "uniform", shift=3.0)
    for k in range(4):
        mine = t[100 * k : 100 * k + 100]
        assert times[k + 1] < mine.min() and mine.max() < times[k]
        share = (mine - times[k + 1]) / (times[k] - times[k + 1])
        assert torch.allclose(share, (torch.arange(100) + 0.5) / 100, atol=1e-4)
    starts = rf.segment_time(u, 4, "start", shift=3.0)
    assert torch.allclose(starts, torch.tensor(times[:-1]).repeat_interleave(100), atol=2e-6)


def test_a_segments_line_passes_through_its_ends_and_knows_its_slope():
    times, states = rf.timesteps(3, shift=2.0), randn(1, 4, 5).repeat(9, 1, 1)
    t, k = [], []
    for j in range(3):
        high, low = times[j], times[j + 1]
        t += [high - 1e-5, (high + low) / 2, low + 1e-5]
        k += [j, j, j]
    t = torch.tensor(t, dtype=F64)
    data, noise = rf.segment_line(states, t, shift=2.0)
    x = rf.interpolate(data, noise, t)
    for i in range(9):
        high, low = times[k[i]], times[k[i] + 1]
        share = (t[i] - low) / (high - low)
        expected = states[i, k[i] + 1] + share * (states[i, k[i]] - states[i, k[i] + 1])
        assert torch.allclose(x[i], expected, atol=1e-6)
        slope = (states[i, k[i]] - states[i, k[i] + 1]) / (high - low)
        assert torch.allclose(rf.velocity_target(data, noise)[i], slope, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_where_two_pieces_meet_it_is_the_one_that_a_walk_takes(shift):
    states, times = randn(4, 5, 3), torch.tensor(rf.timesteps(4, shift))
    data, noise = rf.segment_line(states, times[:-1], shift)
    for k in range(4):
        slope = (states[k, k] - states[k, k + 1]) / (times[k] - times[k + 1])
        assert torch.allclose((noise - data)[k], slope, atol=1e-4)
    last, _ = rf.segment_line(states[:1], torch.zeros(1), shift)
    assert torch.allclose(last[0], states[0, -1])


def test_one_segments_line_is_the_pair():
    states = randn(5, 2, 3, 4)
    data, noise = rf.segment_line(states, torch.rand(5, dtype=F64))
    assert torch.equal(data, states[:, 1]) and torch.equal(noise, states[:, 0])


def test_a_flow_trained_on_segments_walks_them_in_as_many_steps():
    """The velocity that has no loss on the pieces draws the last state in K Euler steps."""
    noise = randn(7, 3)
    states = rf.reflow_states(gaussian_velocity, noise, noise, segments=4, steps=400, shift=2.0)

    def piecewise(x, t, text=None):
        data, start = rf.segment_line(states, t, shift=2.0)
        return start - data

    u = torch.full((7,), 0.6)
    t = rf.segment_time(u, 4, "start", 2.0).double()
    data, start = rf.segment_line(states, t, shift=2.0)
    assert rf.rf_loss(piecewise, data, noise, t=t, noise=start).max() < 1e-9
    drawn = rf.sample(piecewise, noise, noise, steps=4, shift=2.0)
    assert torch.allclose(drawn, states[:, -1], atol=1e-5)
    one = rf.sample(gaussian_velocity, noise, noise, steps=4, shift=2.0)
    assert not torch.allclose(one, states[:, -1], atol=1e-2)


def test_annealed_noise_goes_from_fresh_to_the_pairs_and_stays_normal():
    noise, fresh = randn(100_000), randn(100_000, seed=1)
    assert torch.equal(rf.annealed_noise(noise, fresh, 0.0), noise)
    assert torch.equal(rf.annealed_noise(noise, fresh, 1.0), fresh)
    mixed = rf.annealed_noise(noise, fresh, 0.6)
    assert abs(float(mixed.var()) - 1) < 0.02
    assert abs(float((mixed * noise).mean()) - 0.8) < 0.02


def test_reflow_does_not_raise_the_transport_cost():
    """Gaussians: any pairs cost mean² + s² + 1 in a dimension, the flow's own mean² + (1 − s)²."""
    noise = randn(20_000, 2)
    data = MEAN + STD * randn(20_000, 2, seed=1)
    anyone = rf.transport_cost(data, noise)
    assert anyone.shape == (20_000,)
    assert float(anyone.mean()) == pytest.approx(2 * (MEAN**2 + STD**2 + 1), rel=0.03)
    states = rf.reflow_states(gaussian_velocity, noise, noise, steps=50, solver="rf_solver")
    own = rf.transport_cost(states[:, 1], noise).mean()
    assert float(own) == pytest.approx(2 * (MEAN**2 + (1 - STD) ** 2), rel=0.03)
