"""Takes what was trained away: `python -m distill.export CHECKPOINT --format FORMAT OUT`.

A file holds the averaged weights where the run kept an average. `safetensors` is read by
`student.load` with neither deepspeed nor this package, `onnx` by onnxruntime alone, `radio` by
whatever reads the RADIO family's public checkpoints. A model card is written beside each.
"""

import argparse
from pathlib import Path

from distill.formats.model_card import model_card
from distill.formats.onnx import large_weights, save_onnx
from distill.formats.radio import save_radio
from distill.formats.source import (
    Source,
    is_standardised,
    keep_heads,
    read_source,
    to_teacher_space,
)
from distill.formats.upsampler import NAME as UPSAMPLER
from distill.formats.upsampler import check_out, export_upsampler
from distill.runtime.checkpoint import find_checkpoint
from distill.runtime.command import command
from distill.runtime.errors import RecipeError
from distill.runtime.files import write_text
from distill.tasks.kinds import register_kinds
from student.storage import StudentFile, save_student, student_of
from teachers.files import atomic

FORMATS = ("safetensors", "onnx", "radio")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Write a trained student, or a trained upsampler, as one file that loads "
        "without the trainer. A student's file gets a model card beside it, OUT.md.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a run's, whose newest whole checkpoint is taken; or a "
        "student's file, or a model of the RADIO family in its public format",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument(
        "--head", metavar="NAME", help="keep the backbone and this teacher's head only"
    )
    heads.add_argument("--no-heads", action="store_true", help="keep the backbone only")
    parser.add_argument(
        "--teacher-space",
        action="store_true",
        help="fold PHI-S into the heads, whose maps then are in their teachers' own spaces; "
        "always so with --format radio",
    )
    parser.add_argument(
        "--half", action="store_true", help="an upsampler only: store its weights in float16"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """The command."""
    register_kinds()
    arguments = parse_arguments()
    path, out = arguments.checkpoint, arguments.out
    if _is_upsampler(path):
        asked = arguments.head or arguments.no_heads or arguments.teacher_space
        if asked or arguments.format != FORMATS[0]:
            raise RecipeError(
                "--head, --no-heads, --teacher-space, --format: are for students; this is an "
                "upsampler"
            )
        path = find_checkpoint(path)
        export_upsampler(path, out, half=arguments.half, force=arguments.force)
    elif arguments.half:
        raise RecipeError("--half: is for upsamplers; this is a student")
    else:
        heads = (arguments.head,) if arguments.head else () if arguments.no_heads else None
        path = export_student(
            path,
            out,
            format=arguments.format,
            heads=heads,
            teacher_space=arguments.teacher_space,
            force=arguments.force,
        )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {path}")


def export_student(
    path: Path,
    out: Path,
    *,
    format: str = FORMATS[0],
    heads: tuple[str, ...] | None = None,
    teacher_space: bool = False,
    force: bool = False,
) -> Path:
    """Writes a student as one file, whole or not at all, and its model card.

    Args:
        path: see `export_source.read_source`.
        out: the file to write; missing folders above it are made.
        format: one of `FORMATS`.
        heads: of the teachers whose heads are kept; None for all.
        teacher_space: whether the heads' maps come out in their teachers' own spaces, and not in
            the standardised ones that they were trained in. The RADIO format has no other.
        force: whether `out` may be overwritten.

    Returns:
        What was exported: the checkpoint's folder, or the file.

    Raises:
        RecipeError: no such head, no statistics to fold, or `out` is there or cannot be written.
    """
    card = out.with_name(f"{out.name}.md")
    weights = [large_weights(out)] if format == "onnx" else []
    for each in (out, card, *weights):
        check_out(each, force)
    source = read_source(path)
    if heads is not None:
        source = source._replace(file=keep_heads(source.file, heads))
    file = _in_space(source, format, teacher_space)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(file, format, out)
        write_text(card, model_card(file, out, format, source.checkpoint))
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror or error})") from None
    return source.checkpoint or path


def _is_upsampler(path: Path) -> bool:
    return path.is_dir() and any(
        (folder / UPSAMPLER).is_file() for folder in (path, *path.glob("checkpoints/step-*"))
    )


def _in_space(source: Source, format: str, teacher_space: bool) -> StudentFile:
    checkpoint = source.checkpoint
    raw = checkpoint is not None and not is_standardised(checkpoint)
    if teacher_space and raw:
        raise RecipeError(
            "--teacher-space: the run has objective.standardisation=none, so its heads already "
            "are in their teachers' own spaces; leave the option out"
        )
    if teacher_space or (format == "radio" and not raw):
        return to_teacher_space(source)
    return source.file


def _write(file: StudentFile, format: str, out: Path) -> None:
    if format == "safetensors":
        save_student(out, file.config, file.targets, file.state_dict, file.metadata)
    elif format == "onnx":
        student = student_of(file.config, file.targets, file.state_dict, "the student")
        difference = save_onnx(out, student.float())
        print(f"onnxruntime and PyTorch differ by at most {difference:.0e} at two sizes")
    else:
        from distill.formats.radio_reader import check_radio  # builds timm's models

        with atomic(out) as partial:
            save_radio(partial, file)
            check_radio(partial, file)


if __name__ == "__main__":
    main()
