"""pairs.py: what is written, that a kill changes nothing of it, and training on it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_train_mnist import assert_equal, checkpoint, small  # noqa: F401

import pairs
import rf
import train_mnist
from data_t2i import PairSamples, RankPositions
from encoders import HashText
from mmdit import PRESETS, MMDiT, MMDiTConfig, load_model, save_model
from pairs import PairBatches, Pairs

ROOT = Path(pairs.__file__).parent
DIGITS = MMDiTConfig(
    in_channels=1, patch_size=7, dim=32, head_dim=16, n_layers=1, n_double_layers=0, text_dim=11,
    max_grid=4, n_registers=0, mlp_multiple_of=32,
)  # fmt: skip
DIGITS_RUN = {
    "dataset": "glyphs", "data_dir": "data", "size": 32, "preset": "small", "patch_size": 7,
    "residual": "prenorm", "shift": 1.0, "cfg": 1.6,
}  # fmt: skip
SHAPES_RUN = {
    "text_encoder": "hash", "text_tokens": 12, "vae": "pixels", "size": 20, "shapes": 4,
    "colors": 6, "places": 10, "cfg": 3.0, "shift": 2.0, "preset": "tiny", "residual": None,
}  # fmt: skip


class Killed(BaseException):
    """Not caught by anything that cleans up after errors."""


def run_of(folder, config, settings):
    torch.manual_seed(0)
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(folder, model, run=settings)
    return folder


@pytest.fixture
def digits(tmp_path):
    return run_of(tmp_path / "digits", DIGITS, DIGITS_RUN)


@pytest.fixture
def shapes_run(tmp_path):
    return run_of(tmp_path / "shapes", PRESETS["tiny"], SHAPES_RUN)


def make(run, out, *options):
    told = [run, "--out", out, "--steps", 4, "--number", 25, "--shard", 10, *options]
    pairs.main([str(x) for x in told])
    return Pairs(out)


# --- what is written -----------------------------------------------------------------------------


def test_pairs_are_what_the_model_makes_of_the_noise(tmp_path, digits):
    made = make(digits, tmp_path / "pairs", "--segments", 2)
    assert len(made) == 25 and len(made.files) == 3 and made.about["cfg"] == 1.6
    states, labels = made.all()
    assert states.shape == (25, 3, 1, 28, 28) and states.dtype == torch.float16
    assert set(labels.tolist()) <= set(range(10)) and len(set(labels.tolist())) > 3
    assert abs(float(states[:, 0].float().std()) - 1) < 0.02
    model, eye = load_model(digits), torch.eye(11)
    drawn = rf.sample(
        model, states[:, 0].float(), eye[labels][:, None], null_text=eye[10:][:, None], cfg=1.6,
        steps=4, solver="rf_solver", return_trajectory=True,
    )  # fmt: skip
    assert torch.allclose(drawn[2], states[:, 1].float(), atol=2e-3)
    assert torch.allclose(drawn[4], states[:, 2].float(), atol=2e-3)
    row, label = made.row(17)
    assert torch.equal(row, states[17].float()) and label == int(labels[17])


def test_pairs_of_captions_are_those_training_saw(tmp_path, shapes_run):
    made = make(shapes_run, tmp_path / "pairs")
    states, caption = made.row(24)
    assert states.shape == (2, 3, 20, 20) and isinstance(caption, str) and caption
    assert made.about["words"] == "captions" and made.about["shift"] == 2.0
    captions = [made.row(i)[1] for i in range(25)]
    assert len(set(captions)) > 15
    own = tmp_path / "own.txt"
    own.write_text("a red square\n\n  a blue ring \n")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(SystemExit, match=r"empty.txt holds no captions: write one on each line"):
        make(shapes_run, tmp_path / "none", "--prompts", empty)
    other = make(shapes_run, tmp_path / "other", "--prompts", own)
    assert {other.row(i)[1] for i in range(25)} == {"a red square", "a blue ring"}


def test_a_killed_command_goes_on_and_the_bytes_are_the_same(tmp_path, digits):
    """Killed with -9 in a process of its own, at a moment when some shards are there."""
    whole, out = make(digits, tmp_path / "whole", "--number", 400), tmp_path / "killed"
    options = ["--steps", "4", "--number", "400", "--shard", "10"]
    command = [sys.executable, ROOT / "pairs.py", digits, "--out", out, *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while len(list(out.glob("*.safetensors"))) < 2:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list(out.glob("*.safetensors")))
    assert 2 <= left < 40
    with pytest.raises(ValueError, match=f"is not finished, {40 - left} of 40 shards are missing"):
        Pairs(out)
    before = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    again = make(digits, out, "--number", 400)
    for file in whole.files:
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())
    assert again.id == whole.id


def test_a_greater_number_adds_shards(tmp_path, digits):
    grown = make(digits, tmp_path / "grown", "--number", 20)
    first = [file.read_bytes() for file in grown.files]
    grown = make(digits, tmp_path / "grown", "--number", 40)
    whole = make(digits, tmp_path / "whole", "--number", 40)
    assert [file.read_bytes() for file in grown.files] == [f.read_bytes() for f in whole.files]
    assert [file.read_bytes() for file in grown.files][:2] == first and len(grown) == 40
    with pytest.raises(SystemExit, match="number 40 there, 30 here"):
        make(digits, tmp_path / "grown", "--number", 30)
    make(digits, tmp_path / "part", "--number", 25)
    with pytest.raises(SystemExit, match="number 25 there, 40 here"):  # its last shard is not full
        make(digits, tmp_path / "part", "--number", 40)


@pytest.mark.parametrize("options, message", [
    (["--cfg", 3], r"holds other pairs \(cfg 1.6 there, 3.0 here\): choose another"),
    (["--steps", 5, "--segments", 2], "--steps 5 must be a multiple of --segments 2"),
    (["--solver", "magic"], "--solver 'magic' must be one of"),
    (["--number", 0], "--number 0 must be at least 1"),
    (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is not there"),
    (["--prompts", __file__], "--prompts is for runs of train_t2i.py"),
])  # fmt: skip
def test_bad_options_end_in_one_line(tmp_path, digits, options, message):
    out = tmp_path / "pairs"
    make(digits, out)
    with pytest.raises(SystemExit, match=message) as stopped:
        make(digits, out, *options)
    assert "\n" not in str(stopped.value)


def test_pairs_that_are_not_there_or_broken(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match=r"holds no pairs.json: make it with pairs.py"):
        Pairs(tmp_path)
    made = make(digits, tmp_path / "pairs")
    whole = (made.folder / "pairs.json").read_text()
    for broken in ("", "{", "{}", "[]", whole.replace('"segments"', '"parts"')):
        (made.folder / "pairs.json").write_text(broken)
        with pytest.raises(ValueError, match=r"pairs.json is not what pairs.py writes"):
            Pairs(made.folder)
    (made.folder / "pairs.json").write_text(whole)
    made.files[1].write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"is broken: delete it, run pairs.py"):
        Pairs(tmp_path / "pairs").row(12)


# --- chapter 1 -----------------------------------------------------------------------------------


def test_batches_are_lines_between_the_pairs(tmp_path, digits):
    made = make(digits, tmp_path / "pairs", "--segments", 2)
    options = {"seed": 3, "distribution": "uniform", "shift": 1.0, "anneal": 0, "device": "cpu"}
    whole = PairBatches(made, 10, 25, segments=1, **options)[0]
    states, labels = made.all()
    order = [int((states[:, 0].float() == e).flatten(1).all(1).nonzero()) for e in whole.noise]
    assert sorted(order) == list(range(25))  # each pair once an epoch
    assert torch.equal(whole.data, states[order, -1].float())
    assert torch.equal(whole.labels, labels[order])
    pieces = PairBatches(made, 10, 25, segments=2, **options)[0]
    x = rf.interpolate(pieces.data, pieces.noise, torch.full((25,), 0.5))
    assert torch.allclose(x, states[order, 1].float(), atol=1e-4)  # both pieces pass there
    upper = pieces.t > 0.5
    assert 11 <= int(upper.sum()) <= 14
    assert torch.allclose(pieces.noise[upper], whole.noise[upper], atol=1e-4)
    assert torch.allclose(pieces.data[~upper], whole.data[~upper], atol=1e-4)


def test_annealing_begins_with_any_noise_and_ends_with_the_pairs(tmp_path, digits):
    made = make(digits, tmp_path / "pairs")
    options = {"seed": 3, "distribution": "uniform", "shift": 1.0, "segments": 1, "device": "cpu"}
    plain = PairBatches(made, 10, 25, anneal=0, **options)
    slow = PairBatches(made, 10, 25, anneal=4, **options)
    alike = []
    for step in range(5):
        a, b = plain[step], slow[step]
        assert torch.equal(a.data, b.data) and torch.equal(a.t, b.t)
        alike.append(float((a.noise * b.noise).mean()))
        assert abs(float(b.noise.std()) - 1) < 0.03
    assert alike == pytest.approx([0, 0.66, 0.87, 0.97, 1], abs=0.03)  # √(1 − (1 − step/4)²)


def reflow(out, made, digits, *options):
    told = ["--pairs", made.folder, "--init", digits, "--steps", 12, "--batch-size", 4]
    told += ["--device", "cpu", "--sample-steps", 2, "--checkpoint-every", 5, "--out", out]
    told += options
    train_mnist.main([str(x) for x in told])


def test_training_on_pairs_resumes_like_any_other(tmp_path, digits, monkeypatch):
    made = make(digits, tmp_path / "pairs")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reflow(whole, made, digits)
    original = train_mnist.train_step

    def dies(run, *rest):
        if run.step == 8:
            raise Killed
        original(run, *rest)

    monkeypatch.setattr(train_mnist, "train_step", dies)
    with pytest.raises(Killed):
        reflow(killed, made, digits)
    monkeypatch.setattr(train_mnist, "train_step", original)
    train_mnist.main(["--resume", "--out", str(killed), "--device", "cpu"])
    a, b = checkpoint(whole), checkpoint(killed)
    assert_equal(a, b)
    run = a["settings"]
    assert (run["time"], run["cfg"], run["preset"]) == ("u_shaped", 1.0, "small")
    assert (whole / "log.csv").read_text() == (killed / "log.csv").read_text()


def test_training_begins_with_the_weights_of_init(tmp_path, digits, monkeypatch):
    made, seen = make(digits, tmp_path / "pairs"), []
    monkeypatch.setattr(
        train_mnist, "train_step", lambda run, *rest: seen.append(run.model.state_dict())
    )
    reflow(tmp_path / "run", made, digits, "--steps", 1)
    assert_equal(dict(seen[0]), dict(load_model(digits).state_dict()))


def test_the_loss_on_pairs_falls_below_that_on_any_noise(tmp_path, digits):
    """Reflow in closed form: on its own pairs a flow's target is a function of the noise."""
    made = make(digits, tmp_path / "pairs")
    reflow(tmp_path / "run", made, digits, "--steps", 200, "--batch-size", 25, "--lr", 3e-3)
    model, (states, labels) = load_model(tmp_path / "run"), made.all()
    states, text = states.float(), torch.eye(11)[labels][:, None]
    t = torch.full((25,), 0.9)
    how = {"t": t, "noise": states[:, 0]}
    with torch.no_grad():
        own = rf.rf_loss(model, states[:, 1], text, **how).mean()
        any_noise = rf.rf_loss(model, states[:, 1].roll(1, 0), text, **how).mean()
    assert float(own) < 0.5 * float(any_noise)


