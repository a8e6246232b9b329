"""Data of recipes that is made of scenes: `data.name: imgdit.scenes.sources:frames`, and so on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imgdit.scenes.pictures import ScenePictures
from imgdit.scenes.readings import SceneReadings
from imgdit.scenes.sentences import SceneSentences
from imgdit.scenes.training_conditions import SceneConditions
from imgdit.scenes.training_frames import SceneFrames
from imgdit.scenes.training_readers import collate_readings, collate_sentences
from imgdit.training.batches import Pictures
from imgdit.training.sources import Source, only_batch

FRAMES = "imgdit.scenes.sources:frames"
CONDITIONS = "imgdit.scenes.sources:conditions"


def collate_pictures(samples: Sequence[torch.Tensor]) -> Pictures:
    """Samples (K, 3, S, S) to one batch of all their images."""
    return Pictures(torch.cat(list(samples)))


pictures = Source(ScenePictures, collate_pictures, held_out=16)
sentences = Source(SceneSentences, collate_sentences, held_out=512)
readings = Source(SceneReadings, collate_readings, held_out=64)
frames = Source(SceneFrames, only_batch, held_out=8, whole_batches=True)
conditions = Source(SceneConditions, only_batch, held_out=4, whole_batches=True)
