"""The training stream: endless micro-batches of one rank, resumable at an exact position.

It has two modes. Local shards are indexed and read by position (`data.indexed`); the state is two
integers. Shards at URLs are read in lanes (`data.lanes`); the state is the position of each lane.
Both yield the same global batches for any number of ranks and workers.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.bad import BadCounter
from data.batch import BadSample, Batch
from data.config import DataConfig
from data.decode import ImageReader, choose_decoder
from data.errors import DataError
from data.feed import Feed
from data.indexed import IndexedFeed
from data.layout import StepLayout
from data.shards import is_url, list_shards

State = dict[str, Any]


class TrainStream:
    """Micro-batches of one rank, in order, without end, over epoch after epoch.

    The order of samples is a pure function of config and seed; how many a step takes, and of which
    size, of the step number. So samples, crops and pixels of a step do not depend on the number of
    ranks, on workers and prefetch, or on where the run was resumed.

        layout = fixed_layout(resolution=(224, 224), batch_size=1024, micro_batch_size=64, ranks=8)
        stream = TrainStream(config, layout, rank=rank, seed=0)
        stream.restore(state)                  # to resume; before batches()
        batches = stream.batches()
        for step in range(...):
            for _ in layout.slices(rank, step, 0):
                batch = next(batches)
            state = stream.state()             # merge_states() over ranks, into the checkpoint

    Args:
        config: what to read.
        layout: what each step reads, and on which ranks.
        rank: of this process.
        seed: of the run, not negative.
        index_dir: cache of the index where `config.index_dir` is None; None keeps it in memory.

    Raises:
        DataError: the shards, the sizes or the decoder cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        layout: StepLayout,
        *,
        rank: int = 0,
        seed: int = 0,
        index_dir: Path | None = None,
    ) -> None:
        decoder = choose_decoder(config.decoder)
        images = ImageReader(
            config.augmentation, decoder=decoder, draft=config.draft, max_pixels=config.max_pixels
        )
        self._feed = _build_feed(config, images, layout, rank, seed=seed, index_dir=index_dir)
        self._identity = {
            "seed": seed,
            "weights": [source.weight for source in config.sources],
            **config.crop_facts,
            "decoder": decoder,
            "draft": config.draft,
            "max_pixels": config.max_pixels,
            **layout.identity,
            **self._feed.identity,
        }
        self._crops = config.crops
        self._position = self._feed.start()
        self._counter = BadCounter(config.max_bad_share, self._feed.num_samples)

    @property
    def num_samples(self) -> int | None:
        """Samples of all sources; None in streaming mode, where the number is unknown."""
        return self._feed.num_samples

    @property
    def steps_of_all_crops(self) -> int | None:
        """Steps after which every crop of every image was read; None if crops never end.

        Also where it cannot be told: in streaming mode, and where images have several sizes.
        """
        known = [crops for crops in self._crops if crops is not None]
        return self._feed.steps_of(known) if len(known) == len(self._crops) else None

    @property
    def num_read(self) -> int:
        """Samples that the steps before the current position read, over all ranks."""
        return int(self._position["samples"])

    @property
    def contents(self) -> dict[str, str]:
        """Keys of the recipe to the identity of their images, wherever they are."""
        return contents_of(self.state())

    @property
    def bad(self) -> list[BadSample]:
        """The distinct bad samples that this rank has met since the process started."""
        return self._counter.bad

    def batches(self) -> Iterator[Batch]:
        """Micro-batches from the current position on, without end.

        Raises:
            DataError: more samples are bad than `max_bad_share` allows.
        """
        for batch, position in self._feed.batches(self._position):
            if isinstance(batch, DataError):
                raise batch
            self._counter.add(len(batch.keys), batch.bad)
            if position is not None:
                self._position = position
            yield batch

    def state(self) -> State:
        """The position after the last step that `batches` yielded (not prefetched); JSON-able."""
        return {"identity": self._identity, "position": self._position}

    def restore(self, state: State, *, anyway: bool = False) -> None:
        """Moves to a position; call `batches` afterwards.

        The decoder may be another one, as all give the same pixels.

        Args:
            state: the result of `merge_states` over the states of all ranks of a run, whose number
                of ranks may differ from this one's.
            anyway: with other data, takes the same step of their own order.

        Raises:
            DataError: the data, their order or their augmentation differ; names the difference.
        """
        ours, theirs = (
            {
                name: value
                for name, value in json.loads(json.dumps(each)).items()
                if name != "decoder"
            }
            for each in (self._identity, state["identity"])
        )
        self._position = state["position"]
        if ours == theirs:
            return
        if anyway:
            done = {name: state["position"][name] for name in ("step", "samples")}
            self._position = self._feed.start() | done
            return
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise DataError(
                    f"this run cannot continue the stored one exactly: data {name} was "
                    f"{theirs.get(name)} and is now {ours.get(name)}"
                )


def _build_feed(
    config: DataConfig,
    images: ImageReader,
    layout: StepLayout,
    rank: int,
    *,
    seed: int,
    index_dir: Path | None,
) -> Feed:
    shards = [list_shards(s.shards, allow_pipe=config.allow_pipe) for s in config.sources]
    remote = [is_url(shard) for paths in shards for shard in paths]
    if any(remote):
        from data.lanes import LaneFeed  # imports webdataset, which local shards do not need

        return LaneFeed(config, shards, images, layout, rank, seed=seed)
    index_dir = config.index_dir or index_dir
    return IndexedFeed(config, shards, images, layout, rank, seed=seed, index_dir=index_dir)


def contents_of(state: State) -> dict[str, str]:
    """Key of each source in a recipe to the identity of its images, of a stream's state.

    Also that of the lanes, which local shards do not have.
    """
    identity = state["identity"]
    sources = {k: str(v) for k, v in identity.items() if k.startswith("sources[")}
    found = {f"data.sources.{k[8:-1]}": value for k, value in sources.items()}
    return found | {"data.lanes": str(identity.get("lanes", "none"))}


def merge_states(states: Sequence[State]) -> State:
    """Merges the states of all ranks after one step into the state for the checkpoint."""
    merged = dict(states[0]["position"])
    if "lanes" in merged:
        merged["lanes"] = {k: v for s in states for k, v in s["position"]["lanes"].items()}
    return {"identity": states[0]["identity"], "position": merged}
