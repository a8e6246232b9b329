"""Folders and shards as people have them: captions beside images, stray files, metadata of other programs."""

import io
import json
import os
import re
import tarfile
import unicodedata

import pytest
from tiny_images import image
from typer.testing import CliRunner

from imgdit.apps.cli import app
from imgdit.data.convert import convert
from imgdit.data.linter import check
from imgdit.data.rows import Columns
from imgdit.data.sources import open_rows


def files(folder, names):
    """A folder of files: images by their endings, texts by what stands behind the name."""
    for name, text in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            stream = io.BytesIO()
            image(len(name), (16, 16)).save(stream, "PNG")
            path.write_bytes(stream.getvalue())
        else:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def captions(rows):
    return {row.name: row.captions for row in rows.rows}


def told(rows):
    return {f"{note.kind}: {note.message}" for note in rows.notes}


def test_captions_beside_images(tmp_path):
    """Both endings, sub-folders, letter case, dots in names; the whole name may come before .txt as well."""
    folder = files(
        tmp_path / "set",
        {
            "a.png": None, "a.txt": "a red wall\r\n", "deep/er/b.JPG": None, "deep/er/b.caption": "a green wall",
            "C.PNG": None, "c.TXT": "a blue wall", "d.1.png": None, "d.1.txt": "one", "d.2.png": None,
            "e.png": None, "e.png.txt": "a whole name",
        },
    )  # fmt: skip
    assert captions(open_rows(folder)) == {
        "C.PNG": ("a blue wall",),
        "a.png": ("a red wall",),
        "d.1.png": ("one",),
        "d.2.png": (),
        "deep/er/b.JPG": ("a green wall",),
        "e.png": ("a whole name",),
    }
    report = check(open_rows(folder), min_side=8, workers=1)
    assert [(w.name, w.kind) for w in report.warnings if w.kind == "no caption"] == [("d.2.png", "no caption")]


def test_two_captions_and_texts_of_nothing_are_told(tmp_path):
    folder = files(
        tmp_path / "set",
        {"a.png": None, "a.txt": "one", "a.caption": "other", "b.png": None, "b.txt": " \n", "readme.txt": "hello"},
    )
    rows = open_rows(folder)
    assert captions(rows) == {"a.png": ("one",)}
    assert [(p.name, p.kind, "b.txt is empty" in p.message) for p in rows.problems] == [("b.png", "caption", True)]
    assert told(rows) == {
        "two captions: a.txt counts, a.caption says something else",
        "left alone: 1 text (readme.txt) beside no image of that name",
    }


def test_a_caption_of_wrong_bytes_is_told_with_the_file(tmp_path):
    folder = files(tmp_path / "set", {"a.png": None, "a.txt": "grün".encode("latin-1"), "b.png": None, "b.txt": "b"})
    rows = open_rows(folder)
    assert captions(rows) == {"b.png": ("b",)}
    assert rows.problems[0].kind == "caption" and "a.txt is no text in UTF-8" in rows.problems[0].message


