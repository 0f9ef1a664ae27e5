"""The student: one trunk, a ViT or a network of timm, with a head for each of its teachers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from student.config import Colour
from student.errors import StudentError
from student.heads import Head
from student.timm_config import AnyStudentConfig, TimmStudentConfig
from student.timm_trunk import TimmTrunk
from student.trunk import Trunk
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.normalization import OPENAI_MEAN, OPENAI_STD, warn_of_range


class StudentOutput(NamedTuple):
    """Output of a forward pass.

    Attributes:
        backbone: the student's own features. The summary of a ViT concatenates the class tokens of
            the teachers that have a summary, in the order of the teachers; that of a network of
            timm is the vector that it pools for a classifier. None without any such teacher.
        heads: teacher name to the student's prediction of that teacher's features, on the
            student's own grid (times the head's upsampling). Teachers without a head are missing.
    """

    backbone: Features
    heads: dict[str, Features]


class Student(nn.Module):
    """A trunk, a ViT or a network of timm, and a head for each teacher, with random weights.

    Takes images of any size whose sides are multiples of the patch size (the stride of its level,
    for a network of timm), square or not. A ViT has a class token for each teacher; in training
    each image sees a random window of its position table. In eval mode the output is
    deterministic. `student.initial.build` builds one with the weights that the config names.

    Args:
        config: the architecture; `init` and `weights` are ignored.
        targets: teacher name to the spec of its features, in the order of the class tokens.

    Attributes:
        config: the given one, with the pixel normalisation resolved, and the heads' upsampling.
        targets: the given ones.
        spec: what the backbone returns and accepts.
        in_teacher_space: teachers whose heads started, by `student.initial`, in the teacher's own
            space; until a training has standardised them.

    Raises:
        StudentError: the targets do not fit the configuration.
    """

    trunk: Trunk | TimmTrunk

    def __init__(self, config: AnyStudentConfig, targets: Mapping[str, FeatureSpec]) -> None:
        super().__init__()
        _check_targets(config, targets)
        self.targets = dict(targets)
        self.config = config = config.resolved(targets)
        num_summaries = sum(target.summary_dim is not None for target in targets.values())
        if isinstance(config, TimmStudentConfig):
            self.trunk = TimmTrunk(config, with_summary=num_summaries > 0)
            self.spec = _timm_spec(config, num_summaries > 0)
            width, vector = self.spec.spatial_dim, self.spec.summary_dim
            mean, std = config.network.mean, config.network.std
        else:
            isolated = [i for i, name in enumerate(targets) if name in config.isolated]
            self.trunk = Trunk(config, len(targets), isolated)
            width = vector = config.shape.width
            self.spec = FeatureSpec(
                summary_dim=num_summaries * width or None,
                spatial_dim=width,
                patch_size=config.patch_size,
                resolution=(config.max_resolution, config.max_resolution),
                any_resolution=True,
                spatial_from="last block, "
                f"{'after the' if config.final_norm else 'without a'} final norm",
                summary_from="class tokens of the teachers that have a summary",
            )
            mean, std = OPENAI_MEAN, OPENAI_STD
        self.heads = nn.ModuleDict(
            {
                name: Head(width, target, config.head, config.head.upsample.get(name, 1), vector)
                for name, target in targets.items()
                if config.head.has(name)
            }
        )
        self.in_teacher_space: set[str] = set()
        self.set_normalisation(config.mean or mean, config.std or std)

    def set_normalisation(self, mean: Colour, std: Colour) -> None:
        """Sets the pixel normalisation, for images in [0, 1], here and in `config`."""
        self.mean, self.std = mean, std
        self.config = self.config.model_copy(update={"mean": mean, "std": std})

    @property
    def num_skip(self) -> int:
        """Number of tokens before the first patch: class tokens and registers of a ViT."""
        return self.trunk.num_skip if isinstance(self.trunk, Trunk) else 0

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two dimensions or more that get no weight decay."""
        if isinstance(self.trunk, Trunk):
            tokens = ("positions", "class_tokens", "registers")
            names = {f"trunk.embedding.{name}" for name in tokens}
        else:
            names = {f"trunk.network.{name}" for name in self.trunk.no_weight_decay()}
        return names & {name for name, _ in self.named_parameters()}

    def forward(self, images: Tensor, window: int | None = None) -> StudentOutput:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W are multiples of the patch size.
            window: side in patches of the windows that most blocks attend within (ViTDet), for
                large images; None for global attention. A ViT's only.

        Returns:
            StudentOutput, all float32: backbone summary (B, n * C), of a network of timm (B, C),
            or None, and spatial (B, C, h, w); for each teacher, summary (B, D_summary) or None and
            spatial (B, D, h, w).

        Raises:
            StudentError: the shape of the images is wrong, or windows do not tile their grid;
                names the nearest size.
        """
        grid = self._grid(images)
        if isinstance(self.trunk, TimmTrunk):
            return self._timm_output(self.trunk, images, grid, window)
        if window is not None and any(side % window for side in grid):
            raise StudentError(
                f"windows of {window} x {window} patches do not tile a grid of {grid[0]} x "
                f"{grid[1]}; both sides must be multiples of {window}"
            )
        tokens = self.trunk(self._normalise(images), window)
        # One split and one copy for all heads: with a slice for each head, every slice would need
        # a gradient of the size of all tokens.
        prefix, patches = tokens.split([self.num_skip, tokens.shape[1] - self.num_skip], dim=1)
        slots = dict(zip(self.targets, prefix.unbind(1)[: len(self.targets)], strict=True))
        patches = patches.contiguous()
        summaries = [slots[n] for n, t in self.targets.items() if t.summary_dim is not None]
        backbone = Features(
            torch.cat(summaries, dim=-1).float() if summaries else None,
            rearrange(patches, "b (h w) c -> b c h w", h=grid[0]).float(),
        )
        heads = {name: head(slots[name], patches, grid) for name, head in self.heads.items()}
        return StudentOutput(backbone, heads)

    def _timm_output(
        self, trunk: TimmTrunk, images: Tensor, grid: tuple[int, int], window: int | None
    ) -> StudentOutput:
        if window is not None:
            raise StudentError(
                "window: attention within windows is for students of kind: vit; this one is "
                "timm's, leave it out"
            )
        vector, spatial = trunk(self._normalise(images))
        patches = rearrange(spatial, "b c h w -> b (h w) c").contiguous()
        heads = {name: head(vector, patches, grid) for name, head in self.heads.items()}
        backbone = Features(None if vector is None else vector.float(), spatial.float())
        return StudentOutput(backbone, heads)

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The backbone's maps after some layers, as timm's `forward_intermediates` returns them.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W are multiples of the patch size.
            indices: of the blocks of a ViT, from 0, whose last gives the map that `forward`
                returns; of the levels of a network of timm, from fine to coarse.

        Returns:
            A map (B, C, h, w) for each, in the order of the layers, float32. Those of a ViT are on
            one grid, after the final norm if there is one; those of a CNN or a Swin are a pyramid.

        Raises:
            StudentError: the shape of the images is wrong; names the nearest size. Or there is no
                such level.
        """
        grid = self._grid(images)
        if isinstance(self.trunk, TimmTrunk):
            wrong = [i for i in indices if not 0 <= i < self.trunk.num_layers]
            if wrong:
                raise StudentError(
                    f"indices: this student has no level {wrong[0]}; it has levels 0 to "
                    f"{self.trunk.num_layers - 1}"
                )
            _, *maps = self.trunk(self._normalise(images), sorted(indices))
            return [each.float() for each in maps]
        return [
            rearrange(tokens[:, self.num_skip :], "b (h w) c -> b c h w", h=grid[0]).float()
            for tokens in self.trunk.intermediates(self._normalise(images), indices)
        ]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise StudentError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W)")
        try:
            return self.spec.grid(*images.shape[2:])
        except ValueError as error:
            raise StudentError(str(error)) from None

    def _normalise(self, images: Tensor) -> Tensor:
        warn_of_range(images, self)
        # Not buffers: a cast of the whole module to bfloat16 would round them.
        mean, std = (
            torch.tensor(c, device=images.device).view(3, 1, 1) for c in (self.mean, self.std)
        )
        return (images.float() - mean) / std


