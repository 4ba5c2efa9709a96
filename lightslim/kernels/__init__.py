"""Numbers in, numbers out: fake quantization and norms, each beside the plain-torch reference it is tested against."""

from lightslim.kernels.codes import Codes, encode
from lightslim.kernels.fake_quant import fake_quant
from lightslim.kernels.l1 import l1_norms
from lightslim.kernels.multi import fake_quant_many
from lightslim.kernels.peak import fake_quant_and_peak

__all__ = ["Codes", "encode", "fake_quant", "fake_quant_and_peak", "fake_quant_many", "l1_norms"]
