"""The command over every shipped recipe, its figures by hand, and its messages."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.plan import main
from distill.planning.machine import GPUS, Gpu, Speed, link_seconds, reading_seconds
from distill.planning.meter import Trace
from distill.planning.run import workload_of
from distill.planning.scaling import Scaling, measure_arms
from distill.planning.step import Workload
from distill.runtime.command import MISTAKE
from distill.runtime.config import apply_overrides, load_yaml
from distill.runtime.errors import RecipeError
from student.errors import StudentError
from student.model import Student
from student.storage import save_student
from tests.tiny_run import tiny_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
CLIP = "{kind: dfn_clip, model: ViT-H-14-378-quickgelu, weights: none}"
GPU = Gpu(half=100, tf32=40, single=10, memory=10, link=50, node=2, network=5, source="nowhere")


@cache
def load(name: str, *overrides: str) -> Workload:
    (path,) = [path for path in RECIPES if path.stem == name]
    tree = load_yaml(path)
    apply_overrides(tree, overrides)
    return workload_of(tree, name)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["plan", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "140")
    main()


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_without_weights(path: Path) -> None:
    workload = load(path.stem)
    for arm in {arm.name: arm for arm in (workload.arms[0], workload.arms[-1])}.values():
        trace = workload.trace(arm, 1)
        rows = workload.rows(arm)
        assert {row.component for row in rows} == trace.components.keys()
        assert all(trace.components[row.component].flops.total() > 0 for row in rows)
        assert trace.peak_with_gradients >= trace.peak > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("radio_v2_5_l", {"clip": 632.7, "siglip": 428.2, "dino": 1136.5, "sam": 637.0}),
        ("c_radio_v4_so400m", {"siglip": 1163.7, "dino": 6716.0, "sam": 637.0}),
    ],
)
def test_teachers_have_their_published_sizes(name: str, millions: dict[str, float]) -> None:
    workload = load(name)
    rows = {row.component: row for row in workload.rows(workload.arms[-1])}
    for teacher, due in millions.items():
        assert rows[teacher].parameters / 1e6 == pytest.approx(due, abs=0.06)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "passes"), [("tile", 10), ("featup", 1)])
def test_rows_of_the_papers_table_encode_as_often_as_their_upsampler_says(
    kind: str, passes: int
) -> None:
    entry = f"teachers.clip.upsampler={{kind: {kind}, factor: 3}}"
    few = ("arms={}", "run.resolution=1024", "run.batch_size=1", f"teachers={{clip: {CLIP}}}")
    plain, upsampled = load("radio_v2_5_l", *few), load("radio_v2_5_l", *few, entry)
    rows = {row.component: row for row in upsampled.rows(upsampled.arms[0])}
    assert rows["clip"].passes == passes
    assert rows["clip/upsampler"].shapes == "1134x1134 px -> 81x81x1280"
    bare, more = (w.trace(w.arms[0], 1).flops("clip") for w in (plain, upsampled))
    assert more == Counter({dtype: passes * flops for dtype, flops in bare.items()})


def test_an_upsampler_that_encodes_no_tiles_costs_its_teacher_nothing_more() -> None:
    workload = load("upsampler_clip_ti", "upsampler={kind: bilinear, factor: 2}")
    (teacher,) = [r for r in workload.rows(workload.arms[0]) if r.component == "teacher"]
    assert teacher.passes == 1 + 5


def test_time_takes_each_precision_at_its_own_rate() -> None:
    flops = Counter({torch.bfloat16: 200 * 10**12, torch.float32: 5 * 10**12})
    assert Speed(GPU, "fp32", 0.5).seconds(flops) == pytest.approx(2 * (2 + 5 / 10))
    assert Speed(GPU, "bf16", 0.5).seconds(flops) == pytest.approx(2 * (2 + 5 / 40))


def test_links_between_nodes_count_once_the_ranks_do_not_fit_one() -> None:
    sent = 8e9  # at 80 %
    assert link_seconds(sent, GPU, 2) == pytest.approx(8 / (50 * 0.8))
    assert link_seconds(sent, GPU, 4) == pytest.approx(8 / (5 * 0.8))


def test_small_images_are_read_at_a_rate_of_images_and_large_ones_of_pixels() -> None:
    assert reading_seconds(400, (64, 64), 1) == pytest.approx(1)
    assert reading_seconds(9, (3000, 5000), 3) == pytest.approx(9 * 30 / 90 / 3)


def scaling(tmp_path: Path, gpu: Gpu = GPU, **sections: Any) -> Scaling:
    workload = workload_of(tiny_recipe(tmp_path, **sections), "tiny")
    return Scaling(workload, measure_arms(workload), Speed(gpu, "fp32", 0.5))


@pytest.mark.long
def test_the_largest_micro_batch_fills_the_memory_when_it_is_traced(tmp_path: Path) -> None:
    workload = workload_of(tiny_recipe(tmp_path), "tiny")
    speed = Speed(GPU._replace(memory=0.2), "fp32", 0.5)
    found = Scaling(workload, measure_arms(workload), speed)
    step = found.on(1)
    (largest,), (arm,) = step.largest, workload.arms
    traced = workload.trace(arm, largest)
    memory = found.sharding.memory(traced, 1, accumulation=1, teachers=step.memory.teachers)
    assert memory.total == pytest.approx(0.2e9 * 0.92, rel=0.02)


def traced(tmp_path: Path, **sections: Any) -> tuple[Workload, Trace]:
    """A micro-batch of the tiny recipe with these sections."""
    workload = workload_of(tiny_recipe(tmp_path, **sections), "tiny")
    return workload, workload.trace(workload.arms[0], 2)


def total(trace: Trace, part: str) -> int:
    return trace.components[part].flops.total()


@pytest.mark.long
def test_shifts_dropping_and_tolerated_losses_cost_no_products(tmp_path: Path) -> None:
    objective = {
        "equivariance": {"kind": "shift", "limit": 1},
        "dropping": 0.5,
        "tolerated_non_finite": 2,
    }
    assert traced(tmp_path)[1] == traced(tmp_path, objective=objective)[1]


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"reparametrisation": {"spectral": "all", "damp": 0.1}}])
def test_a_step_in_fp16_holds_half_the_bytes_and_costs_the_same_products(
    options: dict[str, Any], tmp_path: Path
) -> None:
    _, whole = traced(tmp_path, **options)
    workload, half = traced(tmp_path, engine={"precision": "fp16"}, **options)
    assert {p.dtype for p in workload.trained.parameters()} == {torch.float16}
    assert total(half, "student") == total(whole, "student")
    assert half.peak < whole.peak


@pytest.mark.long
def test_mesa_runs_the_average_forward_in_its_steps_and_keeps_it_whole(tmp_path: Path) -> None:
    mesa = {"weight": 1.0, "start_step": 6}
    _, plain = traced(tmp_path)
    workload, trace = traced(tmp_path, objective={"mesa": mesa})
    embedding = 2 * 2 * 4 * 3 * 16**2 * 32  # whose input has no gradient
    forward = (total(plain, "student") - 2 * embedding) / 3 + embedding
    assert total(trace, "moving average") == 18 / 24 * forward
    (row,) = [row for row in workload.rows(workload.arms[0]) if row.component == "moving average"]
    assert (row.passes, row.trained) == (18 / 24, False)
    found = Scaling(workload, measure_arms(workload), Speed(GPU, "fp32", 0.5))
    assert found.on(2).memory.average == 4 * sum(p.numel() for p in workload.trained.parameters())


@pytest.mark.long
def test_windows_count_in_their_share_of_the_steps(tmp_path: Path) -> None:
    options = {"run": {"resolution": 64}, "student": {"windows": {"num_global": 1}}}
    never, always, often = (
        traced(tmp_path, window_augmentation={"probability": p, "sizes": [2, 3]}, **options)[1]
        for p in (0.0, 1.0, 0.25)
    )
    flops = [total(trace, "student") for trace in (never, always, often)]
    assert flops[2] == 0.75 * flops[0] + 0.25 * flops[1]
    # One of two blocks: 4 windows of 4 patches, each with its own copy of 5 tokens.
    assert flops[1] - flops[0] == 3 * 2 * (block(9, 4) - block(21, 1))
    assert often.peak == max(never.peak, always.peak)


def block(tokens: int, windows: int) -> int:
    """FLOPs of a block of the tiny student for an image."""
    return windows * (2 * tokens * 12 * 32**2 + 4 * tokens**2 * 32)


@pytest.mark.long
def test_spectral_norms_hold_each_effective_weight_and_cost_no_products(tmp_path: Path) -> None:
    _, plain = traced(tmp_path)
    workload, trace = traced(tmp_path, reparametrisation={"spectral": "trunk"})
    assert trace.flops() == plain.flops()
    matrices = 4 * 2 * 12 * 32**2  # bytes, of two blocks
    assert trace.components["student"].held - plain.components["student"].held >= matrices
    assert not workload.may_checkpoint
    scales = 2 * (3 + 3)  # q, k and v have one each
    assert sum(p.numel() for p in workload.trained.parameters()) == 54560 + scales


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, Any]:
    """Sections of a recipe that teaches the tiny student one more teacher."""
    workload = workload_of(tiny_recipe(tmp_path), "tiny")
    student = Student(workload.trained.config, workload.trained.targets)
    path = tmp_path / "student.safetensors"
    save_student(path, student.config, student.targets, student.state_dict(), {})
    new = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}
    return {
        "teachers": {"new": new},
        "student": {"init": {"kind": "student", "path": str(path)}, "isolated": ["new"]},
        "objective": {"weights": {"expert": {"summary": 0, "spatial": 0}}},
    }


@pytest.mark.long
def test_a_frozen_trunk_has_no_gradients_of_weights_and_exchanges_the_new_heads(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    workload, trace = traced(tmp_path, finetuning={"trunk": "frozen"}, **trained)
    head = sum(p.numel() for p in workload.trained.heads["new"].parameters())
    tokens = 2 * 32
    embedding, forward = 2 * 2 * 4 * 3 * 16**2 * 32, 2 * 2 * block(4 + 2 + 4, 1)
    # Forward, and backward to the new class token: through attention twice, once through weights.
    attention = 2 * 2 * 4 * 10**2 * 32
    assert total(trace, "student") == embedding + 2 * forward + attention
    sharding = Scaling(workload, measure_arms(workload), Speed(GPU, "fp32", 0.5)).sharding
    assert sharding.parameters == head + tokens
    assert sum(sharding.collectives(1)) == 2 * 4 * (head + tokens)
    memory = sharding.memory(trace, 1, accumulation=1, teachers=0)
    assert memory.weights == 4 * sum(p.numel() for p in workload.trained.parameters())
    assert memory.moments == 2 * 4 * (head + tokens)


@pytest.mark.long
def test_low_rank_updates_are_trained_beside_frozen_weights(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    tuned = {"trunk": "low_rank", "rank": 2}
    workload, trace = traced(tmp_path, finetuning=tuned, **trained)
    frozen, plain = traced(tmp_path, finetuning={"trunk": "frozen"}, **trained)
    more = 2 * 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    (updated, before) = (
        sum(p.numel() for p in w.trained.parameters() if p.requires_grad)
        for w in (workload, frozen)
    )
    assert updated - before == more
    matrices = 2 * 12 * 32**2
    # The update's product and both its gradients, and the gradient of each effective weight.
    products = 3 * 2 * 2 * matrices + 2 * 2 * 10 * matrices
    assert total(trace, "student") - total(plain, "student") == products


def test_fine_tuning_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    start = {"init": {"kind": "student", "path": str(tmp_path / "student.safetensors")}}
    tree = tiny_recipe(tmp_path, student=start, finetuning={"trunk": "frozen"})
    with pytest.raises(StudentError, match="student.safetensors: there is no such file"):
        workload_of(tree, "tiny")


@pytest.mark.long
def test_what_limits_a_run_follows_the_machine(tmp_path: Path) -> None:
    limits = {
        "compute": GPU._replace(half=1e-6, single=1e-6),
        "communication": GPU._replace(half=1e6, single=1e6, link=1e-6, network=1e-6),
        "data": GPU._replace(half=1e6, single=1e6, link=1e6, network=1e6),
    }
    for due, gpu in limits.items():
        assert scaling(tmp_path, gpu).on(2).limit == due


@pytest.mark.long
def test_without_workers_reading_adds_to_the_step_and_with_them_it_runs_beside(
    tmp_path: Path,
) -> None:
    alone = scaling(tmp_path, data={"workers": 0}).on(1)
    beside = scaling(tmp_path, data={"workers": 1}).on(1)
    assert alone.step == pytest.approx(alone.compute + alone.communication + alone.data)
    assert beside.step == pytest.approx(max(beside.compute + beside.communication, beside.data))


def test_ranks_share_the_batch_and_micro_batches_shrink_with_it(tmp_path: Path) -> None:
    found = scaling(tmp_path, run={"batch_size": 12, "micro_batch_size": 4})
    steps = [found.on(gpus) for gpus in (1, 2, 4, 12)]
    assert [(s.micro_batches[0], s.accumulation) for s in steps] == [
        *((4, 3), (3, 2), (3, 1), (1, 1))
    ]
    with pytest.raises(RecipeError, match="12 images do not divide over 5 ranks; use 10 or 15"):
        found.on(5)


@pytest.mark.long
def test_the_command_prints_the_models_a_rank_and_the_hours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(path for path in RECIPES if path.stem == "quickstart")
    call(monkeypatch, str(path), "run.batch_size=4", "--gpus", "1,4", "--gpu", "a100")
    said = capsys.readouterr().out
    assert "4 images of 256 x 256 px a step" in said
    assert re.search(r"clip/upsampler .* 256x256 px -> 16x16x192", said)
    assert "312 TFLOP/s in bf16 and 19.5 of float32 products in float32 (NVIDIA A100" in said
    assert re.search(r"student +│ +4 of [0-9]+ │ +1 of [0-9]+ ", said)
    (line,) = re.findall(r"checkpointing=true: student takes (.*)", said)
    bytes_other, bytes_now, flops_other, flops_now = re.findall(r"[\d.]+(?= GB|, and| T|$)", line)
    assert float(bytes_other) < float(bytes_now)
    assert float(flops_other) > float(flops_now)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "--gpu h10: unknown (did you mean 'h100'?); choose from b200, "),
        (["--gpus", "8,x"], "--gpus 8,x: expected numbers of GPUs, such as 8,64,512"),
        (["--gpus", "0"], "--gpus 0: expected numbers of GPUs"),
        (["--mfu", "1.5"], "--mfu 1.5: expected a share above 0, at most 1"),
        pytest.param(
            ["--gpus", "3"],
            "run.batch_size: 16 images do not divide over 3 ranks; use 15 or 18",
            marks=pytest.mark.long,  # known only after the trace
        ),
        (["task=students"], "got 'students' (did you mean 'student'?); only trainings have a plan"),
        (["run.stepz=3"], "run.stepz: unknown key (did you mean 'steps'?)"),
        (
            ["teachers.clip.upsampler=runs/none.safetensors"],
            "to plan before it is trained, describe it, such as "
            "teachers.clip.upsampler={kind: featsharp, factor: 3}",
        ),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = next(path for path in RECIPES if path.stem == "quickstart")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, str(path), *arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == MISTAKE
    assert message in said
    assert said.startswith("error: ")


def test_a_student_beyond_its_upsamplers_reach_is_refused(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path)
    tree["teachers"]["expert"]["upsampler"] = [{"kind": "tile", "factor": 1}]
    tree["run"]["resolution"] = 64
    with pytest.raises(RecipeError, match="add one of"):
        workload_of(tree, "tiny")


def arms(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Small images, in a quarter of the steps wide ones, and large images."""
    sizes = [{"size": 32, "probability": 0.75}, {"size": [32, 64], "probability": 0.25}]
    low = {"resolution": sizes, "batch_size": 8} | changes
    high = {"resolution": 64, "batch_size": 2} | changes
    run = {"dir": "run", "steps": 24}
    return tiny_recipe(tmp_path) | {"run": run, "arms": {"low": low, "high": high}}


