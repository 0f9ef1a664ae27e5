"""Probes on cached features see every image once, as it is: their recipes ask for no augmentation.

Older versions ignored what a recipe asked for, and their rows say `flip: true`.
"""

from typing import Any


def without_augmentation(config: Any, *, off: dict[str, Any]) -> None:
    """Makes a config state what a probe on cached features sees; called by its validator.

    `flip`, which is on unless a recipe says otherwise, is turned off. Everything else that a recipe
    asks for must be off.

    Args:
        config: of a dense benchmark; has `input` and `probe`.
        off: key of `input` to the value that means no augmentation.

    Raises:
        ValueError: the recipe asks for augmentation.
    """
    given = config.input
    if config.probe.mode != "cached":
        return
    for key, value in off.items():
        asked = getattr(given, key)
        if asked != value:
            raise ValueError(
                f"input.{key}: got {list(asked) if isinstance(asked, tuple) else asked}, but "
                "probe.mode cached encodes every image once, without augmentation; remove the "
                "key, or set probe.mode=online"
            )
    if given.flip:  # the config is frozen, and this is its own validator
        object.__setattr__(config, "input", given.model_copy(update={"flip": False}))


def stated_as_cached(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `results.jsonl`, in which older versions said `flip: true` of cached features."""
    entry = row.get("entry", {})
    given = entry.get("input")
    if entry.get("probe", {}).get("mode") != "cached" or not isinstance(given, dict):
        return row
    row = row | {"entry": entry | {"input": given | {"flip": False}}}
    seen = row.get("protocol", {}).get("input")
    if isinstance(seen, dict) and "flip" in seen:
        row["protocol"] = row["protocol"] | {"input": seen | {"flip": False}}
    return row
