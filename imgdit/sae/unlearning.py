"""Unlearning concepts while sampling: the features of a concept are scaled, removed, or their patches replaced."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch

from imgdit.cards import CardDetails, write_card
from imgdit.hub import HUB_ID, push_folder
from imgdit.naming import check_choice
from imgdit.sae.calls import DenoiserCall
from imgdit.sae.cards import sae_card
from imgdit.sae.concepts import (
    CONCEPTS,
    ConceptBook,
    ConceptSelection,
    check_concepts,
    check_fit,
    check_rule,
    select_concept,
)
from imgdit.sae.edits import ChosenFeatures, Edit, edit_by_decoding
from imgdit.sae.files import CONFIG, local_folder
from imgdit.sae.hooks import check_width, denoiser_of, hooked, hookpoint_of, site
from imgdit.sae.model import DeviceCopies, SparseAutoencoder, autoencoder_of, load_sae, save_sae
from imgdit.sae.statistics import collect_statistics
from imgdit.sae.streams import Tokens

Mode = Literal["scale", "remove", "replace"]
Halves = Literal["both", "conditional", "unconditional"]


class ConceptUnlearner:
    """Sparse autoencoders of one pipeline and the concepts whose features are known.

    unlearner = ConceptUnlearner.from_pretrained(folder)
    with unlearner.attach(pipe, concepts=["neon"]):
        pipe("a red cube in neon lights")
    """

    def __init__(self, saes: Mapping[str, SparseAutoencoder], books: Mapping[str, ConceptBook] | None = None) -> None:
        """
        Args:
            saes: by hookpoint.
            books: selections by hookpoint; none yet by default, see `learn`.
        """
        self.saes = dict(saes)
        self.books = dict(books or {})
        for hookpoint, book in self.books.items():
            if not self.saes[hookpoint].has_fingerprint(book.sae):
                raise ValueError(
                    f"the concepts at {hookpoint} were selected with another SAE (hash {book.sae[-12:]}, this one has "
                    f"{self.saes[hookpoint].fingerprint()[-12:]}); select them anew with `learn`"
                )
            for name, selection in book.selections.items():
                check_fit(selection, self.saes[hookpoint].config, f"the concept {name!r} at {hookpoint}")

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> ConceptUnlearner:
        """Read an SAE's folder, or a folder of several, with the concepts saved beside them. Of a folder of concepts
        alone, the SAEs are read from where it says that they are.

        Args:
            path_or_repo: folder, or Hub repository.
            revision, token: of the repository, see `local_folder`.

        Raises:
            ValueError: no SAE there, no hookpoint given, or concepts of another SAE.
        """
        folder = local_folder(path_or_repo, revision=revision, token=token)
        within = {path.parent for name in (CONFIG, CONCEPTS) for path in folder.glob(f"*/{name}")}
        folders = [folder] if (folder / CONFIG).is_file() else sorted(within)
        if not folders:
            raise ValueError(f"{folder} holds no sparse autoencoder: neither it nor a folder in it has {CONFIG}")
        saes, books = {}, {}
        for inner in folders:
            book = ConceptBook.load(inner)
            if (inner / CONFIG).is_file():
                sae = load_sae(inner)
            elif book is not None and book.saes is not None:
                sae = load_sae(book.saes, inner.name)
            else:
                raise ValueError(f"{inner} has concepts, but neither {CONFIG} nor the place of their autoencoder")
            hookpoint = sae.config.hookpoint
            if hookpoint is None:
                raise ValueError(f"{inner / CONFIG} names no hookpoint, and its folder is not called by one")
            saes[hookpoint] = sae
            if book is not None:
                books[hookpoint] = book
        return cls(saes, books)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        concepts: Sequence[str] | None = None,
        saes: str | None = None,
        card: CardDetails | None = None,
        name: str | None = None,
    ) -> None:
        """Write a folder per hookpoint, each with its SAE and its concepts.

        Args:
            concepts: names of those to write; `None`: all.
            saes: folder or Hub repository where the same SAEs lie: only the concepts are written, which are kilobytes.
            card: what a model card says beside what the files say; `None`: none is written.
            name: Hub repository that the card loads from; `None`: the folder's name.

        Raises:
            ValueError: an unknown concept; `saes` is neither folder nor Hub id; with `saes`, nothing was selected.
        """
        folder = Path(folder)
        check_concepts(concepts or (), self.concepts)
        if saes is not None and not Path(saes).is_dir() and not re.fullmatch(HUB_ID, saes):
            raise ValueError(
                f"saes must be a folder or a Hub repository (owner/name) of the autoencoders, got {saes!r}"
            )
        books = {
            hookpoint: dataclasses.replace(book if concepts is None else book.only(concepts), saes=saes)
            for hookpoint, book in self.books.items()
        }
        if saes is not None and not any(book.selections for book in books.values()):
            raise ValueError(
                "no concept was selected, so nothing is left without the autoencoders; call `learn` first"
            )
        for hookpoint, sae in self.saes.items():
            named = autoencoder_of(dataclasses.replace(sae.config, hookpoint=hookpoint))
            named.load_state_dict(sae.state_dict())
            named.threshold = sae.threshold
            if saes is None:
                save_sae(named, folder / hookpoint)
            if hookpoint in books and (books[hookpoint].selections or saes is None):
                book = books[hookpoint]
                if sae.W_dec.dtype != torch.float32:  # selected with weights that were rounded since
                    book = dataclasses.replace(book, sae=named.fingerprint())
                (folder / hookpoint).mkdir(parents=True, exist_ok=True)
                book.save(folder / hookpoint)
        if card is not None:
            configs = {hookpoint: sae.config for hookpoint, sae in self.saes.items()}
            write_card(folder, sae_card(name or folder.name, configs, books, card, saes))

    def push_to_hub(
        self,
        repository: str,
        *,
        concepts: Sequence[str] | None = None,
        saes: str | None = None,
        card: CardDetails | None = None,
        **options: Any,
    ) -> str:
        """Save with a model card in a repository on the Hub; `from_pretrained` reads it.

        Args:
            concepts, saes, card: see `save_pretrained`.
            options: see `push_folder`.

        Returns:
            The repository's address.
        """
        with TemporaryDirectory() as folder:
            details = card or CardDetails()
            self.save_pretrained(folder, concepts=concepts, saes=saes, card=details, name=repository)
            return push_folder(folder, repository, **options)

    @property
    def concepts(self) -> list[str]:
        """Concepts that can be unlearned."""
        return list(dict.fromkeys(name for book in self.books.values() for name in book.selections))

    def learn(
        self,
        pipe: Any,
        prompts: Mapping[str, Sequence[str]],
        *,
        percentile: float | None = None,
        top_n: int | None = None,
        floor: float = 0.0,
        multiplier: float = -1.0,
        seed: int = 0,
        batch_size: int = 4,
        **call: Any,
    ) -> None:
        """Select the features of concepts from images generated for the purpose, and keep them under their names.

        Args:
            prompts: some per concept; all of them should be told apart, so give every concept of a kind at once.
            percentile, top_n, floor, multiplier: see `select_concept`.
            seed: of the first prompt of each concept.
            call: arguments of the pipeline, such as `num_inference_steps` and `guidance_scale`.

        Raises:
            ValueError: a rule that selects nothing, a concept without prompts, an unknown hookpoint, or an SAE of
                another width, before anything is sampled.
        """
        for sae in self.saes.values():
            check_rule(percentile, top_n, floor, sae.config.num_latents)
        found = collect_statistics(pipe, self.saes, prompts, seed=seed, batch_size=batch_size, **call)
        plain_values = {name: value for name, value in call.items() if isinstance(value, (str, int, float, bool))}
        for hookpoint, statistics in found.items():
            selections = [
                select_concept(
                    statistics,
                    name,
                    percentile=percentile,
                    top_n=top_n,
                    floor=floor,
                    multiplier=multiplier,
                    origin={"prompts": _prompt_texts(prompts[name]), "seed": seed, "call": plain_values},
                )
                for name in prompts
            ]
            denoiser, book = denoiser_of(pipe, hookpoint), self.books.get(hookpoint)
            if book is None or not book.is_of(denoiser):  # what was selected in another model is of no use in this one
                book = ConceptBook.empty(self.saes[hookpoint].fingerprint(), denoiser)
            self.books[hookpoint] = book.with_selections(selections)

    @contextmanager
    def attach(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        *,
        mode: Mode | None = None,
        multiplier: float | None = None,
        timesteps: tuple[float, float] = (0.0, 1000.0),
        halves: Halves = "both",
        hookpoints: Sequence[str] | None = None,
        paper_compat: bool = False,
    ) -> Iterator[None]:
        """Unlearn concepts in every call of the pipeline while the context is open.

        Args:
            concepts: names; or a sequence of names for each request of a batch. Where two concepts share a feature,
                the later one decides.
            mode: "scale": an activation a becomes a * multiplier * its mean for the concept (SAeUron); "remove": it
                becomes 0; "replace": a patch where any of the features is seen becomes the mean of the images
                without the concept (arXiv 2606.31699). A token of a text holds what its neighbours say too, so it is
                not replaced whole: it moves by the difference between the mean of the nearest other concept that stays
                and that of the concept. `None`: "scale" if a multiplier or `paper_compat` is given, otherwise see
                `default_mode`.
            multiplier: of "scale"; `None`: what was stored with each concept, -1 unless it was tuned.
            timesteps: range in which anything is changed.
            halves: guidance halves that are changed.
            hookpoints: some of those that know the concepts; `None`: those that read the text, if they know all of
                them, otherwise all. What the text no longer says, no block puts into the image.
            paper_compat: the reconstruction error with SAeUron's sign, as in its published runs.

        A transcoder's features are read from its module's input and changed in its output: what the features that are
        not changed, and the transcoder's error, add to the output stays as it is.

        Raises:
            ValueError: an unknown concept or hookpoint, a mode that transcoders lack, an SAE of another width or
                concepts of another model, before anything is hooked; and while sampling, activations that are not
                finite.
        """
        requests = _requests(concepts)
        if mode is not None:
            check_choice("mode", mode, ("scale", "remove", "replace"))
        check_choice("halves", halves, ("both", "conditional", "unconditional"))
        if paper_compat and (mode == "replace" or len(requests) > 1):
            raise ValueError("paper_compat is SAeUron's rule; it knows neither mode='replace' nor requests")
        for names in requests:
            check_concepts(names, self.concepts)
        wanted = {name for names in requests for name in names}
        places = self._places(pipe, wanted) if hookpoints is None else list(hookpoints)
        if mode is None:
            given = multiplier is not None or paper_compat
            mode = "scale" if given else self.default_mode(pipe, concepts, hookpoints=hookpoints)
        interventions = {}
        for hookpoint in places:
            book = self.books.get(hookpoint)
            if book is None:
                raise ValueError(f"no concept was selected at {hookpoint!r}; known are {', '.join(self.books)}")
            if not wanted & book.selections.keys():
                continue  # asked for by name, and knows none of them
            sae = self.saes[hookpoint]
            check_width(pipe, hookpoint, sae)
            if mode == "replace" and sae.config.transcode:
                raise ValueError(
                    f"mode='replace' puts mean activations in place of those that are encoded; the transcoder at "
                    f"{hookpoint} encodes its module's input and changes the output; use 'scale' or 'remove'"
                )
            if paper_compat and (sae.config.transcode or sae.config.time_embed_dim is not None):
                raise ValueError(
                    f"paper_compat is SAeUron's rule for sparse autoencoders; the one at {hookpoint} is a transcoder, "
                    "or conditioned on the timestep"
                )
            if not book.is_of(denoiser_of(pipe, hookpoint)):
                raise ValueError(
                    f"the concepts at {hookpoint} were selected in another model ({book.model['class']}, "
                    f"{book.model['parameters']:,} weights); select them anew with `learn`"
                )
            known = [[book.selections[name] for name in names if name in book.selections] for names in requests]
            moves = mode == "replace" and site(pipe, hookpoint).text
            if moves:
                known = [[s.exchanged(book.selections, names) for s in of] for of, names in zip(known, requests)]
            interventions[hookpoint] = Intervention(
                sae, known, mode, multiplier, timesteps, halves, paper_compat, moves=moves
            )
        source = {hookpoint: self.saes[hookpoint].config.reads for hookpoint in interventions}
        checks = _Finite(list(interventions.values()))
        with hooked(pipe, interventions, source=source, after_call=checks):
            yield

    def default_mode(
        self, pipe: Any, concepts: Sequence[str] | Sequence[Sequence[str]], *, hookpoints: Sequence[str] | None = None
    ) -> Mode:
        """What `attach` does with concepts if it is given no mode.

        "replace" where it acts on the text that images are generated from and every concept has what it needs there: a
        mean of its own and that of another concept which stays. "scale" everywhere else.

        Args:
            concepts, hookpoints: see `attach`.
        """
        requests = _requests(concepts)
        wanted = {name for names in requests for name in names}
        places = self._places(pipe, wanted) if hookpoints is None else hookpoints
        acting = [place for place in places if place in self.books and wanted & self.books[place].selections.keys()]
        for place in acting:
            known = self.books[place].selections
            image_model = not place.startswith("model.")  # of a language model every hookpoint reads text
            if self.saes[place].config.transcode or not (image_model and site(pipe, place).text):
                return "scale"
            if any(name in known and not known[name].staying(known, names) for names in requests for name in names):
                return "scale"
        return "replace" if acting else "scale"

    def _places(self, pipe: Any, concepts: set[str]) -> list[str]:
        """Hookpoints that know any of the concepts; only the text's, if they know all of them."""
        known = [hookpoint for hookpoint, book in self.books.items() if concepts & book.selections.keys()]
        text = [hookpoint for hookpoint in known if site(pipe, hookpoint).text]
        in_text = {name for hookpoint in text for name in self.books[hookpoint].selections}
        return text if concepts <= in_text else known


