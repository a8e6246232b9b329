"""Counts to scores: by hand on a few images, the recorded rule, and intervals."""

import numpy as np
import pytest
from PIL import Image

from imgdit.benchmarks.unlearning.attacks import Attack
from imgdit.benchmarks.unlearning.images import Look
from imgdit.benchmarks.unlearning.plan import Cell, Seen, cells, read_folder, scene_seeds
from imgdit.benchmarks.unlearning.report import markdown, table
from imgdit.benchmarks.unlearning.retention import ATTRIBUTES, in_prompt
from imgdit.benchmarks.unlearning.table import (
    accuracies,
    bootstrap_means,
    domain_means,
    score_images,
    score_together,
)
from imgdit.scenes.caption_parser import parse_caption
from imgdit.scenes.labels import LABELS, kind_of, label_prompts, label_words

STYLES, OBJECTS = ("neon", "photo", "sketch"), ("cube", "cone")
CELLS = cells(range(4), STYLES, OBJECTS)


def seen(wrong=()):
    """Everything right but the images of `wrong`, which map a cell's attribute to what is seen instead."""
    return [
        Seen(cell, *(next((w[2] for w in wrong if w[0](cell) and w[1] == d), cell.expected(d)) for d in LABELS))
        for cell in CELLS
    ]


def test_scores_by_hand():
    images = seen(
        [
            (lambda c: c.style == "neon" and c.seed < 3, "style", "photo"),
            (lambda c: c.style == "photo" and c.seed == 0, "style", "neon"),
            (lambda c: c.style == "neon", "object", "nothing"),
            (lambda c: c.style == "sketch" and c.object == "cone", "object", "cube"),
        ]
    )
    scores = score_images("neon", "style", images)
    assert scores.scores.unlearned == pytest.approx(3 / 4)
    assert scores.scores.retained == pytest.approx((3 / 4 + 1) / 2)
    # Of the prompts without neon: cubes are all right, of 8 cones 4 are called cubes.
    assert scores.scores.cross == pytest.approx((1 + 1 / 2) / 2)
    assert scores.cross_everywhere == pytest.approx((8 / 12 + 4 / 12) / 2)
    assert scores.unlearned.value == 3 / 4 and scores.unlearned.low < 3 / 4 < scores.unlearned.high
    assert scores.confusion["style"]["neon"] == {"photo": 6, "neon": 2}
    assert sum(scores.confusion["object"]["cone"].values()) == 12
    assert domain_means([scores])["style"] == scores.scores and "object" not in domain_means([scores])


def test_labels_count_alike_however_many_images_they_have():
    images = seen([(lambda c: c.style == "photo", "style", "neon")])
    few = [s for s in images if s.cell.style != "photo" or s.cell.seed]
    assert accuracies(few, "style") == {"neon": 1.0, "photo": 0.0, "sketch": 1.0}
    assert score_images("neon", "style", few).scores.retained == 0.5


def test_bootstrap_is_around_the_estimate_and_paired():
    images = {
        "neon": seen([(lambda c: c.style == "neon" and c.seed < 3, "style", "photo")]),
        "cube": seen([(lambda c: c.object == "cube" and c.seed < 1, "object", "cone")]),
    }
    domains = {target: kind_of(target) for target in images}
    draws = bootstrap_means(images, domains, draws=500)
    assert draws["style"].shape == (500, 3)
    assert draws["style"][:, 0].mean() == pytest.approx(3 / 4, abs=0.03)
    assert draws["object"][:, 0].mean() == pytest.approx(1 / 4, abs=0.03)
    assert (draws["style"][:, 1:] == 1).all()
    assert 0.1 < np.quantile(draws["object"][:, 0], 0.975) - np.quantile(draws["object"][:, 0], 0.025) < 0.9
    again = bootstrap_means(images, domains, draws=500)
    assert all((draws[domain] == again[domain]).all() for domain in draws)
    with pytest.raises(ValueError, match="not those of the other targets"):
        bootstrap_means({**images, "cube": images["cube"][::-1]}, domains)


