"""Builds a student with its initial weights: random, from timm, or from a trained student.

A trunk of another shape is an error; it is never loaded in part. Weights that the source does not
have (registers, class tokens, heads) stay random, which is logged.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import timm
import torch
from einops import rearrange
from timm.layers import Mlp, resample_abs_pos_embed, resample_patch_embed
from timm.layers.activations import GELUTanh
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from student.config import Colour, HeadConfig, Shape, StudentConfig, StudentInit, TimmInit
from student.errors import StudentError
from student.model import Student
from student.storage import StudentFile, read_student
from student.timm_config import AnyStudentConfig, TimmStudentConfig
from student.timm_file import read_timm_file, say_default_tag, timm_pixels
from student.timm_trunk import TimmTrunk
from student.timm_weights import load_timm_weights
from student.trunk import Trunk
from teachers.features import FeatureSpec
from teachers.messages import did_you_mean, say_once

log = logging.getLogger(__name__)

# Modules of a timm ViT behind the trunk.
_AFTER_TRUNK = ("head.", "fc_norm.", "attn_pool.")
_CLASS_TOKENS = "trunk.embedding.class_tokens"


def build(config: AnyStudentConfig, targets: Mapping[str, FeatureSpec]) -> Student:
    """Builds a student and loads the initial weights of its configuration.

    Args:
        config: the architecture and initial weights.
        targets: teacher name to the spec of its features, in the order of the class tokens.

    Raises:
        StudentError: the targets do not fit the configuration, the initial weights cannot be
            read, or they are of another trunk.
    """
    student = Student(config, targets)
    source = "student.init"
    if isinstance(config.init, StudentInit):
        mean, std = _from_student(student, config, config.init)
    elif isinstance(config, StudentConfig) and config.init is not None:
        assert isinstance(student.trunk, Trunk)
        mean, std = _from_timm(student.trunk, config, config.init)
    elif isinstance(config, TimmStudentConfig) and config.weights != "none":
        assert isinstance(student.trunk, TimmTrunk)
        mean, std = load_timm_weights(student.trunk, config)
        source = "student.weights"
    else:
        return student
    for key, own, theirs in (("mean", config.mean, mean), ("std", config.std, std)):
        if own is not None and any(abs(a - b) > 1e-4 for a, b in zip(own, theirs, strict=True)):
            say_once(f"student.{key}: {list(own)} is taken; {source} has {list(theirs)}")
    student.set_normalisation(config.mean or mean, config.std or std)
    return student


def _from_timm(trunk: Trunk, config: StudentConfig, init: TimmInit) -> tuple[Colour, Colour]:
    where = f"student.init: timm's {init.model}"
    model = _load_timm(init, where)
    _check_shape(model, config.shape, where)
    source = {k: v for k, v in model.state_dict().items() if not k.startswith(_AFTER_TRUNK)}
    if not config.final_norm:
        source = _without_norm(source, where)
    own = trunk.state_dict()
    state = {name: source.pop(name) for name in own if name in source}
    kernel = resample_patch_embed(source.pop("patch_embed.proj.weight"), [config.patch_size] * 2)
    state["embedding.projection.weight"] = kernel.flatten(1)
    prefix, table = _split_positions(model, source.pop("pos_embed"), config.table_side)
    # Our patch embedding has no bias; adding it to every position is equivalent.
    state["embedding.positions"] = table + source.pop("patch_embed.proj.bias", 0)
    state |= _take_prefix(source, prefix, own, where)
    _check_fit(own, state, source, where)
    trunk.load_state_dict(state)
    return timm_pixels(init, model.pretrained_cfg, where, assumes=config.mean is None)


def _without_norm(source: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights without those of the final norm."""
    rest = {name: value for name, value in source.items() if not name.startswith("norm.")}
    if len(rest) < len(source):
        say_once(
            f"{where}: its final norm is left out, as RADIO leaves it out; student.final_norm=true "
            "keeps it"
        )
    return rest


