"""One model for every precision: parameters in SEFP, and tuning that makes each width good (OTARo, arXiv 2511.13147)."""

from quant.bps import BpsConfig, BpsState
from quant.fake_quant import fake_quantize, fake_quantize_array
from quant.laa import LaaConfig, LaaState
from quant.lora import Lora
from quant.otaro import OtaroConfig, Tuned, TuneState, otaro_tune
from quant.params import (
    at_width,
    bits_per_weight,
    decode_params,
    nbytes,
    pin_widths,
    quantize_params,
    tensors,
    width_for_bytes,
)
from quant.planes import PlanesCorrupt, load_planes, planes_metadata, save_planes
from quant.rules import DEFAULT_RULES, Rule
from quant.tensor import Layout, SefpTensor

__all__ = [
    "DEFAULT_RULES",
    "BpsConfig",
    "BpsState",
    "LaaConfig",
    "LaaState",
    "Layout",
    "Lora",
    "OtaroConfig",
    "PlanesCorrupt",
    "Rule",
    "SefpTensor",
    "TuneState",
    "Tuned",
    "at_width",
    "bits_per_weight",
    "decode_params",
    "fake_quantize",
    "fake_quantize_array",
    "load_planes",
    "nbytes",
    "otaro_tune",
    "pin_widths",
    "planes_metadata",
    "quantize_params",
    "save_planes",
    "tensors",
    "width_for_bytes",
]
