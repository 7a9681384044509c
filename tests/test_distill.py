"""The target against a path followed by hand, and a student from its teacher to its pictures."""

import shutil

import pytest
import torch
from helpers import DIGITS, call, close, exported, refused

import rf
import train_mnist
from common.pipeline import Pipeline
from experiments import distill

HOW = ["--device", "cpu", "--batch-size", "4"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    facts = DIGITS | {"size": 28, "steps": 4, "cfg_below": 0.6}
    return exported(tmp_path_factory.mktemp("teacher") / "run", facts)


@pytest.fixture(scope="module")
def student(teacher):
    out = teacher.with_name("student")
    call(distill.main, teacher, *HOW, "--pieces", 2, "--steps", 4, "--out", out)
    return out


@pytest.mark.parametrize("solver", ["euler", "rf_solver"])
def test_the_target_is_the_mean_velocity_of_the_guided_path(solver):
    """A teacher that is linear in x, t and text; a student that knows the answer."""
    steps, pieces, shift, cfg, below = 12, 3, 2.0, 3.0, 0.7

    class Teacher:
        def __init__(self):
            self.facts = {"cfg": cfg, "cfg_below": below, "steps": steps, "shift": shift}
            self.facts["solver"] = solver

        def model(self, x, t, text):
            return -x * t.view(-1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1)

        def features(self, captions):
            return torch.zeros(1, 2, 3)

    grid = torch.tensor(rf.timesteps(steps, shift))
    text, x = torch.randn(steps, 2, 3), torch.randn(steps, 1, 2, 2)

    def end_of(x, text, place):
        """Euler's steps of the guided path, one sample, to the end of its piece."""
        while True:
            t, word = grid[place], text.mean()
            h = grid[place + 1] - t

            def v(x, t, word=word):
                return -x * t + (cfg if t <= below else 1.0) * word

            x = x + h * (v(x, t) if solver == "euler" else v(x + h / 2 * v(x, t), t + h / 2))
            place += 1
            if place % (steps // pieces) == 0:
                return x, grid[place]

    def student(x, t, text):
        found = torch.full_like(x, float("nan"))
        for i, time in enumerate(t):
            place = int((grid - time).abs().argmin())
            if place % (steps // pieces) == 0:  # nothing is left of the piece
                found[i] = 1e3
            else:
                end, at = end_of(x[i], text[i], place)
                found[i] = (x[i] - end) / (time - at)
        return found

    pieced = torch.stack([grid[i : i + 5] for i in (0, 4, 8)])
    place = torch.arange(steps)
    found = distill.target(Teacher(), student, x, text, place, pieced)
    for i in range(steps):
        end, at = end_of(x[i], text[i], i)
        close(found[i], (x[i] - end) / (grid[i] - at), rtol=1e-4, atol=1e-5)


def test_a_student_learns_its_teachers_steps(teacher, tmp_path):
    """The loss falls, and the run knows how it wants to be sampled."""
    out = tmp_path / "student"
    call(distill.main, teacher, *HOW, "--pieces", 2, "--steps", 40, "--out", out)
    losses = [row["loss"] for row in train_mnist.load(out / "checkpoint.pt", "cpu")["log"]]
    assert losses[-1] < losses[0]
    student = Pipeline.open(out)
    facts, older = student.facts, Pipeline.open(teacher).facts
    assert (facts["cfg"], facts["cfg_below"], facts["steps"]) == (1.0, 1.0, 2)
    assert facts["shift"] == older["shift"] and facts["source"] == older["source"]
    drawn = student.draw(["3"], student.noise(0, [0]))
    assert drawn.shape == (1, 1, 28, 28) and (out / "samples.png").exists()


def test_a_student_that_was_stopped_goes_on_bit_for_bit(teacher, student, tmp_path):
    options = [teacher, *HOW, "--pieces", 2, "--steps", 4]
    original = train_mnist.learning_rate
    with pytest.MonkeyPatch.context() as patch:

        def killed(settings, step):
            if step == 2:
                raise KeyboardInterrupt
            return original(settings, step)

        patch.setattr(train_mnist, "learning_rate", killed)
        patch.setattr(train_mnist.Settings, "checkpoint_every", 2)
        with pytest.raises(SystemExit):
            call(distill.main, *options, "--out", tmp_path / "stopped")
    call(distill.main, *options, "--out", tmp_path / "stopped", "--resume")
    whole, stopped = (Pipeline.open(run).model for run in (student, tmp_path / "stopped"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, stopped.state_dict()[name]), name


def test_a_student_goes_on_with_its_own_options_and_those_that_are_typed(teacher, tmp_path):
    how = [teacher, "--device", "cpu", "--pieces", 2, "--out", tmp_path / "student"]
    call(distill.main, *how, "--batch-size", 4, "--steps", 4, "--lr", 0.001)
    call(distill.main, *how, "--resume", "--steps", 6)
    state = train_mnist.load(tmp_path / "student" / "checkpoint.pt", "cpu")
    kept = {key: state["settings"][key] for key in ("steps", "batch_size", "lr", "muon_lr")}
    assert kept == {"steps": 6, "batch_size": 4, "lr": 0.001, "muon_lr": 0.02}
    assert [row["changed"] for row in state["log"]] == ["", "--steps 4 -> 6"]


def test_what_cannot_be_distilled(teacher, student, tmp_path, capsys):
    line = refused(distill.main, capsys, teacher, *HOW, "--pieces", 3)
    assert "--pieces 3 must divide the 4 steps" in line
    assert "--pieces 4 must divide" in refused(distill.main, capsys, teacher, *HOW, "--pieces", 4)
    line = refused(distill.main, capsys, teacher, *HOW, "--pieces", 2, "--out", student)
    assert "holds a student: go on with --resume" in line
    (student / "checkpoint.pt").rename(tmp_path / "checkpoint.pt")  # to save space, say
    for how in ([], ["--resume"]):
        line = refused(distill.main, capsys, teacher, *HOW, "--pieces", 2, "--out", student, *how)
        assert "has no checkpoint.pt: choose another" in line
    (tmp_path / "checkpoint.pt").rename(student / "checkpoint.pt")
    other = shutil.copytree(teacher, tmp_path / "other")
    line = refused(distill.main, capsys, other, *HOW, "--pieces", 2, "--out", student, "--resume")
    assert "learns from another teacher" in line
    line = refused(distill.main, capsys, tmp_path / "none", *HOW)
    assert "holds no" in line or "no run" in line
