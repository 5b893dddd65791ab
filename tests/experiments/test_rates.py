"""The choice of a learning rate from a grid that grows where its best end is."""

import math

from experiments.rates import best_rate


def chosen(best, rates=(1e-3, 3e-3, 1e-2)):
    told = []
    found = best_rate(lambda rate: -abs(math.log(rate / best)), rates, told.append)
    assert len(told) == len(found["validation"])
    return found["rate"], list(found["validation"])


def test_the_grid_grows_where_its_best_end_is_and_no_farther():
    assert chosen(3e-3) == (3e-3, ["0.001", "0.003", "0.01"])
    assert chosen(3e-2) == (3e-2, ["0.001", "0.003", "0.01", "0.03", "0.09"])
    assert chosen(3e-4) == (3e-4, ["9e-05", "0.0003", "0.001", "0.003", "0.01"])
    assert chosen(1e3)[0] == 0.09 and len(chosen(1e3)[1]) == 5
    assert best_rate(lambda rate: 0.5, (0.0,), lambda text: None) == {"rate": 0.0, "validation": {"0": 0.5}}


def test_of_equal_rates_the_middle_one_is_taken():
    assert best_rate(lambda rate: 0.5, (1e-3, 3e-3, 1e-2), lambda text: None)["rate"] == 3e-3
