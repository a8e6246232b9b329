"""The transformer classes that the library knows, one file per class or group of classes that are alike."""

MODULES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "SD3JointModelFlexible": "dual_diffusion",
    "MMDiT": "mmdit",
    "NextDiT": "nextdit",
    "Flux2Transformer2DModel": "flux2",
    "ZImageTransformer2DModel": "z_image",
    "Krea2Transformer2DModel": "krea2",
    "QwenImageTransformer2DModel": "qwen_image",
    "QwenImage21Transformer2DModel": "qwen_image21",
    "ChromaTransformer2DModel": "chroma",
    "LongCatImageTransformer2DModel": "longcat_image",
    "Flux3Transformer2DModel": "flux3",
    "Ideogram4Transformer2DModel": "ideogram4",
    "ErnieImageTransformer2DModel": "ernie_image",
    "Transformer2DModel": "transformer_2d",
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "SanaTransformer2DModel": "sana",
    "HunyuanDiT2DModel": "hunyuan_dit",
    "UNet2DModel": "unet",
    "UNet2DConditionModel": "unet",
    "LlamaPreTrainedModel": "language",
    "Qwen2PreTrainedModel": "language",
}
"""Name of a class and the module of its family, whose `FAMILY` is imported when the class is met."""
