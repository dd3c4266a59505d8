"""The smallest model of the recipes: its tokenizer and chat template are what the hops need."""

from pathlib import Path

import pytest

from recipes.arithmetic import model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model(folder)
    return folder
