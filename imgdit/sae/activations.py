"""Activations of a pipeline, as a stream into memory or as shards on disk.

On disk:

    <folder>/index.json                          what was recorded, and which prompts are done
    <folder>/<hookpoint>/shard-00000.safetensors values (maps, n, d), timesteps (maps), prompts (maps)

A map is one image at one timestep. A shard holds the maps of one batch of prompts and enters the index when it is
complete, so a recording that was interrupted goes on with what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open

from imgdit.io.atomic import write_tensors, write_text
from imgdit.io.order import mixed_seed
from imgdit.io.safe_json import read_object
from imgdit.sae.calls import Grid
from imgdit.sae.fingerprints import model_fingerprint, same_model
from imgdit.sae.hooks import hooked
from imgdit.sae.sampling import prompt_batches
from imgdit.sae.streams import Tokens

FORMAT = "imgdit-activations-1"
_INDEX = "index.json"


class Map(NamedTuple):
    """Activations of one or several images at one timestep, of the half that is guided towards the prompt."""

    hookpoint: str
    values: torch.Tensor
    """(P, n, d)"""
    timestep: float
    grids: tuple[Grid, ...]


class Recording(NamedTuple):
    """What a pipeline's run over one batch of prompts gave."""

    first: int
    """Number of the first prompt."""
    prompts: int
    maps: list[Map]
    """In the order of the calls."""
    output: Any
    """What the pipeline returned."""