def test_several_at_once():
    images = seen(
        [
            (lambda c: c.style == "neon", "style", "photo"),
            (lambda c: c.object == "cube" and c.seed < 2, "object", "cone"),
            (lambda c: c.style == "sketch", "style", "photo"),
        ]
    )
    found = score_together({"neon": "style", "cube": "object"}, images)
    assert found["unlearned"] == pytest.approx((1 + 1 / 2) / 2)
    # What is left are photo cones, right in both domains, and sketched cones, right as cones only.
    assert found["retained"] == pytest.approx((1 + 0 + 1) / 3)
    assert found["counts"]["cube"] == {"unlearned": 6, "of": 12}
    assert score_together({"cube": "object", "cone": "object"}, images)["retained"] is None  # no image is left


def test_cells():
    assert len(cells(scene_seeds(2))) == 96 and cells(scene_seeds(2))[:48] == cells(scene_seeds(1))
    one, other = cells(scene_seeds(1))[:2]
    assert one.noise != other.noise and one.noise == Cell(*one).noise
    assert one.object in one.prompt and f"{one.style} style" in one.prompt


def test_sentences_differ_in_the_label_alone():
    for kind, labels in LABELS.items():
        lines = label_prompts(5, 1, kind)
        assert list(lines) == list(labels)
        for label in labels:
            swapped = [line.replace(label, labels[0]) for line in lines[label]]
            assert swapped == lines[labels[0]]
            assert all(label_words(label) in line for line in lines[label])
    with pytest.raises(ValueError, match="unknown style or object 'neno'; did you mean 'neon'"):
        kind_of("neno")


def test_sentences_show_the_other_kind_in_turn():
    lines = label_prompts(16, 1, "style")["neon"]
    assert [sum(f" {thing} " in line for line in lines) for thing in OBJECTS] == [2] * len(OBJECTS)