def test_metadata_beats_the_file_beside_and_takes_it_where_it_is_silent(tmp_path):
    lines = [{"file_name": "a.png", "text": "of metadata"}, {"file_name": "b.png"}]
    names = {"a.png": None, "a.txt": "beside", "b.png": None, "b.txt": "beside", "c.png": None}
    folder = files(tmp_path / "set", {**names, "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    rows = open_rows(folder)
    assert captions(rows) == {"a.png": ("of metadata",), "b.png": ("beside",)}
    assert told(rows) == {
        "two captions: metadata.jsonl:1 counts, a.txt says something else",
        "left alone: 1 image (c.png) that no line of metadata.jsonl names",
    }


def test_repeats_of_folders_in_rows_and_epochs(tmp_path):
    names = {"4_cat/a.png": None, "4_cat/b.png": None, "1_dog/c.png": None, "2024_holiday/d.png": None, "e.png": None}
    folder = files(tmp_path / "9_set", {**names, "0_out/x.png": None})
    rows = open_rows(folder)
    assert {row.name: row.repeats for row in rows.rows} == {
        "1_dog/c.png": 1, "2024_holiday/d.png": 1, "4_cat/a.png": 4, "4_cat/b.png": 4, "e.png": 1,
    }  # fmt: skip
    assert {(note.name, note.kind, note.message) for note in rows.notes} == {
        ("4_cat", "repeats", "its images count 4 times in an epoch"),
        ("0_out", "repeats", "its images count 0 times in an epoch"),
    }
    for shards in (True, False):
        convert(rows, tmp_path / f"{shards}", shards=shards)
        assert sorted(row.repeats for row in open_rows(tmp_path / f"{shards}").rows) == [1, 1, 1, 4, 4]


STRANGE = ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/a.png", ".ipynb_checkpoints/a-checkpoint.png", "b.png.part",
           "c.png.crdownload", "d.png.incomplete", "in/._a.txt", "desktop.ini")  # fmt: skip


def test_strangers_in_a_folder_stop_nothing(tmp_path):
    folder = files(tmp_path / "set", {"a.png": None, "a.txt": "a wall", **dict.fromkeys(STRANGE, b"\0\5\x16\7")})
    rows = open_rows(folder)
    assert captions(rows) == {"a.png": ("a wall",)} and not rows.problems
    (note,) = rows.notes
    assert note.kind == "left alone" and note.message.startswith("10 files (.DS_Store, ._a.png, .ipynb_checkpoints/")


def tar(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as made:
        for name, data in members:
            if data is None:
                stream = io.BytesIO()
                image(len(name), (16, 16)).save(stream, "PNG")
                data = stream.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return path


def test_strangers_in_and_among_shards_stop_nothing(tmp_path):
    members = [("a.png", None), *((name, b"\0\5\x16\7") for name in STRANGE), ("a.txt", b"a wall")]
    tar(tmp_path / "tars" / "0.tar", members)
    for name in ("._0.tar", "1.tar.part", ".DS_Store"):
        (tmp_path / "tars" / name).write_bytes(b"\0\5\x16\7")
    rows = open_rows(tmp_path / "tars")
    assert captions(rows) == {"a": ("a wall",)} and not rows.problems
    assert [note.message.partition(" (")[0] for note in rows.notes] == [f"{len(STRANGE) + 3} files"]


def test_shards_with_two_rows_under_one_key(tmp_path):
    path = tar(
        tmp_path / "0.tar", [("0.png", None), ("0.txt", b"x"), ("0.png", None), ("0.txt", b"y"), ("1.png", None)]
    )
    rows = open_rows(path)
    assert [row.name for row in rows.rows] == ["1"] and [p.kind for p in rows.problems] == ["duplicate"]
    assert "several rows have the key '0'" in rows.problems[0].message
    rows = open_rows(tar(tmp_path / "1.tar", [("0.png", None), ("0.jpg", None), ("1.png", None)]))
    assert [row.name for row in rows.rows] == ["1"] and "one has several images (0.png, 0.jpg)" in rows.problems[
        0
    ].message


def test_texts_of_shards(tmp_path):
    """Any encoding, .caption, and JSON before both; accents of keys may be composed or not."""
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    members = [("0.png", None), ("0.caption", "a wäll\r\n".encode("utf-16")), (f"{composed}.png", None)]
    members += [
        (f"{decomposed}.txt", b"an accent"),
        ("1.png", None),
        ("1.txt", b"txt"),
        ("1.json", b'{"text": "json"}'),
    ]
    rows = open_rows(tar(tmp_path / "0.tar", members))
    assert captions(rows) == {"0": ("a wäll",), composed: ("an accent",), "1": ("json",)}
    assert [(note.name, note.kind) for note in rows.notes] == [("1", "two captions")]
    rows = open_rows(tar(tmp_path / "1.tar", [("0.png", None), ("0.txt", b"gr\xfcn")]))
    assert "0.txt is no text in UTF-8" in rows.problems[0].message


def test_everything_unknown_in_a_shard_is_named_at_once(tmp_path):
    members = [("0.png", None), ("0.json", b'{"url": 1, "captoin": 2}'), ("1.png", None), ("1.json", b'{"sha256": 1}')]
    path = tar(tmp_path / "0.tar", [*members, ("1.detph.png", None), ("1.cls", b"3")])
    with pytest.raises(ValueError) as error:
        open_rows(path)
    ignored = re.search(r"ignore: \[(.*)\]$", str(error.value))[1]
    assert ignored == "'url', 'captoin', 'sha256', 'cls', 'detph'"
    assert "unknown condition 'detph'; did you mean 'depth'?" in str(error.value)
    names = tuple(name.strip("'") for name in ignored.split(", "))
    assert len(open_rows(path, Columns(ignored=names)).rows) == 2


def metadata(folder, name, text):
    return files(folder, {"a.png": None, "b.png": None, name: text})


ARRAY = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two, and; more", "focal_length": 1.5}]
FORMS = {
    "array.jsonl": ("metadata.jsonl", json.dumps(ARRAY)),
    "array over lines.jsonl": ("metadata.jsonl", "\n" + json.dumps(ARRAY, indent=2)),
    "array.json": ("metadata.json", json.dumps(ARRAY)),
    "lines with a blank one": ("Metadata.JSONL", "\n\n".join(map(json.dumps, ARRAY)) + "\n"),
    "commas": ("metadata.csv", 'file_name,text,focal_length\na.png,one,\nb.png,"two, and; more",1.5\n'),
    "semicolons": ("metadata.csv", 'file_name;text;focal_length\r\na.png;one;\r\n\r\nb.png;"two, and; more";1,5\r\n'),
    "tabs": ("metadata.csv", "file_name\ttext\tfocal_length\na.png\tone\nb.png\ttwo, and; more\t1.5"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_forms_of_metadata(tmp_path, form, encoding):
    name, text = form
    rows = open_rows(metadata(tmp_path / "set", name, text.encode(encoding)))
    assert captions(rows) == {"a.png": ("one",), "b.png": ("two, and; more",)} and not rows.problems
    assert [row.focal_length for row in rows.rows] == [None, 1.5]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            '{"a.png": {"text": "x"},\n"b.png": {}}',
            "holds one JSON dict; expected a line for each image",
        ),
        ("metadata.csv", "image,caption\na.png,x", "its first line has no column 'file_name', got 'image,caption'"),
        ("metadata.jsonl", '[{"file_name": "a.png"},\n', "is damaged, expected JSON"),
    ],
)
def test_metadata_that_is_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_rows(metadata(tmp_path / "set", name, text))


def test_lines_of_csv_that_are_no_rows(tmp_path):
    rows = open_rows(metadata(tmp_path / "set", "metadata.csv", "file_name,text\na.png,one, two\nb.png,two\n"))
    assert captions(rows) == {"b.png": ("two",)}
    assert [(p.name, p.kind) for p in rows.problems] == [("metadata.csv:2", "metadata")]
    assert "the line has 3 cells under 2 columns" in rows.problems[0].message


def test_metadata_of_sub_folders_and_of_other_programs(tmp_path):
    line = json.dumps({"file_name": "a.png", "text": "inner"})
    names = {"one/a.png": None, "one/metadata.jsonl": line, "two/b.png": None, "two/b.txt": "beside"}
    folder = files(tmp_path / "set", {**names, "metadata.json": '{"made_by": "somebody"}'})
    rows = open_rows(folder)
    assert captions(rows) == {"one/a.png": ("inner",), "two/b.png": ("beside",)}
    assert told(rows) == {"left alone: 1 file (metadata.json) of metadata: one/metadata.jsonl is read"}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "two/b.png"}))
    assert captions(open_rows(folder)) == {"two/b.png": ("beside",)}


