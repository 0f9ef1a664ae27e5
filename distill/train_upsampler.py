"""Trains an upsampler: `deepspeed --module distill.train_upsampler RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest complete checkpoint, which holds the
upsampler as a file that a student's recipe can name.
"""

from distill.runtime.command import command
from distill.tasks.kinds import register_kinds
from distill.tasks.upsampler_recipe import load_upsampler_recipe
from distill.tasks.upsampler_run import assemble
from distill.training.session import run_command


@command
def main() -> None:
    """The command."""
    register_kinds()
    run_command(
        "distill.train_upsampler",
        "Train an upsampler that makes one teacher's map denser.",
        load_upsampler_recipe,
        assemble,
    )


if __name__ == "__main__":
    main()
