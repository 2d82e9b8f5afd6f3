import pytest
import torch
from lib import timing
from lib.benchmark import op
from lib.timing import Bench, Unavailable, first_calls

from modeling_constattn import quadratic_attention

BENCH = Bench("cpu")
# torch.compile itself uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def test_contenders_that_compute_the_same_agree():
    inputs = op.random_inputs(BENCH, True, 96)
    query, key, value, log_decay, *_ = inputs
    for backward in (False, True):
        contenders = op.contenders("cpu", backward)
        torch.testing.assert_close(
            contenders[op.COMPILED](inputs)(), contenders[op.OURS](inputs)(), rtol=1e-5, atol=1e-6
        )
    for name, decay in ((op.OURS, None), (op.FORGETTING, log_decay)):
        y = op.FUNCTIONS[name](inputs)
        torch.testing.assert_close(y, quadratic_attention(query, key, value, log_decay=decay), rtol=1e-4, atol=1e-5)
    log_y = op.FUNCTIONS[op.SCAN](inputs)
    y = op.FUNCTIONS[op.OURS](inputs._replace(value=value.exp()))
    torch.testing.assert_close(log_y.exp(), y, rtol=1e-4, atol=1e-5)


def test_an_op_call_gives_the_gradients_of_what_is_used():
    inputs = op.random_inputs(BENCH, True, 8)
    used = {
        name: [grad is not None for grad in op.call_of(function, True, inputs)()]
        for name, function in op.FUNCTIONS.items()
    }
    assert used.pop(op.FORGETTING) == [True, True, True, True, False]
    assert used.pop(op.COMPRESSED) == [True, True, True, False, False]  # 8 tokens: none has departed into the slots
    assert all(flags == [True, True, True, False, False] for flags in used.values())


def test_the_scan_takes_what_it_asks_for(monkeypatch: pytest.MonkeyPatch):
    inputs = op.random_inputs(BENCH, True, 96)
    for backward in (False, True):
        scan = op.contenders("cpu", backward)[op.SCAN]
        peak = first_calls(BENCH, scan(inputs)).peak_bytes
        assert peak
        monkeypatch.setattr(timing, "free_memory", lambda device, peak=peak: 1.2 * peak)
        assert scan(inputs)
        monkeypatch.setattr(timing, "free_memory", lambda device, peak=peak: peak)
        with pytest.raises(Unavailable, match="it would take"):
            scan(inputs)
        monkeypatch.undo()