def test_names_of_files_that_another_system_wrote(tmp_path):
    """Backslashes, letter case, accents; what can mean two files is told."""
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    names = ["in\\a.png", "IN/B.PNG", composed, "X.png", "Y.PNG", "..\\secret.png", "C:\\secret.png", "\\\\pc\\s.png"]
    lines = "\n".join(json.dumps({"file_name": name}) for name in names)
    images = ("in/a.png", "in/b.png", decomposed, "x.png", "x.PNG", "y.png")
    folder = files(tmp_path / "set", {**dict.fromkeys(images), "metadata.jsonl": lines})
    rows = open_rows(folder)
    assert [row.name for row in rows.rows] == ["in/a.png", "in/b.png", decomposed, "y.png"]
    assert [p.kind for p in rows.problems] == ["missing", "outside", "outside", "outside"]
    assert "can be x.PNG or x.png (names differ in letter case or accents only)" in rows.problems[0].message


def test_splits_in_sub_folders(tmp_path):
    folder = files(tmp_path / "set", {"train/a.png": None, "train/in/b.png": None, "test/c.png": None})
    rows = open_rows(folder)
    assert list(captions(rows)) == ["a.png", "in/b.png"]
    assert told(rows) == {"left alone: the splits test: only train is read"}
    assert list(captions(open_rows(folder, split="test"))) == ["c.png"]
    with pytest.raises(ValueError, match="has no split 'validation'; its sub-folders are test, train"):
        open_rows(folder, split="validation")
    files(folder, {"4_cat/d.png": None})
    assert len(open_rows(folder).rows) == 4


