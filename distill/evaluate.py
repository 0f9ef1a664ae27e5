"""Evaluates what was trained: `python -m distill.evaluate TARGET [key=value ...]`.

The `task` of the recipe says what is measured: the agreement of a student with its teachers, the
fidelity of an upsampler to its encoder, a comparison of upsamplers, the time that features take by
resolution, or benchmarks; a report combines the results of several suites of benchmarks. With
`--on SUITE` the suite measures the target beside its baseline. Exit codes: 0 done, or
stopped on request, where measurements that are done are kept; 2 a user's mistake.
"""

import argparse
from pathlib import Path

from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.run import evaluate
from distill.runtime.command import command
from distill.runtime.stopping import interruptible, listening
from distill.runtime.tracking import start_logging


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.evaluate",
        description="Measure on held-out images the agreement of a student with its teachers, "
        "before and after training, the fidelity of upsamplers to their encoder, or any encoder "
        "on benchmarks. Writes JSON lines, pictures and a page that shows them.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a recipe (task student, upsampler, upsamplers, throughput, benchmarks or report), "
        "the folder of a run, or one of its checkpoints; with --on also an exported student, "
        "as safetensors or onnx, or the name of one that ships or of a timm model",
    )
    parser.add_argument(
        "--on",
        type=Path,
        metavar="SUITE",
        help="measure TARGET and the suite's baseline, if it names one, by this recipe of "
        "benchmarks, see recipes/evaluation; overrides change this recipe",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as benchmarks.camvid.dataset.root=PATH or "
        "evaluation.resolutions=[256,[384,512]]; recipes/evaluation/README.md has a command for "
        "each benchmark",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args(arguments)


@command
def main() -> None:
    """The command."""
    register_evaluation_kinds()
    arguments = parse_arguments()
    start_logging()
    with listening(), interruptible():
        evaluate(arguments.target, arguments.overrides, arguments.on)


if __name__ == "__main__":
    main()
