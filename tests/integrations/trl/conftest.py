"""TRL's trainers on arithmetic chains, with models of a size that a test can afford."""

from pathlib import Path

import pytest

from tests.integrations.trl import cases


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders by name: a policy with a tied head, one with an untied head, and a reward model for both."""
    return cases.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def build(models, tmp_path):
    """build(class or name, config, **arguments of the trainer) -> trainer; see `cases.build`."""
    return lambda *args, **kwargs: cases.build(models, tmp_path, *args, **kwargs)
