"""ENHANCE: prompts → prompts. A local instruction model writes each one out in detail.

    python -m tools.enhance --model Qwen/Qwen2.5-7B-Instruct prompts.txt --out enhanced.txt

Networks like the long captions that they were trained on, so AuraFlow's release rewrites prompts
with a language model before it draws (GenEval 0.64 → 0.70). The file has a prompt on each line, and
so has the result, in the same order. Or it is GenEval's .jsonl: then each row keeps its keys,
"prompt" is rewritten and "original" is what it was (tools/geneval.py reads both).

Decoding is greedy, so a prompt is always rewritten alike.
"""

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path

from tqdm import tqdm

from common.settings import Options, option, parse
from common.start import (
    check_free,
    choose_device,
    line_of,
    program,
    read_prompts,
    write_whole,
)
from inputs.encoders import pretrained

ANSWER = 128  # tokens, at most
ASK = (
    "Rewrite this prompt for an image generator as one detailed sentence. Keep every object,"
    " number, colour and position it names. Answer with the sentence alone.\n\n"
)


def enhance(prompts: list[str], name: str, device) -> list[str]:
    """The prompts, rewritten by the instruction model `name`; one that it leaves empty stays."""
    model, tokenizer = pretrained(name, device, "--model", "AutoModelForCausalLM", "AutoTokenizer")
    from transformers import pipeline

    most = getattr(model.config, "max_position_embeddings", None) or inf
    for prompt in prompts:
        if len(tokenizer(ASK + prompt, verbose=False).input_ids) + ANSWER > most:
            raise ValueError(f"{prompt!r:.80} is too long for the {most} tokens of --model {name}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = model.bfloat16() if device.type == "cuda" else model
    asked = (ASK + prompt for prompt in prompts)
    if tokenizer.chat_template:
        asked = ([{"role": "user", "content": text}] for text in asked)
    # pads on the left, so that every answer begins where its row ends
    write = pipeline("text-generation", model, tokenizer=tokenizer, device=device)
    answers = write(
        asked, batch_size=16, max_new_tokens=ANSWER, do_sample=False, return_full_text=False
    )
    try:
        return [
            " ".join(answer["generated_text"].split()) or prompt
            for prompt, (answer,) in zip(tqdm(prompts), answers, strict=True)
        ]
    except Exception as error:  # a tokenizer or template that does not fit the network
        raise ValueError(f"--model {name} could not be used: {line_of(error)}") from error


@dataclass(frozen=True)
class Settings(Options):
    prompts: Path = option(
        None, "a text file with a prompt on each line, or GenEval's .jsonl", positional=True
    )
    model: str = option(None, "name or folder of an instruction model of transformers")
    out: Path = option(None, "file to write, of the same kind")


@program("tools.enhance")
def main(argv=None):
    args = Settings(**parse(Settings, argv, __doc__))
    rows = read_prompts(args.prompts, "PROMPTS")
    check_free(args.out)
    if args.out.suffix != args.prompts.suffix:
        raise ValueError(f"--out {args.out} must end like {args.prompts}: it is of the same kind")
    lines = enhance([row["prompt"] for row in rows], args.model, choose_device())
    if args.prompts.suffix == ".jsonl":
        pairs = zip(rows, lines, strict=True)
        lines = [json.dumps({"original": row["prompt"], **row, "prompt": x}) for row, x in pairs]
    write_whole(args.out, "\n".join([*lines, ""]).encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
