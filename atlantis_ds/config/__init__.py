"""The typed recipe, and how a recipe file becomes one."""
