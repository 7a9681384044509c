"""Tensors without values: what reads a value, or lies on another device, raises.

A step on the meta device computes shapes, dtypes and devices alone. The host cannot read from it
(.item(), bool, .tolist(), .cpu()), and a tensor that was made on the CPU does not mix with it. So
whatever passes here makes no GPU wait for the host, and makes nothing on the wrong device.
"""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers import opened
from torch._subclasses import FakeTensorMode

import mmdit
import rf
import train_mnist
import train_t2i
from common import log, muon
from common.muon import use_muon
from common.pipeline import settle_run
from inputs import digits, encoders, rows

META = torch.device("meta")


@pytest.fixture(autouse=True)
def few_glyphs(monkeypatch):
    few = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: few(20, seed))


class Generator(torch.Generator):
    """There is none for the meta device; torch accepts one of the CPU that says it is."""

    device = META


def chapter_1():
    """→ a function of the step: train_mnist.train_step, and what the log keeps of it."""
    typed = {"data": ["glyphs"], "batch_size": 4, "steps": 10}
    settings, found = settle_run(train_mnist.Settings, typed, {}, META, lambda preset: {})
    model, adamw = train_mnist.build(settings, found, {}, META)
    kept = log.Log(None, 100)

    def step(number: int = 0):
        loss, norm = train_mnist.train_step(model, adamw, found, settings, number, Generator())
        kept.add(loss)
        assert kept.end_step(number + 1, 4, norm, lr=0.1) is None
        return loss, norm

    return step


def chapter_2(data=("shapes",), **typed):
    """→ train_t2i.train_step with two passes; the engine is the plain one that DeepSpeed's equals
    on one rank."""
    settings, found = opened(*data, **typed)
    sizes = {"channels": found.latent_channels, "text_dim": found.text.dim}
    config = mmdit.fitted(settings.preset, sides=list(found.sides()), **sizes)
    model = mmdit.MMDiT(config).to(META)
    adamw = torch.optim.AdamW(model.param_groups(0.1, muon_lr=0.1))
    use_muon(adamw)
    rf.keep_averages(adamw, train_t2i.EMA_WIDTHS)

    class Engine:
        device = META
        __call__ = staticmethod(model)
        gradient_accumulation_steps = staticmethod(lambda: 2)
        backward = staticmethod(torch.Tensor.backward)

        def step(self):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
            return norm

    found.null_text = None  # it is kept on the device of its first use
    run = SimpleNamespace(settings=settings, rows=found, engine=Engine(), adamw=adamw, seen=0)
    run.log = log.Log(None, 100)

    def step(number: int = 0):
        first = 8 * number
        parts = [range(first, first + 4), range(first + 4, first + 8)]
        train_t2i.train_step(run, iter([found.draw(part, 0) for part in parts]))
        return run.log.losses[-2:]

    return step


CHAPTERS = {"chapter 1": chapter_1, "chapter 2": chapter_2}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_whole_step_reads_nothing_and_makes_nothing_elsewhere(chapter):
    step = CHAPTERS[chapter]()
    for number in range(2):  # the second has moments and averages
        assert all(value.is_meta and value.shape == () for value in step(number))


