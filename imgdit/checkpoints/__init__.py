"""The embedded default: small weights that this project's own recipes trained (`make weights`).

`SCENES` is a pipeline folder as any other: `imgdit.DiffusionPipeline.from_pretrained(SCENES)`.
"""

from pathlib import Path

SCENES = Path(__file__).parent / "scenes"
"""Pipeline folder of the embedded model: text to image, conditions and views of the procedural scenes."""
EMBEDDED = "embedded"
"""Its name wherever a pipeline's folder or Hub id is asked for."""
SCENE_PROBE = Path(__file__).parent / "scene_probe"
"""Folder of the `SceneProbe` that measures what models make of scenes."""
