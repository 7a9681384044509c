"""Pictures that are held out by a column, and the score that asks which picture a drawing is."""

import json
import re
import shutil
from math import isnan
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, records, refused
from test_digits import write_mnist
from test_prepare import OPTIONS, captions, picture, prepared, run
from torchvision.transforms.functional import pil_to_tensor

import sample_t2i
from common.retrieval import Gallery, retrieved
from inputs.encoders import HashText, image_encoder
from inputs.rows import open_rows
from inputs.stored import PreparedFolder
from tools import prepare

TONES = ("", ": light", ": dark")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Twelve concepts in three tones, of which some are held out; another wording of each."""
    home = tmp_path_factory.mktemp("home")
    (home / "source").mkdir()
    rows = []
    for i in range(36):
        concept, tone = divmod(i, 3)
        picture(i, [(20, 20)]).save(home / f"source/{i}.png")
        text = f"thing {concept}{TONES[tone]}"
        other = " ".join(text.split(": ")[::-1])
        rows.append({"file_name": f"{i}.png", "text": text, "other": other})
        rows[-1]["held"] = [None, False, concept % 4 == 1][tone]
    (home / "source/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    how = ["--held", "held", "--caption", "text:3", "other:1", "--size", 20]
    run(home / "source", home / "data", *how)
    facts = SHAPES | {"source": str(home / "data"), "shapes": 0, "colors": 0, "places": 0}
    facts["rows"] = PreparedFolder(str(home / "data"), None).id
    exported(home / "run", facts | {"text_tokens": 8})
    return home


def gallery(home):
    return Gallery([PreparedFolder(str(home / "data"), None)], image_encoder("pixels", "cpu"))


def test_rows_are_held_out_by_a_column_in_all_their_wordings(home):
    found = prepared(home / "data")
    held = {i for i, row in found.items() if row["split"] == "validation"}
    assert held == {5, 17, 29} and len(found) == 36
    words = {i: set(row["captions"]) for i, row in found.items()}
    assert words[5] == {"thing 1: dark", "dark thing 1"}
    trained = set().union(*(words[i] for i in found if i not in held))
    assert not any(words[i] & trained for i in held)
    # each half of what is held out is known from others
    assert all({f"thing {i // 3}", "thing 0: dark"} <= trained for i in held)


def test_a_column_that_says_neither_yes_nor_no(home, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    picture(0, [(20, 20)]).save(tmp_path / "a/0.png")
    lines = [{"file_name": "0.png", "text": "a", "held": "yes"}]
    (tmp_path / "a/metadata.jsonl").write_text(json.dumps(lines[0]))
    how = [tmp_path / "a", "--out", tmp_path / "out", *OPTIONS, "--bad-limit", 1]
    assert "held 'yes' must be true or false" in refused(
        prepare.main, capsys, *how, "--held", "held"
    )
    line = refused(prepare.main, capsys, *how, "--held", "kept")
    assert "has no column kept" in line and "or --held" in line


def test_a_nested_column_holds_out_too_and_one_that_holds_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    lines = []
    for i in range(4):
        picture(i, [(20, 20)]).save(tmp_path / f"a/{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"a {i}", "of": {"held": i == 2}})
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(tmp_path / "a", tmp_path / "out", *OPTIONS, "--held", "of.held")
    rows = json.loads((tmp_path / "out/manifest.json").read_text())["rows"]
    assert (rows["train"], rows["validation"]) == (3, 1)
    how = [tmp_path / "a", "--out", tmp_path / "none", *OPTIONS]
    line = refused(prepare.main, capsys, *how, "--held", "of.kept")
    assert "--held of.kept is true in no row" in line
    assert not (tmp_path / "none/manifest.json").exists()


def test_words_are_the_same_before_a_colon_or_a_comma():
    text = HashText(tokens=4)
    assert torch.equal(text.vector("thing"), text.vector("thing"))
    assert text.spelled("Thing: dark, old") == ["thing", "dark", "old"]
    assert torch.equal(text(["thing: dark"]), text(["thing dark"]))


def test_real_pictures_find_themselves(home):
    known = gallery(home)
    asked = known.ask(99, held=True) + known.ask(99, held=False)
    assert len(asked) == 36 and known.held.sum() == 3 and known.held[asked[:3]].all()
    real = known.pictures(asked, (20, 20))
    for i, found in zip(asked, real, strict=True):
        number = [n for n, said in captions(home / "data").items() if said[0] == known.captions[i]]
        assert torch.equal(found, pil_to_tensor(picture(number[0], [(20, 20)])))
    assert retrieved(known, real, asked) == {"top1": 1, "top5": 1, "variant": 1, "copy": 0}
    assert known.ask(2, True) == known.ask(99, True)[:2]


def test_the_score_is_that_of_a_plain_loop(home):
    """Drawings of all kinds: right, of another tone, a copy of a training picture, noise."""
    known, generator = gallery(home), torch.Generator().manual_seed(0)
    asked = known.ask(99, True) * 4 + known.ask(8, False)
    drawn = known.pictures(asked, (20, 20))
    tones = [known.captions.index(known.captions[i].replace("dark", "light")) for i in asked[:3]]
    drawn[:3] = known.pictures(tones, (20, 20))
    drawn[3:6] = torch.randint(0, 256, drawn[3:6].shape, generator=generator, dtype=torch.uint8)
    drawn[6:9] = known.pictures(known.ask(99, False)[:3], (20, 20))
    features = [
        torch.nn.functional.adaptive_avg_pool2d(x / 127.5 - 1, 8).flatten()
        for x in known.pictures(list(range(36)), (20, 20))
    ]
    first, five, variant, copy = [], [], [], []
    for i, x in zip(asked, drawn, strict=True):
        x = torch.nn.functional.adaptive_avg_pool2d(x / 127.5 - 1, 8).flatten()
        order = sorted(range(36), key=lambda j: float((x - features[j]).norm()))
        first.append(order[0] == i)
        five.append(i in order[:5])
        a, b = known.captions[i], known.captions[order[0]]
        if ":" in a and a.split(":")[0] == b.split(":")[0]:
            variant.append(a == b)
        nearest = next(j for j in order if not known.held[j])
        away = (features[i] - features[nearest]).norm()
        copy.append(nearest != i and bool((x - features[nearest]).norm() < away / 2))
    means = [sum(x) / len(x) for x in (first, five, variant, copy)]
    found = retrieved(known, drawn, asked)
    assert list(found.values()) == pytest.approx(means) and min(means[0], means[2], means[3]) > 0
    assert found["copy"] >= 6 / len(asked) and found["variant"] < 1


def test_equal_pictures_are_one(home):
    known = gallery(home)
    i, j = known.ask(2, False)
    known.features[j] = known.features[i]
    found = retrieved(known, known.pictures([i], (20, 20)), [j])
    assert found["top1"] == 1 and found["copy"] == 0


def test_a_run_on_pictures_is_scored(home, tmp_path, capsys):
    how = [home / "run", "--score", "--per-tag", 5, "--out", tmp_path / "score.png"]
    call(sample_t2i.main, *how, "--at-steps", 1, 2, "--batch", 4)
    rows = records(tmp_path / "score.csv")
    assert [row["captions"] for row in rows] == 3 * ["5 seen"] + 3 * ["3 held"] + ["of 36 pictures"]
    assert [row["steps"] for row in rows] == ["1", "2", ""] * 2 + [""]
    real = [row for row in rows if row["run"].startswith("real")]
    assert all(float(row["top5"]) == 1 for row in real)
    assert float(rows[-1]["top5"]) == pytest.approx(5 / 36) and isnan(float(rows[-1]["copy"]))
    assert (tmp_path / "score.png").exists()
    assert f"{home / 'run'}, 2 steps, 3 held: top1 0." in capsys.readouterr().out


def test_the_nearest_pictures_stand_beside(home, tmp_path, monkeypatch):
    seen, plain = [], sample_t2i.pictures.captioned

    def captioned(pictures, captions, path, columns):
        seen.append((pictures, captions, columns))
        plain(pictures, captions, path, columns)

    monkeypatch.setattr(sample_t2i.pictures, "captioned", captioned)
    out = tmp_path / "a.png"
    call(sample_t2i.main, home / "run", "thing 1: dark", "--images", 2, "--nearest", "--out", out)
    assert (tmp_path / "a_nearest.png").exists()
    drawn, words, columns = seen[0]
    assert drawn.shape == (10, 3, 20, 20) and columns == 5 and words[0] == "drawn: thing 1: dark"
    known = gallery(home)
    for k in (0, 5):
        numbers = known.nearest(drawn[k][None], 4, learned=True)[0].tolist()
        assert words[k + 1 : k + 5] == [known.captions[i] for i in numbers]
        assert not known.held[numbers].any()
        assert torch.equal(drawn[k + 1 : k + 5], known.pictures(numbers, (20, 20)))


def test_pictures_that_the_run_did_not_learn_from_are_refused(home, tmp_path, capsys):
    """Or what it saw would count as held out."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    exported(run, config["facts"] | {"rows": "0"})
    other = ["--score", "--against", run, "--out", tmp_path / "a.png"]  # of other rows, too
    assert f"than {run} was" in refused(sample_t2i.main, capsys, home / "run", *other)
    for how in (["--score"], ["thing 1", "--nearest"]):
        line = refused(sample_t2i.main, capsys, run, *how, "--out", tmp_path / "a.png")
        assert f"holds other rows than {run} was trained on" in line
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "a_pictures").exists()


