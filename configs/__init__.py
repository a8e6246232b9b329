"""Recipes as YAML files; read them with ``importlib.resources.files("imgdit.configs")``."""
