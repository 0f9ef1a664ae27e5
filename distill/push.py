"""Uploads an export to Hugging Face's hub: `python -m distill.push OUT OWNER/NAME`.

OUT is a folder of `distill.export --format hf`, an exported file with its card beside it, or the
name of a student that ships. The token is that of `hf auth login` or HF_TOKEN. Exit codes: 0 done;
2 a user's mistake, no token or no access among them; 1 the hub cannot be reached or fails.
"""

import argparse
from pathlib import Path

from data.text import printable
from distill.formats.publish import find_upload, upload
from distill.runtime.command import command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.push",
        description="Upload an exported student to Hugging Face's hub, in one commit.",
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="OUT",
        help="a folder of `distill.export --format hf`, an exported file with its card, OUT.md, or "
        "the name of a student that ships",
    )
    parser.add_argument(
        "repo",
        metavar="REPO",
        help="OWNER/NAME, or NAME for your own account; made where there is none",
    )
    parser.add_argument(
        "--private", action="store_true", help="make it private; an existing one must be"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="another branch than the main one")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be uploaded, and upload nothing"
    )
    return parser.parse_args(arguments)


def _shown(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


@command
def main() -> None:
    """The command."""
    options = parse_arguments()
    found = find_upload(options.path)
    repo = options.repo.removeprefix("hf://")
    for name, path in found.files.items():
        print(printable(f"{name}: {_shown(path.stat().st_size)}"))
    if found.note:
        print(printable(found.note))
    where = f"{repo}{f', branch {options.revision}' if options.revision else ''}"
    total = f"{_shown(found.size)} to {where}, licence {found.licence}"
    if options.dry_run:
        print(printable(f"would upload {total}"))
        return
    url = upload(found, repo, private=options.private, revision=options.revision)
    print(printable(f"uploaded {total}: {url}"))


if __name__ == "__main__":
    main()
