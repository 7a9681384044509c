"""train_mnist.py: what a run leaves, one step, stops and resumes, what it refuses."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers import call, first_gradient, full_disk, records, refused
from host_reads import HostReads
from PIL import Image
from test_digits import write_mnist

import train_mnist
from common.pipeline import Pipeline, settle_run
from common.settings import parse
from inputs import digits

QUICK = """--data mnist --preset digits-narrow --device cpu --seed 1 --steps 60
--batch-size 4 --warmup-steps 5 --checkpoint-every 20 --cfg 3 --solver heun --sample-steps 2"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Options of a short run, on twelve pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    return [*QUICK.split(), "--data-dir", str(folder)]


@pytest.fixture(scope="module")
def run(quick):
    return lambda out, *options: call(train_mnist.main, *quick, "--out", out, *options)


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "run"
    run(out)
    return out


def resume(out):
    call(train_mnist.main, "--resume", "--device", "cpu", "--out", out)


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def new_run(options, device="cpu"):
    """The settings, rows, network and optimizer of a run that begins."""
    typed, device = parse(train_mnist.Settings, list(map(str, options)), ""), torch.device(device)
    settings, rows = settle_run(train_mnist.Settings, typed, {}, device, lambda preset: {})
    return settings, rows, *train_mnist.build(settings, rows, {}, device)


# --- what comes out ------------------------------------------------------------------------------


def test_a_run_leaves_pictures_logs_and_the_averaged_weights(done):
    assert {file.name for file in done.iterdir()} == {*train_mnist.FILES, "made_by.txt"}
    with Image.open(done / "samples.gif") as film:
        assert film.n_frames == 3  # noise and two steps
    steps = [(row["step"], row["samples"]) for row in records(done / "log.csv")]
    assert steps == [("20", "80"), ("40", "160"), ("60", "240")]
    (row,) = records(done / "eval.csv")
    losses = [float(row[f"loss_t{i}/8"]) for i in range(8)]
    assert row["samples"] == "240" and float(row["loss"]) == pytest.approx(sum(losses) / 8)
    states = checkpoint(done)["adamw"]["state"]
    averages = [states[i]["ema_0.05"] for i in sorted(states)]
    groups = Pipeline.open(done).model.param_groups(1.0, muon_lr=1.0)
    exported = [weight for group in groups for weight in group["params"]]
    assert all(map(torch.equal, exported, averages)) and len(exported) == len(averages)
    assert not torch.equal(exported[0], next(iter(checkpoint(done)["model"].values())))


def test_a_run_from_another_has_its_data_and_network(done, quick):
    settings, rows, *_ = new_run([*quick[quick.index("--device") :], "--init", done])
    assert (rows.names, settings.preset, settings.shift) == (["mnist"], "digits-narrow", 1)


def test_glyphs_come_from_the_seed_of_the_run(run, tmp_path, monkeypatch):
    few = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: few(20, seed))
    run(tmp_path, "--data", "glyphs", "--steps", 1)
    resume(tmp_path)


# --- one step ------------------------------------------------------------------------------------


def test_a_step_clips_the_gradient_and_each_group_has_its_rate(run, tmp_path):
    """Adam's first moment is a tenth of the gradient, Muon's a twentieth; it is clipped to 1."""
    how = ["--steps", 1, "--lr", 0.01, "--muon-lr", 0.02]
    run(tmp_path, *how, "--loss", "pseudo_huber")
    adamw = checkpoint(tmp_path)["adamw"]
    assert first_gradient(adamw["state"].values()).norm().item() == pytest.approx(1, rel=1e-3)
    groups = Pipeline.open(tmp_path).model.param_groups(0.01, muon_lr=0.02)
    rates = [group["lr"] / 5 for group in groups]
    assert [group["lr"] for group in adamw["param_groups"]] == pytest.approx(rates)
    assert len(rates) > 1  # muP


