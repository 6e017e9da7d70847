"""One telephone call: read the distributions, draw a channel for an utterance, send the utterance through it.

`draw` is a function of (seed, key, epoch) alone and `apply` of its plan and the samples alone, so that any number
of workers, any order, offline preparation and training online give the same audio. A plan is plain JSON, kept in
the row's `channel` field. The order is the physical one: noise and room at the mouth, send response, level,
limiter, hop 1 with packet loss, hop 2, line noise, hum, echo, G.711, recorder, up-sampler.

    config = load_config("conf/telephone_channel.yaml")
    plan = draw(config, seed=0, key="utt1")
    call = apply(plan, samples, 16000, 16000, "utt1", pool)
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from common import UserError, read_yaml
from telephone import filters, packet_loss
from telephone import noise as sounds
from telephone.codecs import CODECS, fitted, from_pcm, g711, to_pcm
from telephone.resample import resample, resample_counted

TELEPHONE_FS = 8000
CODED = ("amr_nb", "gsm_fr", "opus_nb", "g726")
PROBABILITY = (0.0, 1.0)


def _flat(sections: Any, path: str | Path) -> dict[str, Any]:
    """{"section.item": value}; UserError for what is no sections of values."""
    if not isinstance(sections, dict) or not all(isinstance(items, dict) for items in sections.values()):
        raise UserError(f"{path}: not sections of values; take conf/telephone_channel.yaml as a pattern", code=2)
    return {f"{section}.{item}": value for section, items in sections.items() for item, value in items.items()}


# What the YAML may hold: the bounds of a probability or a range, or the names that have shares.
SCHEMA: dict[str, tuple] = _flat({
    "noise": {
        "probability": PROBABILITY, "kind": ("babble", "pink", "white"), "own_file_probability": PROBABILITY,
        "snr_db": (-20.0, 80.0),
    },
    "room": {"probability": PROBABILITY, "rt60_s": (0.05, 2.0), "direct_db": (-10.0, 30.0)},
    "level": {"active_dbov": (-60.0, -5.0)},
    "send": {
        "shape": ("mobile", "modified_irs", "irs", "g712", "band"),
        "low_hz": (20.0, 1000.0), "high_hz": (2000.0, 3990.0),
        "peak_count": ("0", "1", "2", "3"), "peak_hz": (100.0, 3900.0), "peak_db": (-20.0, 20.0),
    },
    "limiter": {
        "kind": ("none", "agc", "hard_clip", "soft_clip"),
        "drive_dbov": (-30.0, 6.0), "agc_target_dbov": (-40.0, -10.0),
    },
    "hop1": {
        "codec": ("g711", "g722", *CODED, "none"),
        "amr_kbps": ("12.2", "10.2", "7.95", "7.4", "6.7", "5.9", "5.15", "4.75"), "amr_dtx_probability": PROBABILITY,
        "opus_kbps": ("6", "8", "12", "16", "24"), "g726_kbps": ("24", "32", "40"),
    },
    "packet_loss": {"probability": PROBABILITY, "preset": ("0.5/1.1", "1/1.5", "3/2", "5/2.5", "10/3")},
    "hop2": {"codec": (*CODED, "none")},
    "line": {
        "noise_probability": PROBABILITY, "noise_kind": ("white", "pink"), "noise_dbm0": (-90.0, -20.0),
        "hum_probability": PROBABILITY, "hum_dbm0": (-90.0, -20.0),
        "echo_probability": PROBABILITY, "echo_loss_db": (5.0, 90.0), "echo_delay_ms": (1.0, 500.0),
    },
    "g711": {"law": ("alaw", "ulaw", "none")},
    "recorder": {"codec": ("none", "gsm_fr", "mp3", "g726"), "mp3_kbps": ("8", "16", "24", "32")},
}, "")  # fmt: skip
# Where the bit rates of a codec that has several are.
KBPS = {"amr_nb": "hop1.amr_kbps", "opus_nb": "hop1.opus_kbps", "g726": "hop1.g726_kbps", "mp3": "recorder.mp3_kbps"}


def load_config(
    path: str | Path, *presets: str, low_freq: float | None = None, high_freq: float | None = None,
    snr_db_min: float | None = None, snr_db_max: float | None = None, own_noise: bool = False, no_babble: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Read and check the distributions, narrowed by what the arguments say; a mistake is a UserError, code 2."""
    config = _flat(read_yaml(path), path)
    known = {name.removeprefix("presets."): config.pop(name) for name in [*config] if name.startswith("presets.")}
    _check(config, path)
    for name in presets:
        if name not in known:
            raise UserError(f"{path}: no preset {name}; it has {', '.join(known) or 'none'}", code=2)
        config |= _flat(known[name], path)
    for item, hz in (("low_hz", low_freq), ("high_hz", high_freq)):
        if hz is not None:
            config |= {"send.shape": {"band": 1}, f"send.{item}": [hz, hz]}
    if snr_db_min is not None or snr_db_max is not None:
        snr = config["noise.snr_db"]
        low, high = (snr["min"], snr["max"]) if isinstance(snr, dict) else snr
        config["noise.snr_db"] = [low if snr_db_min is None else snr_db_min, high if snr_db_max is None else snr_db_max]
    _check(config, path)
    for name, allowed in SCHEMA.items():  # shares in one order, so that rearranging the YAML changes no draw
        if isinstance(allowed[0], str):
            config[name] = {choice: config[name].get(choice, 0) for choice in allowed}
    kinds = config["noise.kind"]
    if no_babble:  # a corpus of one utterance has no other voices
        kinds["pink"] += kinds.pop("babble")
    if own_noise:
        share = config["noise.own_file_probability"]
        config["noise.kind"] = {kind: value * (1 - share) for kind, value in kinds.items()} | {"file": share}
    return config


