"""The student: one ViT with a head for each of its teachers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from student.config import Colour, StudentConfig
from student.errors import StudentError
from student.heads import Head
from student.trunk import Trunk
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.normalization import OPENAI_MEAN, OPENAI_STD, warn_of_range


class StudentOutput(NamedTuple):
    """Output of a forward pass.

    Attributes:
        backbone: the student's own features. The summary concatenates the class tokens of the
            teachers that have a summary, in the order of the teachers; None without any.
        heads: teacher name to the student's prediction of that teacher's features, on the
            student's own grid (times the head's upsampling). Teachers without a head are missing.
    """

    backbone: Features
    heads: dict[str, Features]


class Student(nn.Module):
    """A ViT with a class token and a head for each teacher, with random weights.

    Takes images of any size whose sides are multiples of the patch size, square or not. In
    training each image sees a random window of the position table; in eval mode the output is
    deterministic. `student.initial.build` builds one with the weights that `config.init` names.

    Args:
        config: the architecture; `init` is ignored.
        targets: teacher name to the spec of its features, in the order of the class tokens.

    Attributes:
        config: the given one, with the pixel normalisation resolved.
        targets: the given ones.
        spec: what the backbone returns and accepts.

    Raises:
        StudentError: the targets do not fit the configuration.
    """

    def __init__(self, config: StudentConfig, targets: Mapping[str, FeatureSpec]) -> None:
        super().__init__()
        _check_targets(config, targets)
        width = config.shape.width
        self.targets = dict(targets)
        isolated = [i for i, name in enumerate(targets) if name in config.isolated]
        self.trunk = Trunk(config, len(targets), isolated)
        self.heads = nn.ModuleDict(
            {
                name: Head(width, target, config.head, config.head.upsample.get(name, 1))
                for name, target in targets.items()
                if config.head.has(name)
            }
        )
        num_summaries = sum(target.summary_dim is not None for target in targets.values())
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
        self.config = config
        self.set_normalisation(config.mean or OPENAI_MEAN, config.std or OPENAI_STD)

    def set_normalisation(self, mean: Colour, std: Colour) -> None:
        """Sets the pixel normalisation, for images in [0, 1], here and in `config`."""
        self.mean, self.std = mean, std
        self.config = self.config.model_copy(update={"mean": mean, "std": std})

    @property
    def num_skip(self) -> int:
        """Number of tokens before the first patch: class tokens and registers."""
        return self.trunk.num_skip

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two dimensions or more that get no weight decay."""
        names = {f"trunk.embedding.{name}" for name in ("positions", "class_tokens", "registers")}
        return names & {name for name, _ in self.named_parameters()}

    def forward(self, images: Tensor, window: int | None = None) -> StudentOutput:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W are multiples of the patch size.
            window: side in patches of the windows that most blocks attend within (ViTDet), for
                large images; None for global attention.

        Returns:
            StudentOutput, all float32: backbone summary (B, n * C) or None and spatial
            (B, C, h, w); for each teacher, summary (B, D_summary) or None and spatial
            (B, D, h, w).

        Raises:
            StudentError: the shape of the images is wrong, or windows do not tile their grid;
                names the nearest size.
        """
        grid = self._grid(images)
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

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The backbone's maps after some blocks, as timm's `forward_intermediates` returns them.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W are multiples of the patch size.
            indices: of the blocks, from 0; the last block gives the map that `forward` returns.

        Returns:
            A map (B, C, h, w) for each, in the order of the blocks, float32; after the final norm
            if there is one.

        Raises:
            StudentError: the shape of the images is wrong; names the nearest size.
        """
        grid = self._grid(images)
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


def _check_targets(config: StudentConfig, targets: Mapping[str, FeatureSpec]) -> None:
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
        "isolated": config.isolated,
    }
    for key, names in named.items():
        for name in names:
            if name not in targets:
                raise StudentError(
                    f"student.{key}: no teacher {name!r}{did_you_mean(name, targets)}; "
                    f"there are {sorted(targets)}"
                )
