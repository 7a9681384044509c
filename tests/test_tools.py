"""The small tools: enhance, geneval and show."""

import json
import re
import sys

import pytest
import tokenizers
import torch
import transformers
from helpers import DIGITS, SHAPES, call, exported, refused
from PIL import Image
from test_encoders import tiny_t5, tiny_vae
from test_pairs import make
from test_prepare import pictures
from test_prepare import run as prepare
from torchvision.transforms.functional import pil_to_tensor

import sample_t2i
from common.pipeline import Pipeline
from common.start import owned, read_prompts
from tools import enhance, geneval, pairs, show

METADATA = [
    {"tag": "two_object", "include": [{"class": "ring", "count": 1}], "prompt": "a ring, a star"},
    {"tag": "colors", "include": [{"class": "star", "color": "red"}], "prompt": "a red star"},
    {"original": "three circles", "tag": "counting", "prompt": "three circles at dawn"},
]


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, METADATA)) + "\n")
    return path


# --- enhance -------------------------------------------------------------------------------------


def word_tokenizer(*words, **special):
    """A tokenizer of transformers that knows <pad>, </s>, <unk> and these words."""
    numbers = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def tiny_chat(folder, plain=False, silent=False):
    """A random Llama of one layer that knows eight words; its folder.

    plain: without a chat template; otherwise without a padding token. silent: writes nothing.
    """
    tokenizer = word_tokenizer("a", "red", "ring", "with", "stars")
    if not plain:
        tokenizer.pad_token = None
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} a{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    if silent:  # <pad> is the likeliest word
        torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("plain, silent", [(False, False), (True, False), (True, True)])
def test_prompts_are_rewritten_in_order_or_stay(tmp_path, plain, silent):
    model, prompts = tiny_chat(tmp_path / "chat", plain, silent), tmp_path / "prompts.txt"
    lines = ["a ring", " ".join(["a red ring with stars"] * 3), "stars"]
    prompts.write_text("\n\n".join(lines))
    call(enhance.main, "--model", model, prompts, "--out", tmp_path / "out.txt")
    found = (tmp_path / "out.txt").read_text().splitlines()
    assert (found == lines) == silent and "" not in found and "Rewrite" not in " ".join(found)
    for line, expected in zip(lines, found, strict=True):  # padding beside others changes nothing
        assert enhance.enhance([line], model, torch.device("cpu")) == [expected]


def test_rows_of_geneval_keep_their_keys(tmp_path, metadata):
    """And what was rewritten before keeps its first prompt."""
    out = tmp_path / "enhanced.jsonl"
    call(enhance.main, "--model", tiny_chat(tmp_path / "chat"), metadata, "--out", out)
    for before, row in zip(METADATA, read_prompts(out, "--prompts"), strict=True):
        assert row["prompt"] != before["prompt"]
        assert row == {"original": before["prompt"], **before, "prompt": row["prompt"]}


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("none.txt", None, "none.txt is not there: give a text file"),
        ("empty.txt", "\n \n", "empty.txt is empty: write one on each line"),
        ("bad.jsonl", '{"prompt": "a"}\n{"tag": "colors"}', "line 2 is no prompt"),
        ("half.jsonl", '{"prompt"', "line 1 is no prompt"),
        ("list.jsonl", '["a"]', "line 1 is no prompt"),
        ("number.jsonl", '{"prompt": 1}', "line 1 is no prompt"),
        ("rows.csv", "prompt", "rows.csv must be plain text or .jsonl"),
        (
            "rows.ndjson",
            'a ring\n {"prompt": "a"}',
            'line 2 is no prompt; a file of JSON objects with a "prompt" is called .jsonl',
        ),
        ("rows.jsonl", '{"prompt": "a"}', "out.txt must end like"),
        ("good.txt", "a ring", "could not be loaded"),
        ("alone.txt", "a ring", "needs transformers: pip install transformers"),
        ("long.txt", "ring " * 2000, "is too long for the 2048 tokens of --model"),
    ],
)
def test_what_cannot_be_rewritten_says_why(tmp_path, capsys, monkeypatch, name, content, reason):
    if content is not None:
        (tmp_path / name).write_text(content)
    if name == "alone.txt":
        monkeypatch.setitem(sys.modules, "transformers", None)
    if name == "long.txt":
        tiny_chat(tmp_path)
    out = tmp_path / "out.txt"
    said = refused(enhance.main, capsys, "--model", tmp_path, tmp_path / name, "--out", out)
    assert reason in said and not out.exists()