@torch.no_grad()
def stream_activations(
    pipe: Any,
    prompts: Sequence[Any],
    hookpoints: Sequence[str],
    *,
    source: Literal["output", "update"] = "output",
    batch_size: int = 4,
    seed: int = 0,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> Iterator[Recording]:
    """Run a pipeline over prompts and hand out what all hookpoints saw, a batch of prompts at a time.

    At most one batch's activations are held: calls * batch_size * n * d values per hookpoint.

    Args:
        prompts: see `prompt_batches`; prompt i starts from the noise of seed + i.
        hookpoints: module paths, see `imgdit.sae.hooks.find_hookpoints` for wildcards.
        source: what of the modules, see `SAEConfig.source`.
        start: number of the prompt to begin with.
        dtype: of the values.
        call: arguments of the pipeline.

    Raises:
        ValueError: an unknown hookpoint, or activations that are NaN or infinite.
    """
    maps: list[Map] = []

    def reader(hookpoint: str) -> Any:
        def read(tokens: Tokens) -> None:
            if tokens.call.conditional is not None:
                values = tokens.values[tokens.call.conditional].to("cpu", dtype, copy=True)
                maps.append(Map(hookpoint, values.contiguous(), tokens.call.timestep, tokens.grids))

        return read

    functions = {hookpoint: reader(hookpoint) for hookpoint in hookpoints}
    for batch in prompt_batches(prompts, batch_size, seed, start):
        maps.clear()
        # Hooked for each batch: whoever iterates may use the pipeline in between.
        with hooked(pipe, functions, source=dict.fromkeys(hookpoints, source)):
            output = batch.run(pipe, **call)
        for found in maps:
            if not bool(torch.isfinite(found.values).all()):
                raise ValueError(
                    f"activations at {found.hookpoint} are NaN or infinite at timestep {found.timestep:g} "
                    f"(prompts {batch.first} to {batch.first + len(batch.prompts) - 1})"
                )
        yield Recording(batch.first, len(batch.prompts), list(maps), output)


class ShuffleBuffer:
    """A fixed amount of memory from which rows are taken in random order, each once.

    While it is full, what comes in replaces rows at random. It never holds more than `nbytes`.
    """

    def __init__(self, capacity: int, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, seed: int = 0):
        """
        Args:
            capacity: rows it holds.
            shape: of a row: (d,), or (n, d) where whole maps must stay together.
        """
        self.rows = torch.empty(capacity, *shape, dtype=dtype)
        self.filled = 0
        self.generator = torch.Generator().manual_seed(mixed_seed(seed, 7))

    @property
    def nbytes(self) -> int:
        """Memory of the rows, in bytes."""
        return self.rows.numel() * self.rows.element_size()

    @property
    def capacity(self) -> int:
        return self.rows.shape[0]

    def add(self, rows: torch.Tensor) -> None:
        """Put rows (m, …) in."""
        rows = rows[torch.randperm(len(rows), generator=self.generator)][: self.capacity]
        free = min(self.capacity - self.filled, len(rows))
        self.rows[self.filled : self.filled + free] = rows[:free]
        self.filled += free
        rest = rows[free:]
        places = torch.randperm(self.filled, generator=self.generator)[: len(rest)]
        self.rows[places] = rest.to(self.rows.dtype)

    def take(self, count: int) -> torch.Tensor:
        """Random rows (count, …), which leave the buffer."""
        if count > self.filled:
            raise ValueError(f"the buffer holds {self.filled} rows, {count} were asked for")
        places = torch.randperm(self.filled, generator=self.generator)[:count]
        taken = self.rows[places]
        # The last rows move into the gaps.
        self.filled -= count
        gaps = places[places < self.filled].sort().values
        gone = torch.zeros(count, dtype=torch.bool)
        gone[places[places >= self.filled] - self.filled] = True
        movers = (~gone).nonzero().flatten() + self.filled
        self.rows[gaps] = self.rows[movers]
        return taken

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `load` goes on exactly here."""
        return {"rows": self.rows[: self.filled].clone(), "generator": self.generator.get_state()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.filled = len(state["rows"])
        self.rows[: self.filled] = state["rows"]
        self.generator.set_state(state["generator"])


class ActivationRecorder:
    """Writes the activations of all hookpoints, a shard for each batch of prompts; shards may be made in any order, by
    any number of processes.

    Arguments as in `stream_activations`, and:
        folder: of the recording.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        hookpoints: Sequence[str],
        folder: str | Path,
        *,
        source: Literal["output", "update"] = "output",
        batch_size: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **call: Any,
    ) -> None:
        self.pipe, self.prompts, self.hookpoints, self.folder = pipe, prompts, list(hookpoints), Path(folder)
        self.batch_size = batch_size
        self.options: dict[str, Any] = {
            "source": source,
            "batch_size": batch_size,
            "seed": seed,
            "dtype": dtype,
            **call,
        }
        plain_values = {name: value for name, value in call.items() if isinstance(value, (str, int, float, bool))}
        self.about: dict[str, Any] = {
            "format": FORMAT,
            "hookpoints": self.hookpoints,
            "source": source,
            "batch_size": batch_size,
            "seed": seed,
            "dtype": str(dtype).removeprefix("torch."),
            "call": plain_values,
            "model": {
                name: model_fingerprint(getattr(pipe, name))
                for name in sorted({h.partition(".")[0] for h in hookpoints})
            },
        }

    def missing(self) -> list[int]:
        """Numbers of the batches that are not recorded yet.

        Raises:
            ValueError: the folder holds a recording of something else.
        """
        index = self._index()
        for key, value in self.about.items():
            if not (_same_models(index.get(key), value) if key == "model" else index.get(key) == value):
                raise ValueError(
                    f"{self.folder} holds a recording with {key}={index.get(key)!r}, this one has {value!r}; "
                    "choose another folder"
                )
        # A last batch that was cut short by fewer prompts is made again when there are more.
        done = {shard["file"] for shard in index["shards"] if shard["prompts"] == self._size(_number(shard))}
        count = -(-len(self.prompts) // self.batch_size)
        return [number for number in range(count) if _shard(number) not in done]

    def record(self, number: int) -> dict[str, Any]:
        """Make and write one batch's shard; what the index says about it."""
        stream = stream_activations(
            self.pipe, self.prompts, self.hookpoints, start=number * self.batch_size, **self.options
        )
        recording = next(stream)
        numbers = torch.arange(recording.first, recording.first + recording.prompts)
        count = 0
        for hookpoint in self.hookpoints:
            maps = [found for found in recording.maps if found.hookpoint == hookpoint]
            tensors = {
                "values": torch.cat([found.values for found in maps]),
                "timesteps": torch.tensor([found.timestep for found in maps for _ in range(recording.prompts)]),
                "prompts": numbers.repeat(len(maps)),
            }
            count = len(tensors["values"])
            (self.folder / hookpoint).mkdir(parents=True, exist_ok=True)
            write_tensors(self.folder / hookpoint / _shard(number), tensors)
        return {"file": _shard(number), "prompts": recording.prompts, "maps": count}

    def record_all(self) -> None:
        """Make what is missing, here and one after the other."""
        for number in self.missing():
            self.note(self.record(number))

    def note(self, shard: dict[str, Any]) -> None:
        """Enter a shard into the index. One process only."""
        index = self._index()
        others = [known for known in index["shards"] if known["file"] != shard["file"]]
        index["shards"] = sorted([*others, shard], key=_number)
        write_text(self.folder / _INDEX, json.dumps(index, indent=1))

    def _index(self) -> dict[str, Any]:
        path = self.folder / _INDEX
        return read_object(path) if path.is_file() else {**self.about, "shards": []}

    def _size(self, number: int) -> int:
        return min(self.batch_size, len(self.prompts) - number * self.batch_size)


def _same_models(one: Any, other: dict[str, Any]) -> bool:
    """Whether the models of two recordings are the same, by component."""
    return isinstance(one, dict) and one.keys() == other.keys() and all(same_model(one[n], other[n]) for n in other)


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _number(shard: Mapping[str, Any]) -> int:
    return int(shard["file"].removeprefix("shard-").partition(".")[0])


class RecordedActivations:
    """Maps (n, d) of one hookpoint that an `ActivationRecorder` wrote, read from disk one at a time."""

    def __init__(self, folder: str | Path, hookpoint: str) -> None:
        folder = Path(folder)
        if not (folder / _INDEX).is_file():
            raise ValueError(f"{folder} holds no recorded activations: it has no {_INDEX}")
        self.index = read_object(folder / _INDEX)
        if self.index.get("format") != FORMAT:
            raise ValueError(f"{folder / _INDEX}: expected format {FORMAT!r}, got {self.index.get('format')!r}")
        if hookpoint not in self.index["hookpoints"]:
            raise ValueError(f"{folder} has no {hookpoint!r}; recorded are {', '.join(self.index['hookpoints'])}")
        self.files: list[Any] = []
        self.places: list[tuple[int, int]] = []
        for shard in self.index["shards"]:
            self.files.append(safe_open(folder / hookpoint / shard["file"], framework="pt"))
            self.places += [(len(self.files) - 1, i) for i in range(shard["maps"])]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> torch.Tensor:
        file, place = self.places[number]
        return self.files[file].get_slice("values")[place]

    def timestep(self, number: int) -> float:
        """Timestep of a map."""
        file, place = self.places[number]
        return float(self.files[file].get_slice("timesteps")[place : place + 1])
