"""Training on people's own images."""

import json
import logging
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import rope_config, tiny_pipeline, tiny_vae
from tiny_images import DEFECTS, ODDITIES, image, write_folder

from imgdit.apps.chores.training_plan import training_plan
from imgdit.data.convert import convert
from imgdit.data.sources import open_rows
from imgdit.io.checkpoints import CheckpointError
from imgdit.scenes.geometry import camera_to_world
from imgdit.scenes.world import Scene
from imgdit.training import load_recipe, train
from imgdit.training.build import build_model
from imgdit.training.recipe import parse_recipe
from imgdit.training.sources import training_batches
from imgdit.training.user_images import UserImages, UserImagesSettings
from imgdit.training.user_images.encoder import Encoder

BASE = {"base": 16, "samples": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny pipeline: 4 pixels per token."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    write_folder(tmp_path / "data", 10)
    return str(tmp_path / "data")


def recipe(folder, data, model, **arguments):
    values = {
        "run": {"folder": str(folder), "steps": 4, "batch_size": 1, "log_every": 1, "tracker": "none"},
        "model": {"arguments": rope_config(num_layers=1, num_single_layers=1)},
        "data": {"name": "user_images", "arguments": {"path": data, "model": model, **BASE, **arguments}},
    }
    return parse_recipe(values, "own")


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_cached_and_uncached_training_are_the_same(tmp_path, data, model):
    for name, cache in (("cached", str(tmp_path / "cache")), ("again", str(tmp_path / "cache")), ("without", None)):
        made = recipe(tmp_path / name, data, model, cache=cache, condition="grey", preprocessor="grey")
        batches, _ = training_batches(made)
        train(made, model=build_model(made), batches=batches)
    assert len(losses(tmp_path / "cached")) == 4
    assert losses(tmp_path / "cached") == losses(tmp_path / "again") == losses(tmp_path / "without")


def test_runs_and_recipes_of_version_0_1_go_on(tmp_path, data, model, caplog):
    """They call the data own_pictures."""
    checkpoint = resumed(tmp_path / "run", data, model, stop_at=1).checkpoint
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["recipe"]["data"]["name"] = "own_pictures"
    path.write_text(json.dumps(state))
    assert resumed(tmp_path / "run", data, model).step == 3
    assert not [record for record in caplog.records if "data.name" in record.getMessage()]
    with pytest.warns(DeprecationWarning, match="data.name: 'own_pictures' is now 'user_images'"):
        again = parse_recipe(state["recipe"], "old")
    assert again.data.name == "user_images"


def test_the_packaged_recipe_trains_an_adapter(tmp_path, data, model):
    made = load_recipe("own/condition_lora")
    arguments = {**made.data.arguments, "path": data, "model": model, "cache": str(tmp_path / "cache"), **BASE}
    arguments |= {"condition": "blur", "preprocessor": "blur", "preprocessor_options": {"radius": 1.0}}
    transformer = {"pretrained": model, "subfolder": "transformer"}
    made = made.replace(
        run={"folder": str(tmp_path / "run"), "mixed_precision": "no", "tracker": "none", "log_every": 1},
        model=transformer,
        data={"arguments": arguments},
    )
    network = build_model(made)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    result = train(made, model=network, batches=training_batches(made)[0], stop_at=2)
    assert result.step == 2 and result.metrics["loss"] > 0
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)


