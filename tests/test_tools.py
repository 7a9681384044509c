"""tools/enhance.py and tools/geneval.py: prompts in, prompts or folders of pictures out."""

import json
import sys
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from common.auraflow import save_pipeline
from common.pipeline import Pipeline
from inputs.encoders import VAE, HashText, HuggingFaceText, Pixels
from mmdit import PRESETS, MMDiT
from tools import enhance, geneval

FACTS = {
    "text_encoder": "hash",
    "text_tokens": 12,
    "vae": "pixels",
    "channels": 3,
    "words": None,
    "size": 8,
    "cfg": 2.0,
    "shift": 2.0,
    "steps": 1,
    "samples": 80,
    "source": "shapes",
}
METADATA = [
    {"tag": "two_object", "include": [{"class": "ring", "count": 1}], "prompt": "a ring, a star"},
    {"tag": "colors", "include": [{"class": "star", "color": "red"}], "prompt": "a red star"},
    {"tag": "counting", "include": [{"class": "circle", "count": 3}], "prompt": "three circles"},
]


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, METADATA)) + "\n")
    return path


def call(tool, *args):
    tool.main([str(a) for a in args])


def refused(tool, capsys, *args):
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(tool, *args)
    lines = [line for line in capsys.readouterr().err.splitlines() if tool.__name__[6:] in line]
    return lines[-1]


# --- enhance -------------------------------------------------------------------------------------


