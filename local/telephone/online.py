"""One call from its settings: what stage 0 does to a file, and training with ONLINE_CHANNEL=1 to an utterance.

Settings are plain JSON, written by stage 0: distributions, seed, rate of the output, babble pool, noise recordings.
A row that stage 0 left for training names their file as {"online": PATH} in its `channel` field.

    samples = simulate(PATH, "utt1", samples, 16000, epoch=3)   # the same as stage 0 with that seed and --epoch 3
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from telephone import noise
from telephone.channel import apply, draw

FIELDS = ("config", "seed", "output_fs", "pool", "noises")


def call(settings: dict[str, Any], plan: dict[str, Any], key: str, samples: np.ndarray, fs: int) -> np.ndarray:
    """The call of `plan`, drawn for `key`, as int16 samples; what came of it is added to the plan."""
    babble = noise.babble_source(settings["pool"], key) if settings["pool"] else None
    own = noise.file_source(settings["noises"]) if settings["noises"] else None
    return apply(plan, samples, fs, settings["output_fs"], babble=babble, noise=own, pcm=True)


def simulate(path: str, key: str, samples: np.ndarray, fs: int, epoch: int) -> np.ndarray:
    """Wideband samples as the call that (seed, key, epoch) draw: float32 at the settings' rate.

    ValueError for a recording at less than 16 kHz.
    """
    settings = _load(path)
    if fs < 16000:
        raise ValueError(f"{fs} Hz is no wideband recording")
    plan = draw(settings["config"], settings["seed"], key, epoch)
    return call(settings, plan, key, samples, fs) * np.float32(1 / 32768)


@functools.lru_cache
def _load(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    lists = {name: [noise.Recording(*given) for given in settings[name]] for name in ("pool", "noises")}
    return settings | lists
