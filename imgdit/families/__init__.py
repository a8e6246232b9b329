"""The transformer classes that the library knows, one file per class or group of classes that are alike."""

MODULES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "MMDiT": "mmdit",
}
"""Name of a class and the module of its family, whose `FAMILY` is imported when the class is met."""