def test_digits_have_their_nearest_too(tmp_path):
    write_mnist(tmp_path / "data")
    rows = open_rows(["mnist"], data_dir=tmp_path / "data").id
    exported(tmp_path / "run", DIGITS | {"source": "mnist", "size": 28, "rows": rows})
    how = ["--data-dir", tmp_path / "data", "--nearest", "--out", tmp_path / "a.png"]
    call(sample_t2i.main, tmp_path / "run", "3", "--images", 1, *how)
    assert (tmp_path / "a_nearest.png").exists()


def test_the_lines_of_the_docs_make_a_source(tmp_path, monkeypatch):
    """On an emoji.json of the package's form, with pictures of its size."""
    text = (Path(__file__).parents[1] / "docs/emoji.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    home, names = tmp_path / "node_modules/emoji-datasource-twitter", []
    (home / "img/twitter/64").mkdir(parents=True)
    for name in ("PIZZA", *(f"WOMAN {i}" for i in range(10))):
        codes = [] if name == "PIZZA" else [*(f"1F3F{c}" for c in "BCDEF"), "1F3FB-1F3FC"]
        files = [f"{name}-{code}.png" for code in ["", *codes]]
        for file in files:
            picture(len(file), [(64, 64)]).save(home / "img/twitter/64" / file)
        variants = {c: {"image": f} for c, f in zip(codes, files[1:], strict=True)}
        names.append({"name": name, "image": files[0], "skin_variations": variants})
    (home / "emoji.json").write_text(json.dumps(names))
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    run(home, tmp_path / "data", "--held", "held", "--caption", "text:2", "other:1", "--size", 32)
    found = list(prepared(tmp_path / "data").values())
    words = {tuple(filter(None, row["captions"])) for row in found}
    assert len(words) == 1 + 10 * 6 and ("pizza",) in words and ("woman 3",) in words
    assert ("woman 3: medium-dark skin tone", "medium-dark skin tone woman 3") in words
    held = [row["captions"][0] for row in found if row["split"] == "validation"]
    assert 2 < len(held) < 25 and all("skin tone" in caption for caption in held)
