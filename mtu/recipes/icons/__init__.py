"""The icon models: a small base model made from nothing, for `python -m mtu.recipes.icons`."""