@contextmanager
def steer(
    pipe: Any,
    sae: SparseAutoencoder,
    factors: Mapping[int, float],
    *,
    hookpoint: str | None = None,
    timesteps: tuple[float, float] = (0.0, 1000.0),
    halves: Halves = "both",
) -> Iterator[None]:
    """Multiply features by factors in every call of the pipeline while the context is open.

    Args:
        factors: feature -> what its activation is multiplied by.
        hookpoint: `None`: the SAE's own.
        timesteps, halves: see `ConceptUnlearner.attach`.
    """
    place = hookpoint_of(pipe, sae, hookpoint)
    for feature in factors:
        if not 0 <= feature < sae.config.num_latents:
            raise ValueError(f"the SAE has features 0 to {sae.config.num_latents - 1}, got {feature}")
    count = len(factors)
    selection = ConceptSelection(
        name="steered",
        timesteps=(0.0,),
        features=torch.tensor(list(factors), dtype=torch.long),
        selected=torch.ones(1, count, dtype=torch.bool),
        means=torch.tensor([list(factors.values())], dtype=torch.float32).view(1, count),
        thresholds=torch.zeros(1, count),
        replacement=torch.zeros(1, sae.config.d_in),
    )
    intervention = Intervention(sae, [[selection]], "scale", 1.0, timesteps, halves, False)
    with hooked(pipe, {place: intervention}, source={place: sae.config.reads}, after_call=_Finite([intervention])):
        yield


