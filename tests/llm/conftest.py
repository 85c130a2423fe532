"""The model server of `examples/`, and a host's models pointed at it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "model_server"))

from model_server import ModelServer, Script  # noqa: E402
from tests.llm.asking import OpenModels, models_of  # noqa: E402


@pytest.fixture
async def model_server() -> AsyncIterator[ModelServer]:
    """A server that says `Hello there, friend` unless it is told otherwise; at the end nothing is being answered."""
    async with ModelServer(Script(text="Hello there, friend"), tokens_per_second=500) as server:
        yield server


@pytest.fixture
async def open_models() -> AsyncIterator[OpenModels]:
    """Open models without a host: `llm = await open_models(server.base_url, retries=0)`; closed with the test."""
    async with models_of() as open_them:
        yield open_them
