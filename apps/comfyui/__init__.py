"""Nodes for ComfyUI; `custom_nodes/imgdit/__init__.py` imports the two tables below."""

from imgdit.apps.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