def draw(config: dict[str, Any], seed: int, key: str, epoch: int | None = None) -> dict[str, Any]:
    """Draw the channel of one utterance: a plain JSON plan, a function of (seed, key, epoch) alone."""
    digest = hashlib.sha256(f"{seed}\0{key}\0{epoch}".encode("utf-8", "surrogatepass")).digest()
    number = int.from_bytes(digest[:6], "big")
    # One number for each value, needed or not: narrowing one value leaves every other one as it was.
    numbers = np.random.default_rng(number).random(len(SCHEMA) + 6).tolist()
    uniform, spare = dict(zip(SCHEMA, numbers, strict=False)), numbers[len(SCHEMA) :]

    def value(name: str) -> Any:
        return _quantile(config[name], uniform[name])

    plan: dict[str, Any] = {"seed": seed, "epoch": epoch, "draw": number}
    if value("noise.probability"):
        plan["noise"] = {"kind": value("noise.kind"), "snr_db": value("noise.snr_db")}
    if value("room.probability"):
        plan["room"] = {"rt60_s": value("room.rt60_s"), "direct_db": value("room.direct_db")}
    plan["send"] = {"shape": value("send.shape")}
    if plan["send"]["shape"] == "band":
        plan["send"] |= {"low_hz": value("send.low_hz"), "high_hz": value("send.high_hz")}
    elif count := int(value("send.peak_count")):
        hz, db = config["send.peak_hz"], config["send.peak_db"]
        plan["send"]["peaks"] = [[_quantile(hz, spare[i]), _quantile(db, spare[3 + i])] for i in range(count)]
    plan["active_dbov"] = value("level.active_dbov")
    limiter = value("limiter.kind")
    if limiter == "agc":
        plan["limiter"] = {"kind": limiter, "target_dbov": value("limiter.agc_target_dbov")}
    elif limiter != "none":
        plan["limiter"] = {"kind": limiter}
        plan["active_dbov"] = value("limiter.drive_dbov")
    law = value("g711.law")
    for hop in ("hop1", "hop2", "recorder"):
        codec = value(f"{hop}.codec")
        if codec == "none":
            continue
        if codec == "g711":
            codec = "g711_ulaw" if law == "ulaw" else "g711_alaw"
        plan[hop] = {"codec": codec}
        if codec in KBPS:
            kbps = float(value(KBPS[codec]))
            # At 24 kbit/s G.726 makes digital silence of a quiet line's idle noise; after hop 1 the line adds its own.
            plan[hop]["kbps"] = max(kbps, 32.0) if (hop, codec) == ("recorder", "g726") else kbps
        if codec == "amr_nb":
            plan[hop]["dtx"] = value("hop1.amr_dtx_probability")
    if "hop1" in plan and value("packet_loss.probability"):
        percent, burst = value("packet_loss.preset").split("/")
        plan["packet_loss"] = {"percent": float(percent), "burst": float(burst)}
    plan["line"] = {}
    if value("line.noise_probability"):
        plan["line"] |= {"noise": value("line.noise_kind"), "noise_dbm0": value("line.noise_dbm0")}
    if value("line.hum_probability"):
        plan["line"]["hum_dbm0"] = value("line.hum_dbm0")
    if value("line.echo_probability"):
        plan["line"] |= {"echo_ms": value("line.echo_delay_ms"), "echo_loss_db": value("line.echo_loss_db")}
    plan["g711"] = law
    return plan