def test_a_contact_sheet_is_no_data(tmp_path):
    folder = files(tmp_path / "set", {"000.png": None, "sheet.png": None})
    rows = open_rows(folder)
    assert list(captions(rows)) == ["000.png"] and rows.notes[0].name == "sheet.png"
    files(folder, {"sheet.txt": "a sheet of paper"})
    assert captions(open_rows(folder))["sheet.png"] == ("a sheet of paper",)


@pytest.mark.parametrize("name", ["pictures", "somebody/pictures", "./pictures", "images-{000..002}.tar", "a.tar"])
def test_what_is_not_there_is_never_looked_for_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is no data at '{re.escape(name)}'.*{re.escape(os.getcwd())}"):
        open_rows(name)


def test_data_sets_of_the_hub_are_named_as_such(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="look like owner/name, got 'images'"):
        open_rows("hub:images")
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        open_rows("hub:somebody/pictures")
    files(tmp_path, {"somebody/pictures/a.png": None})
    with pytest.raises(ValueError, match="there is a folder 'somebody/pictures' here too"):
        open_rows("hub:somebody/pictures")


def test_folders_without_data_say_what_they_hold(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"the folder holds no image, no metadata.jsonl and no .tar file$"):
        open_rows(tmp_path / "set")
    files(tmp_path / "set", {"notes.pdf": "x"})
    with pytest.raises(ValueError, match=r"no .tar file, only notes.pdf$"):
        open_rows(tmp_path / "set")
    with pytest.raises(ValueError, match=r"it is a file and no .tar; name the folder"):
        open_rows(tmp_path / "set" / "notes.pdf")


def test_home_is_found_in_data_recipes_and_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    files(tmp_path / "set", {"a.png": None, "a.txt": "a wall"})
    assert captions(open_rows("~/set")) == {"a.png": ("a wall",)}
    done = CliRunner().invoke(app, ["data", "check", "~/set", "--min-side=8", "--out=~/report"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "check.txt").is_file()


def test_check_by_a_recipe(tmp_path):
    """The recipe's folder, columns and least side; what it needs beyond sound files."""
    line = {"file_name": "a.png", "caption": "x", "score": 1}
    folder = files(tmp_path / "set", {"a.png": None, "metadata.jsonl": json.dumps(line)})
    data = {"path": str(folder), "columns": {"text": "caption"}, "ignore": ["score"], "base": 16, "samples": 2}
    recipe = {
        "run": {"folder": "run", "steps": 1, "batch_size": 1},
        "data": {"name": "user_images", "arguments": data},
    }

    def said(**arguments):
        data.update(arguments)
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        done = CliRunner().invoke(app, ["data", "check", "--recipe", str(tmp_path / "recipe.yaml")])
        return done.exit_code, done.output

    code, text = said()
    assert code == 1 and "1 usable rows, 0 problems" in text and "a batch takes 2 rows" in text
    code, text = said(samples=1)
    assert code == 0 and "needs:" not in text
    code, text = said(condition="depth")
    assert code == 1 and "a.png: no condition: it has no condition 'depth'" in text
    code, text = said(preprocessor="depth")
    assert code == 1 and "1 rows have no 'depth', which is computed: depth of a photo needs a model" in text
    code, text = said(preprocessor="grey", condition="grey", base=64)
    assert code == 1 and "too small: 16x16 pixels; the shorter side must have 32" in text
