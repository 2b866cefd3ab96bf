"""Gap, gap closed, closure and price at both ends and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memsinks.auditing.forgetting import counterfactual_closure, gap_closed, loss_gap, price

UNSEEN, RECITED = 3.2, 0.1


def test_nothing_memorized() -> None:
    assert loss_gap(UNSEEN, UNSEEN) == 0.0
    assert math.isnan(gap_closed(0.0, 0.0))  # there was nothing to remove
    assert math.isnan(gap_closed(0.5, 0.0))
    assert math.isnan(counterfactual_closure(UNSEEN, UNSEEN, UNSEEN))
    assert price(UNSEEN, UNSEEN) == 0.0


def test_everything_memorized() -> None:
    assert loss_gap(UNSEEN, RECITED) == pytest.approx(3.1)
    assert gap_closed(3.1, 3.1) == 0.0
    assert counterfactual_closure(RECITED, RECITED, UNSEEN) == 0.0


def test_all_of_it_taken_away() -> None:
    assert gap_closed(0.0, 3.1) == 1.0
    assert counterfactual_closure(UNSEEN, RECITED, UNSEEN) == 1.0


@pytest.mark.parametrize(
    ("figure", "values", "expected"),
    [(loss_gap, (3.0, 2.5), 0.5), (gap_closed, (0.25, 1.0), 0.75), (gap_closed, (-0.5, 1.0), 1.5),
     (gap_closed, (2.0, 1.0), -1.0), (counterfactual_closure, (2.0, 1.0, 3.0), 0.5),
     (counterfactual_closure, (4.0, 1.0, 3.0), 1.5), (counterfactual_closure, (0.0, 1.0, 3.0), -0.5),
     (price, (3.25, 3.0), 0.25), (price, (2.5, 3.0), -0.5)],
)  # fmt: skip
def test_figures_by_hand(figure, values, expected) -> None:
    found = figure(*values)
    assert isinstance(found, float)
    assert found == pytest.approx(expected)
    arrays = figure(*(np.array([value, value]) for value in values))
    assert arrays.shape == (2,)
    assert arrays.tolist() == pytest.approx([expected] * 2)


def test_places_without_anything_to_remove_are_no_numbers() -> None:
    found = gap_closed(np.array([0.5, 0.5, 0.0]), np.array([1.0, 0.0, 0.0]))
    assert found[0] == 0.5
    assert np.isnan(found[1:]).all()