def test_batches_fit_their_layout(tmp_path, data, model):
    dataset = UserImages(
        UserImagesSettings(data, model, str(tmp_path / "cache"), **BASE, condition="grey", preprocessor="grey")
    )
    sizes = set()
    for i in range(dataset.index.batches_per_epoch):
        batch = dataset[i]
        image, condition = batch.layout.frames
        assert image.size == condition.size and condition.index == 1.0
        assert batch.tokens.shape == (len(dataset.index.rows_of(i)), batch.layout.image_length, 16)
        assert torch.isfinite(batch.tokens).all() and batch.text.mask.any(1).all()
        sizes.add(image.size)
    assert len(sizes) == 2  # the folder's images lie and stand
    adapter = UserImages(
        UserImagesSettings(
            data,
            model,
            str(tmp_path / "cache"),
            **BASE,
            condition="grey",
            preprocessor="grey",
            mode="joint",
            position="subject",
        )
    )
    batch = adapter[0]
    held = batch.layout.frames[1]
    assert (held.sigma, held.adapter, held.sees) == (0.0, "trained", "joint") and held.offset[1] == -held.size[1]
    n = held.length
    assert not batch.empty_tokens[:n].any() and batch.empty_tokens[n:].any()


def test_a_sample_is_the_same_wherever_it_is_made(tmp_path, data, model):
    cached = UserImages(UserImagesSettings(data, model, str(tmp_path / "cache"), **BASE))
    plain = UserImages(UserImagesSettings(data, model, None, **BASE))
    there = pickle.loads(pickle.dumps(cached))[7]
    for other in (there, plain[7]):
        assert torch.equal(cached[7].tokens, other.tokens)
        assert torch.equal(cached[7].text.embeddings, other.text.embeddings)