@pytest.mark.long
def test_a_step_takes_all_arms_and_each_size_in_its_share_of_the_steps(tmp_path: Path) -> None:
    workload = workload_of(arms(tmp_path), "arms")
    names = [(arm.name, arm.share) for arm in workload.arms]
    assert names == [("low 32 x 32", 0.75), ("low 32 x 64", 0.25), ("high", 1.0)]
    costs = measure_arms(workload)
    speed = Speed(GPU, "fp32", 1.0)
    seconds = [speed.seconds(cost.trace.flops()) for cost in costs]
    step = Scaling(workload, costs, speed).on(1)
    due = 8 * (0.75 * seconds[0] + 0.25 * seconds[1]) + 2 * seconds[2]
    assert step.compute == pytest.approx(due, rel=1e-3)
    assert step.accumulation == 2


@pytest.mark.long
def test_arms_with_ranks_of_their_own_run_side_by_side(tmp_path: Path) -> None:
    workload = workload_of(arms(tmp_path, ranks=1), "arms")
    costs = measure_arms(workload)
    speed = Speed(GPU, "fp32", 1.0)
    seconds = [speed.seconds(cost.trace.flops()) for cost in costs]
    found = Scaling(workload, costs, speed)
    low, high = 8 * (0.75 * seconds[0] + 0.25 * seconds[1]), 2 * seconds[2]
    assert found.on(1).compute == pytest.approx(low + high, rel=1e-3)
    assert found.on(2).compute == pytest.approx(max(low, high), rel=1e-3)
    with pytest.raises(RecipeError, match="do not fit 3 ranks; start 2 or 4"):
        found.on(3)


def test_stages_count_for_the_steps_that_they_last(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path)
    tree["run"]["resolution"] = [{"size": 32, "end": 6}, {"size": 64, "start": 6}]
    assert [arm.share for arm in workload_of(tree, "stages").arms] == [0.25, 0.75]


@pytest.mark.long
def test_images_on_one_canvas_share_a_pass_of_their_teacher() -> None:
    workload = load("radio_v2_5_l")
    low, high = (
        next(row for row in workload.rows(arm) if row.component == "sam") for arm in workload.arms
    )
    assert (low.passes, low.shapes) == (0.25, "1024x1024 px -> 27x27x1280")
    assert (high.passes, high.shapes) == (1, "1024x1024 px -> 64x64x1280")


def test_every_gpu_has_a_source() -> None:
    assert all(gpu.source and gpu.half > gpu.single for gpu in GPUS.values())
