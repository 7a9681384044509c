"""LEADERBOARD: how many minutes until the pictures are good? Measures an entry and writes its row.

    python -m experiments.leaderboard digits --name "the default"
    python -m experiments.leaderboard digits --name "AdamW" -- --muon-lr 0 --steps 7500
    python -m experiments.leaderboard shapes --name "longer" -- --samples 1000000

What comes after -- goes to the trainer. It runs as a program of its own, and the clock runs from
its start to its end: imports, data, evaluations and pictures included. Then its weights are scored
with samples that no training option can choose:

    digits   recognised and Fréchet / real of 1,000 samples, the means over five noises. The target:
             at least 98.5 % and at most 1.5       (experiments/digit_score.py)
    shapes   the mean of the six scores, 300 held-out prompts of each tag, in the world of the
             default recipe. The target: at least 0.80          (sample_t2i.py --score)

The row goes to --table, with processor and versions. docs/leaderboard.md has the rules.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import train_mnist
import train_t2i
from common.log import append_row, check_table
from common.pipeline import Pipeline
from common.settings import Options, flag, option, parse
from common.start import begin, choose_device, move_away, program
from experiments.digit_score import Judge
from experiments.measure import machine
from inputs.shapes import World, obeyed, prompts_by_tag, scores

ROOT = Path(__file__).parents[1]
NOISES = 5
PER_TAG = 300
ROW = ("task", "name", "minutes", "score", "reached", "options", "machine")
TARGETS = {"digits": "recognised ≥ 0.985, Fréchet / real ≤ 1.5", "shapes": "mean ≥ 0.80"}


@dataclass(frozen=True)
class Settings(Options):
    task: str = option(None, "digits or shapes", positional=True, choices=TARGETS)
    name: str = option(None, "of the entry: what is new in it")
    data_dir: Path = option(Path("data"), "where MNIST lies or goes")
    cache: Path = option(Path("runs/readers"), "where the reader of digits is kept")
    out: Path = option(Path("runs/entry"), "folder of the run; it is begun anew")
    table: Path = option(ROOT / "docs" / "leaderboard.csv", "where the row is added")


def command(args: Settings, rest: list[str]) -> list[str]:
    """The trainer's command line. Chapter 2 has a process for each of two cores."""
    given = [*rest, "--out", str(args.out), "--overwrite"]
    if args.task == "digits":
        data = ["--data", "mnist", "--data-dir", str(args.data_dir), "--device", "cpu"]
        return [sys.executable, str(ROOT / "train_mnist.py"), *data, *given]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", *launcher, str(ROOT / "train_t2i.py"), *given]


def judged(args: Settings) -> tuple[str, bool]:
    """What the run's weights score, and whether that is the target."""
    device = choose_device("cpu")
    begin(device)
    pipeline = Pipeline.open(args.out, device)
    if args.task == "digits":
        found = []
        for seed in range(NOISES):
            judge = Judge("mnist", args.data_dir, args.cache, 1000, device, seed)
            recognised, frechet = judge.score(
                pipeline.draw(judge.captions, judge.noise), judge.labels
            )
            found.append((recognised, frechet / judge.real[1]))
        recognised, ratio = map(mean, zip(*found, strict=True))
        return f"{recognised:.3f}, {ratio:.2f}", recognised >= 0.985 and ratio <= 1.5
    tiny = World.of(train_t2i.RECIPES["tiny"])
    if World.of(pipeline.facts) != tiny:
        raise ValueError(f"the entry was trained in another world than {tiny}: drop those options")
    asked = prompts_by_tag(tiny, PER_TAG)
    noise = pipeline.noise(0, range(len(asked)))
    drawn = pipeline.draw([caption for _, caption in asked], noise, progress=True)
    score = scores(asked, obeyed(drawn, asked))["mean"]
    return f"{score:.3f}", score >= 0.80


@program("experiments.leaderboard")
def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    own, rest = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    args = Settings(**parse(Settings, own, __doc__))
    trainer = train_mnist if args.task == "digits" else train_t2i
    try:  # a mistake shows before an older run is moved away
        typed = parse(trainer.Settings, rest, "")
    except SystemExit as ended:
        raise ValueError(f"{' '.join(rest)} after -- is not a whole run: see above") from ended
    for name in typed.keys() & {"dry_run", "resume", "data", "data_dir", "device", "out"}:
        raise ValueError(f"{flag(name)} after -- is not for an entry: drop it")
    check_table(args.table, ROW)  # before the minutes of a run
    if args.out.exists():  # else an older run might be scored
        move_away(args.out, "train_mnist.py" if args.task == "digits" else "train_t2i.py")
    line = command(args, rest)
    started = time.monotonic()
    done = subprocess.run(line, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    minutes = (time.monotonic() - started) / 60
    if done.returncode:
        raise ValueError(f"the trainer ended with status {done.returncode}: see what it said above")
    score, reached = judged(args)
    done = (f"{minutes:.1f}", score, "yes" if reached else "no", " ".join(rest), machine())
    append_row(args.table, dict(zip(ROW, (args.task, args.name, *done), strict=True)))
    print(f"{args.task}: {score} after {minutes:.1f} minutes (target: {TARGETS[args.task]})")
    print(f"wrote a row to {args.table}; the run's log is {args.out}/log.csv")


if __name__ == "__main__":
    main()
