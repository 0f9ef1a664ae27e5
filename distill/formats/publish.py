"""Uploads an export to Hugging Face's hub: the work of `distill.push`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from distill.formats import hf
from distill.formats.export import card_of
from distill.formats.hf_keys import check_keys
from distill.formats.hub_metadata import MARK, read_front_matter
from distill.formats.model_card import relocatable
from distill.formats.onnx_graph import large_weights
from distill.runtime.config import parse_yaml
from distill.runtime.errors import RecipeError, UploadError
from student.hub import why_not
from student.shipped import WEIGHTS, is_name, names, shipped
from student.storage import read_header
from teachers.messages import did_you_mean
from teachers.weights import read_json


class Upload(NamedTuple):
    """What is uploaded.

    Attributes:
        files: the name in the repository to the file here.
        licence: the identifier on the card.
        note: what the user may not know; empty for nothing.
    """

    files: dict[str, Path]
    licence: str
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def find_upload(path: Path) -> Upload:
    """Finds and checks what is to be uploaded.

    Args:
        path: a folder of `--format hf`; the file of another format with its card beside it; or the
            name of a student that ships.

    Raises:
        RecipeError: neither, or parts of it are missing or damaged.
        StudentError: the heads in the folder, or the student's file, are damaged.
    """
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{path}: is a run or a checkpoint; export it first, `python -m distill.export {path} "
            "--format hf OUT`"
        )
    note, box = "", shipped(path)
    if box is not None:
        files = {WEIGHTS: box / WEIGHTS, hf.CARD: box / hf.CARD}
        _require(path, files, "is no whole student in the box")
        note = _note(read_header(path).metadata)
    elif path.is_dir():
        files = {name: path / name for name in hf.FILES}
        _require(path, files, "is no folder of `distill.export --format hf`")
        check_keys(files[hf.MODEL], read_json(files[hf.CONFIG]))
        read_header(path)
    else:
        files = {path.name: path, hf.CARD: card_of(path)}
        _require(path, files, "is no export with its card beside it")
        if path.suffix == ".safetensors":
            note = _note(read_header(path).metadata)
        if large_weights(path).is_file():
            files[large_weights(path).name] = large_weights(path)
    front = read_front_matter(files[hf.CARD])
    if MARK not in front.get("tags", ()):
        raise RecipeError(
            f"{files[hf.CARD]}: is no card of `distill.export`: its tags have no {MARK}"
        )
    return Upload(files, str(front.get("license")), note)


def _note(metadata: Mapping[str, str]) -> str:
    """Says where a file's header would publish paths of this machine."""
    recipe = parse_yaml(metadata.get("recipe", "{}"), "the recipe in its header")
    if relocatable(recipe) == recipe:
        return ""
    return (
        "note: the recipe in its header has absolute paths of the machine that trained it; "
        "--format hf leaves them out"
    )


def _require(path: Path, files: dict[str, Path], what: str) -> None:
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        hint = did_you_mean(path.name, names()) if is_name(path) else ""
        raise RecipeError(f"{path}: {what}: there is no {missing[0]}{hint}")


def upload(found: Upload, repo: str, *, private: bool, revision: str | None) -> str:
    """Uploads in one commit; makes the repository, and the branch, where there is none.

    Args:
        found: what is uploaded.
        repo: OWNER/NAME, or NAME for the owner of the token.
        private: whether the repository is made private; an existing one must be.
        revision: the branch; None for the main one.

    Returns:
        The address of the commit.

    Raises:
        RecipeError: huggingface_hub is missing, or there is no token, access or such name; or the
            repository is public and `private` was asked for.
        UploadError: the hub cannot be reached, or fails.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
    except ImportError:
        raise RecipeError(
            "huggingface_hub is missing; pip install 'featsharp-distill[hf]'"
        ) from None
    if get_token() is None:
        raise RecipeError(
            "there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write"
        )
    api = HfApi()
    additions = [CommitOperationAdd(name, str(file)) for name, file in found.files.items()]
    with _translated(repo):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise RecipeError(
                f"{repo}: exists and is public, and --private was asked for; nothing was uploaded. "
                "Make it private on its page, or choose another name"
            )
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        message = f"Upload {next(iter(found.files))} by featsharp-distill"
        commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    return commit.commit_url


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Turns errors of huggingface_hub and its HTTP client into one message."""
    from huggingface_hub import errors

    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # the client's classes depend on its release
        status: Any = getattr(getattr(error, "response", None), "status_code", None)
        told = why_not(error, cached=False)
        if status is None and type(error) is ValueError:  # a card that the hub refuses
            told, status = " ".join(str(error).split()), 400
        mistake = isinstance(error, errors.HFValidationError) or (status or 500) < 500
        kind = RecipeError if mistake else UploadError
        raise kind(f"{repo}: no commit was made: {told}") from None
