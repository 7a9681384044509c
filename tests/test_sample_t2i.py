"""sample_t2i.py: the command line, from captions to pictures, scores and exports."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import DIGITS, SHAPES, call, close, exported, records, refused
from PIL import Image
from test_encoders import tiny_t5, tiny_vae
from torchvision.transforms.functional import pil_to_tensor

import sample_t2i
from common.auraflow import load_auraflow
from common.pipeline import Pipeline
from common.start import owned
from sample_t2i import Graphed, main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Exported weights of several runs."""
    home = tmp_path_factory.mktemp("home")
    exported(home / "shapes", SHAPES)
    exported(home / "other", SHAPES | {"steps": 3})
    exported(home / "richer", SHAPES | {"shapes": 6})
    exported(home / "digits", DIGITS)
    return home


def test_captions_become_pictures_the_same_twice(home, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n two stars for $10 \n")
    outs = [tmp_path / f"{name}.png" for name in "abcd"]
    how = [home / "shapes", "a red circle", "--prompts", prompts, "--steps", 2, "--images", 2]
    changes = [[], [], ["--seed", 1], ["--cfg", 1]]
    for out, change in zip(outs, changes, strict=True):
        call(main, *how, "--gif", "--out", out, *change)
    first, again, *others = [out.with_suffix(".gif").read_bytes() for out in outs]
    assert first == again and first not in others
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert str(outs[0]) in capsys.readouterr().out
    with Image.open(outs[0].with_suffix(".gif")) as gif:
        width, height = gif.size  # three rows of two pictures of 20 pixels, each with its frame
        assert gif.n_frames == 3 and width / height == 43 / 64
    call(main, *how, "--size", "12x20", "--gif", "--out", outs[1])
    with Image.open(outs[1].with_suffix(".gif")) as gif:
        assert gif.width / gif.height == 43 / 40


def test_prompts_are_read_once_and_a_gif_has_room(home, tmp_path, capsys):
    """As of <(…), which is empty when it is read again."""
    reader, writer = os.pipe()
    os.write(writer, b"a ring")
    os.close(writer)
    how = ["--steps", 1, "--images", 1, "--out", tmp_path / "a.png"]
    call(main, home / "shapes", "--prompts", f"/dev/fd/{reader}", *how)
    os.close(reader)
    many = [home / "shapes", "a ring", *how[:3], 10**4, *how[4:], "--gif"]
    said = refused(main, capsys, *many)
    assert "--gif: 10000 pictures of 20x20 are too many for one: drop it" in said


def shown(folder):
    """file name → its picture, of the pictures that are there."""
    return {f.name: pil_to_tensor(Image.open(f)).int() for f in sorted(folder.glob("*.png"))}


def told(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_caption_that_is_cut_is_named(home, tmp_path, capsys):
    """The run reads twelve words: from the thirteenth on nothing changes the picture."""
    words = ["a", "big"] * 6
    long = " ".join([*words, "ring"])
    call(main, home / "shapes", " ".join(words), long, "--out", tmp_path / "a.png", "--images", 1)
    assert f"{long!r} has 13 tokens, and the run reads 12: it is cut\n" in capsys.readouterr().out
    call(main, home / "shapes", " ".join(words), "--out", tmp_path / "b.png", "--images", 1)
    assert "it is cut" not in capsys.readouterr().out


def test_each_picture_stands_by_itself_with_its_caption(home, tmp_path, capsys):
    out, folder = tmp_path / "a.png", tmp_path / "a_pictures"
    captions, how = ["a red circle", "two stars"], ["--images", 2, "--size", "12x20", "--out", out]
    call(main, home / "shapes", *captions, *how, "--seed", 3)
    assert f"wrote {folder}\n" in capsys.readouterr().out
    pipeline = Pipeline.open(home / "shapes")
    each = [caption for caption in captions for _ in range(2)]
    wanted = pipeline.draw(each, pipeline.noise(3, range(4), "12x20"))
    names = ["00000-0000.png", "00000-0001.png", "00001-0000.png", "00001-0001.png"]
    found = shown(folder)
    assert list(found) == names and torch.equal(torch.stack([*found.values()]), wanted.int())
    rows = told(folder)
    assert [(row["file_name"], row["text"]) for row in rows] == [*zip(names, each, strict=True)]
    for row in rows:
        assert (row["seed"], row["cfg"], row["steps"], row["size"]) == (3, 3.0, 2, [3, 12, 20])
        assert row["model"] == pipeline.origin
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    call(main, home / "shapes", *captions, *how, "--seed", 3)  # the same command again
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "mine-1.png").write_bytes(b"mine")
    call(main, home / "shapes", "a ring", "--images", 1, "--out", out)  # fewer: no old one stays
    assert {f.name for f in folder.iterdir()} - {"mine-1.png"} == {
        "made_by.txt",
        "metadata.jsonl",
        names[0],
    }
    assert [row["text"] for row in told(folder)] == ["a ring"]
    assert (folder / "mine-1.png").read_bytes() == b"mine"


def test_no_picture_goes_into_the_folder_of_another(home, tmp_path, capsys):
    folder = tmp_path / "a_pictures"
    folder.mkdir()
    (folder / "00000-0000.png").write_bytes(b"mine")
    for run in (home / "shapes", tmp_path / "nowhere"):  # before a network is loaded
        said = refused(main, capsys, run, "a ring", "--out", tmp_path / "a.png")
        assert f"--out: the folder {folder} holds other files: sample_t2i.py needs a new" in said
    assert (folder / "00000-0000.png").read_bytes() == b"mine" and not (tmp_path / "a.png").exists()


def test_a_drawing_that_fails_leaves_the_pictures_before_it(home, tmp_path, capsys, monkeypatch):
    how = [home / "shapes", "--images", 1, "--out", tmp_path / "a.png"]
    call(main, *how, "a ring")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def failed(*args, **how):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(Pipeline, "draw", failed)
    assert "not finite" in refused(main, capsys, *how, "a star")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_parts_fill_one_folder(home, tmp_path, capsys, monkeypatch):
    """File for file what one process draws: a picture has the noise of its number in the whole."""
    captions = ["a ring", "two stars", "a red circle", "a square", "a blue ring"]
    how = [home / "shapes", *captions, "--images", 2, "--out"]
    call(main, *how, tmp_path / "whole.png")
    parts, folder = tmp_path / "parts.png", tmp_path / "parts_pictures"
    for part in ("2/3", "0/3"):
        call(main, *how, parts, "--part", part)
    wanted = shown(tmp_path / "whole_pictures")
    assert shown(folder).keys() == {name for name in wanted if name[4] in "023"}
    call(main, *how, parts, "--part", "1/3")
    call(main, *how, parts, "--part", "7/9")  # more parts than captions
    assert "--part 7/9 has none of the 5 captions" in capsys.readouterr().out
    found = shown(folder)
    assert found.keys() == wanted.keys() and len(found) == 10
    for name, picture in found.items():
        assert (picture - wanted[name]).abs().max() <= 1
    assert told(folder) == told(tmp_path / "whole_pictures") and not parts.exists()  # no sheet
    for other in (["--seed", 1], ["--cfg", 1], ["a triangle"], ["--images", 3]):
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "draw", None)  # refused before hours of drawing
            said = refused(main, capsys, *how, parts, "--part", "0/3", *other)
        assert f"{folder} holds pictures of another command: choose another --out" in said
    assert len(shown(folder)) == 10
    with owned(folder, "sample_t2i.py", shared=True):  # another part draws
        call(main, *how, parts, "--part", "1/3")
        assert "is in use by another process" in refused(main, capsys, *how, parts)
    with owned(folder, "sample_t2i.py"):
        said = refused(main, capsys, *how, parts, "--part", "1/3")
        assert f"--out: the folder {folder} is in use by another process" in said
    call(main, *how, parts, "--seed", 1)  # one process replaces them all
    assert {row["seed"] for row in told(folder)} == {1} and parts.exists()