def test_a_model_that_does_not_fit_itself_says_so(tmp_path, capsys):
    tiny_chat(tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ nothing.at.all }}")
    (tmp_path / "p.txt").write_text("a ring")
    how = ["--model", tmp_path / "chat", tmp_path / "p.txt", "--out", tmp_path / "out.txt"]
    said = refused(enhance.main, capsys, *how)
    assert f"--model {tmp_path / 'chat'} could not be used" in said
    assert not (tmp_path / "out.txt").exists()


# --- geneval -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return exported(tmp_path / "run", SHAPES)


def test_geneval_gets_its_folders_and_goes_on_where_it_stopped(run, metadata, tmp_path):
    """As the evaluator reads them; each picture is the pipeline's of its prompt and number."""
    out = tmp_path / "geneval"
    command = [run, metadata, "--out", out, "--seed", 3, "--cfg", 9]
    call(geneval.main, *command, "--batch", 5)
    files = [out / f"{k:05d}" / "samples" / f"{i:04d}.png" for k in range(3) for i in range(4)]
    assert sorted(out.rglob("*.png")) == files
    for k, row in enumerate(METADATA):
        told = json.loads((out / f"{k:05d}" / "metadata.jsonl").read_text())
        assert told == (row if k < 2 else {"tag": "counting", "prompt": "three circles"})
    (enhanced,) = out.rglob("enhanced.txt")  # of the last row
    assert enhanced.read_text() == "three circles at dawn"
    made = [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    files[9].write_bytes(files[9].read_bytes()[:-9])  # cut
    content = files[5].read_bytes()
    files[5].write_bytes(content[:200] + bytes(20) + content[220:])  # damaged inside
    Image.new("RGB", (20, 20)).save(files[7])  # not ours
    (files[0].parent / ".0009.png.999999999.part").write_bytes(b"of a killed process")
    call(geneval.main, *command)  # in batches of another size
    again = [file.stat().st_mtime_ns for file in files]
    assert [i for i in range(12) if again[i] != made[i]] == [2, 5, 7, 9]
    assert not [*out.rglob(".*.part")]
    pipeline, prompts = Pipeline.open(run), [row["prompt"] for row in METADATA for _ in range(4)]
    expected = pipeline.draw(prompts, pipeline.noise(3, range(12)), cfg=9)
    for file, picture in zip(files, expected, strict=True):
        found = pil_to_tensor(Image.open(file)).int()
        assert found.shape == (3, 20, 20) and (found - picture).abs().max() <= 1


def test_a_word_that_the_run_does_not_know_leaves_nothing(metadata, tmp_path, capsys):
    digits = exported(tmp_path / "digits", DIGITS)
    lines = tmp_path / "lines.txt"
    lines.write_text("3\ncat")
    for program, how in ((geneval, [metadata]), (pairs, ["--prompts", lines, "--number", 2])):
        said = refused(program.main, capsys, digits, *how, "--out", tmp_path / "out")
        assert "is no word of this model" in said and not (tmp_path / "out").exists()


def test_parts_share_the_prompts_of_geneval(run, metadata, tmp_path, capsys):
    how, outs = ["--images", 2, "--batch", 2], [tmp_path / name for name in ("whole", "parts")]
    call(geneval.main, run, metadata, *how, "--out", outs[0])
    call(geneval.main, run, metadata, *how, "--out", outs[1], "--part", "1/2")
    assert [f.parts[-3] for f in outs[1].rglob("*.png")] == ["00001", "00001"]
    with owned(outs[1], "tools.geneval", shared=True):  # another part draws
        call(geneval.main, run, metadata, *how, "--out", outs[1], "--part", "0/2")
        said = refused(geneval.main, capsys, run, metadata, *how, "--out", outs[1])
        assert "is in use by another process" in said
    found, wanted = (
        {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()} for out in outs
    )
    assert wanted.keys() == found.keys() and len(found) == 12
    for path, content in found.items():
        assert content == wanted[path], path
    other = ["--part", "0/2", "--seed", 1, "--out", outs[1]]
    assert "was begun with" in refused(geneval.main, capsys, run, metadata, *how, *other)


def test_another_setting_is_refused(run, metadata, tmp_path, capsys):
    how = ["--out", tmp_path / "geneval", "--images", 1]
    call(geneval.main, run, metadata, *how)
    (tmp_path / "other.jsonl").write_text(json.dumps(METADATA[0]))
    for change in (
        [run, metadata, "--seed", 1],
        [run, metadata, "--images", 2],
        [run, metadata, "--cfg", 1],
        [run, metadata, "--solver", "heun"],
        [run, metadata, "--size", "20x16"],
        [run, tmp_path / "other.jsonl"],
        [exported(tmp_path / "copy", SHAPES), metadata],
    ):
        assert "was begun with" in refused(geneval.main, capsys, *how, *change)
    with owned(tmp_path / "geneval", "tools.geneval"):
        assert "is in use by another process" in refused(geneval.main, capsys, run, metadata, *how)
    call(geneval.main, run, metadata, *how, "--cfg", SHAPES["cfg"])  # the run's own, said
    for file in (tmp_path / "geneval").rglob("*.png"):
        file.unlink()
    assert "was begun with" in refused(geneval.main, capsys, run, metadata, *how, "--seed", 1)


def test_auraflow_is_drawn_with_its_own_settings(tmp_path):
    facts = {"vae": tiny_vae(tmp_path / "vae"), "text_encoder": tiny_t5(tmp_path / "t5")}
    facts |= {"text_tokens": 256, "residual": "auraflow", "patch_size": 2, "size": 16}
    run, out = exported(tmp_path / "run", SHAPES | facts), tmp_path / "geneval"
    call(sample_t2i.main, run, "--export", "diffusers", tmp_path / "pipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring")
    how = ["--auraflow", "--out", out, "--size", 16, "--images", 1]
    call(geneval.main, tmp_path / "pipeline", prompts, *how)
    settings = json.loads((out / "settings.json").read_text())
    assert [settings[key] for key in ("cfg", "shift", "steps")] == [3.5, 1.73, 50]
    assert (out / "00000" / "samples" / "0000.png").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        (["run", "--images", 0], "0 must be at least 1"),
        (["run", "--part", "3/3"], "--part 3/3 must be i/n with 0 ≤ i < n, such as 0/2 and 1/2"),
        (["run", "--size", "big"], "--size big must be a number of pixels or HEIGHTxWIDTH"),
        (["empty", "--auraflow"], "no .safetensors file and no folder with one"),
    ],
)
def test_wrong_options_end_in_one_line(run, metadata, tmp_path, capsys, options, reason):
    (tmp_path / "empty").mkdir()
    source, *options = options
    how = [tmp_path / source, metadata, "--out", tmp_path / "out", *options]
    assert reason in refused(geneval.main, capsys, *how) and not (tmp_path / "out").exists()