def test_a_step_draws_from_seed_and_step_alone(quick):
    settings, rows, *_ = new_run(quick)
    generator, other = torch.Generator(), replace(settings, seed=2)
    cases = [(settings, 0), (settings, 0), (settings, 1), (other, 0)]
    batches = [train_mnist.draw(rows, how, step, generator) for how, step in cases]
    for field in ("u", "noise"):
        first, *others = (getattr(batch, field) for batch in batches)
        assert [torch.equal(first, x) for x in others] == [True, False, False]
    assert torch.equal((batches[0].u * 4).long(), torch.arange(4))  # stratified
    many = train_mnist.draw(rows, replace(settings, batch_size=4000), 0, generator)
    assert 0.08 < many.dropped.float().mean() < 0.12


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_a_step_never_reads_a_value_back(quick, device):
    settings, rows, model, adamw = new_run(quick, device)
    log, generator = train_mnist.Log(None, 100), torch.Generator(device)
    for step in range(2):  # the first draws the epoch's permutation, on the host
        with HostReads() as reads:
            loss, norm = train_mnist.train_step(model, adamw, rows, settings, step, generator)
            log.add(loss)
            assert log.end_step(step + 1, 0, norm, lr=0.1) is None
    assert reads.seen == []


def test_the_rate_warms_up_and_falls_to_zero():
    settings = train_mnist.Settings(steps=100, warmup_steps=10)
    rates = [train_mnist.learning_rate(settings, step) for step in (0, 4, 9, 50, 100)]
    assert rates == pytest.approx([0.1, 0.5 * 0.96, 0.91, 0.5, 0])


# --- a run that grows ----------------------------------------------------------------------------


GROWN = """--steps 80 --lr 0.01 --muon-lr 0.02 --warmup-steps 200 --weight-decay 0.1
--shift 2"""


