"""Exports a trained student or upsampler as one file: the work of `distill.export`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data.files import atomic, atomic_folder, write_text
from distill.formats import hf
from distill.formats.model_card import model_card
from distill.formats.onnx import PLAIN, OnnxOptions, save_onnx
from distill.formats.onnx_agreement import Agreement, agreement_text
from distill.formats.onnx_graph import large_weights
from distill.formats.pt2 import save_pt2
from distill.formats.radio import save_radio
from distill.formats.source import (
    Source,
    is_standardised,
    keep_heads,
    read_source,
    to_teacher_space,
)
from distill.formats.upsampler import has_upsampler, read_trained_upsampler
from distill.runtime.checkpoint import find_checkpoint
from distill.runtime.errors import RecipeError
from student.storage import StudentFile, save_student
from teachers.upsamplers.trained import save_upsampler

FORMATS = ("safetensors", "onnx", "radio", "hf", "pt2")
_SUFFIXES = {
    **{".safetensors": "safetensors", ".onnx": "onnx", ".pth": "radio", ".tar": "radio"},
    ".pt2": "pt2",
}


def export(
    path: Path,
    out: Path,
    *,
    format: str = FORMATS[0],
    heads: tuple[str, ...] | None = None,
    teacher_space: bool = False,
    half: bool = False,
    onnx: OnnxOptions = PLAIN,
    force: bool = False,
) -> Path:
    """Writes a student or an upsampler, whole or not at all.

    Args:
        path: the folder of a run or of a checkpoint; or the file of a student, see
            `source.read_source`.
        out: the file to write, or the folder for `hf`; missing folders above it are made.
        format: of a student's file, one of `FORMATS`.
        heads: the teachers whose heads a student keeps; None for all.
        teacher_space: whether a student's heads return maps in their teachers' own spaces, as in
            RADIO's format always, instead of the standardised ones that they were trained in.
        half: whether the weights of an upsampler, or of a student as safetensors, are stored in
            float16; they load in float32.
        onnx: the precision and the operators of a graph.
        force: whether existing files are overwritten.

    Returns:
        The folder of the checkpoint that was exported, or the file.

    Raises:
        RecipeError: an option that the model does not have, no such head, no statistics to fold,
            or `out` exists, cannot be written or has the suffix of another format; weights that
            are not finite.
    """
    if not has_upsampler(path):
        return export_student(
            path,
            out,
            format=format,
            heads=heads,
            teacher_space=teacher_space,
            half=half,
            onnx=onnx,
            force=force,
        )
    if heads is not None or teacher_space or format != FORMATS[0] or onnx != PLAIN:
        raise RecipeError(
            "--head, --no-heads, --teacher-space, --format, --precision, --opset: are for "
            "students; this is an upsampler"
        )
    checkpoint = find_checkpoint(path)
    _check_out(out, force)
    card, tensors = read_trained_upsampler(checkpoint)
    with _writing(out):
        save_upsampler(out, tensors, card, half=half)
    return checkpoint


def export_student(
    path: Path,
    out: Path,
    *,
    format: str = FORMATS[0],
    heads: tuple[str, ...] | None = None,
    teacher_space: bool = False,
    half: bool = False,
    onnx: OnnxOptions = PLAIN,
    force: bool = False,
) -> Path:
    """Writes a student and its model card, `OUT.md`; arguments and errors as of `export`.

    In the folder of `hf` the card is `README.md`.
    """
    card = card_of(out)
    weights = [large_weights(out)] if format == "onnx" else []
    if format == "hf":
        _check_folder(out, force)
    else:
        for each in (out, card, *weights):
            _check_out(each, force)
    _check_suffix(out, format)
    if format != "onnx" and onnx != PLAIN:
        raise RecipeError(f"--precision, --opset: are for --format onnx, not {format}")
    if half and format != FORMATS[0]:
        cure = "; --precision fp16 halves a graph" if format == "onnx" else ""
        raise RecipeError(f"--half: is for --format {FORMATS[0]}, not {format}{cure}")
    source = read_source(path)
    _check_finite(source.file, path)
    if heads is not None:
        source = source._replace(file=keep_heads(source.file, heads))
    file = _in_space(source, format, teacher_space)
    if format == "hf":
        _write_folder(out, file, source.checkpoint)
        return source.checkpoint or path
    with _writing(out):
        agreement = _write(file, format, out, onnx, half)
        write_text(card, model_card(file, out, format, source.checkpoint, agreement))
    return source.checkpoint or path


def card_of(out: Path) -> Path:
    """The model card of an exported file, beside it."""
    return out.with_name(f"{out.name}.md")


def _check_out(out: Path, force: bool) -> None:
    """Refuses a folder, and an existing file unless forced."""
    if out.is_dir():
        raise RecipeError(f"{out} is a folder; name the file to write, {out / 'NAME.safetensors'}")
    if out.exists() and not force:
        raise RecipeError(f"{out} already exists; --force overwrites it")


def _check_folder(out: Path, force: bool) -> None:
    """Refuses a file, and a folder that holds anything; an earlier export only unless forced."""
    if out.is_file():
        raise RecipeError(f"{out} is a file; name the folder to write, {out.with_suffix('')}_hf")
    inside = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
    others = [name for name in inside if name not in hf.FILES]
    if others:
        raise RecipeError(
            f"{out}: holds {others[0]}, which no export wrote; name a new folder, {out / 'hf'}"
        )
    if inside and not force:
        raise RecipeError(f"{out} already exists; --force overwrites it")


def _check_suffix(out: Path, format: str) -> None:
    """Refuses a name that says another format than the file has."""
    stated = _SUFFIXES.get(out.suffix.lower(), format)
    if stated != format:
        raise RecipeError(
            f"{out}: files of --format {format} are not {out.suffix}; did you mean "
            f"--format {stated}?"
        )


def _check_finite(file: StudentFile, path: Path) -> None:
    """Refuses weights that are NaN or infinite."""
    bad = {n: int((~t.isfinite()).sum()) for n, t in file.state_dict.items()}
    bad = {name: count for name, count in bad.items() if count}
    if bad:
        name, count = next(iter(bad.items()))
        raise RecipeError(
            f"{path}: {count} of {file.state_dict[name].numel()} values of {name} are NaN or "
            f"infinite, and so are values of {len(bad) - 1} more tensors; export an earlier "
            "checkpoint"
        )


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Makes the folder of a file and turns errors of the file system into a user's mistake."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror or error})") from None


def _in_space(source: Source, format: str, teacher_space: bool) -> StudentFile:
    checkpoint = source.checkpoint
    raw = checkpoint is not None and not is_standardised(checkpoint)
    if teacher_space and raw:
        raise RecipeError(
            "--teacher-space: the run has objective.standardisation=none, so its heads are already "
            "in their teachers' own spaces; leave the option out"
        )
    if teacher_space or (format == "radio" and not raw):
        return to_teacher_space(source)
    return source.file


def _write_folder(out: Path, file: StudentFile, checkpoint: Path | None) -> None:
    file = hf.for_hf(file)
    with _writing(out), atomic_folder(out) as partial:
        hf.save_hf(partial, file)
        write_text(partial / hf.CARD, model_card(file, out, "hf", checkpoint))
        from distill.formats.hf_check import check_hf  # builds timm's blocks

        print(check_hf(partial, file))


def _write(
    file: StudentFile, format: str, out: Path, onnx: OnnxOptions, half: bool
) -> Agreement | None:
    if format == "safetensors":
        save_student(out, file.config, file.targets, file.state_dict, file.metadata, half=half)
    elif format == "onnx":
        agreement = save_onnx(out, file, onnx)
        print(agreement_text(agreement))
        return agreement
    elif format == "pt2":
        save_pt2(out, file)
    else:
        from distill.formats.radio_reader import check_radio  # builds timm's models

        with atomic(out) as partial:
            save_radio(partial, file)
            check_radio(partial, file)
    return None
