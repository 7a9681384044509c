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
    told = [*QUICK, "--preset", "small", "--steps", "8", "--out", "runs/none", *options]
    args = parser.parse_args(told)
    device = torch.device(args.device)
    dataset, _ = few_glyphs("glyphs")
    return train_mnist.Run(train_mnist.resolve(args, device), dataset, device), dataset


def test_a_step_never_reads_a_value_back(tmp_path):
    run, dataset = new_run()
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=True, dropout=0.1, device="cpu")
    batches.indices(0)  # the epoch's permutation is drawn once, on the host
    with HostReads() as reads:
        train_mnist.train_step(run, batches[0], 1.0)
        run.ema.update(1)
        run.log.send(3)
    assert reads.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_gpu():
    run, dataset = new_run("--device", "cuda")
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=True, dropout=0.1, device="cuda")
    for step in range(2):  # the first step allocates and compiles
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            train_mnist.train_step(run, batches[step], 1.0)
            run.ema.update(step + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_flow_matching_and_mup_adamw(monkeypatch):
    """What reaches the loss is the drawn line, and what moves is each group at its own rate."""
    run, dataset = new_run("--shift", "2", "--lr", "0.01")
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=False, dropout=0.5, device="cpu")
    seen, real = {}, rf.rf_loss

    def recorded(model, data, text, *, t, noise, loss):
        seen.update(data=data, text=text, t=t, noise=noise)
        return real(model, data, text, t=t, noise=noise, loss=loss)

    monkeypatch.setattr(rf, "rf_loss", recorded)
    batch = batches[0]
    state = batch.generator.get_state()
    before = [p.detach().clone() for p in run.model.parameters()]
    train_mnist.train_step(run, batch, 0.25)
    batch.generator.set_state(state)
    t = rf.sample_time(4, shift=2.0, stratified=True, generator=batch.generator)
    assert torch.equal(seen["t"], t)
    noise = torch.randn(batch.data.shape, generator=batch.generator)
    assert torch.equal(seen["noise"], noise) and torch.equal(seen["data"], batch.data)
    assert torch.equal(seen["text"], run.text(batch.labels))
    # a fresh model answers 0, so the loss is the mean square of noise − data
    assert run.log.buffer[0, 0] == pytest.approx((noise - batch.data).square().mean().item())
    # Adam's first step moves every entry with a gradient by its group's rate
    rates = {id(p): g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    wanted = {id(p): g["lr"] / 4 for g in run.model.param_groups(0.01) for p in g["params"]}
    assert rates == pytest.approx(wanted)
    moved = 0
    for p, old in zip(run.model.parameters(), before, strict=True):
        step = (p.detach() - old).abs().max().item()
        moved += step > 0
        assert step == 0 or step == pytest.approx(rates[id(p)], rel=1e-3)
    assert moved > 0


def test_gradients_are_clipped(monkeypatch):
    run, dataset = new_run()
    batches = data_mnist.Batches(dataset, 4, seed=0, flip=False, dropout=0.1, device="cpu")
    real, norms = rf.rf_loss, []
    monkeypatch.setattr(rf, "rf_loss", lambda *a, **k: 1000 * real(*a, **k))

    def norm_before_the_step():
        grads = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())

    run.optimizer.register_step_pre_hook(lambda *a: norm_before_the_step())
    train_mnist.train_step(run, batches[0], 1.0)
    assert norms[0] == pytest.approx(train_mnist.CLIP, rel=1e-3)
    assert run.log.buffer[1, 0] > 10  # the log has the norm before clipping


def test_training_flips_cifar_alone_and_drops_a_tenth_of_the_captions(tmp_path, monkeypatch):
    made = []

    class Spy(data_mnist.Batches):
        def __init__(self, *args, **kwargs):
            made.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(train_mnist, "Batches", Spy)
    colour = data_mnist.ImageSet(
        torch.zeros(8, 3, 28, 28, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), ["a"], "x"
    )
    monkeypatch.setattr(train_mnist, "load_images", lambda *a, **k: (colour, colour))
    run(tmp_path / "a", "--dataset", "cifar10", "--steps", "1")
    run(tmp_path / "b", "--dataset", "mnist", "--steps", "1")
    assert [m["flip"] for m in made] == [True, False]
    assert [m["dropout"] for m in made] == [0.1, 0.1]


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
    resume = [*command[:3], "--resume", "--device", "cpu", "--out"]
    resume[2] = script.replace('state["step"] == 4', "False")
    subprocess.run([*resume, str(tmp_path)], check=True, capture_output=True)
    assert not (tmp_path / "checkpoint.partial").exists()
    whole = [*resume[:3], *options, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True)
    assert_equal(checkpoint(tmp_path), checkpoint(tmp_path / "whole"))


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
    (tmp_path / "checkpoint.pt").rename(tmp_path / "kept")
    assert "already holds a run" in error_of(tmp_path, "--steps", "1")  # the log alone is a run
    (tmp_path / "kept").rename(tmp_path / "checkpoint.pt")
    message = error_of(tmp_path, "--steps", "1")
    assert "already holds a run" in message and "--resume" in message and "--overwrite" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(tmp_path, "--steps", "2", "--overwrite")
    assert checkpoint(tmp_path)["step"] == 2


def test_an_overwriting_run_that_dies_leaves_no_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, "--steps", "1")
    after_step(monkeypatch, 1, kill)
    with pytest.raises(Killed):
        run(tmp_path, "--steps", "3", "--overwrite")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resume_keeps_the_options_of_the_pictures(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path, "--steps", "3", "--cfg", "3", "--solver", "heun")
    before = (tmp_path / "config.json").read_text()
    assert '"solver": "heun"' in before and '"cfg": 3.0' in before
    train_mnist.main(["--resume", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "config.json").read_text() == before


def test_resume_on_other_images_is_refused(tmp_path, monkeypatch):
    run(tmp_path, "--steps", "1")
    monkeypatch.setattr(
        train_mnist, "load_images", lambda *a, **k: (data_mnist.glyphs(100, seed=9),) * 2
    )
    assert "trained on other images" in error_of(tmp_path, "--resume")


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
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    assert "is no checkpoint of this script" in error_of(tmp_path, "--resume")
    (tmp_path / "taken").write_text("a file")
    assert "taken" in error_of(tmp_path / "taken")


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
        (["--ema", "0.5"], "sigma_rel = 0.5 must lie in"),
        (["--shift", "0"], "shift = 0.0 must be positive"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
        (["--patch-size", "0"], "--patch-size 0 must be at least 1"),
        (["--resume", "--dry-run"], "does not exist"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, options, message):
    assert message in error_of(tmp_path / "out", *options)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    if "--patch-size" not in options:  # what the data decides is known only after they are read
        assert not (tmp_path / "out").exists()


# --- what it needs -------------------------------------------------------------------------------


def test_chapter_1_imports_without_the_large_packages():
    absent = ("deepspeed", "datasets", "diffusers", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import rf, mmdit, train_mnist"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