def test_a_finished_run_grows(done, tmp_path, capsys):
    """Length, rates, decay and times are new from the checkpoint on, and it is said."""
    for name in "ab":
        out = shutil.copytree(done, tmp_path / name)
        call(train_mnist.main, "--resume", "--device", "cpu", "--out", out, *GROWN.split())
    changed = (
        "--steps 60 -> 80; --lr 0.006 -> 0.01; --muon-lr 0.04 -> 0.02; --warmup-steps 5 -> 200;"
        " --weight-decay 0.0 -> 0.1; --shift 1.0 -> 2.0"
    )
    assert capsys.readouterr().out.count(f"changed from here on: {changed}\n") == 2
    for name in ("log.csv", "eval.csv", "model.safetensors"):  # the same commands, the same run
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    *older, row = records(out / "log.csv")
    assert older == records(done / "log.csv") and not any(row["changed"] for row in older)
    assert (row["step"], row["samples"], row["changed"]) == ("80", "320", changed)
    share = 80 / 200 * (1 - 79 / 80)
    assert float(row["lr"]) == pytest.approx(0.01 * share)
    groups = checkpoint(out)["adamw"]["param_groups"]
    expected = Pipeline.open(out).model.param_groups(0.01, 0.1, muon_lr=0.02)
    for group, wanted in zip(groups, expected, strict=True):
        for key in ("base_lr", "weight_decay"):
            assert group[key] == wanted[key]
        assert group["lr"] == pytest.approx(wanted["lr"] * share) and group["updates"] == 80
    assert {s["step"].item() for s in checkpoint(out)["adamw"]["state"].values()} == {80}
    assert Pipeline.open(out).facts["shift"] == 2
    resume(out)  # nothing is left to do, and nothing changes
    assert "changed" not in capsys.readouterr().out
    assert records(out / "log.csv") == [*older, row]
    call(train_mnist.main, "--resume", "--device", "cpu", "--out", out, "--cfg", 4)
    resume(out)  # what was given to the finished run stays
    assert Pipeline.open(out).facts["cfg"] == 4


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("every, saved", [(1, [1]), (50, [])])
def test_a_loss_that_is_not_finite_ends_the_run(done, quick, tmp_path, capsys, every, saved):
    """A rate of 1e30 does it in the second step. --overwrite: what was there is gone."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    how = ["--overwrite", "--lr", 1e30, "--warmup-steps", 1, "--checkpoint-every", every]
    line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path, *how)
    left = f"{tmp_path / 'checkpoint.pt'} is from before" if saved else "nothing was saved"
    rate = 1e30 * (1 - 1 / 60 if saved else 1 - 19 / 60)
    assert line == (
        f"train_mnist.py: loss or gradient is not finite at step 2 (lr {rate:.3g}); {left};"
        " start again with --overwrite and a lower --lr"
    )
    assert [torch.load(path)["step"] for path in tmp_path.glob("checkpoint.pt")] == saved
    assert not (tmp_path / "model.safetensors").exists()


def test_a_full_disk_leaves_the_last_checkpoint(done, quick, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    with full_disk(path):
        line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path)
    assert f"{path} could not be written: File too large" in line
    assert checkpoint(tmp_path)["step"] < 60 and len(list(tmp_path.iterdir())) == 3
    resume(tmp_path)
    for name in ("model.safetensors", "log.csv", "eval.csv", "samples.gif"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_a_folder_with_a_run_is_not_overwritten_by_accident(done, run, quick, tmp_path, capsys):
    (tmp_path / "log.csv").write_text("a log alone is a run")
    (tmp_path / "made_by.txt").write_text("train_mnist.py")
    for out in (done, tmp_path):
        line = refused(train_mnist.main, capsys, *quick, "--out", out)
        assert (
            f"--out {out} already holds a run: continue it with --resume, replace it with" in line
        )
    run(tmp_path, "--resume", "--steps", 1)  # killed before its first checkpoint: it begins
    run(tmp_path, "--overwrite", "--dry-run")  # in another folder
    assert [row["step"] for row in records(tmp_path / "log.csv")] == ["1"]
    run(tmp_path, "--overwrite", "--steps", 2)
    assert [row["step"] for row in records(tmp_path / "log.csv")] == ["2"]


def spoil(**changes):
    def change(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return change


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, ["--batch-size", 8], "--batch-size 8 differs from the run to resume, which has 4"),
        (None, ["--ema", 0.1], "--ema 0.1 differs from the run to resume, which has 0.05"),
        (None, ["--steps", 59], "--steps 59 is less than the 60 steps that the run in"),
        (None, ["--muon-lr", 0], "which has 0.04, and Muon and AdamW keep different moments: drop"),
        (lambda path: path.write_bytes(b"x"), [], "or no checkpoint of this script"),
        (lambda path: torch.save({"model": {}}, path), [], 'this script ("settings" is missing)'),
        (spoil(rows="0"), [], "was trained on other rows: give its --data"),
        (spoil(config={"dim": 3}), [], "is of another network: choose another --out"),
    ],
)
def test_what_cannot_be_resumed_is_refused(done, tmp_path, capsys, change, options, message):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    if change:
        change(tmp_path / "checkpoint.pt")
    how = ("--resume", "--device", "cpu", "--out", tmp_path, *options)
    assert message in refused(train_mnist.main, capsys, *how)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--preset huge", "--preset 'huge' must be one of digits, tiny, small"),
        ("--data imagenet", "--data imagenet is none of shapes, auto, mnist, glyphs, cifar10"),
        ("--patch-size 5", "a patch of 5 must divide what the network sees, 28x28"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--ema 0.5", "--ema 0.5 must be at most 0.28"),
        ("--shift 0", "--shift 0.0 must be at least 0.01"),
        ("--lr nan", "--lr nan must be finite"),
        ("--anneal 2", "--anneal 2.0 must be at most 1"),
        ("--anneal 0.5", "--anneal 0.5 is for pairs (tools.pairs) with --segments 1"),
        ("--init nowhere", "nowhere holds no weights: train it first"),
        ("--resume --dry-run", "--resume goes with none of --overwrite, --dry-run and --init"),
        ("--resume --init {done}", "--resume goes with none of --overwrite, --dry-run and --init"),
    ],
)
def test_bad_options_end_in_one_line(done, quick, tmp_path, capsys, options, message):
    how = options.format(done=done).split()
    line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path / "run", *how)
    assert line.startswith("train_mnist.py: ") and message in line
    assert not (tmp_path / "run").exists()


def test_a_name_of_digits_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = {"data": ["glyphs"], "out": tmp_path}
    settings, _ = settle_run(train_mnist.Settings, typed, {}, torch.device("cpu"), lambda _: {})
    assert settings.data == ["glyphs"]


def test_a_run_that_goes_on_keeps_the_weights_of_its_stop_until_it_has_newer_ones(
    done, tmp_path, capsys, monkeypatch
):
    def killed(*args):
        raise OSError("killed")

    for last, there in (("train_step", True), ("finish", False)):
        out = shutil.copytree(done, tmp_path / last)
        with monkeypatch.context() as patch:
            patch.setattr(train_mnist, last, killed)
            refused(train_mnist.main, capsys, "--resume", "--steps", 65, "--out", out)
        assert checkpoint(out)["step"] == (60 if there else 65)
        for name in ("model.safetensors", "config.json"):
            assert (out / name).exists() == there
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        Pipeline.open(out)
