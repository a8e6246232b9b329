"""Data of recipes that is made of scenes: `data.name: imgdit.scenes.sources:frames`, and so on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imgdit.scenes.answers import SceneCaptions
from imgdit.scenes.images import SceneImages
from imgdit.scenes.readings import SceneReadings
from imgdit.scenes.texts import SceneTextPairs, SceneTexts
from imgdit.scenes.training_conditions import SceneConditions
from imgdit.scenes.training_frames import SceneFrames
from imgdit.scenes.training_readers import collate_captions, collate_readings
from imgdit.scenes.training_stream import SceneFramesAndStream, SceneStream
from imgdit.scenes.training_texts import SceneFramesAndTexts, SceneImageTexts
from imgdit.scenes.trajectories import SceneTrajectories
from imgdit.training.batches import Images
from imgdit.training.sources import Source, only_batch
from imgdit.training.text_pairs import collate_text_pairs
from imgdit.training.text_rows import collate_text_rows

FRAMES = "imgdit.scenes.sources:frames"
STREAMS = ("imgdit.scenes.sources:stream", "imgdit.scenes.sources:frames_and_stream")
CONDITIONS = "imgdit.scenes.sources:conditions"
TEXTS = "imgdit.scenes.sources:texts"
IMAGE_TEXTS = "imgdit.scenes.sources:image_texts"
TEXT_PAIRS = "imgdit.scenes.sources:text_pairs"
TRAJECTORIES = "imgdit.scenes.sources:trajectories"


def collate_images(samples: Sequence[torch.Tensor]) -> Images:
    """Samples (K, 3, S, S) to one batch of all their images."""
    return Images(torch.cat(list(samples)))


images = Source(SceneImages, collate_images, held_out=16)
captions = Source(SceneCaptions, collate_captions, held_out=512)
texts = Source(SceneTexts, collate_text_rows, held_out=512)
text_pairs = Source(SceneTextPairs, collate_text_pairs, held_out=128)
readings = Source(SceneReadings, collate_readings, held_out=64)
frames = Source(SceneFrames, only_batch, held_out=8, whole_batches=True)
stream = Source(SceneStream, only_batch, held_out=8, whole_batches=True)
frames_and_stream = Source(SceneFramesAndStream, only_batch, held_out=8, whole_batches=True)
image_texts = Source(SceneImageTexts, only_batch, held_out=8, whole_batches=True)
frames_and_texts = Source(SceneFramesAndTexts, only_batch, held_out=8, whole_batches=True)
conditions = Source(SceneConditions, only_batch, held_out=4, whole_batches=True)
trajectories = Source(SceneTrajectories, only_batch, held_out=8, whole_batches=True)
