"""sample_t2i.py: finding weights, drawing, scoring, and the command line."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import rf
import sample_t2i
import shapes
from encoders import HashText, Pixels
from mmdit import PRESETS, MMDiT, MMDiTConfig, save_model
from sample_t2i import draw, find_weights, fixed_noise, obeyed, scores, shapes_prompts
from shapes import World

RUN = {
    "text_encoder": "hash", "text_tokens": 12, "vae": "pixels", "size": 20, "shapes": 4,
    "colors": 6, "places": 10, "cfg": 2.0, "shift": 2.0,
}  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """A run with two checkpoints of random weights, each with two averages."""
    torch.manual_seed(0)
    model = MMDiT(PRESETS["tiny"])
    torch.nn.init.normal_(model.final.weight, std=0.02)
    for samples in (40, 80):
        for width in ("0.05", "0.10"):
            folder = tmp_path / "run" / "checkpoints" / f"{samples:012d}" / f"ema_{width}"
            save_model(folder, model, run=RUN | {"samples_seen": samples})
    return tmp_path / "run"


def main(*args):
    sample_t2i.main([str(a) for a in args])


# --- drawing -------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_place_alone():
    a = fixed_noise(5, (3, 4, 4), seed=0)
    assert torch.equal(a[:2], fixed_noise(2, (3, 4, 4), seed=0))
    assert not torch.equal(a, fixed_noise(5, (3, 4, 4), seed=1))
    assert a.flatten(1).unique(dim=0).shape[0] == 5 and abs(a.std() - 1) < 0.15


def test_draw_follows_the_flow_in_batches_of_any_size():
    """On the field v = (x − c)/t every path ends in c: here a grey that the caption tells."""
    text = HashText(8, 4)
    greys = {"dark": -0.5, "light": 0.5, "": 0.0}
    features = text(list(greys))

    def model(x, t, words):
        near = (words[:, None] - features[None]).flatten(2).norm(dim=2).argmin(1)
        grey = torch.tensor(list(greys.values()))[near]
        return (x - grey[:, None, None, None]) / t[:, None, None, None]

    captions = ["dark", "light", "light", "dark", "dark"]
    noise = fixed_noise(5, (3, 4, 4), seed=0)
    options = {"text": text, "image": Pixels(), "steps": 4}
    pictures = draw(model, captions, noise, batch=2, **options)
    expected = Pixels().decode(torch.tensor([greys[c] for c in captions]))
    assert pictures.dtype == torch.uint8
    assert (pictures == expected[:, None, None, None]).all()
    guided = draw(model, captions, noise, cfg=1.5, **options)  # 0 + 1.5·(grey − 0)
    expected = Pixels().decode(1.5 * torch.tensor([greys[c] for c in captions]))
    assert (guided == expected[:, None, None, None]).all()
    path = draw(model, captions, noise, batch=2, return_trajectory=True, **options)
    assert path.shape == (5, 5, 3, 4, 4) and torch.equal(path[-1], pictures)


# --- score ---------------------------------------------------------------------------------------


def test_true_pictures_score_one_and_exchanged_ones_do_not():
    world = World(20, 4, 6, 10)
    prompts = shapes_prompts(world, 20)
    assert [m.tag for m, _ in prompts[::20]] == list(shapes.TAGS)
    assert all(shapes.held_out(*prompt) for prompt in prompts)
    rng = np.random.default_rng(0)
    pictures = torch.stack(
        [
            torch.from_numpy(shapes.render(shapes.draw_scene(m, rng, world), 20, rng))
            for m, _ in prompts
        ]
    )
    result = scores(prompts, obeyed(pictures, prompts))
    assert list(result) == [*shapes.TAGS, "mean"] and result["mean"] > 0.98
    exchanged = scores(prompts, obeyed(pictures.roll(20, 0), prompts))  # another tag's pictures
    assert exchanged["mean"] < 0.25


def test_the_mean_is_of_the_six_tags():
    prompts = shapes_prompts(World(20, 4, 6, 10), 2)
    obeys = [True, True, True, False] + [False] * 8
    result = scores(prompts, obeys)
    assert result["single_object"] == 1 and result["two_object"] == 0.5
    assert result["mean"] == pytest.approx(1.5 / 6)


def test_a_model_taught_with_bytes_is_told_bytes(tmp_path):
    form = {"tokens": 12, "dim": 128, "bits": 8, "reach": 0.25}
    save_model(tmp_path / "run", MMDiT(PRESETS["tiny"]), run=RUN | {"text_format": form})
    painter = sample_t2i.Painter.of_run(tmp_path / "run", torch.device("cpu"))
    plain, told = HashText(tokens=12)(["a red ring"]), painter.text(["a red ring"])
    assert told.shape == plain.shape and told.abs().max() <= 0.25 < plain.abs().max()
    assert (told - plain.clamp(-0.25, 0.25)).abs().max() <= 0.25 / 255 + 1e-6


def test_captions_may_hold_dollars(tmp_path):
    sample_t2i.captioned_grid(
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        ["$10 #1 and $20", "win $$$"],
        tmp_path / "a.png",
    )
    assert (tmp_path / "a.png").exists()


# --- weights -------------------------------------------------------------------------------------


def test_a_run_means_its_newest_narrowest_average(weights):
    newest = weights / "checkpoints" / f"{80:012d}"
    assert find_weights(weights) == newest / "ema_0.05"
    assert find_weights(weights, "0.10") == newest / "ema_0.10"
    assert find_weights(newest) == newest / "ema_0.05"
    assert find_weights(newest / "ema_0.10") == newest / "ema_0.10"
    with pytest.raises(FileNotFoundError, match=r"no weights ema_0.2: it holds ema_0.05"):
        find_weights(weights, "0.2")
    with pytest.raises(FileNotFoundError, match="train one first"):
        find_weights(weights / "nowhere")


# --- command line --------------------------------------------------------------------------------


def test_prompts_become_pictures_the_same_twice(weights, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n two stars \n")
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--prompts", prompts, "--steps", 2, "--images", 2, "--gif"]
    main(weights, "a red circle", *options, "--out", first)
    main(weights, "a red circle", *options, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    main(weights, "a red circle", *options, "--out", second, "--seed", 1)
    assert first.read_bytes() != second.read_bytes()
    with Image.open(first.with_suffix(".gif")) as gif:
        assert gif.n_frames == 3
    assert str(first) in capsys.readouterr().out


def test_the_score_is_printed_for_each_tag(weights, tmp_path, capsys):
    out = tmp_path / "score.png"
    main(weights, "--score", "shapes", "--per-tag", 2, "--steps", 1, "--out", out)
    said = capsys.readouterr().out
    assert all(tag in said for tag in (*shapes.TAGS, "mean")) and out.exists()


METADATA = [
    {"tag": "two_object", "include": [{"class": "ring", "count": 1}], "prompt": "a ring, a star"},
    {"tag": "colors", "include": [{"class": "star", "color": "red"}], "prompt": "a red star"},
    {"tag": "counting", "include": [{"class": "circle", "count": 3}], "prompt": "three circles"},
]


def test_geneval_gets_its_folders_and_goes_on_where_it_stopped(weights, tmp_path, monkeypatch):
    metadata, out = tmp_path / "metadata.jsonl", tmp_path / "geneval"
    metadata.write_text("\n".join(map(json.dumps, METADATA)))
    drawn, original = [], sample_t2i.draw

    def counted(model, captions, *rest, **options):
        drawn.extend(captions)
        return original(model, captions, *rest, **options)

    monkeypatch.setattr(sample_t2i, "draw", counted)
    options = ["--geneval", metadata, "--steps", 1, "--batch", 5]
    main(weights, *options, "--out", out)
    files = sorted(p.relative_to(out) for p in out.rglob("*.png"))
    assert [str(f) for f in files] == [
        f"{k:05d}/samples/{i:04d}.png" for k in range(3) for i in range(4)
    ]
    for k, row in enumerate(METADATA):  # as the evaluator reads it
        assert json.loads((out / f"{k:05d}" / "metadata.jsonl").read_text()) == row
    assert drawn == [row["prompt"] for row in METADATA for _ in range(4)]
    before = {f: (out / f).read_bytes() for f in files}
    assert len(set(before.values())) == 12
    for f in (files[2], files[9]):
        (out / f).unlink()
    drawn.clear()
    main(weights, *options, "--out", out)
    assert drawn == ["a ring, a star", "three circles"]
    assert {f: (out / f).read_bytes() for f in files} == before
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(METADATA[0]))
    for changed in (["--seed", 1], ["--ema", "0.10"], ["--geneval", other]):
        with pytest.raises(SystemExit, match="was begun with"):
            main(weights, *options, "--out", out, *changed)


def tiny_chat(folder, template):
    """A random Llama of one layer that knows eight words; its folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "ring", "with", "stars"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} a{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [True, False])
