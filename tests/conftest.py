"""What all tests share: a fixed stream of examples and one thread, so that a run repeats bit for bit."""

from hypothesis import HealthCheck, settings

import sums

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, max_examples=15, **_COMMON)
# a search for new failures: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=1000, **_COMMON)
settings.load_profile("default")

sums.set_up()
