"""Peak memory of a device."""

from __future__ import annotations

import torch

from pecobook.utils.devices import peak_memory


def test_peak_memory__of_a_cpu_is_that_of_the_process_in_bytes() -> None:
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**45  # in KiB it would be far below 2**26
