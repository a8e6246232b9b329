import json
import re
import shutil
import tarfile

import pytest
import torch
from tiny_images import image, write_folder

from imgdit.data.convert import convert
from imgdit.data.rows import Columns, Problem
from imgdit.data.sources import open_rows


def lines(folder, *rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        image(0).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def whole(tmp_path):
    """Rows with everything that a row may have."""
    folder = tmp_path / "whole"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "depth.png", "other.png")):
        image(i).save(folder / name)
    cameras = torch.eye(4).expand(2, 4, 4).tolist()
    rows = (
        {"file_name": "a.png", "text": ["a red cube", "a cube"], "depth_file_name": "depth.png"},
        {"file_name": "b.jpg", "frames_file_names": ["other.png"], "cameras": cameras, "focal_length": 1.2},
    )
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def content(rows):
    return [
        (
            row.image.read(),
            row.captions,
            {name: blob.read() for name, blob in row.conditions.items()},
            [frame.read() for frame in row.frames],
            None if row.cameras is None else row.cameras.tolist(),
            row.focal_length,
        )
        for row in rows.rows
    ]


def test_rows_of_a_folder(whole):
    rows = open_rows(whole)
    first, second = rows.rows
    assert (first.name, first.captions, list(first.conditions)) == ("a.png", ("a red cube", "a cube"), ["depth"])
    assert second.captions == () and second.cameras.shape == (2, 4, 4) and second.focal_length == 1.2
    assert [frame.path.name for frame in second.frames] == ["other.png"]


def test_folder_to_shards_and_back(whole, tmp_path):
    convert(open_rows(whole), tmp_path / "shards", shards=True, shard_size=100)
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == ["000000.tar", "000001.tar"]
    expected = content(open_rows(whole))
    assert content(open_rows(tmp_path / "shards")) == expected
    assert content(open_rows(f"{tmp_path}/shards/{{000000..000001}}.tar")) == expected
    convert(open_rows(tmp_path / "shards"), tmp_path / "folder", shards=False)
    assert content(open_rows(tmp_path / "folder")) == expected
    with pytest.raises(ValueError, match="is not empty; choose a new folder"):
        convert(open_rows(whole), tmp_path / "folder", shards=False)


def test_webdataset_reads_the_shards(whole, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    convert(open_rows(whole), tmp_path / "shards", shards=True)
    found = list(webdataset.WebDataset(str(tmp_path / "shards" / "000000.tar"), shardshuffle=False))
    assert [sorted(key for key in row if key[0] != "_") for row in found] == [
        ["depth.png", "json", "png"],
        ["frames.0.png", "jpg", "json"],
    ]
    assert json.loads(found[0]["json"])["text"] == ["a red cube", "a cube"]


def test_the_datasets_library_reads_folders_and_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_folder(tmp_path / "folder", 3, conditions=True)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "folder"), cache_dir=str(tmp_path / "hf"))
    loaded["train"].save_to_disk(tmp_path / "saved")
    rows = open_rows(tmp_path / "saved")
    expected = content(open_rows(tmp_path / "folder"))
    assert sorted(content(rows), key=str) == sorted(expected, key=str)
    renamed = loaded["train"].rename_column("text", "caption")
    renamed.save_to_disk(tmp_path / "renamed")
    with pytest.raises(ValueError, match="unknown column 'caption'"):
        open_rows(tmp_path / "renamed")
    rows = open_rows(tmp_path / "renamed", Columns({"text": "caption"}))
    assert {caption for row in rows.rows for caption in row.captions} == {"a red cube", "a green cube", "a blue cube"}
    assert len(open_rows(tmp_path / "renamed", Columns(ignored=("caption", "grey"))).rows[0].conditions) == 0


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"text": 3}, "caption", "must be a caption or a list of them, got 3"),
        ({"text": ["a", None]}, "caption", r"got \['a', None\]"),
        ({"text": " "}, "caption", "text is empty"),
        ({"depth_file_name": "no.png"}, "missing", r"metadata.jsonl:1 names 'no.png', which is not in"),
        ({"cameras": [[1]]}, "cameras", r"must be a 4x4 matrix.*got shape \(1, 1\)"),
        ({"focal_length": -1}, "cameras", "must be positive, in image widths, got -1"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, kind, message):
    rows = open_rows(lines(tmp_path / "data", {"file_name": "a.png", **row}))
    assert rows.rows == [] and rows.problems[0].kind == kind
    assert re.search(message, rows.problems[0].message)


