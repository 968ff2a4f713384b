"""Settings for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from srccore.config import ModelConfig

# On a busy machine, an example may take long; that is not a failure.
settings.register_profile("srccore", deadline=None)
settings.load_profile("srccore")


@pytest.fixture(scope="session")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelConfig]:
    """Builds one of `awkward.checkpoints.CHECKPOINTS` by name, once."""
    built: dict[str, ModelConfig] = {}

    def build(name: str) -> ModelConfig:
        # Most tests need no torch.
        from awkward.checkpoints import CHECKPOINTS

        if name not in built:
            built[name] = CHECKPOINTS[name].build(tmp_path_factory.mktemp(name))
        return built[name]

    return build
