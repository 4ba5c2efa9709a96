"""Models, data and recipes to try lightslim on; nothing in the package depends on them."""
