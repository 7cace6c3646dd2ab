"""Every layout of eight simulated devices gives what one device gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

# Layout -> the part of a [layers, embed, mlp] kernel of 2 x 32 x 48 that one device holds.
LAYOUTS = {
    "data=8": [2, 32, 48],
    "fsdp=8": [2, 4, 48],
    "data=2,fsdp=2,tensor=2": [2, 16, 24],
    "data=2,context=4": [2, 8, 48],
    "fsdp=2,context=2,tensor=2": [2, 8, 24],
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return tiny.on_eight_devices(Path(__file__).parent / "eight_devices.py")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_give_the_losses_of_one_device(results: dict[str, Any], layout: str) -> None:
    one, many = results["one"], results[layout]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-3)
    assert max(one["losses"]) - min(one["losses"]) > 0.01
    assert many["kernel_part"] == many["moment_part"] == LAYOUTS[layout]
    assert many["fingerprint"] == one["fingerprint"]


# Layout -> the parts of the factors of the same kernel's second moments, 2 x 32 (rows) and 2 x 48 (columns).
FACTORS = {
    "data=2,fsdp=2,tensor=2": ([2, 16], [2, 24]),
    "fsdp=2,context=2,tensor=2": ([2, 8], [2, 24]),
}


@pytest.mark.parametrize("layout", FACTORS)
def test_four_steps_of_sft_with_adafactor_give_the_losses_of_one_device(results: dict[str, Any], layout: str) -> None:
    one, many = results["one"]["sft_losses"], results[layout]["sft_losses"]
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)
    assert max(one) - min(one) > 0.01
    kept = results[layout]["kept_parts"]
    assert (kept["v_row"], kept["v_col"]) == FACTORS[layout] and kept["v"] == [1]


@pytest.mark.parametrize("layout", FACTORS)
def test_embeddings_are_looked_up_without_bringing_rows_together(results: dict[str, Any], layout: str) -> None:
    assert results[layout]["float_gathers"] == []


def test_a_resume_point_of_factored_moments_is_read_under_any_layout(results: dict[str, Any]) -> None:
    assert results["fsdp=2,context=2,tensor=2"]["restored"] == [True, True]


def test_the_head_gives_the_log_probs_and_gradients_of_a_whole_softmax(results: dict[str, Any]) -> None:
    """Float32 on 192 tokens; gradients are sums of up to all of them."""
    assert len(results["head"]) == 7
    for layout, (values, d_hidden, d_table) in results["head"].items():
        assert values < 1e-5 and d_hidden < 1e-5 and d_table < 3e-5, layout


def test_the_splash_kernels_with_spread_rows_are_plain_attention(results: dict[str, Any]) -> None:
    assert len(results["splash"]) == 4 and max(results["splash"]) < 1e-5


@pytest.mark.parametrize(
    ("layout", "snapshot_axis"),
    [("data=2,fsdp=2,tensor=2", 4), ("fsdp=2,context=2,tensor=2", 4)],
)
def test_probing_with_a_snapshot_axis_gives_the_scores_of_one_device(
    results: dict[str, Any], layout: str, snapshot_axis: int
) -> None:
    assert results["one"]["snapshot_axis"] == 1 and results[layout]["snapshot_axis"] == snapshot_axis
    one, many = np.array(results["one"]["sums"]), np.array(results[layout]["sums"])
    assert one.shape == (4, 6, 2) and np.abs(np.diff(one, axis=0)).min() > 1e-3
    # Sums of up to 12 log-probs of about -6 nats: 1e-5 for each token.
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4)
    np.testing.assert_allclose(many, one, rtol=1e-5)
