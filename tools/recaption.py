"""RECAPTION: captions written by an image-to-text model.

    python -m tools.recaption SOURCE --out r.parquet --model NAME
    python -m tools.prepare SOURCE --out data/my --with r.parquet --caption recaption

Captions from the web often say nothing about the picture, and a network cannot learn from words
that its pictures do not show. Written captions are long and exact (DALL-E 3's report: 95 % of them
in the mix). Keep some of the old ones too: people type short prompts.
The columns of the file: row, recaption.
"""

from dataclasses import dataclass

import torch
from PIL import Image

from common.settings import option, parse
from common.start import check_free, choose_device, line_of, program
from inputs.encoders import pretrained
from tools.prepare import Reading, open_source, pictures, write_table

ASK = "Describe this image in one sentence."


class Captioner:
    """An image-to-text model; captions of at most 64 tokens, the likeliest token each time."""

    def __init__(self, name: str, ask: str | None, device: torch.device):
        self.model, self.processor = pretrained(
            name, device, "--model", "AutoModelForImageTextToText"
        )
        self.model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.prompt = None
        if getattr(self.processor, "chat_template", None):
            self.processor.tokenizer.padding_side = "left"
            content = [{"type": "image"}, {"type": "text", "text": ask or ASK}]
            self.prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        elif ask:
            raise ValueError(f"--model {name} is no chat model and cannot be asked: drop --ask")
        try:  # a model that does not fit its processor shows before hours
            self([Image.new("RGB", (32, 32))])
        except Exception as error:
            raise ValueError(f"--model {name} could not be used: {line_of(error)}") from error

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[str]:
        said = {"text": [self.prompt] * len(images), "padding": True} if self.prompt else {}
        inputs = self.processor(images=images, return_tensors="pt", **said)
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=64, do_sample=False, num_beams=1)
        if self.prompt:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [s.strip() for s in self.processor.batch_decode(tokens, skip_special_tokens=True)]


@dataclass(frozen=True)
class Settings(Reading):
    model: str = option("Salesforce/blip-image-captioning-base", "image-to-text, a name or folder")
    ask: str | None = option(None, f"what a chat model is asked ({ASK})")


@program("tools.recaption")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    check_free(args.out)
    source = open_source(args)
    write = Captioner(args.model, args.ask, choose_device(args.device))
    table = {"row": [], "image_crc32": [], "recaption": []}
    for batch in pictures(source, args):
        rows, crcs, images = zip(*batch, strict=True)
        table["row"] += rows
        table["image_crc32"] += crcs
        table["recaption"] += [said or None for said in write(list(images))]
    empty = table["recaption"].count(None)
    if empty == len(table["row"]):
        raise ValueError(f"--model {args.model} wrote no caption for {empty} images")
    write_table(args.out, table, source.id)
    print(f"{args.out}: {len(table['row']) - empty:,} captions, {empty} images without one")


if __name__ == "__main__":
    main()
