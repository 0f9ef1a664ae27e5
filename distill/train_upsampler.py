"""Trains an upsampler: `deepspeed --module distill.train_upsampler RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest whole checkpoint, which holds the
upsampler as a file that a student's recipe can name.
"""

from distill.engine.engine import Engine
from distill.runtime import distributed
from distill.runtime.command import command
from distill.tasks.kinds import register_kinds
from distill.tasks.upsampler_build import NAME, base_resolution, build_encoder, fit_phi_s_of
from distill.tasks.upsampler_recipe import UpsamplerRecipe, load_upsampler_recipe
from distill.tasks.upsampler_task import UpsamplerTask, build_multi_view, parameter_groups
from distill.training.session import Assembly, open_stream, run_command


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


def assemble(recipe: UpsamplerRecipe) -> Assembly:
    """Builds the teacher and its upsampler, and opens the images at the size they need."""
    with distributed.first_on_its_node():
        teacher, fingerprint = build_encoder(recipe)
    resolution = base_resolution(recipe, teacher.spec)
    plan = recipe.step_plan(resolution, NAME, distributed.world_size())
    stream = open_stream(recipe, plan)
    phi_s = fit_phi_s_of(recipe, teacher, plan)
    module = build_multi_view(recipe, teacher, phi_s)
    engine = Engine(
        module,
        recipe.engine,
        recipe.optimizer,
        parameter_groups(module, recipe),
        micro_batch_size=plan.micro_batches(distributed.rank(), 0)[0].images,
    )
    return Assembly(UpsamplerTask(recipe, module, engine, teacher, fingerprint), stream, plan)


if __name__ == "__main__":
    main()
