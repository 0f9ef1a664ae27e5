"""Reads a model of the RADIO family, in its public format, as a student.

Public checkpoints and files of `distill.formats.radio` become students that can run, be exported,
or start another training. `teachers.radio_format` describes the format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import GluMlp
from torch import Tensor, nn

from distill.formats.radio_heads import read_heads
from distill.runtime.errors import RecipeError
from student.config import HeadConfig, Shape, StudentConfig
from student.errors import StudentError
from student.storage import StudentFile, student_of
from teachers.features import FeatureSpec
from teachers.radio_format import SPLIT_TOKENS, RadioCheckpoint, read_radio
from teachers.radio_models import build_trunk

_NORM_EPS = 1e-6  # of LayerNorm in timm's ViTs


def read_radio_student(path: Path) -> StudentFile:
    """Reads a model of the family as a student.

    Heads of other MLP versions than v2 and `attn`, or of another size than the first one, are left
    out with a warning. The others return their teachers' own spaces, which the metadata record.

    Raises:
        TeacherError: not a checkpoint of the format.
        RecipeError: its trunk is not built like that of a student.
    """
    checkpoint = read_radio(path)
    names = checkpoint.architecture.class_tokens
    if names == ("",):
        raise RecipeError(f"{path}: its teachers share one class token; a student has one for each")
    summary = checkpoint.architecture.summary
    if list(summary) != [name for name in names if name in summary]:
        raise RecipeError(
            f"{path}: summary_idxs: its summary is of the class tokens "
            f"{[names.index(name) for name in summary]}; a student's are in their order, each once"
        )
    head, heads = read_heads(checkpoint, path)
    file = StudentFile(
        _config(checkpoint, head, path),
        {name: _target(checkpoint, heads, head, name) for name in names},
        {k: v.clone() for k, v in (_read_trunk(checkpoint.tensors, len(names)) | heads).items()},
        {"head_space": "teacher"},
    )
    try:
        student_of(file.config, file.targets, file.state_dict, f"{path}")
    except StudentError as error:
        raise RecipeError(f"{error}: a student is a plain ViT as in timm") from None
    return file


@torch.no_grad()
def check_radio(path: Path, file: StudentFile) -> None:
    """Checks that a file of `distill.formats.radio` returns the same as the student, bit for bit.

    Raises:
        RecipeError: the format cannot hold this student.
    """
    again = read_radio_student(path)
    p = file.config.patch_size
    images = torch.rand(1, 3, 2 * p, 3 * p, generator=torch.Generator().manual_seed(0))
    expected, returned = (
        student_of(f.config, f.targets, f.state_dict, "")(images) for f in (file, again)
    )
    for name, features in {"backbone": expected.backbone, **expected.heads}.items():
        other = returned.backbone if name == "backbone" else returned.heads.get(name)
        if other is None or not all(map(_equal, features, other)):
            raise RecipeError(
                "--format radio: the format cannot hold this student; readers would get another "
                f"{name}. Choose another format, or drop the heads with --no-heads"
            )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _read_trunk(tensors: Mapping[str, Tensor], num_class_tokens: int) -> dict[str, Tensor]:
    """The trunk of a student from one of timm's NaFlexVit."""
    rest = dict(tensors)
    tokens = torch.cat([rest.pop(k)[0] for k in SPLIT_TOKENS if k in rest])
    trunk = {
        "embedding.class_tokens": tokens[:num_class_tokens],
        "embedding.registers": tokens[num_class_tokens:],
        "embedding.positions": rest.pop("embeds.pos_embed")[0],
        "embedding.projection.weight": rest.pop("embeds.proj.weight"),
        **rest,
    }
    return {f"trunk.{name}": value for name, value in trunk.items() if value.numel()}


def _config(checkpoint: RadioCheckpoint, head: HeadConfig, path: Path) -> StudentConfig:
    architecture = checkpoint.architecture
    with torch.device("meta"):
        network = build_trunk(architecture)
    block: Any = network.blocks[0]
    _check_block(block, architecture.model, path)
    shape = Shape(
        network.embed_dim, len(network.blocks), block.attn.num_heads, block.mlp.fc1.out_features
    )
    return StudentConfig(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_ratio=shape.mlp_dim / shape.width,
        patch_size=architecture.patch_size,
        max_resolution=architecture.table_side * architecture.patch_size,
        num_registers=architecture.registers,
        layer_scale=1e-5 if architecture.layer_scale else None,
        final_norm=architecture.final_norm,
        head=head,
        mean=architecture.mean,
        std=architecture.std,
    )


def _check_block(block: Any, model: str, path: Path) -> None:
    """Checks that a timm block is built like a student's."""
    if isinstance(block.mlp, GluMlp):
        raise RecipeError(f"{path}: its MLP is gated (SwiGLU, use_swiglu_ffn); a student's is not")
    if block.attn.qkv.bias is None:
        raise RecipeError(f"{path}: its queries, keys and values have no bias (qkv_bias)")
    if type(block.mlp.act) is not nn.GELU or block.norm1.eps != _NORM_EPS:
        raise RecipeError(
            f"{path}: {model} has {block.mlp.act} and {block.norm1}; a student has GELU and timm's "
            "LayerNorm"
        )


def _target(
    checkpoint: RadioCheckpoint, heads: Mapping[str, Tensor], head: HeadConfig, name: str
) -> FeatureSpec:
    """What a head returns; the format has no native resolution, so that of the table is taken."""
    architecture = checkpoint.architecture
    side = architecture.table_side * architecture.patch_size
    # For a teacher without a head, only the presence of a summary matters.
    dims = {
        kind: len(heads.get(f"heads.{name}.{kind}.final.2.bias", ())) or 1
        for kind in ("summary", "spatial")
    }
    return FeatureSpec(
        summary_dim=dims["summary"] if name in architecture.summary else None,
        spatial_dim=dims["spatial"] // head.upsample.get(name, 1) ** 2 or 1,
        patch_size=architecture.patch_size,
        resolution=(side, side),
        any_resolution=True,
    )