@pytest.mark.parametrize("options, message", [
    (["--segments", 2], "--segments 2 must divide --pairs' 1"),
    (["--shift", 2], "--shift 2.0 must be that of --pairs, 1.0"),
    (["--anneal", 2], r"--anneal 2.0 must lie in \[0, 1\]"),
    (["--time", "noon"], "--time 'noon' must be one of"),
    (["--loss", "mae"], "--loss 'mae' must be one of"),
    (["--init", "nowhere"], "--init nowhere holds no config.json"),
    (["--residual", "auraflow"], "--init .* holds another network"),
])  # fmt: skip
def test_bad_options_of_training_end_in_one_line(tmp_path, digits, options, message):
    made = make(digits, tmp_path / "pairs")
    with pytest.raises(SystemExit, match=message) as stopped:
        reflow(tmp_path / "run", made, digits, *options)
    assert "\n" not in str(stopped.value)


def test_a_run_is_not_started_on_top_of_its_beginning(tmp_path, digits):
    made = make(digits, tmp_path / "pairs")
    with pytest.raises(SystemExit, match="--init starts another run: drop --resume, and give it"):
        reflow(digits, made, digits, "--overwrite")
    assert (digits / "model.safetensors").exists()
    reflow(tmp_path / "run", made, digits)
    with pytest.raises(SystemExit, match="--init starts another run"):
        reflow(tmp_path / "run", made, digits, "--resume")