def apply(
    plan: dict[str, Any], samples: np.ndarray, fs: int, output_fs: int,
    key: str = "", pool: Sequence[sounds.Recording] = (), noises: Sequence[sounds.Recording] = (),
) -> np.ndarray:  # fmt: skip
    """Send float samples at `fs` Hz through the channel of `plan`; return the call at `output_fs`, int16.

    Babble is made of the utterances of `pool` but the one named `key`, which is sent; noise from files of `noises`.
    Adds to the plan what came of it: `measured` (level in dBov, packets lost, overshoots of the up-sampler) and the
    keys of babble or noise files used.
    """
    # Only a wideband first hop needs more than the telephone band; every step before it is linear.
    working_fs = CODECS[plan["hop1"]["codec"]].fs if "hop1" in plan else TELEPHONE_FS
    plan["measured"] = {}
    speech = _mouth_to_line(plan, sounds.without_offset(samples), fs, working_fs, key, pool, noises)
    speech += sounds.converter(_generator(plan, 6), speech.size, plan["g711"])
    if "hop1" in plan:
        speech = _first_hop(plan, speech, round(samples.size * TELEPHONE_FS / fs))
    if "hop2" in plan:
        speech = _coded(speech, **plan["hop2"])
    speech = _line(plan, speech)
    if plan["g711"] != "none":
        speech = from_pcm(g711(to_pcm(speech), plan["g711"]))
    if "recorder" in plan:
        speech = _coded(speech, **plan["recorder"])
    out, plan["measured"]["overshoots"] = resample_counted(speech, TELEPHONE_FS, output_fs)
    return to_pcm(fitted(out, round(samples.size * output_fs / fs)))


def simulate(path: str, key: str, samples: np.ndarray, fs: int, epoch: int) -> np.ndarray:
    """Training online: wideband samples as the call that (seed, key, epoch) draw, float32 at the settings' rate.

    `path` names the settings that stage 0 wrote for it. ValueError for a recording at less than 16 kHz.
    """
    if fs < 16000:
        raise ValueError(f"{fs} Hz is no wideband recording")
    settings = _settings(path)
    plan = draw(settings["config"], settings["seed"], key, epoch)
    return from_pcm(apply(plan, samples, fs, settings["output_fs"], key, settings["pool"], settings["noises"]))


@functools.lru_cache
def _settings(path: str) -> dict[str, Any]:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    return settings | {name: [sounds.Recording(*given) for given in settings[name]] for name in ("pool", "noises")}


def _generator(plan: dict, place: int) -> np.random.Generator:
    """Every source of noise has its own generator, so that leaving one out changes no other."""
    return np.random.default_rng([plan["draw"], place])


def _mouth_to_line(
    plan: dict, speech: np.ndarray, fs_in: int, fs: int, key: str, pool: Sequence[sounds.Recording],
    noises: Sequence[sounds.Recording],
) -> np.ndarray:  # fmt: skip
    """Room, send response, noise, level and limiter; from `fs_in` to `fs` Hz.

    Level and SNR are those of the line, after the send response.
    """
    if "room" in plan or fs_in != 2 * fs:
        speech, fs_in = resample(speech, fs_in, fs), fs
    if "room" in plan:
        speech = filters.room(_generator(plan, 1), speech, fs, **plan["room"])
    speech = filters.send(speech, fs_in, fs_out=fs, **plan["send"])
    active = sounds.active_level(speech, fs)
    plan["measured"]["sent_dbov"] = None
    if active > sounds.SILENT_DBOV:
        plan["measured"]["sent_dbov"] = round(active, 2)
        speech *= np.float32(sounds.db_to_gain(plan["active_dbov"] - active))
    if "noise" in plan:
        rng, kind = _generator(plan, 2), plan["noise"]["kind"]
        if kind == "babble":
            around, plan["noise"]["sources"] = sounds.babble(rng, speech.size, fs, pool, key)
        elif kind == "file":
            around, plan["noise"]["sources"] = sounds.excerpt(rng, speech.size, fs, noises)
        else:
            around = sounds.coloured(rng, kind, speech.size, fs)
        around = filters.send(around, fs, **plan["send"])
        speech += sounds.at_level(around, plan["active_dbov"] - plan["noise"]["snr_db"])
    if "limiter" not in plan:
        return speech
    if plan["limiter"]["kind"] == "agc":
        return filters.agc(speech, fs, plan["limiter"]["target_dbov"])
    return filters.limit(speech, plan["limiter"]["kind"])