def _prompt_texts(prompts: Sequence[Any]) -> list[Any]:
    """Prompts as JSON takes them; of embeddings, their names."""
    return [sorted(prompt) if isinstance(prompt, dict) else prompt for prompt in prompts]


def _requests(concepts: Sequence[Any]) -> list[list[str]]:
    """Names per request; one list of names is for all."""
    if isinstance(concepts, str):
        raise ValueError(f"concepts must be a list of names, got the text {concepts!r}; write [{concepts!r}]")
    if all(isinstance(name, str) for name in concepts):
        return [list(concepts)]
    return [list(names) for names in concepts]


class _Finite:
    """Asks once per call of the denoiser whether what all hooks read was finite: asking at each of them would wait for
    the device each time."""

    def __init__(self, interventions: Sequence[Intervention]) -> None:
        self.interventions = interventions

    def __call__(self, call: DenoiserCall) -> None:
        finite = [torch.isfinite(one.sums) for one in self.interventions if one.sums is not None]
        for intervention in self.interventions:
            intervention.sums = None
        if finite and not bool(torch.stack([one.to(finite[0].device) for one in finite]).all()):
            raise ValueError(
                f"the activations that the SAE reads are NaN or infinite at timestep {call.timestep:g}; the model "
                "overflowed (try another dtype), or its weights are damaged"
            )


