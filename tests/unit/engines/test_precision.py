"""bf16 on any processor: oneDNN's recurrent layers want AVX-512, torch's own do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distdl.engines.precision import Precision, slow_here


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_run_in_bf16_on_any_processor(
    supported: bool, kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    if supported and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    torch.manual_seed(0)
    layer, x = kind(8, 16, batch_first=True), torch.randn(3, 5, 8)
    expected = layer(x)[0]
    with Precision("bf16", torch.device("cpu")).autocast():
        found = layer(x)[0]
        assert torch.nn.functional.linear(x, torch.eye(8)).dtype is torch.bfloat16
    found.float().sum().backward()
    assert torch.allclose(found.float(), expected, atol=0.02)
    assert layer.weight_hh_l0.grad is not None
    assert torch._C._get_mkldnn_enabled(), "it is as it was"


def test_short_arithmetic_is_slow_where_a_processor_only_imitates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert slow_here("bf16", "cpu")
    assert slow_here("fp16", "cpu")
    assert not slow_here("bf16", "cuda")
    assert not slow_here("fp32", "cpu")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert not slow_here("bf16", "cpu")


def test_a_layer_that_fails_leaves_the_switch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(RuntimeError), Precision("bf16", torch.device("cpu")).autocast():
        nn.LSTM(8, 16)(torch.randn(3, 5, 7))
    assert torch._C._get_mkldnn_enabled()