def _first_hop(plan: dict, speech: np.ndarray, count: int) -> np.ndarray:
    """Hop 1 and the packets it loses: inside the stream of AMR-NB, concealed on decoded speech for the others."""
    codec, lost = CODECS[plan["hop1"]["codec"]], None
    if "packet_loss" in plan:
        packets = -(-count // packet_loss.PACKET)
        rate, burst = plan["packet_loss"]["percent"] / 100, plan["packet_loss"]["burst"]
        lost = packet_loss.lost_packets(_generator(plan, 3), packets, rate, burst)
        plan["measured"] |= {"packets": packets, "packets_lost": int(lost.sum())}
    if codec.loses:
        return _coded(speech, lost=lost, **plan["hop1"])
    speech = fitted(resample(_coded(speech, **plan["hop1"]), codec.fs, TELEPHONE_FS), count)
    return speech if lost is None else packet_loss.conceal(speech, lost, packet_loss.PACKET)


def _coded(speech: np.ndarray, codec: str, **settings: Any) -> np.ndarray:
    return from_pcm(fitted(CODECS[codec].code(to_pcm(speech), **settings), speech.size))


def _line(plan: dict, speech: np.ndarray) -> np.ndarray:
    line = plan["line"]
    if "echo_ms" in line:
        speech = filters.echo(speech, TELEPHONE_FS, line["echo_ms"], line["echo_loss_db"])
    if "hum_dbm0" in line:
        hum = sounds.hum(_generator(plan, 4), speech.size, TELEPHONE_FS)
        speech += sounds.at_level(hum, line["hum_dbm0"] - sounds.DBM0)
    if "noise" in line:
        hiss = sounds.coloured(_generator(plan, 5), line["noise"], speech.size, TELEPHONE_FS)
        speech += sounds.at_level(hiss, line["noise_dbm0"] - sounds.DBM0)
    elif "hop1" in plan or "hop2" in plan:  # a codec or a long gap may have left digital silence
        speech += sounds.converter(_generator(plan, 7), speech.size, plan["g711"])
    return speech


def _quantile(given: Any, uniform: float) -> Any:
    """The value of a distribution at `uniform` in [0, 1)."""
    if isinstance(given, list):
        return round(given[0] + uniform * (given[1] - given[0]), 3)
    if not isinstance(given, dict):
        return uniform < given
    if "mean" in given:
        normal = NormalDist(given["mean"], max(given["std"], 1e-9)).inv_cdf(max(uniform, 1e-9))
        return round(min(max(normal, given["min"]), given["max"]), 3)
    left = uniform * sum(given.values())
    for name, share in given.items():
        left -= share
        if left < 0:
            return name
    return max(given, key=given.get)  # rounding left nothing


def _check(config: dict[str, Any], path: str | Path) -> None:
    for name in [*config, *SCHEMA]:
        if name not in config or name not in SCHEMA:
            raise UserError(f"{path}: {name} is {'missing' if name in SCHEMA else 'unknown'}", code=2)
        value, allowed = config[name], SCHEMA[name]
        try:
            fits = _fits(value, allowed)
        except (AttributeError, LookupError, TypeError, ValueError):  # no numbers, or too few
            fits = False
        if isinstance(allowed[0], str):
            wanted = f"{{name: share}}, summing to 1, of {', '.join(allowed)}"
        elif allowed == PROBABILITY:
            wanted = "a probability from 0 to 1"
        else:
            wanted = f"[from, to] or {{mean, std, min, max}} within {allowed[0]:g}..{allowed[1]:g}"
        if not fits:
            raise UserError(f"{path}: {name}: {value} is not {wanted}", code=2)


def _fits(given: Any, allowed: tuple) -> bool:
    if isinstance(allowed[0], str):
        return set(given) <= set(allowed) and min(given.values()) >= 0 and abs(sum(given.values()) - 1) < 1e-6
    if allowed == PROBABILITY:
        return 0 <= given <= 1
    if isinstance(given, dict):
        ordered = allowed[0] <= given["min"] <= given["mean"] <= given["max"] <= allowed[1]
        return ordered and 0 <= given["std"] <= 1000 and len(given) == 4
    low, high = given
    return allowed[0] <= low <= high <= allowed[1]