def test_a_part_does_not_delete_what_another_command_drew_meanwhile(
    home, tmp_path, capsys, monkeypatch
):
    how, draw = [home / "shapes", "a ring", "a star", "--out", tmp_path / "a.png"], Pipeline.draw

    def meanwhile(*args, **options):
        monkeypatch.setattr(Pipeline, "draw", draw)
        call(main, *how, "--part", "1/2", "--cfg", 5)
        return draw(*args, **options)

    monkeypatch.setattr(Pipeline, "draw", meanwhile)
    said = refused(main, capsys, *how, "--part", "0/2", "--cfg", 2)
    assert "has become that of another command" in said
    folder = tmp_path / "a_pictures"
    assert {row["cfg"] for row in told(folder)} == {5} and {n[4] for n in shown(folder)} == {"1"}


def test_a_size_that_does_not_fit_leaves_nothing(home, tmp_path, capsys):
    said = refused(main, capsys, home / "shapes", "a", "--size", 18, "--out", tmp_path / "a.png")
    assert "18x18 must be a multiple of patch_size" in said and not [*tmp_path.iterdir()]


def test_only_pictures_of_ours_are_replaced(home, tmp_path):
    call(main, home / "shapes", "a ring", "--images", 1, "--out", tmp_path / "a.png")
    mine = tmp_path / "a_pictures" / "00099-0000.png"
    Image.new("RGB", (4, 4)).save(mine)
    call(main, home / "shapes", "a star", "--images", 1, "--out", tmp_path / "a.png")
    assert mine.exists()