# --- show ----------------------------------------------------------------------------------------


def test_pairs_of_either_chapter_are_shown(tmp_path):
    pairs = make(
        exported(tmp_path / "run", DIGITS | {"preset": "digits-narrow"}), tmp_path / "pairs"
    )
    call(show.main, pairs, "--rows", 2, "--device", "cpu", "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_rows_are_counted_and_drawn(tmp_path, capsys):
    call(show.main, "shapes", "--rows", 3, "--device", "cpu", "--out", tmp_path / "new" / "a.png")
    said = capsys.readouterr().out
    for line in (
        r"size +20",
        r"20 x 20 +1,000,000 rows to train on, 100.0%",
        r"held out +512 rows",
    ):
        assert re.search(line, said)
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        assert sheet.width > 2 * sheet.height  # three pictures side by side
    prepare(pictures(tmp_path / "source", 30), tmp_path / "data")
    call(show.main, tmp_path / "data", "--device", "cpu", "--out", tmp_path / "b.png")
    said = capsys.readouterr().out
    shares = re.findall(r"rows to train on, ([\d.]+)% of the steps", said)
    assert len(shares) == 3 and sum(map(float, shares)) == pytest.approx(100, abs=0.2)
    assert "caption tokens 5% 2, 50% 2, 95% 2" in said
