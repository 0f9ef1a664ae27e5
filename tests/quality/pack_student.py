"""Packs a trained student as one that ships with the package, in `student/small/NAME`.

    python -m tests.quality.pack_student RUN NAME [--box DIR]

RUN is the folder of a run, or of one of its checkpoints. Written are `student.safetensors` in
float16 with heads in their teachers' own spaces, the card `README.md`, `recipe.yaml` without
absolute paths and the log `metrics.jsonl`. Anything else in the folder stays as it is.
"""

import argparse
from pathlib import Path
from shutil import copyfile

from distill.formats import hf
from distill.formats.export import card_of, export_student
from distill.formats.model_card import relocatable
from distill.runtime.checkpoint import find_checkpoint
from distill.runtime.config import dump_yaml, load_yaml
from student.shipped import SHIPPED, WEIGHTS

RECIPE, LOG = "recipe.yaml", "metrics.jsonl"


def pack(run: Path, name: str, box: Path = SHIPPED) -> Path:
    """Writes the folder of a student, and returns it."""
    checkpoint, folder = find_checkpoint(run), box / name
    out = folder / name  # the card says `student.load(NAME)`
    export_student(checkpoint, out, teacher_space=True, half=True, force=True)
    out.replace(folder / WEIGHTS)
    card_of(out).replace(folder / hf.CARD)
    recipe = relocatable(load_yaml(checkpoint / "recipe.yaml"))
    (folder / RECIPE).write_text(dump_yaml(recipe), encoding="utf-8")
    log = checkpoint.absolute().parents[1] / LOG
    if log.is_file():
        copyfile(log, folder / LOG)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a trained student to ship with the package.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--box", type=Path, default=SHIPPED, help="default: %(default)s")
    options = parser.parse_args()
    folder = pack(options.run, options.name, options.box)
    for each in sorted(folder.iterdir()):
        print(f"{each}: {each.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