def test_unknown_columns_are_named(tmp_path):
    folder = lines(tmp_path / "data", {"file_name": "a.png", "dpeth_file_name": "a.png"})
    with pytest.raises(ValueError, match=r"unknown column 'dpeth_file_name'; did you mean 'depth_file_name'"):
        open_rows(folder)
    assert len(open_rows(folder, Columns(ignored=("dpeth_file_name",))).rows) == 1
    with pytest.raises(ValueError, match=r"has no column 'captoin'"):
        open_rows(folder, Columns({"text": "captoin"}, ("dpeth_file_name",)))
    with pytest.raises(ValueError, match="there is no data at"):
        open_rows(tmp_path / "nowhere")


def test_keys_that_come_twice(tmp_path):
    folder = lines(tmp_path / "data", {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"})
    rows = open_rows(folder)
    assert rows.rows[0].captions == ("one",)
    assert rows.problems == [Problem("a.png", "duplicate", "a.png is there twice; the first one counts")]
    shards = tmp_path / "shards"
    convert(open_rows(folder), shards, shards=True, skip_broken=True)
    shutil.copy(shards / "000000.tar", shards / "000001.tar")
    assert [problem.kind for problem in open_rows(shards).problems] == ["duplicate"]


@pytest.mark.parametrize(("lost", "whole"), [("member", 1), ("header", 1), ("end mark", 2)])
def test_shards_that_end_early(tmp_path, lost, whole):
    """The last row that is there counts as lost: nobody knows what else it had."""
    write_folder(tmp_path / "folder", 3)
    shard = tmp_path / "shards" / "000000.tar"
    convert(open_rows(tmp_path / "folder"), tmp_path / "shards", shards=True)
    last = open_rows(tmp_path / "shards").rows[-1].image
    end = {"member": last.offset + 10, "end mark": last.offset + 512, "header": last.offset - 300}[lost]
    shard.write_bytes(shard.read_bytes()[:end])
    rows = open_rows(tmp_path / "shards")
    assert [row.name for row in rows.rows] == [f"{n:08d}" for n in range(whole)]
    (problem,) = rows.problems
    assert problem.kind == "shard" and f"ends early, after the row '{whole - 1:08d}'" in problem.message


def test_shards_with_unknown_members(whole, tmp_path):
    convert(open_rows(whole), tmp_path / "shards", shards=True)
    with tarfile.open(tmp_path / "shards" / "000000.tar", "a") as tar:
        tar.add(whole / "a.png", "00000009.detph.png")
        tar.add(whole / "a.png", "00000009.png")
    with pytest.raises(ValueError, match=r"unknown condition 'detph'; did you mean 'depth'"):
        open_rows(tmp_path / "shards")
    assert len(open_rows(tmp_path / "shards", Columns(ignored=("detph",))).rows) == 3


def test_a_disk_that_fills_leaves_whole_shards(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", 6)
    added = []

    def full(self, member, content=None):
        added.append(member.name)
        if len(added) > 5:
            raise OSError(28, "No space left on device")
        return plain(self, member, content)

    plain = tarfile.TarFile.addfile
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ValueError, match=r"No space left on device.*The 2 shards before it are complete"):
        convert(open_rows(tmp_path / "folder"), tmp_path / "shards", shards=True, shard_size=100)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["000000.tar", "000001.tar"]
    assert len(open_rows(tmp_path / "shards").rows) == 2