def _timm_spec(config: TimmStudentConfig, with_summary: bool) -> FeatureSpec:
    network, number = config.network, config.level_index
    return FeatureSpec(
        summary_dim=network.summary_dim if with_summary else None,
        spatial_dim=network.levels[number].channels,
        patch_size=config.patch_size,
        resolution=(network.side, network.side),
        any_resolution=True,
        spatial_from=f"level {number} of timm's {config.model}",
        summary_from="the vector that timm pools for a classifier",
    )


def _check_targets(config: AnyStudentConfig, targets: Mapping[str, FeatureSpec]) -> None:
    if not targets:
        raise StudentError("student: no targets; it needs at least one teacher")
    for name in targets:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise StudentError(
                f"teacher {name!r}: the name is used in parameter names; it must not be empty, "
                "contain a dot, or be an attribute of torch's ModuleDict"
            )
    named: dict[str, Iterable[str]] = {
        "head.upsample": config.head.upsample,
        "head.only": config.head.only or (),
        "isolated": () if isinstance(config, TimmStudentConfig) else config.isolated,
    }
    for key, names in named.items():
        for name in names:
            if name not in targets:
                raise StudentError(
                    f"student.{key}: no teacher {name!r}{did_you_mean(name, targets)}; "
                    f"there are {sorted(targets)}"
                )
