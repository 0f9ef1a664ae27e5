"""Exports what was trained: `python -m distill.export CHECKPOINT --format FORMAT OUT`.

The file holds the averaged weights if the run kept an average. `safetensors` is read by
`student.load` with neither deepspeed nor this package, `onnx` by onnxruntime alone, `pt2` by torch
alone, `radio` by whatever reads the public checkpoints of the RADIO family, `hf`, a folder, by
transformers without code of ours and by vLLM. A model card is written beside each.
"""

import argparse
from pathlib import Path

from data.text import printable
from distill.formats.export import FORMATS, export
from distill.formats.onnx import DEFAULT_OPSET, OnnxOptions
from distill.formats.onnx_graph import OPSETS
from distill.formats.onnx_precision import PRECISIONS
from distill.runtime.command import command
from distill.tasks.kinds import register_kinds


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Write a trained student, or a trained upsampler, as one file that loads "
        "without the trainer, or as a folder for transformers. A student's file gets a model card "
        "beside it, OUT.md.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="the folder of a checkpoint, or of a run, whose newest whole checkpoint is taken; or "
        "a student's file, folder of --format hf, hf://OWNER/NAME on the hub, or the name of one "
        "that ships; or a model of the RADIO family in its public format",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; for hf a folder")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument(
        "--head", metavar="NAME", help="keep the backbone and the head of this teacher only"
    )
    heads.add_argument("--no-heads", action="store_true", help="keep the backbone only")
    parser.add_argument(
        "--teacher-space",
        action="store_true",
        help="fold PHI-S into the heads, so that their maps are in their teachers' own spaces; "
        "always done for --format radio",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="of an upsampler, or a student's --format safetensors: store the weights in float16; "
        "they load in float32",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=PRECISIONS[0],
        help="of --format onnx: fp16 halves the file, int8 quarters it",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        default=DEFAULT_OPSET,
        help="of --format onnx: the version of ONNX's operators; %(default)s by default, 17 for "
        "older runtimes",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(arguments)


@command
def main() -> None:
    """The command."""
    register_kinds()
    options = vars(parse_arguments())
    out, head, no_heads = (options.pop(name) for name in ("out", "head", "no_heads"))
    heads = (head,) if head else () if no_heads else None
    onnx = OnnxOptions(options.pop("precision"), options.pop("opset"))
    path = export(options.pop("checkpoint"), out, heads=heads, onnx=onnx, **options)
    size = sum(each.stat().st_size for each in ([out] if out.is_file() else out.iterdir()))
    print(printable(f"{out}: {size / 1e6:.1f} MB, from {path}"))


if __name__ == "__main__":
    main()