class _Plan(NamedTuple):
    """What an intervention does at one timestep."""

    chosen: ChosenFeatures
    factors: torch.Tensor
    """(requests, m), or (m,) where there is one request."""
    concept: torch.Tensor
    """(requests, m): number, from 1, of the concept a feature belongs to; 0: none of the request's."""
    replacements: torch.Tensor
    """(requests, 1 + concepts, d): what a patch of each concept becomes, or moves by; the first is 0."""


class Intervention:
    """What is done at one hookpoint; called by the hook."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        requests: Sequence[Sequence[ConceptSelection]],
        mode: Mode,
        multiplier: float | None,
        timesteps: tuple[float, float],
        halves: Halves,
        paper_compat: bool,
        *,
        moves: bool = False,
    ) -> None:
        """
        Args:
            moves: in mode "replace", what is stored as `replacement` is added to the patch instead.
        """
        self.moves = moves
        self.sae, self.requests, self.mode, self.multiplier = sae, requests, mode, multiplier
        self.timesteps, self.halves, self.paper_compat = timesteps, halves, paper_compat
        self.plans: dict[float, _Plan | None] = {}
        """By timestep, for the device and the precision of `place`."""
        self.place: tuple[torch.device, torch.dtype] | None = None
        self.whole = DeviceCopies(sae)
        self.sums: torch.Tensor | None = None

    def __call__(self, tokens: Tokens) -> torch.Tensor | None:
        call, x = tokens.call, tokens.values
        low, high = self.timesteps
        if not low <= call.timestep <= high:
            return None
        place = x.device, self.sae.W_dec.dtype
        if self.place != place:  # the model was moved, or is offloaded: the weights follow the activations
            self.plans, self.place = {}, place
        if call.timestep not in self.plans:
            self.plans[call.timestep] = self._plan(call.timestep, x.device)
        plan = self.plans[call.timestep]
        if plan is None:
            return None
        encoded = tokens.encoded
        if encoded.shape[-1] != self.sae.config.d_in:
            raise ValueError(f"the SAE reads width {self.sae.config.d_in}, the activations have {encoded.shape[-1]}")
        if self.halves == "both":
            return self._changed(x, encoded, plan, call)
        negative = call.unconditional or slice(0, 0)
        lengths = [negative.start, negative.stop - negative.start, len(x) - negative.stop]
        parts, read = list(x.split(lengths)), encoded.split(lengths)
        chosen = [n for n in ((1,) if self.halves == "unconditional" else (0, 2)) if len(parts[n])]
        for number in chosen:
            parts[number] = self._changed(parts[number], read[number], plan, call)
        return torch.cat(parts) if chosen else None

    def _changed(self, x: torch.Tensor, encoded: torch.Tensor, plan: _Plan, call: DenoiserCall) -> torch.Tensor:
        """Tokens (B, n, d) of one or several guidance parts with `call.images` rows each; `encoded` is x, or what a
        transcoder reads."""
        rows, images = x.reshape(-1, x.shape[-1]), call.images
        if self.paper_compat:
            change = Edit(plan.chosen.features, plan.factors, plan.chosen.thresholds)
            self._watch(rows)
            return edit_by_decoding(self.whole.on(x.device), rows, change, error="reversed").view(x.shape)
        factors, owner = plan.factors, torch.zeros(1, dtype=torch.long, device=x.device)
        if len(self.requests) > 1:
            requests = len(self.requests)
            if images % requests:
                raise ValueError(f"concepts were given for {requests} requests, the batch has {images} image(s)")
            each = images // requests * x.shape[1]
            owner = torch.arange(requests, device=x.device).repeat_interleave(each).repeat(len(x) // images)
            factors = factors[owner]
        read = encoded.reshape(-1, encoded.shape[-1]).to(self.sae.W_dec.dtype)
        normalised, scale = plan.chosen.normalize(read, call.timestep)
        scores = plan.chosen.scores(normalised)
        self._watch(scores)
        acts = plan.chosen.activations(normalised, scores)
        if self.mode != "replace":
            return plan.chosen.added(rows, acts, factors, scale).view(x.shape)
        if self.moves:  # by all concepts that are seen
            concepts = torch.arange(plan.replacements.shape[1], device=x.device)
            seen = ((acts > 0)[..., None] & (plan.concept[owner][..., None] == concepts)).any(1)  # (N, 1 + concepts)
            moved = seen[:, None].to(plan.replacements) @ plan.replacements[owner]
            return (rows + moved[:, 0].to(x.dtype)).view(x.shape)
        concept = ((acts > 0) * plan.concept[owner]).amax(1)  # (N,), the last one where several are seen
        values = plan.replacements[owner, concept].to(x.dtype)
        return torch.where((concept > 0)[:, None], values, rows).view(x.shape)

    def _watch(self, values: torch.Tensor) -> None:
        total = values.detach().sum()
        self.sums = total if self.sums is None else self.sums + total

    @torch.no_grad()
    def _plan(self, timestep: float, device: torch.device) -> _Plan | None:
        """Features, factors and thresholds at a timestep; `None` where nothing would change."""
        dtype = self.sae.W_dec.dtype
        merged: list[dict[int, tuple[float, float, int]]] = []
        fills = torch.zeros(len(self.requests), 1 + max(map(len, self.requests)), self.sae.config.d_in)
        for request, selections in enumerate(self.requests):
            entries: dict[int, tuple[float, float, int]] = {}
            for number, selection in enumerate(selections, start=1):
                step = selection.at(timestep)
                fills[request, number] = step.replacement
                multiplier = selection.multiplier if self.multiplier is None else self.multiplier
                wanted = torch.zeros_like(step.means) if self.mode == "remove" else step.means * multiplier
                factors = torch.lerp(torch.ones_like(wanted), wanted, step.weights)
                for feature, factor, threshold in zip(
                    step.features.tolist(), factors.tolist(), step.thresholds.tolist()
                ):
                    if factor != 1.0 or self.mode == "replace":
                        entries[feature] = (factor, threshold, number)
                    else:
                        entries.pop(feature, None)
            merged.append(entries)
        features = list(dict.fromkeys(feature for entries in merged for feature in entries))
        # The published rule decodes every activation, whether a feature is selected or not.
        if not features and not self.paper_compat:
            return None
        # A feature's threshold is a property of the statistics, the same for all requests.
        thresholds = {f: threshold for entries in merged for f, (_, threshold, _) in entries.items()}
        nothing = (1.0, 0.0, 0)

        def put(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)  # blocking, it would wait

        factors = put([[e.get(f, nothing)[0] for f in features] for e in merged], dtype)
        chosen = ChosenFeatures(
            self.sae,
            torch.tensor(features, dtype=torch.long),
            put([thresholds[f] for f in features], dtype),
            self.whole,
        )
        concept = put([[e.get(f, nothing)[2] for f in features] for e in merged], torch.long)
        return _Plan(
            chosen, factors if len(merged) > 1 else factors[0], concept, fills.to(device, dtype, non_blocking=True)
        )
