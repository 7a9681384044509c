"""train_t2i.py on pairs: what a run takes from them, that it resumes exactly, what is refused."""

import json

import pytest
import torch
from test_pairs import SHAPES_RUN, make, run_of
from test_train_t2i import arguments, quiet_signals, rows, train  # noqa: F401

import train_t2i
import zero
from data_t2i import encode
from mmdit import PRESETS, load_model
from options_t2i import resolve, settings

SHORT = ("--samples", 48, "--eval-every-samples", 24, "--save-every-samples", 24, "--batch-size", 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("first") / "run", PRESETS["tiny"], SHAPES_RUN)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return make(run, tmp_path_factory.mktemp("pairs") / "pairs", "--segments", 4, "--number", 60)


def settings_of(out):
    newest = zero.checkpoints(out / "checkpoints")[-1]
    return json.loads((newest / "ema_0.05" / "config.json").read_text())["run"]


def test_a_run_on_pairs_takes_world_and_shift_from_them(tmp_path, run, made):
    options = ("--pairs", made.folder, "--init", run, "--segments", 4, "--time", "start")
    out = train(tmp_path / "run", *SHORT, *options)
    told = settings_of(out)
    assert (told["cfg"], told["shift"], told["segments"], told["sample_steps"]) == (1.0, 2.0, 4, 4)
    assert (told["time"], told["shapes"], told["pairs_id"]) == ("start", 4, made.id)
    assert {"mean", "loss", "color_attr"} <= set(rows(out / "eval.csv")[-1])
    newest = zero.checkpoints(out / "checkpoints")[-1]
    assert load_model(newest / "ema_0.05").config == load_model(run).config


def test_training_on_pairs_resumes_exactly(tmp_path, run, made, monkeypatch):
    options = (*SHORT, "--pairs", made.folder, "--init", run, "--loss", "pseudo_huber")
    whole = train(tmp_path / "whole", *options)
    original = train_t2i.Run.end_step

    def stops(self):
        original(self)
        if self.step == 3:
            self.wishes._heard(15, None)

    monkeypatch.setattr(train_t2i.Run, "end_step", stops)
    parted = train(tmp_path / "parted", *options)
    assert settings_of(parted)["samples_seen"] < 48
    monkeypatch.setattr(train_t2i.Run, "end_step", original)
    train_t2i.launch(arguments(parted, *SHORT, "--resume", "auto"))
    assert (whole / "log.csv").read_text() == (parted / "log.csv").read_text()
    for width in ("ema_0.05", "ema_0.10"):
        a, b = (
            load_model(zero.checkpoints(out / "checkpoints")[-1] / width).state_dict()
            for out in (whole, parted)
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_is_that_of_the_line_between_the_pair(tmp_path, run, made, monkeypatch):
    """The batch that reaches the loss: noise − data is noise − what the model made of it."""
    seen = []

    def spy(batch, *rest):
        found = encode(batch, *rest)
        seen.append(found)
        return found

    monkeypatch.setattr(train_t2i, "encode", spy)
    train(tmp_path / "run", *SHORT, "--samples", 8, "--pairs", made.folder, "--init", run)
    data, text, t, noise = seen[0]
    ends = [made.row(i)[0] for i in range(len(made))]
    starts = torch.stack([states[0].flatten() for states in ends])
    for d, e in zip(data, noise, strict=True):
        k = int((starts - e.flatten()).abs().sum(1).argmin())
        assert torch.equal(ends[k][0], e) and torch.equal(ends[k][-1], d)
    assert text.shape == (8, 12, 128) and t.dtype == torch.float32


def test_captions_of_ones_own_have_a_loss_and_pictures_but_no_score(tmp_path, run):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue ring\n")
    made = make(run, tmp_path / "pairs", "--prompts", prompts)
    out = train(tmp_path / "run", *SHORT, "--pairs", made.folder, "--init", run)
    assert "mean" not in rows(out / "eval.csv")[-1] and (out / "samples.png").exists()


@pytest.mark.parametrize("options, message", [
    (["--segments", 3], "--segments 3 must divide --pairs' 4"),
    (["--shift", 1], "--shift 1.0 must be that of --pairs, 2.0"),
    (["--data", "x"], "--pairs and --data exclude each other"),
    (["--time", "noon"], "--time 'noon' must be one of"),
    (["--sample-steps", 0], "--sample-steps 0 must be at least 1"),
    (["--size", 32], "--size 32 does not fit --pairs .*, made with 20: drop it"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, made, options, message):
    with pytest.raises(ValueError, match=message):
        resolve(arguments(tmp_path / "run", "--pairs", made.folder, *options), None)


def test_another_folder_of_pairs_does_not_resume(tmp_path, run, made):
    saved = resolved_settings(tmp_path, "--pairs", made.folder)
    other = make(run, tmp_path / "other", "--seed", 1)
    for older, given in ((saved, other.folder), (saved | {"pairs_id": None}, made.folder)):
        with pytest.raises(ValueError, match=r"is not what the run in .* is trained on"):
            resolve(arguments(tmp_path / "run", "--pairs", given), {"settings": older})
    with pytest.raises(ValueError, match="exclude each other"):
        older = saved | {"data": ["x"], "pairs": None}
        resolve(arguments(tmp_path / "run", "--pairs", made.folder), {"settings": older})


def test_an_older_record_keeps_its_time(tmp_path):
    saved = resolved_settings(tmp_path)
    for key in ("time", "loss", "segments", "pairs_id", "pairs", "sample_steps"):
        del saved[key]
    with pytest.raises(ValueError, match="--time uniform differs from the run to resume"):
        resolve(arguments(tmp_path / "run", "--time", "uniform"), {"settings": saved})
    args = arguments(tmp_path / "run")
    resolve(args, {"settings": saved})
    assert (args.time, args.loss, args.sample_steps) == ("logit_normal", "mse", 20)


def resolved_settings(tmp_path, *options):
    args = arguments(tmp_path / "run", *options)
    resolve(args, None)
    return settings(args)


def test_segments_without_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--segments 2 is for training on --pairs"):
        resolve(arguments(tmp_path / "run", "--segments", 2), None)