@pytest.mark.parametrize("solver", rf.SOLVERS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sampling_reads_nothing(solver, cfg):
    with META:
        model = mmdit.MMDiT(mmdit.PRESETS["tiny"])
        noise, text = torch.randn(2, 3, 20, 20), torch.randn(2, 12, 128)
        path = rf.sample(
            model, noise, text, null_text=text[:1], cfg=cfg, steps=3, solver=solver,
            return_trajectory=True,
        )  # fmt: skip
    assert path.is_meta and path.shape == (4, 2, 3, 20, 20)


def test_the_arithmetic_of_an_evaluation_and_of_reflow_reads_nothing():
    with META:
        model = mmdit.MMDiT(mmdit.PRESETS["tiny"])
        states, text = torch.randn(4, 5, 3, 20, 20), torch.randn(4, 12, 128)
        t_index = torch.zeros(4, dtype=torch.long)
    u = torch.empty(4, device=META)
    losses = []
    for segments, beta in ((1, 0.5), (4, 0.0)):
        how = {"segments": segments, "shift": 2.0}
        data, noise, t = rf.line(states, torch.empty_like(states[:, 0]), u, beta=beta, **how)
        losses.append(rf.rf_loss(model, data, text, t=t, noise=noise, loss="pseudo_huber"))
        data, noise = rf.line_at(states, noise, t_index / 8, **how)
        losses += rf.validation_loss(model, data, text, t_index, noise)
    losses.append(rf.straightness(model, noise, text, steps=2))
    assert all(loss.is_meta for loss in losses)


def test_the_log_reads_once_an_interval():
    kept = log.Log(None, 2)
    kept.add(torch.empty((), device=META))
    assert kept.end_step(1, 4, torch.empty((), device=META)) is None
    kept.add(torch.empty((), device=META))
    with pytest.raises(NotImplementedError, match="meta"):
        kept.end_step(2, 8, torch.empty((), device=META))


def planted(patch, owner, name: str, old: str, new: str):
    """In place of owner.name: the same function with one piece of its source replaced."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} no longer holds {old!r}"
    source = source.replace(old, new)
    exec(compile(source, name, "exec"), function.__globals__, made := {})
    patch.setattr(owner, name, made[name])


FAULTS = {
    "a loss is read": (rf, "rf_loss", "if loss ==", "if velocity.sum() > 0 and loss =="),
    "the norm is read": (train_mnist, "train_step", "loss, norm", "loss, norm.item()"),
    "the log reads": (log.Log, "add", "loss.detach()", "loss.item()"),
    "times from the host": (rf, "spread", "torch.arange(n, device=device)", "torch.arange(n)"),
    "the grid on the CPU": (rf, "time_at", "t.clamp(1e-6", "(t + torch.zeros(len(t))).clamp(1e-6"),
    "null text elsewhere": (
        rows.Rows, "null_features", "self.text.expand(self.null, device)",
        "self.text.expand(self.null, 'cpu')",
    ),
    "a mask that selects": (
        rows.Rows, "states", "self.image.encode(stored,",
        "self.image.encode(stored[stored.flatten(1).any(1)],",
    ),
    "sinusoids from the CPU": (
        mmdit.TimeEmbedding, "forward", "self.index.float()", "torch.arange(128)",
    ),
    "a branch on the input": (mmdit.MMDiT, "forward", "B, C, H, W = x.shape",
                              "B, C, H, W = x.shape; assert (x < 9).all()"),
    "Muon looks at its norm": (
        muon, "orthogonal", "wide.norm(dim=(1, 2), keepdim=True)", "wide.norm().item()",
    ),
    "averages on the host": (rf, "keep_averages", "w.detach().clone()", "torch.zeros(w.shape)"),
    "pictures through numpy": (
        encoders.Pixels, "encode", "(images)", "(torch.from_numpy(images.numpy()))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, fault):
    planted(monkeypatch, *FAULTS[fault])
    caught = []
    for chapter in CHAPTERS.values():
        try:
            chapter()()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            caught.append(str(error))
    assert caught, "nothing was raised"


def test_the_forward_pass_under_the_rules_of_cuda():
    """Fake tensors of a device that is not here: torch goes the way of a GPU's kernels."""
    for name in ("tiny", "small"):
        with FakeTensorMode(), torch.device("cuda"):
            model = mmdit.MMDiT(mmdit.PRESETS[name])
            half = {key: weight.bfloat16() for key, weight in model.state_dict().items()}
            model.load_state_dict(half, assign=True)
            side = model.config.max_grid * model.config.patch_size
            x, t, text = torch.empty(2, 3, side, side), torch.empty(2), torch.empty(2, 12, 128)
            velocity = model(x, t, text)
            assert (velocity.device.type, velocity.dtype) == ("cuda", torch.bfloat16)
            with pytest.raises(RuntimeError, match="device"):
                model(x, torch.empty(2, device="cpu"), text)
