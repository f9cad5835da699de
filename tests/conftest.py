"""What all tests share: plain assertions in the helpers say what they compared, as in a test."""

import pytest

pytest.register_assert_rewrite("helpers")
