"""Which precision a device computes natively."""

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware here, not by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return False


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`bf16` or `fp32`, `auto` being resolved."""
    if wanted != "auto":
        return wanted
    return "bf16" if native_bf16(device) else "fp32"