def test_runs_are_scored_at_several_numbers_of_steps(home, tmp_path, capsys):
    out = tmp_path / "score.png"
    how = ["--score", "--against", home / "other", "--per-tag", 2, "--out", out]
    call(main, home / "shapes", *how, "--at-steps", 1, 2)
    rows = records(out.with_suffix(".csv"))
    wanted = [(str(home / name), n) for name in ("shapes", "other") for n in "12"]
    assert [(row["run"], row["steps"]) for row in rows] == wanted
    said, mean = capsys.readouterr().out, float(rows[3]["mean"])
    assert f"{home}/other, 2 steps" in said and f"mean           {mean:.3f}" in said
    assert out.exists()
    call(main, home / "shapes", *how)  # each its own number of steps, written anew
    assert [row["steps"] for row in records(out.with_suffix(".csv"))] == ["2", "3"]
    for run in ("digits", "richer"):
        said = refused(main, capsys, home / "shapes", "--score", "--against", home / run)
        assert re.search(rf"{home / run}(, of World.* must be| was not trained on shapes)", said)


def test_the_network_is_exported(home, tmp_path, capsys):
    export = [home / "shapes", "--export", "weights", tmp_path]
    call(main, *export, "--device", "cuda")  # as they are, not rounded for a GPU
    assert "holds an export already: choose a new folder" in refused(main, capsys, *export)
    ours = tmp_path / "with git"
    (ours / ".git").mkdir(parents=True)
    (ours / "made_by.txt").write_text("sample_t2i.py --export")  # it was killed
    call(main, *export[:-1], ours)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (home / "shapes" / name).read_bytes()
    run = exported(tmp_path / "run", SHAPES | {"residual": "auraflow", "patch_size": 2})
    call(main, run, "--export", "diffusers", tmp_path / "diffusers")
    again = load_auraflow(tmp_path / "diffusers")
    close(again.state_dict(), Pipeline.open(run).model.state_dict(), atol=0, rtol=0)
    run = exported(tmp_path / "pixels", SHAPES | {"residual": "auraflow"})  # patches of 4 x 4
    call(main, run, "--export", "diffusers", tmp_path / "four")
    again, ours = load_auraflow(tmp_path / "four"), Pipeline.open(run).model
    close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)
    assert (again.config.patch_size, again.config.in_channels) == (4, 3)
    file = tmp_path / "four" / "config.json"
    for patch in ("4", 0, 5):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": patch}))
        with pytest.raises(ValueError, match=f"config.json says patch_size {patch!r}, the weights"):
            load_auraflow(tmp_path / "four")