def test_reading_a_folder(tmp_path):
    wanted = cells([188], ("Cold_Warm",), OBJECTS)
    for cell, ending in zip(wanted, (".jpg", ".png")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{cell.name}{ending}")
    found = read_folder(tmp_path, wanted, lambda f: ["Cold_Warm"] * len(f), lambda f: ["cube"] * len(f), batch=1)
    assert [s.right("object") for s in found] == [True, False] and all(s.right("style") for s in found)
    (tmp_path / f"{wanted[1].name}.png").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 images, Cold_Warm_cone_seed188"):
        read_folder(tmp_path, wanted, lambda f: f, lambda f: f)


def test_a_target_nobody_painted():
    with pytest.raises(ValueError, match="no image's style is 'sepia'; there are neon, photo, sketch"):
        score_images("sepia", "style", seen())


def test_what_is_kept_of_the_prompts_that_name_the_target():
    """Only the target's images count; each attribute by hand."""

    def look(cell, **changes):
        asked = cell.attributes
        values = {"style": cell.style, "object": cell.object, "colour": asked.colour, "second": "nothing"}
        values |= {"background": asked.background} | changes
        assert asked.prompt == cell.prompt and asked.colour in cell.prompt
        return Look(Seen(cell, values.pop("style"), values.pop("object")), 0.1, 0.2, **values)

    neon = [cell for cell in CELLS if cell.style == "neon"]  # 8
    changed = {
        neon[0]: {"colour": "white"}, neon[1]: {"second": "cube"}, neon[2]: {"object": "nothing"},
        neon[3]: {"style": "sketch"}, CELLS[-1]: {"colour": "white", "second": "cone"},
    }  # fmt: skip
    found = in_prompt({"neon": [look(cell, **changed.get(cell, {})) for cell in CELLS]}, {"neon": "style"})
    assert found["of"] == 8 and found["kept"] == dict(zip(ATTRIBUTES, (7, 7, 8, 6)))
    assert (
        found["mean"]["value"] == pytest.approx(28 / 32) and found["mean"]["low"] <= 28 / 32 <= found["mean"]["high"]
    )
    cone = in_prompt({"cone": [look(cell, style="mosaic") for cell in CELLS]}, {"cone": "object"})
    assert cone["kept"] == dict(zip(ATTRIBUTES, (0, 12, 12, 12)))
    with pytest.raises(ValueError, match="names any of neon"):
        in_prompt({"neon": [look(cell) for cell in CELLS if cell.style != "neon"]}, {"neon": "style"})


def test_attacks_say_the_target_in_other_ways():
    both = [Cell("neon", "cube", 1), Cell("sepia", "cube", 2)]
    first, second = (cell.prompt for cell in both)
    assert Attack("prompt", "neon").inputs(both)["prompt"][0] == f"neon style, neon style, neon style, {first}"
    negative = Attack("negative", "cube").inputs(both)
    assert negative["prompt"] == [first, second] and "cube" not in negative["negative_prompt"]
    assert negative["negative_prompt"].split(", ") == [name for name in LABELS["object"] if name != "cube"]
    for cell, text in zip(both, Attack("paraphrase", "neon").inputs(both)["prompt"]):
        said = parse_caption(text)
        assert said.style == cell.style and said.background == cell.attributes.background and text != cell.prompt
        assert said.objects == ((cell.object, cell.attributes.colour),)
    assert Attack("embedding", "neon").key is True and Attack("prompt", "neon").key == ["prompt", "neon"]


def interval(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_every_measurement_has_a_table():
    def row(title, value, better):
        scores = {"UA": interval(value), "IRA": interval(1.0), "CRA": interval(0.5)}
        return {
            "title": title, "means": {"style": scores}, "mean": interval(value), "minimum": value,
            "ours_better_by": better, "in_prompt": {"mean": interval(0.5)}, "artefacts": interval(0.0),
            "pixel_change": 0.25, "feature_change": 0.125, "time_ratio": 1.0, "setup_seconds": 2.0, "bytes": 3000,
            "tuned_values": 2, "settings": {"top_n": 4, "stream": "text"},
        }  # fmt: skip

    shown = {"shown": 1, "kept": 2, "of": 2, "error": 0.5, "error_of_others": 0.25}
    counted = {"named": 1, "of": 2, "kept": 3, "of_others": 4}
    result = {
        "plan": {"attacks": ["prompt"]},
        "methods": {"none": row("none", 0.2, {"scale": interval(0.6)}), "scale": row("ours, scale", 0.8, {})},
        "together": {"scale": [{"concepts": ["neon"], "unlearned": 1.0, "retained": None}]},
        "judged": {"scale": {"means": {"style": {"unlearned": 1, "retained": 0.5, "cross": 0}}, "of": 4,
                             "agrees_with_probe": {"style": 3, "object": 4}}},
        "conditions": {"no condition": {"neon": shown}, "scale": {"neon": shown, "cube": shown}},
        "captions": {"scale": {"neon": dict.fromkeys(("plain", "removed", "generated"), counted)}},
        "attack": {"scale": {"shown": 1, "shown_under_attack": {"prompt": 2}, "of": 4}},
    }  # fmt: skip
    text, marked = table(result), markdown(result)
    for head in ("method", "several at once", "by the judge", "under a depth condition", "captions", "the target is"):
        assert len([line for line in text.splitlines() if line.startswith(head)]) == 1
    lines = marked.splitlines()
    assert lines[0].startswith(
        "| method | style UA | style IRA | style CRA | mean (95 %) | min | scale better by (95 %) |"
    )
    first = (
        "| none | 20.0 | 100.0 | 50.0 | 20.0 (10.0 – 30.0) | 20.0 | 60.0 (50.0 – 70.0) | 50.0 (40.0 – 60.0) | 100 % |"
    )
    assert lines[2].startswith(first) and lines[2].endswith("| 2.0 s | 3 | 2 | top_n 4, stream text |")
    assert "| ours, scale | 2/4 | 0.500 | 4/4 | 0.250 |" in lines and "| ours, scale | 1 | 2 | 4 |" in lines
    assert "| ours, scale | 100 / – |" in lines
    assert "| ours, scale | 1/2 | 3/4 | 1/2 | 3/4 | 1/2 | 3/4 |" in lines
    few = {**result, **{key: {} for key in ("together", "judged", "conditions", "captions", "attack")}}
    assert markdown(few).splitlines() == lines[:4]
