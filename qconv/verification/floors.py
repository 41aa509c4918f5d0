"""The least credible distance of a weight from its source, by how many bits it has and how it was made."""

from __future__ import annotations

import math

from qconv.core.settings import MOST_MOVED


def snr_floor_db(bits: int, compensated: bool) -> float:
    """The least credible signal to noise ratio of a linear with that many bits, in decibels.

    A uniform quantizer gains 6.02 dB a bit; gaussian weights in groups of 128 come within 4 dB of that, heavy tails and
    clipping cost a few more. Ten below is beyond any sound rounding and far above what swapped nibbles, shifted scales
    or a wrong tensor give: -3 dB, the ratio of two unrelated tensors of one size.

    Compensation (GPTQ) puts errors where the inputs have little energy, and the more of them the more the inputs
    correlate: 12 dB less than rounding were seen, with one input far larger than all others. So it is given six more,
    down to -2 dB for few bits.
    """
    return max(6.02 * bits - 20.0, -2.0) if compensated else 6.02 * bits - 14.0


def matched_floor_db(floor_db: float) -> float:
    """The floor of a weight that matched calibration moved before it was rounded, from that of its rounding.

    Both errors may point the same way; the first is at most :data:`qconv.core.settings.MOST_MOVED` of the weight.
    """
    return max(-20.0 * math.log10(10.0 ** (-floor_db / 20.0) + MOST_MOVED), -2.0)


def float_snr_floor_db(compensated: bool) -> float:
    """The least credible signal to noise ratio of a linear of E4M3 floats, in decibels.

    Compensation costs up to 12 of what rounding has: see :func:`snr_floor_db`. What is below that still shows a zeroed
    block of rows or two exchanged ones, which give -3 to 0.
    """
    return FLOAT_SNR_FLOOR_DB - 12.0 if compensated else FLOAT_SNR_FLOOR_DB


FLOAT_SNR_FLOOR_DB = 24.0
"""The least possible signal to noise ratio of a linear of E4M3 floats, rounded to nearest, whatever its weights.

Rounding to three bits of fraction moves a number by at most 1/17 of itself (1 + 1/16 becomes 1), which is 24.6 dB; what
lies below 2**-6 moves by at most 2**-10 where the largest of its block is 448, which 100 million weights that share a
scale bring to 24.1 dB. Sound weights have about 31.5: errors of a gaussian are spread over each power of two.
"""
