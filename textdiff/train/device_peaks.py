"""Operations per second that devices are sold with, for dense products without sparsity.

Figures are from the makers' data sheets: bfloat16 with float32 sums on matrix units, and plain
float32 (no TF32). A device that is not listed word by word has no peak: a part of a device (MIG), a
laptop's or another variant differs. Of AMD's modules with two dies each die is a device.
"""

import re

import torch

# Name without its maker and its memory: 10^12 operations per second in bfloat16 and in float32.
PEAKS: dict[str, tuple[float | None, float]] = {
    "V100 SXM2": (None, 15.7),
    "V100 PCIE": (None, 14.0),
    "V100S PCIE": (None, 16.4),
    "T4": (None, 8.1),
    "A10": (125.0, 31.2),
    "A30": (165.0, 10.3),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "A100 SXM4": (312.0, 19.5),
    "A100 PCIE": (312.0, 19.5),
    "RTX 3090": (71.0, 35.6),
    "L4": (121.0, 30.3),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 91.6),
    "RTX 4090": (165.2, 82.6),
    "H100 HBM3": (989.4, 66.9),
    "H100 PCIE": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H200": (989.4, 66.9),
    "H200 NVL": (835.0, 60.0),
    "GH200": (989.4, 66.9),
    "RTX 5090": (209.5, 104.8),
    "B200": (2250.0, 75.0),
    "MI210": (181.0, 45.3),
    "MI250": (181.0, 45.3),
    "MI250X": (191.5, 47.9),
    "MI300X": (1307.4, 163.4),
    "MI325X": (1307.4, 163.4),
}
_NOT_THE_MODEL = re.compile(r"NVIDIA|AMD|TESLA|GEFORCE|INSTINCT|OAM|\d+GB")


def peak_flops(name: str, bf16: bool) -> float | None:
    """Return the operations per second of a device; None: it is not listed.

    Args:
        name: as the driver reports it.
        bf16: whether products are in bfloat16, else in float32.
    """
    words = re.split(r"[\s-]+", name.upper())
    model = " ".join(word for word in words if not _NOT_THE_MODEL.fullmatch(word))
    half, single = PEAKS.get(model, (None, None))
    value = half if bf16 else single
    return None if value is None else value * 1e12


def device_peak(device: torch.device, bf16: bool) -> float | None:
    """Return the peak of a device; None: it is a CPU, not listed, or computes in TF32."""
    if device.type != "cuda":
        return None
    if not bf16 and torch.get_float32_matmul_precision() != "highest":
        return None
    return peak_flops(torch.cuda.get_device_name(device), bf16)
