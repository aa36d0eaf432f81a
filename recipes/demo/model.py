"""The demo trains the models of `recipes/alexnet` themselves."""

from pathlib import Path

from lars.recipe.model_file import import_model_file

import_model_file(Path(__file__).parents[1] / "alexnet")