def test_prompts_are_rewritten_and_both_are_kept(weights, tmp_path, template):
    model, out = tiny_chat(tmp_path / "chat", template), tmp_path / "out.png"
    main(weights, "a ring", "--enhance", model, "--steps", 1, "--images", 1, "--out", out)
    (pair,) = json.loads(out.with_suffix(".json").read_text())
    assert pair["prompt"] == "a ring" and pair["enhanced"] not in ("", "a ring")
    plain = tmp_path / "plain.png"
    main(weights, pair["enhanced"], "--steps", 1, "--images", 1, "--out", plain)
    assert plain.read_bytes() == out.read_bytes()  # the rewritten one was drawn
    assert sample_t2i.Enhancer.ASK not in pair["enhanced"]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(json.dumps(METADATA[1]))
    options = ["--geneval", metadata, "--enhance", model, "--steps", 1, "--images", 1]
    main(weights, *options, "--out", tmp_path / "geneval")
    folder = tmp_path / "geneval" / "00000"
    assert json.loads((folder / "metadata.jsonl").read_text()) == METADATA[1]
    assert (folder / "enhanced.txt").read_text()


def test_wrong_metadata_and_missing_models_say_so(weights, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"tag": "colors"}')
    (tmp_path / "half.jsonl").write_text('{"prompt"')
    out = ["--out", tmp_path / "out"]
    for args, reason in (
        (["--geneval", tmp_path / "none.jsonl", *out], "is not there"),
        (["--geneval", tmp_path / "bad.jsonl", *out], "line 2 has no prompt"),
        (["--geneval", tmp_path / "half.jsonl", *out], "is not JSON lines"),
        (["--geneval", tmp_path / "bad.jsonl"], "give a folder as --out, not out.png"),
        (["a ring", "--enhance", tmp_path], f"--enhance {tmp_path} could not be loaded"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(weights, *args)
        assert reason in caught.value.code and "\n" not in caught.value.code
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        main(weights, "a ring", "--enhance", "some/model")


@pytest.mark.parametrize(
    "args, match",
    [
        ([], "no prompt given: write one in quotes, or give --prompts FILE"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is not there"),
        (["a ring", "--steps", "0"], "--steps 0 must be at least 1"),
        (["a ring", "--solver", "rk45"], "--solver 'rk45' must be one of euler, heun"),
        (["a ring", "--ema", "0.3"], "no weights ema_0.3"),
    ],
)
def test_wrong_input_ends_in_one_line(weights, args, match):
    with pytest.raises(SystemExit) as caught:
        main(weights, *args)
    assert match in caught.value.code and "\n" not in caught.value.code


def test_weights_of_another_script_are_refused(tmp_path):
    model = MMDiT(PRESETS["tiny"])
    save_model(tmp_path, model)
    with pytest.raises(SystemExit, match=r"was not written by train_t2i.py"):
        main(tmp_path, "a ring")
    assert json.loads((tmp_path / "config.json").read_text())["model"] == asdict(model.config)
    assert rf.SOLVERS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_graph_draws_what_the_network_draws():
    config = MMDiTConfig(dim=64, head_dim=32, n_layers=2, n_double_layers=1, text_dim=8, max_grid=4,
                         base_dim=64)  # fmt: skip
    torch.manual_seed(0)
    model = MMDiT(config).to("cuda").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    graphed = sample_t2i.Graphed(model)
    for batch in (2, 3, 2):  # two shapes, and one of them again
        noise = torch.randn(batch, 4, 8, 8, device="cuda")
        text = torch.randn(batch, 5, 8, device="cuda")
        how = {"null_text": torch.zeros_like(text[:1]), "cfg": 2.0, "steps": 4, "solver": "heun"}
        drawn = rf.sample(graphed, noise, text, **how)
        assert torch.allclose(drawn, rf.sample(model, noise, text, **how), atol=1e-4)
    assert len(graphed.captured) == 2


def test_graphs_are_refused_without_cuda(tmp_path):
    args = sample_t2i.build_parser().parse_args(["run", "x", "--cudagraphs", "--device", "cpu"])
    with pytest.raises(ValueError, match="--cudagraphs needs a CUDA device, this is cpu: drop it"):
        sample_t2i.launch(args)
