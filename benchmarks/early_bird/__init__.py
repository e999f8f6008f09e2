"""Are Early-Bird tickets worth having: a study with controls. See README.md."""
