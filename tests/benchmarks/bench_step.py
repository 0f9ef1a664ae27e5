"""What one training step costs beside a bare PyTorch loop that does the same mathematics.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_step

Both take turns in one process; the ratio is the median over rounds of process CPU time, which
others on the machine disturb less than wall time. Peak memory is each one's own, in its own
process. Targets: CPU time at most 1.05 of the bare loop, peak memory at most 1.10 of it.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import distributed
from distill.config import validate
from distill.engine import Engine
from distill.feature_statistics import TargetStatistics
from distill.optimizer import decay_groups
from distill.recipe import StudentRecipe
from distill.student_task import StudentTask, build_student, build_targets, build_teachers
from teachers.phi_s import FeatureStatistics, fit_phi_s
from tests.benchmarks.figure import Figure
from tests.benchmarks.workload import BATCH, DIM, HIDDEN, LAYERS, SIDE, recipe

LR, DECAY, CLIP = 1e-4, 0.02, 1.0
Step = Callable[[Tensor], None]


def phi_s_statistics() -> FeatureStatistics:
    """Of random vectors: standardising costs the same whatever it was fitted to."""
    sums = FeatureStatistics.zeros(DIM)
    sums.update(torch.randn(2 * DIM, DIM))
    return sums


def our_step() -> Step:
    """The engine, the task and the targets, as `train_student` puts them together."""
    distributed.connect(600, Path())  # one process: nothing is written
    ours = validate(StudentRecipe, recipe(Path("unused"), steps=1), "workload")
    teachers = build_teachers(ours)
    targets = build_targets(ours, teachers)
    phi_s = fit_phi_s(phi_s_statistics())
    for name in teachers:
        targets.statistics[name] = TargetStatistics(phi_s, torch.ones(()))
    student = build_student(ours, teachers)
    groups = decay_groups(student, ours.optimizer, student.no_weight_decay())
    engine = Engine(student, ours.engine, ours.optimizer, groups, micro_batch_size=BATCH)
    task = StudentTask(ours, student, engine, targets)
    (part,) = ours.step_plan(1).passes(0, 0)

    def step(images: Tensor) -> None:
        engine.backward(task.loss(images.float() / 255, part).total)
        engine.step(LR)

    return step


def bare_step() -> Step:
    """The same in plain PyTorch and timm, with nothing around it."""
    import timm  # once the package `teachers` has repaired torchvision

    mean, std = (torch.full((3, 1, 1), value) for value in (0.45, 0.27))
    build = timm.create_model
    teachers = [build("vit_base_patch16_224", num_classes=0).eval() for _ in range(2)]
    student = build("vit_small_patch16_224", num_classes=0, reg_tokens=1, global_pool="token")

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def mlp(last: int = HIDDEN) -> list[nn.Module]:
        return [nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, last)]

    def head() -> nn.Module:
        inner = [Residual(*mlp()) for _ in range(LAYERS)]
        return nn.Sequential(nn.Linear(student.embed_dim, HIDDEN), *inner, *mlp(DIM))

    heads = nn.ModuleList(nn.ModuleList([head(), head()]) for _ in teachers)
    phi_s = fit_phi_s(phi_s_statistics())
    matrix, centre = phi_s.alpha * phi_s.rotation, phi_s.mean
    parameters = [*student.parameters(), *heads.parameters()]
    decayed, free = ([p for p in parameters if (p.ndim > 1) == matrices] for matrices in (1, 0))
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)

    def step(pixels: Tensor) -> None:
        images = (pixels.float() / 255 - mean) / std
        with torch.no_grad():
            tokens = [teacher.forward_features(images) for teacher in teachers]
            targets = [(t[:, 0], (t[:, 1:] - centre) @ matrix.T) for t in tokens]
        ours, loss = student.forward_features(images), torch.zeros(())
        for i, (summary, spatial) in enumerate(targets):
            cosine = F.cosine_similarity(heads[i][0](ours[:, i]), summary)
            loss = loss + (1 - cosine).mean() + F.mse_loss(heads[i][1](ours[:, 2:]), spatial)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(rounds: int) -> list[float]:
    """Ratios of process CPU time, ours over bare, a round each; the first round only warms up."""
    steps = {"ours": our_step(), "bare": bare_step()}
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        # Who goes first changes, as the second finds another heap than the first.
        for name, step in sorted(steps.items(), reverse=bool(number % 2)):
            start = time.process_time()
            step(images)
            if number:
                seconds[name].append(time.process_time() - start)
    for name, each in seconds.items():
        print(
            f"{name}: {statistics.median(each):.3f} CPU s a step [{min(each):.3f}..{max(each):.3f}]"
        )
    return [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]


def peak_memory(name: str) -> float:
    """GB that three steps of `ours` or `bare` take in a process of their own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--peak", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = float(done.stdout.split()[-1])
    print(f"{name}: peak memory {peak:.3f} GB")
    return peak


def high_water() -> float:
    """GB of this program's largest resident set.

    Not getrusage's, which a child process starts with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=["ours", "bare"], help="only this one's peak memory")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if chosen.peak:
        step = our_step() if chosen.peak == "ours" else bare_step()
        for _ in range(3):
            step(torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8))
        print(high_water())
        return []
    ratio = statistics.median(compare(chosen.rounds))
    memory = peak_memory("ours") / peak_memory("bare")
    return [
        Figure("step: CPU time over a bare PyTorch loop", ratio, 1.05, True),
        Figure("step: peak memory over a bare PyTorch loop", memory, 1.10, True),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
