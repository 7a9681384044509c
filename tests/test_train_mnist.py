"""train_mnist.py end to end on a hundred glyphs: outputs, exact resume, kills, bad input."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from host_reads import HostReads
from PIL import Image

import data_mnist
import rf
import train_mnist
from mmdit import load_model

ROOT = Path(train_mnist.__file__).parent
QUICK = ["--dataset", "glyphs", "--device", "cpu", "--batch-size", "4", "--sample-steps", "2"]


def few_glyphs(source, data_dir="data", *, size=32, seed=0):
    if source != "glyphs":
        return data_mnist.load_images(source, data_dir, size=size, seed=seed)
    return data_mnist.glyphs(100, seed=seed), data_mnist.glyphs(40, seed=seed + 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_mnist, "load_images", few_glyphs)
    monkeypatch.setattr(train_mnist, "LOG_EVERY", 3)
    few = train_mnist.PRESETS | {
        "small": train_mnist.replace(
            train_mnist.PRESETS["digits"], dim=32, head_dim=16, n_layers=1, patch_size=7
        )
    }
    monkeypatch.setattr(train_mnist, "PRESETS", few)


def run(out, *options):
    given = [*QUICK, *([] if "--preset" in options else ["--preset", "small"]), *options]
    train_mnist.main([*given, "--out", str(out)])


def error_of(out, *options):
    with pytest.raises(SystemExit) as stopped:
        run(out, *options)
    message = str(stopped.value)
    assert message.startswith("train_mnist.py: ") and "\n" not in message
    return message


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_equal(a, b, where=""):
    """Bit for bit, through nested dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


# --- what comes out ------------------------------------------------------------------------------


