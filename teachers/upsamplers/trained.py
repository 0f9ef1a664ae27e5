"""Saves and loads a trained upsampler as one safetensors file with a card.

Loading needs no encoder and runs no code from the file. In a recipe, the path of the file takes the
place of an upsampler's entry: `upsampler: runs/featsharp/upsampler.safetensors`.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.files import halved, open_format, save_tensors, shape_mismatch
from teachers.messages import did_you_mean, took
from teachers.phi_s import PhiS
from teachers.upsamplers.downsampler import AttentionDownsampler
from teachers.upsamplers.kinds import UPSAMPLERS
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

FORMAT = "featsharp-distill upsampler 1"
SHIPPED = Path(__file__).resolve().parent.parent / "small" / "upsamplers"
_DOWNSAMPLER = "downsampler."
_FLOAT32 = ("phi_s.", _DOWNSAMPLER)  # small and sensitive to rounding: never in half precision


class UpsamplerCard(StrictConfig):
    """Description of a trained upsampler.

    Attributes:
        upsampler: its recipe entry: `kind`, `factor` and options.
        bias: whether it has a position bias.
        spec: what its encoder returns and accepts.
        teacher: the recipe entry of its encoder.
        fingerprint: of its encoder, see `teacher_fingerprint`.
        facts: further entries: recipe, versions, steps, fidelity.
    """

    upsampler: dict[str, Any]
    bias: bool
    spec: FeatureSpec
    teacher: dict[str, Any]
    fingerprint: str
    facts: dict[str, Any] = {}


class TrainedConfig(UpsamplerConfig):
    """A file of `save_upsampler`.

    Attributes:
        path: the file, or the name of an upsampler that ships with this package.
    """

    kind: str = "trained"
    path: Path


class TrainedUpsampler(Standardised):
    """A trained upsampler, in eval mode, with its `card`."""

    Config = TrainedConfig
    card: UpsamplerCard
    path: Path

    @classmethod
    def from_config(cls, config: Any, spec: FeatureSpec) -> Self:
        """Loads the upsampler of an encoder with `spec`.

        Raises:
            TeacherError: no such file, or it was trained for an encoder with another spec.
        """
        upsampler = load_upsampler(config.path)
        if upsampler.spec != spec:
            raise TeacherError(
                f"upsampler {config.path}: trained for another encoder; "
                f"{_first_difference(upsampler.spec, spec)}"
            )
        assert isinstance(upsampler, cls)
        return upsampler

    def check_encoder(self, fingerprint: str) -> None:
        """Checks the fingerprint of an encoder in float32, see `teacher_fingerprint`.

        Raises:
            TeacherError: the upsampler was trained for an encoder with other weights or options.
        """
        if fingerprint != self.card.fingerprint:
            own = {k: v for k, v in self.card.teacher.items() if v is not None}
            raise TeacherError(
                f"upsampler {self.path}: trained for an encoder of the same shape with other "
                f"weights or options: {own} with fingerprint {self.card.fingerprint[:12]}, "
                f"got fingerprint {fingerprint[:12]}"
            )


def save_upsampler(
    path: str | PathLike[str],
    tensors: Mapping[str, Tensor],
    card: UpsamplerCard,
    *,
    half: bool = False,
) -> None:
    """Writes a trained upsampler, whole or not at all.

    Args:
        path: the file to write, usually `*.safetensors`.
        tensors: the state dict of its `Standardised`, and as `downsampler.*` that of the
            `AttentionDownsampler` trained with it, for measuring its fidelity.
        card: its description.
        half: whether to store the weights in float16; PHI-S and downsampler stay float32.

    Raises:
        TeacherError: a value is beyond float16's range.
    """
    if half:
        where = f"upsampler {path}"
        tensors = halved(tensors, lambda n, _: n.startswith(_FLOAT32), where, TeacherError)
    save_tensors(Path(path), tensors, {"card": card.model_dump_json()}, FORMAT)


def load_upsampler(path: str | PathLike[str]) -> TrainedUpsampler:
    """Loads an upsampler, in eval mode, on the CPU, in float32.

    Args:
        path: a file of `save_upsampler`, or the name of an upsampler that ships.

    Raises:
        TeacherError: there is no such file, or it is not one of `save_upsampler`.
    """
    found = _find(Path(path))
    card, tensors = read_upsampler(found)
    upsampler = TrainedUpsampler(_build(card), PhiS(card.spec.spatial_dim), bias=card.bias)
    upsampler.card, upsampler.path = card, found
    own = {n: t for n, t in tensors.items() if not n.startswith(_DOWNSAMPLER)}
    _check_state(upsampler.state_dict(), own, found)
    upsampler.load_state_dict(own)
    if not upsampler.phi_s.fitted:
        raise TeacherError(f"upsampler {found}: its PHI-S is not fitted")
    return upsampler.eval().requires_grad_(False)


def load_downsampler(path: str | PathLike[str]) -> AttentionDownsampler:
    """Loads the downsampler of an upsampler (see `load_upsampler`), in eval mode, on the CPU.

    Raises:
        TeacherError: there is no such file, or it has no downsampler that fits its card.
    """
    found = _find(Path(path))
    card, tensors = read_upsampler(found)
    own = {n: t for n, t in tensors.items() if n.startswith(_DOWNSAMPLER)}
    with torch.device("meta"):  # the config of a user's own kind may not have a `factor`
        factor = _build(card).factor
    downsampler = AttentionDownsampler(card.spec.spatial_dim, factor)
    expected = {_DOWNSAMPLER + name: t for name, t in downsampler.state_dict().items()}
    _check_state(expected, own, found)
    downsampler.load_state_dict({n.removeprefix(_DOWNSAMPLER): t for n, t in own.items()})
    return downsampler.eval().requires_grad_(False)


def _build(card: UpsamplerCard) -> Upsampler:
    """The upsampler that a card describes, with random weights."""
    config = UPSAMPLERS.parse(card.upsampler)
    upsampler: Upsampler = UPSAMPLERS.resolve(config.kind).from_config(config, card.spec)
    return upsampler


def _find(path: Path) -> Path:
    shipped = SHIPPED / f"{path}.safetensors"
    if path.is_file():
        if path.parent == Path() and shipped.is_file():
            took(f"upsampler {path}", "the file", ["the file", "the upsampler that ships"])
        return path
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in SHIPPED.glob("*.safetensors"))
    beside = map(str, path.parent.glob("*.safetensors"))
    raise TeacherError(
        f"upsampler {path}: there is no such file{did_you_mean(str(path), [*names, *beside])}; "
        f"give the path of a file of train_upsampler{f', or one of {names}' if names else ''}"
    )


def read_upsampler(path: Path) -> tuple[UpsamplerCard, dict[str, Tensor]]:
    """The card and the tensors of a file of `save_upsampler`, in float32 on the CPU.

    Raises:
        TeacherError: it is not one.
    """
    with open_format(path, "upsampler", FORMAT, TeacherError) as (file, header):
        card = UpsamplerCard.model_validate_json(header["card"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return card, {
        n: t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for n, t in tensors.items()
    }


def _check_state(own: Mapping[str, Tensor], came: Mapping[str, Tensor], path: Path) -> None:
    if wrong := shape_mismatch(own, came):
        raise TeacherError(f"upsampler {path}: not the weights that its card describes: {wrong}")


def _first_difference(own: FeatureSpec, other: FeatureSpec) -> str:
    for name in own.__dataclass_fields__:
        a, b = getattr(own, name), getattr(other, name)
        if a != b:
            return f"its {name} is {a}, got {b}"
    raise AssertionError("the specs are equal")
