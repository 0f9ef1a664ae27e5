"""The images of an evaluation."""

from pathlib import Path

from distill.runtime.errors import RecipeError


def require_images(source: Path) -> None:
    """Looks for them before teachers are built, which may take minutes.

    Raises:
        RecipeError: there is no such file or folder.
    """
    if not source.exists():
        raise RecipeError(
            f"evaluation.images: there is no {source.absolute()}; set it to a folder, "
            "archive or shards of images that the run does not train on"
        )