def test_a_run_leaves_pictures_log_and_a_model_that_loads(tmp_path):
    run(tmp_path, "--steps", "7")
    assert {f.name for f in tmp_path.iterdir()} == {
        "samples.png", "samples.gif", "loss.png", "log.csv", "model.safetensors", "config.json",
        "checkpoint.pt",
    }  # fmt: skip
    for name in ("samples.png", "loss.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200
    with Image.open(tmp_path / "samples.gif") as gif:
        assert gif.n_frames == 3  # noise and two steps
    rows = (tmp_path / "log.csv").read_text().split()
    assert rows[0] == "step,loss,grad_norm,lr" and [r.split(",")[0] for r in rows[1:]] == ["3", "6"]
    state, model = checkpoint(tmp_path), load_model(tmp_path)
    for average, weight in zip(state["ema"]["averages"], model.parameters(), strict=True):
        assert torch.equal(average, weight)


def test_training_learns(tmp_path):
    run(tmp_path, "--steps", "90", "--batch-size", "32", "--lr", "1e-2", "--warmup-steps", "5")
    losses = [row[1] for row in checkpoint(tmp_path)["log"]["rows"]]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_dry_run_leaves_nothing(tmp_path, capsys):
    run(tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    assert "samples.gif" in capsys.readouterr().out


def test_folder_and_two_class_data_train(tmp_path, image_folder):
    run(tmp_path / "out", "--dataset", "folder", "--data-dir", str(image_folder), "--size", "14",
        "--steps", "2")  # fmt: skip
    assert load_model(tmp_path / "out").config.in_channels == 3


def test_learning_rate_warms_up_and_ends_at_zero():
    args = train_mnist.argparse.Namespace(warmup_steps=10, steps=100)
    rates = [train_mnist.learning_rate(args, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == 0
    assert max(rates) == pytest.approx(rates[9]) and rates[54] < rates[53]


# --- the step ------------------------------------------------------------------------------------


def new_run(*options):
    parser = train_mnist.build_parser()
    args = parser.parse_args([*QUICK, "--preset", "small", "--steps", "8", *options])
    args = train_mnist.resolve(args, torch.device("cpu"))
    dataset, _ = few_glyphs("glyphs")
    return train_mnist.Run(args, dataset, torch.device("cpu")), dataset


def test_a_step_never_reads_a_value_back():
    run, dataset = new_run()
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=True, dropout=0.1, device="cpu")
    batches.indices(0)  # the epoch's permutation is drawn once, on the host
    with HostReads() as reads:
        batch = batches[0]
        train_mnist.train_step(run, batch, 1.0)
        run.ema.update(1)
    assert reads.seen == []


def test_steps_are_flow_matching_on_the_drawn_noise_and_time():
    """The logged loss is that of the lines' velocity at stratified logit-normal times."""
    run, dataset = new_run()
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=False, dropout=0.1, device="cpu")
    batch = batches[0]
    state = batch.generator.get_state()
    train_mnist.train_step(run, batch, 1.0)
    batch.generator.set_state(state)
    rf.sample_time(4, stratified=True, generator=batch.generator)
    noise = torch.randn(batch.data.shape, generator=batch.generator)
    # a fresh model answers 0, so the loss is the mean square of noise − data
    assert run.log.buffer[0, 0] == pytest.approx((noise - batch.data).square().mean().item())


# --- interruption --------------------------------------------------------------------------------


def after_step(monkeypatch, step, action):
    """Calls action() in place of the training step that would follow `step`."""
    real = train_mnist.train_step

    def step_or_act(run, batch, scale):
        if run.step == step:
            action()
        return real(run, batch, scale)

    monkeypatch.setattr(train_mnist, "train_step", step_or_act)


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("every, killed_at", [(4, 4), (4, 7), (3, 5)])
def test_resuming_after_a_kill_is_bit_exact(tmp_path, monkeypatch, every, killed_at):
    options = ["--steps", "8", "--checkpoint-every", str(every)]
    run(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        after_step(patch, killed_at, kill)
        with pytest.raises(Killed):
            run(tmp_path / "parts", *options)
    assert checkpoint(tmp_path / "parts")["step"] == killed_at // every * every
    train_mnist.main(["--resume", "--device", "cpu", "--out", str(tmp_path / "parts")])
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["step"] == parts["step"] == 8
    assert_equal(whole, parts)
    for name in ("log.csv", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_checkpoint_and_pictures_and_resumes(
    tmp_path, monkeypatch, capsys, number
):
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda: os.kill(os.getpid(), number))
        run(tmp_path / "out", "--steps", "8")
    assert "stopped at step 5 of 8; add --resume" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["step"] == 5
    assert (tmp_path / "out" / "samples.gif").exists()
    run(tmp_path / "out", "--resume")
    run(tmp_path / "whole", "--steps", "8")
    assert_equal(checkpoint(tmp_path / "out"), checkpoint(tmp_path / "whole"))


def test_sigkill_while_a_checkpoint_is_written_leaves_the_previous_one(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch, data_mnist, train_mnist
        train_mnist.LOG_EVERY = 3
        train_mnist.load_images = lambda *a, **k: (data_mnist.glyphs(100), data_mnist.glyphs(40))
        real_save = torch.save
        def save(state, file):
            if state["step"] == 4:  # half of the bytes, then the end
                import io
                whole = io.BytesIO()
                real_save(state, whole)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real_save(state, file)
        torch.save = save
        train_mnist.main(sys.argv[1:])
        """
    )
    options = [*QUICK, "--patch-size", "7", "--steps", "6", "--checkpoint-every", "2"]
    command = [sys.executable, "-c", script, *options, "--out", str(tmp_path)]
    died = subprocess.run(command, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "checkpoint.partial").exists()
    assert checkpoint(tmp_path)["step"] == 2
    train_mnist.main(["--resume", "--device", "cpu", "--out", str(tmp_path)])
    assert checkpoint(tmp_path)["step"] == 6
    assert not (tmp_path / "checkpoint.partial").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(tmp_path, monkeypatch):
    real = rf.rf_loss
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) >= 6 else 1)

    monkeypatch.setattr(rf, "rf_loss", poisoned)
    message = error_of(
        tmp_path, "--steps", "20", "--checkpoint-every", "2", "--lr", "0.01", "--warmup-steps", "1"
    )
    assert "not finite at step 6 (lr 0.0075)" in message and "lower --lr" in message
    assert "checkpoint.pt is from before" in message
    state = checkpoint(tmp_path)
    assert state["step"] == 4
    assert all(p.isfinite().all() for p in state["model"].values())


# --- bad input -----------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, "--steps", "1")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    message = error_of(tmp_path, "--steps", "1")
    assert "already holds a run" in message and "--resume" in message and "--overwrite" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(tmp_path, "--steps", "2", "--overwrite")
    assert checkpoint(tmp_path)["step"] == 2


def test_resume_takes_the_runs_options_and_refuses_others(tmp_path):
    run(tmp_path, "--steps", "2", "--lr", "0.003")
    assert "--lr 0.01 differs" in error_of(tmp_path, "--resume", "--lr", "0.01")
    assert "--steps 3 differs" in error_of(tmp_path, "--resume", "--steps", "3")
    assert "does not exist" in error_of(tmp_path / "other", "--resume")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run(tmp_path, "--steps", "1")
    state = checkpoint(tmp_path)
    state["model_config"]["n_layers"] = 3
    torch.save(state, tmp_path / "checkpoint.pt")
    message = error_of(tmp_path, "--resume")
    assert "another network (n_layers 3 there, 1 here)" in message


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    assert "is no checkpoint of this script" in error_of(tmp_path, "--resume")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--preset", "huge"], "--preset 'huge' must be one of digits"),
        (["--solver", "rk4"], "--solver 'rk4' must be one of euler, heun, rf_solver"),
        (["--dataset", "imagenet"], "--dataset 'imagenet' must be one of auto"),
        (["--patch-size", "5"], "--patch-size 5 must divide the image size 28x28"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--device", "tpu"], "--device 'tpu' is not here; this machine has: cpu"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere does not exist"),
        (["--residual", "post"], "residual = 'post' must be one of"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, options, message):
    assert message in error_of(tmp_path / "out", *options)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


# --- what it needs -------------------------------------------------------------------------------


def test_chapter_1_imports_without_the_large_packages():
    absent = ("deepspeed", "datasets", "diffusers", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import rf, mmdit, train_mnist"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
