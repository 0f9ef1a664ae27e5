"""Downloads a student from Hugging Face's hub: `hf://OWNER/NAME[@REVISION][/FILE]`.

By huggingface_hub: its cache, token (`HF_TOKEN`, `hf auth login`), endpoint (`HF_ENDPOINT`) and
`HF_HUB_OFFLINE` count.
"""

import re
from os import PathLike
from pathlib import Path, PurePosixPath

from student.errors import StudentError
from student.hf_folder import CONFIG, HEADS, MODEL
from teachers.messages import did_you_mean

_STUDENT = "student.safetensors"
# One slash where a path type has cut the other. A revision may be a pull request, refs/pr/3.
_URL = re.compile(
    r"hf:/{1,2}(?P<repo>[^/@\s]+/[^/@\s]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/\s]+|[^/\s]+))?(?:/(?P<file>[^\s]+))?"
)
_PART = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def on_hub(path: str | PathLike[str]) -> bool:
    """Whether a path names a student on the hub."""
    return str(path).startswith("hf:/")


def download(url: str | PathLike[str]) -> Path:
    """Downloads a student, or finds it in the cache.

    Args:
        url: `hf://OWNER/NAME`, with `@REVISION` for a branch, tag or commit. The repository holds
            an export for transformers, or one file of `save_student`; with several, `/FILE` names
            one.

    Returns:
        The student's file in the cache, of an export for transformers that of the heads.

    Raises:
        StudentError: not such an address, no such repository, revision or file, no access, neither
            a network nor a copy in the cache, or huggingface_hub is missing.
    """
    found = _URL.fullmatch(str(url))
    if found is None:
        raise StudentError(
            f"student {url}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or, for one of "
            "several files, hf://OWNER/NAME/FILE"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise StudentError(
            f"student {url}: needs huggingface_hub; pip install huggingface_hub"
        ) from None

    def fetch(revision: str | None, *names: str) -> Path:
        try:
            return Path(
                snapshot_download(found["repo"], revision=revision, allow_patterns=list(names))
            )
        except Exception as error:  # of huggingface_hub, its HTTP client, and the file system
            raise StudentError(f"student {url}: {why_not(error)}") from None

    wanted = found["file"]
    folder = fetch(found["revision"], wanted or HEADS, CONFIG)
    commit = folder.name  # from here on one commit, whatever is pushed meanwhile
    if wanted is None and not (folder / HEADS).is_file():
        wanted = _only_student(str(url), _names(found["repo"], commit, folder))
        fetch(commit, wanted)
    if wanted is None or PurePosixPath(wanted).name == HEADS:
        wanted = wanted or HEADS
        fetch(commit, str(PurePosixPath(wanted).with_name(MODEL)))
    if not (folder / wanted).is_file():
        names = _names(found["repo"], commit, folder)
        raise StudentError(
            f"student {url}: the repository has no {wanted}{did_you_mean(wanted, names)}"
        )
    return folder / wanted


def _names(repo: str, commit: str, folder: Path) -> list[str]:
    """The files of a repository; without a network those in the cache."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(repo, revision=commit))
    except Exception:  # as above
        return sorted(str(each.relative_to(folder)) for each in folder.rglob("*.safetensors"))


def _only_student(url: str, names: list[str]) -> str:
    """The file of `save_student` in a repository without an export for transformers."""
    files = [name for name in names if name.endswith(".safetensors")]
    if _STUDENT in files:
        return _STUDENT
    if MODEL in files or any(map(_PART.search, files)):
        raise StudentError(
            f"student {url}: holds a model of another library, not a student: there is no {HEADS}. "
            "As a teacher, try `kind: radio` or `kind: hf`"
        )
    if len(files) == 1:
        return files[0]
    what = f"there are {', '.join(files)}; name one: {url}/{files[0]}" if files else "it has none"
    raise StudentError(f"student {url}: expected one safetensors file in the repository; {what}")


def why_not(error: Exception, cached: bool = True) -> str:
    """Why huggingface_hub could not do something with a repository, in words for a user.

    Args:
        error: what it raised.
        cached: whether a copy in the cache would have served.
    """
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    causes = (
        (errors.HFValidationError, f"is no name on the hub ({_line(error)})"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.GatedRepoError,
            f"its owner grants access on request; ask at {constants.ENDPOINT}, then log in with "
            "`hf auth login` or set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{constants.ENDPOINT} has no such repository, or it is private and the token has no "
            "access; log in with `hf auth login` or set HF_TOKEN",
        ),
    )
    for kind, told in causes:
        if isinstance(error, kind):
            return told
    if status in (401, 403):
        return (
            f"{constants.ENDPOINT} refuses the token (code {status}): it must be valid and allowed "
            "to do this; log in with `hf auth login` or set HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif status is not None:
        reason = f"{constants.ENDPOINT} answered with code {status} ({_line(error)})"
    else:
        reason = f"{constants.ENDPOINT} cannot be reached ({_line(error)})"
    also = f", and it is not in the cache {constants.HF_HUB_CACHE}"
    return f"{reason}{also if cached else ''}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