def test_a_run_is_not_resumed_on_other_pairs(tmp_path, digits):
    made = make(digits, tmp_path / "pairs", "--number", 20)
    reflow(tmp_path / "run", made, digits)
    resume = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]
    other = make(digits, tmp_path / "other", "--seed", 1)
    with pytest.raises(SystemExit, match=r"is not what the run in .* is trained on"):
        train_mnist.main([*resume, "--pairs", str(other.folder)])
    make(digits, tmp_path / "pairs", "--number", 40)  # the same folder, grown
    with pytest.raises(SystemExit, match=r"is not what the run in .* is trained on"):
        train_mnist.main(resume)


def test_pairs_of_other_images_are_refused(tmp_path, digits, image_folder):
    made = make(digits, tmp_path / "pairs")
    told = ["--pairs", made.folder, "--dataset", "folder", "--data-dir", image_folder, "--size",
            28, "--out", tmp_path / "run", "--device", "cpu"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"are of images \[1, 28, 28\], the data set's are \[3,"):
        train_mnist.main([str(x) for x in told])


def test_a_distilled_run_is_drawn_in_its_own_steps(tmp_path, digits):
    made = make(digits, tmp_path / "pairs", "--segments", 2)
    told = ["--pairs", made.folder, "--init", digits, "--out", tmp_path / "run"]
    for options, steps in ((["--time", "start"], 1), (["--segments", 2], 2), ([], 24)):
        given = [str(x) for x in (*told, *options)]
        args = train_mnist.build_parser().parse_args(given)
        assert train_mnist.resolve(args, torch.device("cpu")).sample_steps == steps


