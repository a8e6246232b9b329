"""Text files of any system, wherever text is read."""

import json

import pytest
import yaml
from tiny_images import image

from imgdit.apps.commands.data import _lines
from imgdit.apps.jobs.plan import Plan
from imgdit.apps.jobs.request import Request
from imgdit.data import open_rows
from imgdit.io.safe_json import parse_json
from imgdit.io.text import decode_text, encoding_of, lines_or_errors, split_lines
from imgdit.training.recipe import load_recipe
from imgdit.training.sae_recipe import SAEData


def planned(file):
    plan = Plan()
    plan.read(file, Request())
    return plan.jobs


ENCODINGS = {
    "UTF-8": "utf-8",
    "UTF-8 with a mark": "utf-8-sig",
    "UTF-16 with a mark": "utf-16",
    "UTF-16, little end first": "utf-16-le",
    "UTF-16, big end first": "utf-16-be",
    "UTF-32 with a mark": "utf-32",
}
TEXTS = (
    "a red cube",
    '{"text": "ein grüner Würfel"}\n',
    "красный куб\r\nсиний шар",
    "一只红色的猫坐在沙发上, 一\n",
    "naïve “quotes”, 🟥 cube",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_every_encoding_says_the_same(text, encoding):
    assert decode_text(text.encode(encoding), "a file") == text


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("ein grüner".encode("latin-1"), "byte 6 is 0xfc"),
        (b"\xef\xbb\xbfgr\xfcn", "byte 5 is 0xfc"),
        (b"a red\0 cube, and more of it", "byte 5 is a zero byte"),
        (b"\xff\xfea\0b", "byte 4 is 0x62"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0@", "byte 0 is 0x89"),
    ],
)
def test_what_is_no_text_is_told_with_its_byte(data, place):
    with pytest.raises(ValueError, match=f"^f.txt is no text in UTF-8 or UTF-16: {place}.*Save it as UTF-8$"):
        decode_text(data, "f.txt")


def test_a_mark_decides_and_is_no_text():
    assert encoding_of(b"\xfe\xff\0a") == ("utf-16-be", 2)
    assert encoding_of(b"\xff\xfe\0\0a\0\0\0") == ("utf-32-le", 4)
    assert encoding_of(b"") == ("utf-8", 0)


def test_only_two_things_end_a_line():
    kept = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    assert split_lines(f"{kept}\r\n\n{kept}\n") == [kept, "", kept]
    assert split_lines("") == [] and split_lines("a\n\n") == ["a", ""] and split_lines("a") == ["a"]


def test_a_wrong_byte_costs_its_line_only():
    good, bad, last = lines_or_errors(b"\xef\xbb\xbfa\r\nb\xff\nc\n", "f.txt")
    assert (good, last) == ("a", "c") and "f.txt" in str(bad) and "byte 7 is 0xff" in str(bad)
    assert lines_or_errors("a\nb".encode("utf-16"), "f.txt") == ["a", "b"]


STRANGE = "a red cube\u2028on a wooden floor,\x85 two\x0clines"


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_every_reader_of_text(tmp_path, encoding):
    """Lists of prompts of all kinds, recipes, metadata and JSON."""
    (tmp_path / "prompts.txt").write_bytes(f"{STRANGE}\r\n\r\na cone\r\n".encode(encoding))
    assert _lines(tmp_path / "prompts.txt", "prompt") == [STRANGE, "a cone"]
    assert SAEData(prompts_file=str(tmp_path / "prompts.txt"), held_out=1).all_prompts(0) == [STRANGE, "a cone"]
    assert [job.request.prompt for job in planned(tmp_path / "prompts.txt")] == [STRANGE, "a cone"]
    asked = json.dumps({"prompt": STRANGE, "name": "one"}, ensure_ascii=False)
    for name, text in (("asked.jsonl", f"{asked}\r\n{asked}"), ("array.json", f"[\n{asked},\n{asked}]")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        found = [(job.request.prompt, job.file.name) for job in planned(tmp_path / name)]
        assert found == [(STRANGE, "one.png")] * 2
    (tmp_path / "recipe.yaml").write_bytes(
        yaml.safe_dump({"run": {"folder": "grün", "steps": 1, "batch_size": 1}}).encode(encoding)
    )
    assert load_recipe(tmp_path / "recipe.yaml").run.folder == "grün"
    assert parse_json(asked.encode(encoding), "x")["prompt"] == STRANGE
    (tmp_path / "data").mkdir()
    image(0).save(tmp_path / "data" / "0.png")
    line = json.dumps({"file_name": "0.png", "text": STRANGE}, ensure_ascii=False)
    (tmp_path / "data" / "metadata.jsonl").write_bytes(f"{line}\r\n".encode(encoding))
    rows = open_rows(tmp_path / "data")
    assert [row.captions for row in rows.rows] == [(STRANGE,)] and not rows.problems


def test_what_is_piped_in(tmp_path, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a cube\na cone".encode("utf-16"))))
    assert [job.request.prompt for job in planned("-")] == ["a cube", "a cone"]


def test_a_prompt_may_begin_with_a_bracket_and_an_array_must_be_whole(tmp_path):
    (tmp_path / "p.txt").write_text("[photo] a red cube\n")
    assert [job.request.prompt for job in planned(tmp_path / "p.txt")] == ["[photo] a red cube"]
    (tmp_path / "p.txt").write_text('[{"prompt": "a"},\n')
    with pytest.raises(ValueError, match="is damaged, expected JSON"):
        Plan().read(tmp_path / "p.txt", Request())
    (tmp_path / "p.txt").write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(ValueError, match="entry 2: the entry must hold an object, got int"):
        Plan().read(tmp_path / "p.txt", Request())