def test_a_killed_export_leaves_nothing_that_counts(home, tmp_path, monkeypatch):
    export = [home / "shapes", "--export", "weights", tmp_path / "out"]

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_t2i, "os", SimpleNamespace(replace=killed))
        patch.setattr(sample_t2i, "shutil", SimpleNamespace(rmtree=lambda *args, **how: None))
        with pytest.raises(SystemExit):
            call(main, *export)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"made_by.txt", ".part"}
    call(main, *export)
    names = {"made_by.txt", "model.safetensors", "config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_a_whole_pipeline_goes_out_and_comes_in(tmp_path):
    """Text encoder, VAE and network; what comes in is drawn as it went out."""
    encoders = {"vae": tiny_vae(tmp_path / "vae"), "text_encoder": tiny_t5(tmp_path / "t5")}
    encoders |= {"text_tokens": 256, "residual": "auraflow", "patch_size": 2, "size": 16}
    run = exported(tmp_path / "run", SHAPES | encoders)
    call(main, run, "--export", "diffusers", tmp_path / "pipeline")
    how = ["--size", 16, "--steps", 2, "--cfg", 2, "--shift", 1, "--images", 1]
    call(main, run, "a red ring", *how, "--out", tmp_path / "a.png")
    call(main, tmp_path / "pipeline", "--auraflow", "a red ring", *how, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "args, message",
    [
        (["shapes"], "no caption given: write one in quotes, or give --prompts FILE"),
        (["shapes", "--prompts", "nowhere.txt"], "--prompts nowhere.txt is not there: give a text"),
        (["x", "--auraflow", "--export", "weights", "o"], "--auraflow is a release and no run of"),
        (["shapes", "a ring", "--part", "2/2"], "--part 2/2 must be i/n with 0 ≤ i < n, such as"),
        (
            ["shapes", "a ring", "--part", "1/2", "--gif"],
            "--part 1/2 shares captions: drop --score",
        ),
        (
            ["shapes", "--score", "--part", "0/2"],
            "shares captions: drop --score, --export, --gif and --nearest",
        ),
        (["shapes", "a ring", "--device", "cuda:99"], "'cuda:99' is not here; this machine has: "),
        (["shapes", "--score", "--size", 8], "pictures of the run's own size: drop --size 8"),
        (["shapes", "--score", "--at-steps", 1, "--steps", 2], "takes the place of --steps: drop"),
        (["shapes", "--score", "--at-steps", 1, 0], "--at-steps 0 must be at least 1"),
        (["nowhere", "a ring"], "holds no weights: train it first, or give another run"),
        (["digits", "ten"], "'ten' is no word of this model; it knows: 0, 1, 2"),
        (["shapes", "a ring", "--nearest"], "--data shapes is no collection of pictures"),
        (["shapes", "--score", "--nearest"], "--nearest is for pictures of captions: drop --score"),
        (["shapes", "--export", "gguf", "x"], "--export gguf x must be weights or diffusers, OUT"),
        (["shapes", "--export", "weights"], "--export weights must be weights or diffusers, OUT"),
        (["shapes", "--export", "diffusers", "x"], "residual 'prenorm' is not AuraFlow's"),
        (["shapes", "a ring", "--cudagraphs"], "--cudagraphs needs a CUDA device, not cpu"),
    ],
)
def test_wrong_input_ends_in_one_line(home, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    run, *rest = args
    rest = rest if "--device" in rest else [*rest, "--device", "cpu"]
    assert message in refused(main, capsys, home / run, *rest)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_graph_draws_what_the_network_draws(home):
    pipeline = Pipeline.open(home / "shapes", "cuda")
    graphed = replace(pipeline, model=Graphed(pipeline.model))
    for seed, n in enumerate((2, 3, 2)):  # two shapes, and one of them again
        noise, captions = pipeline.noise(seed, range(n)), ["a ring", "two stars", "a square"]
        wanted = pipeline.draw(captions[-n:], noise, solver="heun")
        close(graphed.draw(captions[-n:], noise, solver="heun"), wanted, atol=1, rtol=0)
    assert len(graphed.model.captured) == 2
