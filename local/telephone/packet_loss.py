"""Packet loss in bursts (Gilbert-Elliott) and its concealment on decoded speech.

Concealment follows the timing ITU-T G.711 Appendix I publishes, in an implementation of our own: repeat the
last pitch period, use two and then three periods after 10 and 20 ms, fade by a fifth per 10 ms from the
second 10 ms on, and cross-fade over a quarter of a pitch period at every join. A gap is never zero-filled.

    lost = lost_packets(rng, count, loss=0.03, burst=2.0)
    samples = conceal(samples, lost, PACKET)
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PACKET = 160  # 20 ms at 8 kHz: one frame of GSM and AMR, the usual RTP packet of the others
FRAME = 80  # 10 ms at 8 kHz
SHORTEST_PITCH, LONGEST_PITCH = 40, 120  # 200 to 66 Hz at 8 kHz
HISTORY = 390  # 48.75 ms: three of the longest pitch periods and a quarter


def lost_packets(rng: np.random.Generator, count: int, loss: float, burst: float) -> np.ndarray:
    """Draw which of `count` packets are lost: mean rate `loss`, mean run of lost packets `burst`.

    Two states, p = P(good -> bad), r = P(bad -> good): loss = p / (p + r), burst = 1 / r.
    """
    lost = np.zeros(count, bool)
    r = 1.0 / burst
    p = loss * r / (1.0 - loss)
    position = 0
    bad = rng.random() < loss
    while position < count:
        run = int(rng.geometric(r if bad else p))
        lost[position : position + run] = bad
        position, bad = position + run, not bad
    return lost


def bursts(lost: np.ndarray) -> list[tuple[int, int]]:
    """(first, count) of every run of lost packets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lost.astype(np.int8), [0]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def conceal(samples: np.ndarray, lost: np.ndarray, packet: int) -> np.ndarray:
    """Replace lost packets of `packet` samples by what a receiver with concealment plays (8 kHz speech)."""
    out = samples.copy()
    for first, count in bursts(lost):
        _fill(out, first * packet, min((first + count) * packet, out.size))
    return out


def _fill(out: np.ndarray, start: int, end: int) -> None:
    """Fill out[start:end] from what came before, and cross-fade into what follows."""
    known = out[max(0, start - HISTORY) : start]
    history = np.pad(known, (HISTORY - known.size, 0))
    pitch = _pitch(history)
    quarter = pitch // 4
    lost_frames = -(-(end - start) // FRAME)
    # Coming back: a quarter period, 4 ms more for each further lost frame, at most 10 ms.
    rejoin = min(quarter + 32 * (lost_frames - 1), FRAME, out.size - end)
    length = end - start + rejoin
    fade = np.clip(1.0 - 0.2 * (np.arange(length) / FRAME - 1.0), 0.0, 1.0).astype(out.dtype)
    repeated = _repeat(history, pitch, length) * fade
    # The receiver plays 3.75 ms late, so that it can lead into the first repeated period before the gap.
    lead = min(quarter, start)
    out[start - lead : start] = _faded(out[start - lead : start], history[HISTORY - pitch - lead : HISTORY - pitch])
    out[start:end] = repeated[: end - start]
    out[end : end + rejoin] = _faded(repeated[end - start :], out[end : end + rejoin])


def _pitch(history: np.ndarray) -> int:
    """Lag of the highest normalised correlation of the last 20 ms with what came 5 to 15 ms before."""
    recent = history[-2 * FRAME - LONGEST_PITCH :].astype(np.float64)
    past = sliding_window_view(recent[:-SHORTEST_PITCH], 2 * FRAME)
    correlation = past @ recent[-2 * FRAME :] / np.sqrt(np.einsum("ij,ij->i", past, past) + 1e-9)
    return LONGEST_PITCH - int(np.argmax(correlation))


def _repeat(history: np.ndarray, pitch: int, length: int) -> np.ndarray:
    """`length` samples of the last one, two, then three pitch periods, cross-faded where the number changes."""
    quarter, out = pitch // 4, np.empty(length, history.dtype)
    for periods, begin in enumerate(range(0, min(length, 3 * FRAME), FRAME), 1):
        span = periods * pitch
        cycle = history[HISTORY - span :].copy()
        # The end of the cycle leads into its own beginning: fade into what came before that beginning.
        cycle[-quarter:] = _faded(cycle[-quarter:], history[HISTORY - span - quarter : HISTORY - span])
        # Continue at the phase reached so far, so that only the number of periods changes, not the pitch.
        new = np.resize(np.roll(cycle, -(begin % pitch)), length - begin)
        if begin:
            new[:quarter] = _faded(out[begin : begin + quarter], new[:quarter])
        out[begin:] = new
    return out


def _faded(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    ramp = ((np.arange(after.size) + 0.5) / after.size).astype(after.dtype)
    return before * (1 - ramp) + after * ramp
