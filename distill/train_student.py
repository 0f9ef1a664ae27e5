"""Trains a student: `deepspeed --module distill.train_student RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest complete checkpoint.
"""

from distill.runtime.command import command
from distill.tasks.kinds import register_kinds
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.student_run import assemble, preview
from distill.training.session import run_command


@command
def main() -> None:
    """The command."""
    register_kinds()
    run_command(
        "distill.train_student",
        "Train a student from several frozen teachers.",
        load_student_recipe,
        assemble,
        preview,
    )


if __name__ == "__main__":
    main()