def _load_timm(init: TimmInit, where: str) -> Any:
    if not timm.is_model(init.model):
        hint = did_you_mean(init.model.split(".")[0], timm.list_models())
        raise StudentError(f"{where}: timm has no such model{hint}")
    if init.weights == "hub":
        say_default_tag(init.model, where)
        try:
            return timm.create_model(init.model, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise StudentError(
                f"{where}: its weights are not in the local cache and cannot be downloaded "
                f"({error}); set student.init.weights to a local file"
            ) from error
    if not init.weights.is_file():
        raise StudentError(f"{where}: student.init.weights: no such file: {init.weights}")
    model = timm.create_model(init.model, num_classes=0)
    state = read_timm_file(init.weights, where)
    try:
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    except RuntimeError as error:
        raise StudentError(f"{where}: {init.weights} is for another model: {error}") from error
    return model


def _check_shape(model: Any, shape: Shape, where: str) -> None:
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        raise StudentError(
            f"{where} is a {type(model).__name__}; only timm's VisionTransformer with learned "
            "positions can initialise a student"
        )
    block: Any = model.blocks[0]
    mlp: Any = getattr(block, "mlp", None)
    if (type(block), type(mlp)) != (Block, Mlp):
        raise StudentError(
            f"{where} has blocks of type {type(block).__name__} with {type(mlp).__name__}; "
            "the student has Block with Mlp"
        )
    theirs = Shape(model.embed_dim, len(model.blocks), block.attn.num_heads, mlp.fc1.out_features)
    for name, ours, came in zip(Shape._fields, shape, theirs, strict=True):
        if ours != came:
            raise StudentError(f"{where} has {name} {came}, but the student has {ours}")
    if not isinstance(mlp.act, nn.GELU | GELUTanh):
        raise StudentError(f"{where} has the activation {mlp.act}, but the student has GELU")
    if isinstance(mlp.act, GELUTanh):
        log.info("%s approximates GELU by tanh (within 5e-4); the student uses exact GELU", where)


def _split_positions(model: Any, positions: Tensor, side: int) -> tuple[dict[str, Tensor], Tensor]:
    """Positions of timm's prefix tokens by name, and its grid resized to (side, side, D)."""
    count = 0 if model.no_embed_class else model.num_prefix_tokens
    num_class_tokens = int(model.cls_token is not None)
    grid = resample_abs_pos_embed(
        positions[:, count:],
        [side, side],
        old_size=list(model.patch_embed.grid_size),
        num_prefix_tokens=0,
    )
    prefix = {}
    if count:
        prefix["cls_token"] = positions[:, :num_class_tokens]
        prefix["reg_token"] = positions[:, num_class_tokens:count]
    return prefix, rearrange(grid, "1 (y x) d -> y x d", y=side)


def _take_prefix(
    source: dict[str, Tensor], prefix: dict[str, Tensor], own: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Class tokens, which all start as timm's one, and registers."""
    state = {}
    for ours, theirs in (("class_tokens", "cls_token"), ("registers", "reg_token")):
        name = f"embedding.{ours}"
        if theirs in source:
            tokens = (source.pop(theirs) + prefix.get(theirs, 0))[0]
            state[name] = tokens.expand_as(own[name]) if ours == "class_tokens" else tokens
        elif name in own:
            log.info("%s has no %s: they start random", where, ours.replace("_", " "))
            state[name] = own[name]
    return state


def _from_student(
    student: Student, config: AnyStudentConfig, init: StudentInit
) -> tuple[Colour, Colour]:
    where = f"student.init: {init.path}"
    source = read_student(init.path)
    if config.kind != source.config.kind:
        raise StudentError(
            f"{where} is of kind: {source.config.kind}, but the student of kind: {config.kind}; "
            f"set student.kind={source.config.kind}"
        )
    _check_trunk(_trunk_keys(config, student.targets), source, where)
    own = student.state_dict()
    state = own | _student_trunk(source, own, student.targets, where)
    unlike = _unlike_attention(config.head, source.config.head)
    for name in student.heads:
        head, theirs = _head_state(own, name), _head_state(source.state_dict, name)
        if not init.heads:
            reason = "student.init.heads is false"
        elif not theirs:
            reason = "the file has none"
        elif unlike:
            reason = f"head.{unlike} differs; the file has {getattr(source.config.head, unlike)}"
        elif {k: v.shape for k, v in head.items()} != {k: v.shape for k, v in theirs.items()}:
            reason = "its dimensions differ"
        else:
            state |= theirs
            log.info("%s: loaded the head of %s", where, name)
            if source.metadata.get("head_space") == "teacher":
                student.in_teacher_space.add(name)
            continue
        log.info("%s: the head of %s starts from random weights: %s", where, name, reason)
    student.load_state_dict(state)
    assert source.config.mean is not None
    assert source.config.std is not None
    return source.config.mean, source.config.std


def _trunk_keys(config: AnyStudentConfig, targets: Sized) -> dict[str, Any]:
    """The keys of a recipe that decide the shapes of the trunk's weights, and their values."""
    if isinstance(config, TimmStudentConfig):
        return {"model": config.architecture, "level": config.level_index}
    width, depth, heads, mlp_dim = config.shape
    return {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_dim / width,
        "patch_size": config.patch_size,
        "max_resolution": config.max_resolution,
        "num_registers": config.count_registers(len(targets)),
        "layer_scale": config.layer_scale,
        "final_norm": config.final_norm,
    }


def _check_trunk(ours: Mapping[str, Any], source: StudentFile, where: str) -> None:
    """Checks that a student's trunk is that of a file; the message has the keys to set."""
    theirs = _trunk_keys(source.config, source.targets)
    if None not in (ours.get("layer_scale"), theirs.get("layer_scale")):
        theirs["layer_scale"] = ours["layer_scale"]  # the value before training counts no more
    other = [key for key in theirs if ours[key] != theirs[key]]
    if other:
        differ = " and ".join(f"{key} {theirs[key]}" for key in other)
        cure = " ".join(f"student.{key}={json.dumps(theirs[key])}" for key in other)
        raise StudentError(
            f"{where} has {differ}, but the student has {' and '.join(str(ours[k]) for k in other)}"
            f"; set {cure}"
        )


def _unlike_attention(ours: HeadConfig, theirs: HeadConfig) -> str | None:
    """A key in which the attention of heads differs, of which not all show in shapes."""
    keys = ("attention_blocks", "attention_heads", "attention_bias")
    used = ours.attention_blocks or theirs.attention_blocks
    return next((k for k in keys if used and getattr(ours, k) != getattr(theirs, k)), None)


def _student_trunk(
    source: StudentFile, own: dict[str, Tensor], targets: Iterable[str], where: str
) -> dict[str, Tensor]:
    """The trunk of a trained student; class tokens of teachers that it did not have stay ours."""
    trunk = {k: v for k, v in source.state_dict.items() if k.startswith("trunk.")}
    if _CLASS_TOKENS not in own:
        fresh = {k: v for k, v in own.items() if k.startswith("trunk.")}
        # A student whose teachers have no summary lacks what only a summary needs, and the reverse.
        _check_fit(fresh, trunk, {k: v for k, v in trunk.items() if k not in fresh}, where)
        return trunk
    tokens = dict(zip(source.targets, trunk.pop(_CLASS_TOKENS), strict=True))
    fresh = {k: v for k, v in own.items() if k.startswith("trunk.") and k != _CLASS_TOKENS}
    _check_fit(fresh, trunk, {k: v for k, v in trunk.items() if k not in fresh}, where)
    rows = zip(targets, own[_CLASS_TOKENS], strict=True)
    return trunk | {_CLASS_TOKENS: torch.stack([tokens.get(name, row) for name, row in rows])}


def _head_state(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.startswith(f"heads.{name}.")}


def _check_fit(
    own: dict[str, Tensor], state: dict[str, Tensor], left: dict[str, Tensor], where: str
) -> None:
    """Checks that every weight of ours is given, in its shape, and that none is left over."""
    if left:
        raise StudentError(f"{where} has {_name(left)}, which the student's trunk does not have")
    missing = [name for name in own if name not in state]
    if missing:
        raise StudentError(f"{where} has no {_name(missing)}, which the student's trunk has")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise StudentError(
                f"{where} has {name} of shape {tuple(state[name].shape)}, "
                f"but the student has {tuple(value.shape)}"
            )


def _name(weights: Iterable[str]) -> str:
    first, *others = weights
    return f"{first} and {len(others)} more weights" if others else first
