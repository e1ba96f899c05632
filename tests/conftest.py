"""Fixtures for all tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from shared.redis import EmbeddedRedis
from tests.shared.remote_stores import (
    aws,
    oci_url,
    registry_address,
    registry_folder,
    remote,
    s3,
    s3_url,
    url,
)

# Servers run once, whichever files ask for them.
__all__ = ["aws", "oci_url", "registry_address", "registry_folder", "remote", "s3", "s3_url", "url"]


# What an example takes says how busy the machine is, and nothing of the code; a run's examples are every run's.
settings.register_profile(
    "millrace", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("millrace")

# A shell starts what runs in its background with Ctrl-C ignored, and processes of tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def embedded_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A real Valkey of the test's own that keeps its data when it is stopped and started."""
    with EmbeddedRedis(tmp_path / "redis-data") as server:
        yield server


@pytest.fixture
def redis_url(embedded_redis: EmbeddedRedis) -> str:
    """Where a real, empty Valkey of the test's own answers."""
    return embedded_redis.url