def test_an_older_checkpoint_keeps_its_time_and_loss(tmp_path, digits):
    """Runs from before these options had logit-normal time, squared error and no pairs."""
    out, options = tmp_path / "run", ("--steps", 4, "--batch-size", 4, "--dataset", "glyphs")
    told = [*options, "--preset", "small", "--out", out, "--device", "cpu", "--sample-steps", 1]
    train_mnist.main([str(x) for x in told])
    state = checkpoint(out)
    for key in train_mnist.OLDER:
        del state["settings"][key]
    torch.save(state, out / "checkpoint.pt")
    resume = ["--resume", "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit, match="--time uniform differs from the run"):
        train_mnist.main([*resume, "--time", "uniform"])
    train_mnist.main(resume)


def test_pairs_of_the_other_chapter_are_refused(tmp_path, shapes_run, digits):
    made = make(shapes_run, tmp_path / "pairs")
    with pytest.raises(SystemExit, match=r"has captions: train_t2i.py takes them"):
        reflow(tmp_path / "run", made, digits)


# --- chapter 2 -----------------------------------------------------------------------------------


def test_the_row_of_pairs_is_shared_out_among_ranks(tmp_path, shapes_run):
    made = make(shapes_run, tmp_path / "pairs", "--segments", 4)
    text = HashText(tokens=12)
    samples = PairSamples(made, text, seed=1, segments=4)
    train = len(made) - made.held
    assert made.held == 2 and train == 23
    whole = samples.__getitems__(list(range(train)))
    starts = torch.stack([made.row(i)[0][0].flatten() for i in range(train)])
    first = whole.t > rf.timesteps(4, shift=2.0)[1]  # the first piece begins in the noise itself
    assert 5 <= int(first.sum()) <= 7
    assert torch.cdist(whole.noise[first].flatten(1), starts).min(1).values.max() < 1e-2
    for rank in range(2):
        positions = next(iter(RankPositions(0, 4, rank, 2)))
        mine = samples.__getitems__(positions)
        for key in ("images", "noise", "t", "text"):
            assert torch.equal(getattr(mine, key), getattr(whole, key)[positions])
    held = PairSamples(made, text, seed=1, segments=4, held=True).__getitems__([0, 1])
    assert held.t.tolist() == [0.0, 1 / 8]
    assert torch.allclose(held.images[0], made.row(23)[0][-1], atol=1e-5)  # t = 0 is the data


def test_a_file_names_its_captions_beside_its_states(tmp_path, shapes_run):
    made = make(shapes_run, tmp_path / "pairs")
    with safe_open(made.files[0], "pt") as file:
        assert list(file.keys()) == ["states"] and "captions" in file.metadata()
    assert os.listdir(made.folder).count("pairs.json") == 1
