# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests stand on: a real ferryd, real volumes, and ways to compare them."""
import pytest

# So that a failing assertion in here shows its values, as in the tests themselves.
for module in ("compare", "ferryd", "guest", "refusals", "volumes", "waiting"):
    pytest.register_assert_rewrite(f"harness.{module}")