def tiny_chat(folder, template=True, pad=True):
    """A random Llama of one layer that knows eight words; its folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "ring", "with", "stars"]
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="</s>",
        unk_token="<unk>",
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} a{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template, pad", [(True, True), (False, True), (True, False)])
def test_prompts_are_rewritten_in_order(tmp_path, template, pad):
    model, prompts = tiny_chat(tmp_path / "chat", template, pad), tmp_path / "prompts.txt"
    lines = ["a ring", "a red ring with stars " * 3, "stars"]
    prompts.write_text("\n\n".join(lines))
    call(enhance, "--model", model, prompts, "--out", tmp_path / "out.txt")
    found = (tmp_path / "out.txt").read_text().splitlines()
    assert len(found) == 3 and "" not in found and "Rewrite" not in " ".join(found)
    for line, expected in zip(lines, found, strict=True):  # padding beside others changes nothing
        assert enhance.enhance([line], model, torch.device("cpu")) == [expected]


def test_rows_of_geneval_keep_their_keys(tmp_path, metadata):
    model = tiny_chat(tmp_path / "chat")
    out, twice = tmp_path / "enhanced.jsonl", tmp_path / "twice.jsonl"
    call(enhance, "--model", model, metadata, "--out", out)
    rows = enhance.read_rows(out)
    for row, before in zip(rows, METADATA, strict=True):
        assert row["original"] == before["prompt"] != row["prompt"]
        assert {**row, "prompt": row["original"]} == before | {"original": before["prompt"]}
    call(enhance, "--model", model, out, "--out", twice)
    assert [row["original"] for row in enhance.read_rows(twice)] == [
        row["prompt"] for row in METADATA
    ]


def test_a_silent_model_leaves_the_prompt(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = tiny_chat(tmp_path / "chat")

    def silent(*args, **options):
        return lambda asked, **how: ([{"generated_text": " \n "}] for _ in asked)

    monkeypatch.setattr(transformers, "pipeline", silent)
    assert enhance.enhance(["a ring"], model, torch.device("cpu")) == ["a ring"]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("none.txt", None, "No such file or directory"),
        ("empty.txt", "\n \n", "empty.txt has no prompt: write one on each line"),
        ("bad.jsonl", '{"prompt": "a"}\n{"tag": "colors"}', "line 2 is no JSON object with a"),
        ("half.jsonl", '{"prompt"', "line 1 is no JSON object with a prompt"),
        ("list.jsonl", '["a"]', "line 1 is no JSON object with a prompt"),
        ("number.jsonl", '{"prompt": 1}', "line 1 is no JSON object with a prompt"),
        ("good.txt", "a ring", "could not be loaded"),
    ],
)
def test_wrong_prompts_and_models_end_in_one_line(tmp_path, capsys, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    out = tmp_path / "out.txt"
    args = ["--model", tmp_path, tmp_path / name, "--out", out]
    assert reason in refused(enhance, capsys, *args) and not out.exists()


def test_a_missing_library_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("a ring")
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = ["--model", "some/model", tmp_path / "a.txt", "--out", tmp_path / "b.txt"]
    assert "pip install transformers" in refused(enhance, capsys, *args)


# --- geneval -------------------------------------------------------------------------------------


def network(**changes):
    torch.manual_seed(0)
    model = MMDiT(replace(PRESETS["tiny"], **changes))
    torch.nn.init.normal_(model.final.weight, std=0.02)
    return model


@pytest.fixture
def run(tmp_path):
    """Exported weights of a run."""
    Pipeline(network(), HashText(tokens=12), Pixels(), FACTS).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def drawn(monkeypatch):
    """The captions that are drawn, in order."""
    captions, draw = [], Pipeline.draw

    def counted(pipeline, asked, *rest, **options):
        captions.extend(asked)
        return draw(pipeline, asked, *rest, **options)

    monkeypatch.setattr(Pipeline, "draw", counted)
    return captions


def pngs(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.png"))}


def pixels(png):
    return torch.tensor(np.asarray(Image.open(BytesIO(png))), dtype=torch.int)


def test_geneval_gets_its_folders_and_goes_on_where_it_stopped(run, metadata, drawn, tmp_path):
    out = tmp_path / "geneval"
    command = [run, metadata, "--out", out, "--batch", 5]
    call(geneval, *command)
    before = pngs(out)
    assert list(before) == [f"{k:05d}/samples/{i:04d}.png" for k in range(3) for i in range(4)]
    assert len(set(before.values())) == 12
    assert pixels(before["00000/samples/0000.png"]).shape == (8, 8, 3)
    for k, row in enumerate(METADATA):  # as the evaluator reads it
        folder = out / f"{k:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert not (folder / "enhanced.txt").exists()
    assert drawn == [row["prompt"] for row in METADATA for _ in range(4)]
    for name in ("00000/samples/0002.png", "00002/samples/0001.png"):
        (out / name).unlink()
    drawn.clear()
    call(geneval, *command[:-2])  # in batches of another size
    assert drawn == ["a ring, a star", "three circles"]
    again = pngs(out)
    assert again.keys() == before.keys()
    for name, picture in before.items():
        assert (pixels(again[name]) - pixels(picture)).abs().max() <= 1


def test_another_setting_is_refused(run, metadata, tmp_path, capsys):
    out = tmp_path / "geneval"
    call(geneval, run, metadata, "--out", out, "--images", 1)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(METADATA[0]))
    for source, *change in (
        (metadata, "--seed", 1),
        (metadata, "--images", 2),
        (metadata, "--cfg", 1),
        (metadata, "--solver", "heun"),
        (metadata, "--size", "8x4"),
        (other,),
    ):
        command = [run, source, "--out", out, "--images", 1, *change]
        assert "was begun with" in refused(geneval, capsys, *command)
    Pipeline.open(run).save(tmp_path / "copy")
    command = [tmp_path / "copy", metadata, "--out", out, "--images", 1]
    assert "was begun with" in refused(geneval, capsys, *command)
    call(geneval, run, metadata, "--out", out, "--images", 1, "--cfg", 2)  # the run's own, said


def test_enhanced_rows_are_drawn_and_the_evaluator_sees_the_original(
    run, drawn, tmp_path, metadata
):
    rows = [
        {"original": row["prompt"], **row, "prompt": f"{row['prompt']} at dawn"} for row in METADATA
    ]
    enhanced = tmp_path / "enhanced.jsonl"
    enhanced.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "geneval"
    call(geneval, run, enhanced, "--out", out, "--images", 1)
    assert drawn == [row["prompt"] for row in rows]
    for k, row in enumerate(METADATA):
        assert json.loads((out / f"{k:05d}" / "metadata.jsonl").read_text()) == row
        assert (out / f"{k:05d}" / "enhanced.txt").read_text() == rows[k]["prompt"]


def test_auraflow_is_drawn_from_a_pipelines_folder(drawn, tmp_path, metadata):
    from test_encoders import tiny_t5, tiny_vae

    text = HuggingFaceText(tiny_t5(tmp_path / "text"), 256)
    image = VAE(tiny_vae(tmp_path / "vae"))
    model = network(
        residual="auraflow",
        in_channels=image.channels,
        patch_size=2,
        head_dim=96,
        base_dim=96,
        text_dim=text.dim,
        n_registers=8,
        mlp_multiple_of=256,
    )
    save_pipeline(model, text, image, tmp_path / "pipe", shift=1.73)
    out = tmp_path / "geneval"
    options = ["--size", 16, "--steps", 2, "--images", 1]
    call(geneval, tmp_path / "pipe", metadata, "--auraflow", "--out", out, *options)
    assert len(pngs(out)) == len(drawn) == 3
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["cfg"], settings["shift"], settings["steps"]) == (3.5, 1.73, 2)


def test_wrong_options_end_in_one_line(run, metadata, tmp_path, capsys):
    out = tmp_path / "out"
    for options, reason in (
        (["--images", 0], "0 must be at least 1"),
        (["--steps", 0], "0 must be at least 1"),
        (["--size", "big"], "--size big must be a number of pixels or HEIGHTxWIDTH"),
        (["--auraflow"], "no .safetensors file and no folder with one"),
    ):
        command = [metadata, "--out", out, *options]
        source = tmp_path / "empty" if "--auraflow" in options else run
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert reason in refused(geneval, capsys, source, *command)
        assert not out.exists()
    assert "No such file" in refused(geneval, capsys, run, tmp_path / "none.jsonl", "--out", out)
    assert "holds no weights" in refused(geneval, capsys, tmp_path / "empty", metadata)
