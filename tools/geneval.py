"""GENEVAL: pictures of its prompts, in the folders that its evaluator reads.

    python -m tools.geneval runs/my evaluation_metadata.jsonl --out out/geneval
    python -m tools.geneval fal/AuraFlow-v0.3 evaluation_metadata.jsonl --auraflow --part 0/8

    out/geneval/00000/metadata.jsonl      the prompt's row, as it was
    out/geneval/00000/samples/0000.png …  --images pictures of it
    out/geneval/00000/enhanced.txt        what was drawn instead, if tools/enhance.py rewrote it

GenEval (Ghosh et al. 2023, 2310.11513) has prompts of six kinds; the score is the mean of the six
accuracies. A picture's noise depends on (seed, its number) alone. A second call goes on where the
first one stopped, and is refused if it asks for anything else. With --part 0/8 … 7/8 eight
processes share the prompts and fill one folder.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.pictures import SIGN, strip
from common.pipeline import Pipeline, Sampling
from common.settings import Parted, option, parse, read_json
from common.start import claim, owned, program, read_prompts, write_whole


def whole(file: Path) -> bool:
    """Whether it is a picture of ours, as it was written: a PNG has checksums."""
    try:
        with Image.open(file) as picture:
            picture.verify()
    except (OSError, SyntaxError):  # PIL's for a checksum that does not fit
        return False
    return SIGN in file.read_bytes()


def geneval(pipeline: Pipeline, rows: list[dict], args: "Settings"):
    """Draw each row's "prompt" into args.out. ValueError if that was begun with other settings."""
    settings = pipeline.recipe(args.seed, args.size, **args.how())
    settings |= {"images": args.images, "rows": zlib.crc32(json.dumps(rows).encode())}
    out, begun = args.out, args.out / "settings.json"
    drawn = {file for file in out.glob("*/samples/*.png") if whole(file)}
    if (drawn or begun.exists()) and read_json(begun) != settings:
        raise ValueError(f"--out {out} was begun with {read_json(begun)}: choose another --out")
    write_whole(begun, json.dumps(settings).encode())
    missing = []  # file, caption, number of the picture
    for k in range(len(rows))[args.share]:
        folder, row = out / f"{k:05d}", dict(rows[k])
        prompt = row["prompt"]
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if "original" in row:  # the evaluator knows only this one
            row["prompt"] = row.pop("original")
            write_whole(folder / "enhanced.txt", prompt.encode())
        write_whole(folder / "metadata.jsonl", json.dumps(row).encode())
        for i in range(args.images):
            file = folder / "samples" / f"{i:04d}.png"
            if file not in drawn:  # or it is cut
                missing.append((file, prompt, k * args.images + i))
    batch = args.batch or (8 if args.auraflow else 128)  # of a bar, and at most at a time
    for first in tqdm(range(0, len(missing), batch), unit="batch"):
        files, captions, numbers = zip(*missing[first : first + batch], strict=True)
        noise = pipeline.noise(args.seed, numbers, args.size)
        pictures = pipeline.draw(captions, noise, **args.how())
        for file, picture in zip(files, pictures, strict=True):
            strip(picture[None], file)


@dataclass(frozen=True)
class Settings(Parted, Sampling):
    metadata: Path = option(
        None, "evaluation_metadata.jsonl, or from tools.enhance", positional=True
    )
    out: Path = option(Path("out/geneval"), "folder of the pictures", group="geneval")
    images: int = option(4, "pictures of each prompt", least=1)
    size: str | None = option(None, "pixels a side, or HEIGHTxWIDTH (the run's)")


@program("tools.geneval")
def main(argv=None):
    args = Settings(**parse(Settings, argv, __doc__))
    rows = read_prompts(args.metadata, "METADATA")
    claim(args.out, "tools.geneval")
    pipeline = args.open()
    pipeline.latent(args.size)  # before a folder is made, as the next
    pipeline.text.prepare([row["prompt"] for row in rows])
    with owned(args.out, "tools.geneval", shared=args.share.step > 1):
        geneval(pipeline, rows, args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