def test_captions_are_drawn_and_images_without_one_have_the_empty_text(tmp_path, model):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        image(i, (16, 16)).save(folder / f"{i}.png")
    rows = [{"file_name": "0.png", "text": ["a red cube", "a blue sphere", "the cone"]}, {"file_name": "1.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    dataset = UserImages(UserImagesSettings(str(folder), model, None, base=16, samples=1))
    said = {0: set(), 1: set()}
    for i in range(40):
        (row,) = dataset.index.rows_of(i)
        said[row].add(dataset[i].text.embeddings.sum().item())
    assert len(said[0]) == 3 and len(said[1]) == 1


def test_views_with_cameras(tmp_path):
    torch.manual_seed(0)
    pipe = tiny_pipeline(rope_config(in_channels=64))
    pipe.vae = type(tiny_vae())(**{**tiny_vae().config, "latent_channels": 16})
    pipe.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        image(i, (16, 16)).save(folder / f"{i}.png")
    scene = Scene.sample(0)
    poses = camera_to_world([scene.camera, scene.camera.orbit(azimuth=20.0)])
    row = {"file_name": "0.png", "frames_file_names": ["1.png"], "cameras": poses.tolist()}
    still = {**row, "cameras": poses[:1].expand(2, 4, 4).tolist()}
    apart = [torch.eye(4), torch.eye(4)]
    apart[1][0, 3] = 1.0  # parallel axes, which meet nowhere
    lines = [row, still | {"file_name": "1.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = {"base": 16, "samples": 1, "ratio": 1.0, "views": 2, "cameras": True}
    batch = UserImages(UserImagesSettings(str(folder), str(tmp_path / "model"), None, **options))[0]
    assert [frame.is_clean for frame in batch.layout.frames] == [False, True, False, False]
    assert batch.tokens.shape == (1, 64, 64)
    lines[1]["cameras"] = [pose.tolist() for pose in apart]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=r"1 of 2 rows .* optical axes are parallel"):
        UserImages(UserImagesSettings(str(folder), str(tmp_path / "model"), None, **options))
    with pytest.raises(ValueError, match=r"2 frames\), 100.0% .* 3 views were asked for; it has 2"):
        UserImages(UserImagesSettings(str(folder), str(tmp_path / "model"), None, **{**options, "views": 3}))


def test_every_row_once_per_epoch_through_a_kill(tmp_path, model, caplog):
    """Defects of every kind are left out; the rest comes once per epoch on one and on two ranks, also where a run
    went on in the middle of an epoch."""
    count, each = 160, 8  # 5 % of each kind
    write_folder(tmp_path / "data", count, dict.fromkeys((*DEFECTS, *ODDITIES), each))
    made = recipe(tmp_path / "run", str(tmp_path / "data"), model, cache=None, samples=3, max_broken=0.5)
    with caplog.at_level(logging.WARNING):
        batches, _ = training_batches(made)
    dataset = batches.dataset
    assert f"{each * len(DEFECTS)} of {count} rows cannot be used" in caplog.text
    assert all(f"{each} {kind}" in caplog.text for kind in DEFECTS)
    usable = count - each * len(DEFECTS)
    assert len(dataset.index.images) == usable
    epoch = dataset.index.batches_per_epoch

    def rows(start, count, rank=0, ranks=1):
        stream = batches.stream(start, 1, rank, ranks)
        return [row for _ in range(count) for row in dataset.index.rows_of(next(stream).indices[0])]

    whole, second = rows(0, epoch), rows(epoch, epoch)
    assert sorted(whole) == sorted(second) == list(range(usable)) and second != whole
    stopped = epoch // 4 * 2
    assert rows(0, stopped) + rows(stopped, epoch - stopped) == whole
    assert Counter(rows(0, epoch, 0, 2) + rows(0, epoch, 1, 2)) == Counter([*range(usable)] * 2)
    rest = [rows(stopped, epoch - stopped // 2, rank, 2) for rank in range(2)]  # one rank before, two after
    assert Counter(whole[: len(rows(0, stopped))] + rest[0] + rest[1]) == Counter([*range(usable)] * 2)


def test_held_out_rows_are_never_trained_on(tmp_path, model):
    write_folder(tmp_path / "data", 40)
    options = {**BASE, "cache": str(tmp_path / "cache"), "held_out": 0.3}
    kinds = [
        UserImages(UserImagesSettings(str(tmp_path / "data"), model, split=split, **options))
        for split in ("train", "heldout")
    ]
    names = [{p.row.name for p in one.index.images} for one in kinds]
    assert names[0] | names[1] == {f"{i:05d}.png" for i in range(40)} and not names[0] & names[1]
    assert 3 < len(names[1]) < 22


def test_what_changed_is_computed_again(tmp_path, data, model, monkeypatch):
    made = []
    plain = Encoder.latents
    monkeypatch.setattr(Encoder, "latents", lambda self, image: (made.append(1), plain(self, image))[1])
    options = {**BASE, "cache": str(tmp_path / "cache"), "condition": "blur", "preprocessor": "blur"}
    UserImages(UserImagesSettings(data, model, **options))
    assert len(made) == 20
    UserImages(UserImagesSettings(data, model, **options))
    assert len(made) == 20
    UserImages(UserImagesSettings(data, model, **options, preprocessor_options={"radius": 2.0}))
    assert len(made) == 30  # the images are the same
    image(99).save(f"{data}/00003.png")
    UserImages(UserImagesSettings(data, model, **options))
    assert len(made) == 32


def test_a_cache_of_another_model_is_refused(tmp_path, data, model):
    UserImages(UserImagesSettings(data, model, str(tmp_path / "cache"), **BASE))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    pipe = tiny_pipeline()
    pipe.vae = tiny_vae(seed=5)
    pipe.vae.save_pretrained(other / "vae")
    with pytest.raises(ValueError, match=r"latents.index.json says .* but the model is .*; choose another folder"):
        UserImages(UserImagesSettings(data, str(other), str(tmp_path / "cache"), **BASE))
    assert (
        len(UserImages(UserImagesSettings(data, model, str(tmp_path / "cache"), **BASE)).row_encoder.caches.latents)
        == 10
    )


def test_a_step_takes_whole_batches(tmp_path, data, model):
    made = recipe(tmp_path, data, model, cache=None).replace(run={"batch_size": 2})
    with pytest.raises(ValueError, match=r"asks for 2 at once: set run.batch_size to run.accumulation times"):
        train(made, model=build_model(made), batches=training_batches(made)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 11}, r"has 10 usable rows in the split 'train', a batch takes 11; lower data.arguments.samples"),
        ({"condition": "depth"}, r"row 0, 00000.png, has no condition 'depth' and no preprocessor is named"),
        ({"condition": "dpeth"}, "unknown condition 'dpeth'; did you mean 'depth'"),
        ({"condition": "grey", "preprocessor": "gray"}, "unknown preprocessor 'gray'; did you mean 'grey'"),
        ({"condition": "grey", "preprocessor": "imgdit.images.preprocess:HOLE"}, "must name a function .*HOLE"),
        (
            {"condition": "blur", "preprocessor": "blur", "preprocessor_options": {"radios": 1}},
            "unknown key 'radios'; did you mean 'radius'",
        ),
        ({"preprocessor": "grey"}, "name the condition too"),
        ({"cameras": True}, "at least two square views"),
        ({"path": ""}, "path names the data"),
        ({"min_side": 17}, r"10 of 10 rows cannot be used \(10 too small\), 100.0% where max_broken allows 5.0%"),
        ({"split": "heldout"}, "0 usable rows in the split 'heldout'"),
        ({"model": "no/such-model"}, "neither a pipeline's folder nor on the Hub"),
    ],
)
def test_mistakes_are_named(data, model, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        UserImages(UserImagesSettings(**{"path": data, "model": model, "cache": None, **BASE, **arguments}))


def test_a_shard_that_ends_early_is_no_broken_row(tmp_path, model):
    write_folder(tmp_path / "data", 4)
    convert(open_rows(tmp_path / "data"), tmp_path / "shards", shards=True)
    assert len(UserImages(UserImagesSettings(str(tmp_path / "shards"), model, None, **BASE)).index.images) == 4
    shard = tmp_path / "shards" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"000000.tar ends early, after the row"):
        UserImages(UserImagesSettings(str(tmp_path / "shards"), model, None, **BASE, max_broken=1.0))


def resumed(folder, data, model, **options):
    made = recipe(folder, data, model, cache=None)
    made = made.replace(run={"steps": 3})
    return train(made, model=build_model(made), batches=training_batches(made)[0], resume=True, **options)


def edit_rows(data, change):
    path = Path(data) / "metadata.jsonl"
    path.write_text(
        "\n".join(json.dumps(row) for row in change([json.loads(x) for x in path.read_text().split("\n")]))
    )


CHANGES = {
    "a row less": (lambda rows: rows[1:], "0 added, 1 gone, 0 changed; 10 rows then, 9 rows now"),
    "another caption": (lambda rows: [{**rows[0], "text": "new"}, *rows[1:]], "0 added, 0 gone, 1 changed; 10 rows"),
    "another name": (lambda rows: [{**rows[0], "file_name": "new.png"}, *rows[1:]], "1 added, 1 gone, 0 changed"),
    "another order": (lambda rows: rows[::-1], "the same 10 rows in another order"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_goes_on_with_other_rows_says_so(tmp_path, data, model, change, caplog):
    resumed(tmp_path / "run", data, model, stop_at=1)
    image(99, (24, 16)).save(Path(data) / "new.png")
    resumed(tmp_path / "run", data, model, stop_at=2)  # the rows are the same
    edit_rows(data, CHANGES[change][0])
    with pytest.raises(ValueError, match=f"was trained on other rows: {CHANGES[change][1]}.*accept_data=True"):
        resumed(tmp_path / "run", data, model)
    caplog.clear()
    assert resumed(tmp_path / "run", data, model, accept_data=True).step == 3
    assert any("going on with other rows" in record.getMessage() for record in caplog.records)
    caplog.clear()
    resumed(tmp_path / "run", data, model)  # the rows that were accepted are the run's own now
    assert not [record for record in caplog.records if "other rows" in record.getMessage()]


def test_another_image_under_the_same_name_is_another_row(tmp_path, data, model):
    resumed(tmp_path / "run", data, model, stop_at=1)
    image(99, (24, 16)).save(Path(data) / "00000.png")
    with pytest.raises(ValueError, match="0 added, 0 gone, 1 changed"):
        resumed(tmp_path / "run", data, model)


def test_checkpoints_that_tell_no_rows_go_on(tmp_path, data, model):
    """Those of earlier versions."""
    checkpoint = resumed(tmp_path / "run", data, model, stop_at=1).checkpoint
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"]["rows.safetensors"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "rows.safetensors").unlink()
    edit_rows(data, lambda rows: rows[1:])
    assert resumed(tmp_path / "run", data, model).step == 3


def test_damaged_rows_of_a_checkpoint_are_told(tmp_path, data, model):
    checkpoint = resumed(tmp_path / "run", data, model, stop_at=1).checkpoint
    path = checkpoint / "rows.safetensors"
    size = path.stat().st_size
    save_file({"rows": torch.zeros(2, dtype=torch.int64)}, path)
    state = checkpoint / "state.json"
    state.write_text(
        state.read_text().replace(f'"rows.safetensors": {size}', f'"rows.safetensors": {path.stat().st_size}')
    )
    with pytest.raises(CheckpointError, match=r"rows.safetensors is damaged"):
        resumed(tmp_path / "run", data, model)


def test_repeats_fill_an_epoch(tmp_path, model):
    folder = tmp_path / "data"
    for name in ("3_red/a.png", "1_blue/b.png"):
        (folder / name).parent.mkdir(parents=True)
        image(len(name), (16, 16)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    dataset = UserImages(UserImagesSettings(str(folder), model, None, base=16, samples=2))
    for epoch in range(2):
        rows = [row for i in range(2) for row in dataset.index.rows_of(2 * epoch + i)]
        assert Counter(dataset.index.images[row].row.name for row in rows) == {"3_red/a.png": 3, "1_blue/b.png": 1}


def test_what_is_left_alone_and_bare_is_told(tmp_path, model, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b", "c"):
        image(1, (16, 16)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a wall")
    (folder / "._a.png").write_bytes(b"\0")
    UserImages(UserImagesSettings(str(folder), model, None, base=16, samples=2))
    said = [record.getMessage() for record in caplog.records]
    assert any("1 file (._a.png) left by systems" in one for one in said)
    assert any(
        "2 images (b.png, c.png) of 3 have no caption and are trained with the empty text" in one for one in said
    )


def test_a_package_that_is_not_there_is_told_before_images_are_read(tmp_path, data, model, monkeypatch):
    """And a plan of the memory does without."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    (Path(data) / "00000.png").write_bytes(b"no image")
    options = {"condition": "canny", "preprocessor": "canny"}
    with pytest.raises(ImportError, match=r"edges of photos need OpenCV"):
        UserImages(UserImagesSettings(data, model, None, **BASE, **options))
    made = load_recipe("own/condition_lora")
    arguments = {**made.data.arguments, **BASE, **options, "path": data, "model": model, "max_broken": 0.2}
    arguments["cache"] = str(tmp_path / "cache")
    made = made.replace(model={"pretrained": model}, data={"arguments": arguments})
    assert any("fits into" in line for line in training_plan(made, gigabytes=24))


def test_metrics_count_samples_and_not_batches(tmp_path, data, model):
    """Ten rows of two shapes in batches of up to four, through a stop."""
    made = recipe(tmp_path / "run", data, model, cache=None, samples=4)
    batches, _ = training_batches(made)
    sizes = [len(batches.dataset.index.rows_of(i)) for i in range(4)]
    assert sum(sizes) == 10 and min(sizes) < 4
    network = build_model(made)
    train(made, model=network, batches=batches, stop_at=3)
    train(made, model=network, batches=batches, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [sum(sizes[: i + 1]) for i in range(4)]
