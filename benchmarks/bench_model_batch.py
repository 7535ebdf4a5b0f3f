"""Whole images to label maps as in bench_model.py, eight at a time: the same contestants.

Seg-T alone unless --all-sizes is given, which takes minutes more.
"""

import pytest
from bench_model import whole_models

BATCH = 8
ROUNDS = {"Seg-T-Mask/16": 5, "Seg-S-Mask/16": 3, "Seg-B-Mask/16": 3}


@pytest.mark.parametrize("variant", ROUNDS)
def test_labels(request, contest, compiled, tmp_path, variant):
    if "-T-" not in variant and not request.config.getoption("--all-sizes"):
        pytest.skip("needs --all-sizes")
    whole_models(contest, compiled, tmp_path, variant, BATCH, ROUNDS[variant])
