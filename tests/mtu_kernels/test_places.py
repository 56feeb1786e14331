"""Which tests may run where."""

import pytest

from .places import why_not_most_of_a_gpu


def test_a_test_that_needs_most_of_a_gpu_never_runs_beside_other_workers():
    def never_asked():
        raise AssertionError

    sentence = "It takes 32 GiB of a GPU, which 10 workers share: run it without -n."
    assert why_not_most_of_a_gpu("10", never_asked) == sentence


@pytest.mark.parametrize(
    ("free", "sentence"), [(39, None), (32, None), (23, "It takes 32 GiB of a GPU, of which 23 GiB are free.")]
)
def test_and_not_with_too_little_memory(free, sentence):
    assert why_not_most_of_a_gpu("1", lambda: (free << 30, 80 << 30)) == sentence
