"""Takes what was trained away: `python -m distill.export CHECKPOINT --format safetensors OUT`.

The file holds the averaged weights where the run kept an average, the architecture and, as
metadata, the recipe, the versions and the step. `student.storage.load_student` reads it with
neither deepspeed nor this package.
"""

import argparse
import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.checkpoint import find_checkpoint, read_manifest
from distill.config import load_yaml
from distill.errors import RecipeError, command
from distill.export_upsampler import NAME as UPSAMPLER
from distill.export_upsampler import check_out, export_upsampler
from student.config import StudentConfig
from student.storage import StudentFile, read_student, save_student
from teachers.phi_s import PhiS, load_phi_s


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Write a trained student, or a trained upsampler, as one file that loads "
        "without the trainer.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a run's, whose newest whole checkpoint is taken",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=["safetensors"], default="safetensors")
    parser.add_argument(
        "--head", metavar="NAME", help="keep the backbone and this teacher's head only"
    )
    parser.add_argument(
        "--teacher-space",
        action="store_true",
        help="fold PHI-S into the heads, whose maps then are in their teachers' own spaces",
    )
    parser.add_argument(
        "--half", action="store_true", help="an upsampler only: store its weights in float16"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """The command."""
    arguments = parse_arguments()
    checkpoint = find_checkpoint(arguments.checkpoint)
    head, teacher_space, force = arguments.head, arguments.teacher_space, arguments.force
    if (checkpoint / UPSAMPLER).is_file():
        if head or teacher_space:
            raise RecipeError("--head, --teacher-space: are for students; this is an upsampler")
        export_upsampler(checkpoint, arguments.out, half=arguments.half, force=force)
    elif arguments.half:
        raise RecipeError("--half: is for upsamplers; this is a student")
    else:
        export_student(
            checkpoint, arguments.out, head=head, teacher_space=teacher_space, force=force
        )
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {size:.1f} MB, from {checkpoint}")


def export_student(
    checkpoint: Path, out: Path, *, head: str | None, teacher_space: bool, force: bool
) -> None:
    """Writes a checkpoint's student as one safetensors file; whole or not at all.

    Args:
        checkpoint: the folder of a whole checkpoint.
        out: the file to write; missing folders above it are made.
        head: the one teacher whose head is kept; None for all. The backbone and the kept head
            return the same numbers, bit for bit, as all class tokens stay.
        teacher_space: whether the heads' maps come out in their teachers' own spaces, and not in
            the standardised ones that they were trained on.
        force: whether `out` may be overwritten.

    Raises:
        RecipeError: no such head, no statistics to fold, or `out` is there or cannot be written.
    """
    check_out(out, force)
    file = read_student(checkpoint / "student.safetensors")
    config, state = _keep_head(file, head)
    kept = [name for name in file.targets if config.head.has(name)]
    if teacher_space:
        for name in kept:
            state = _fold(state, name, _statistics(checkpoint, name))
    manifest = read_manifest(checkpoint)
    metadata = {
        **file.metadata,
        "recipe": (checkpoint / "recipe.yaml").read_text(encoding="utf-8"),
        "versions": json.dumps(manifest["versions"]),
        "step": str(manifest["step"]),
        "head_space": "teacher" if teacher_space else "training",
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_student(out, config, file.targets, state, metadata)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror or error})") from None


def _keep_head(file: StudentFile, head: str | None) -> tuple[StudentConfig, dict[str, Tensor]]:
    """The configuration and weights with the MLPs of one teacher only."""
    if head is None:
        return file.config, file.state_dict
    known = [name for name in file.targets if file.config.head.has(name)]
    if head not in known:
        near = difflib.get_close_matches(head, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RecipeError(f"--head: no head {head!r}{hint}; there are {', '.join(known)}")
    only = file.config.head.model_copy(update={"only": (head,)})
    state = {
        name: value
        for name, value in file.state_dict.items()
        if not name.startswith("heads.") or name.startswith(f"heads.{head}.")
    }
    return file.config.model_copy(update={"head": only}), state


def _statistics(checkpoint: Path, name: str) -> PhiS:
    """What the map of one teacher was standardised with."""
    recipe = load_yaml(checkpoint / "recipe.yaml")
    if recipe["objective"]["standardisation"] == "none":
        raise RecipeError(
            "--teacher-space: the run has objective.standardisation=none, so its heads already "
            "are in their teachers' own spaces; leave the option out"
        )
    path = checkpoint / "statistics" / f"{name}.safetensors"
    if not path.is_file():
        raise RecipeError(
            f"--teacher-space: {checkpoint} has no statistics of {name!r}, whose losses have "
            "weight zero; its head was not trained. Choose another with --head"
        )
    return load_phi_s(path, "checkpoint")


def _fold(state: Mapping[str, Tensor], name: str, phi_s: PhiS) -> dict[str, Tensor]:
    """The weights with the inverse of PHI-S in the last layer of a spatial head."""
    last = f"heads.{name}.spatial.final.2"
    weight, bias = state[f"{last}.weight"], state[f"{last}.bias"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    folded = phi_s.fold_into_linear(linear)
    new: dict[str, Tensor] = {f"{last}.weight": folded.weight, f"{last}.bias": folded.bias}
    return {**state, **{key: torch.as_tensor(value).detach() for key, value in new.items()}}


if __name__ == "__main__":
    main()
